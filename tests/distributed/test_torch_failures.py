"""What goes wrong with torch's two spectral norms on several processes, and does not with ours.

As in `tests/contracts/test_torch_failures.py`, and in the same table: P is
`torch.nn.utils.parametrizations.spectral_norm`, O the hook `torch.nn.utils.spectral_norm`, and both must fail where
they are known to.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations as torch_parametrizations

from spectralnorm import spectral_norm


class Contender(NamedTuple):
    name: str
    normalize: Callable
    u_name: str


OURS = Contender("ours", spectral_norm, "parametrizations.weight.0._u")
P = Contender("P", torch_parametrizations.spectral_norm, "parametrizations.weight.0._u")
O = Contender("O", nn.utils.spectral_norm, "weight_u")  # noqa: E741

# What torch says of it.
CANNOT_SPLIT = "parameter name can.+t contain"
NO_STRATEGY = "in-place operations that require placement changes are not supported"


def contenders(*failing: str, error: str):
    """Ours and torch's two; the ones named are known to fail, in the torch that the tests are for.

    There a rank fails with what ``error`` tells, a regular expression; anything else is a slip of the test.
    """
    cases, is_theirs = [], torch.__version__.startswith("2.13.")
    raises = pytest.RaisesExc(AssertionError, match=error) if is_theirs else Exception
    for each in (OURS, P, O):
        reason = f"{each.name} is known to fail"
        marks = [pytest.mark.xfail(strict=is_theirs, raises=raises, reason=reason)] if each.name in failing else []
        cases.append(pytest.param(each, id=each.name, marks=marks))
    return pytest.mark.parametrize("sn", cases)


def linear(size=8):
    torch.manual_seed(0)
    return nn.Linear(size, size)


def inputs(size=8):
    return torch.randn(4, size, generator=torch.Generator().manual_seed(1))


def assert_norm_is_one(outputs_of, size=8, tolerance=0.05):
    """By the map that a layer computes, after it has been used for a while."""
    for _ in range(100):
        outputs_of(torch.ones(1, size))
    with torch.no_grad():
        matrix = outputs_of(torch.eye(size)) - outputs_of(torch.zeros(1, size))
    assert torch.linalg.matrix_norm(matrix.double(), 2).item() == pytest.approx(1, abs=tolerance)


def use_in_tensor_parallel(normalize, style):
    layout = {} if style is ColwiseParallel else {"input_layouts": whole_on_each_rank()}
    layer = parallelize_module(
        normalize(linear()), init_device_mesh("cpu", (2,)), style(output_layouts=whole_on_each_rank(), **layout)
    )
    assert_norm_is_one(layer)


def whole_on_each_rank():
    from torch.distributed.tensor import Replicate

    return Replicate()


@contenders("P", "O", error=f"{CANNOT_SPLIT}|{NO_STRATEGY}|`distribute_tensor` should be used|'weight' already exists")
@pytest.mark.parametrize("style", [ColwiseParallel, RowwiseParallel])
def test_21a_normalized_layer_can_be_split_over_processes(pair, sn, style):
    """A normalized layer can be split over processes by rows and by columns, and has norm 1, to 5%."""
    pair.run(use_in_tensor_parallel, normalize=sn.normalize, style=style)


def sharded_on_cpu(layer):
    return fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))


def normalize_after_sharding(normalize):
    layer = normalize(sharded_on_cpu(linear()))
    assert_norm_is_one(layer)
    layer(inputs()).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@contenders("P", "O", error=NO_STRATEGY)
def test_21b_layer_that_is_sharded_can_be_normalized(pair, sn):
    """A layer that FSDP2 has sharded can be normalized, used and trained."""
    pair.run(normalize_after_sharding, normalize=sn.normalize)


def seed_ranks_differently(normalize, u_name, wrap):
    layer = linear()
    torch.manual_seed(dist.get_rank())
    normalize(layer)
    if wrap == "FSDP2":
        sharded_on_cpu(layer)
        outputs = layer(inputs())
    else:
        outputs = DistributedDataParallel(layer, broadcast_buffers=False, init_sync=False)(inputs())
    from rank_checks import assert_ranks_agree  # on the ranks alone

    assert_ranks_agree([("u", layer.get_buffer(u_name)), ("outputs", outputs)])


@contenders("P", "O", error="AssertionError: u$")
@pytest.mark.parametrize("wrap", ["FSDP2", "DDP"])
def test_22_ranks_with_other_seeds_have_the_same_vectors_and_outputs(pair, sn, wrap):
    """Under FSDP2, and under DDP without broadcasts, processes with other seeds have the same vectors and outputs."""
    pair.run(seed_ranks_differently, normalize=sn.normalize, u_name=sn.u_name, wrap=wrap)
