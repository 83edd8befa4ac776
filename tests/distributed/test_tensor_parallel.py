"""Tensor parallelism on two processes: layers of which each process holds some rows or columns."""

import pytest
import torch
import torch.distributed as dist
from rank_checks import assert_same_state
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import spectralnorm as sn

PLAN = {"0": ColwiseParallel(), "2": RowwiseParallel()}


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 20)).double()


def parallel(order, **options):
    mesh = init_device_mesh("cpu", (2,))
    if order == "normalized first":
        return parallelize_module(sn.add_spectral_norm(plain(), **options), mesh, PLAN)
    return sn.add_spectral_norm(parallelize_module(plain(), mesh, PLAN), **options)


def inputs():
    return torch.randn(4, 8, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_state(model):
    return {name: whole(value) for name, value in model.state_dict().items()}


def train(model):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for batch in inputs():
        optimizer.zero_grad()
        (model(batch).square().mean() + model(batch + 1).mean()).backward()
        optimizer.step()


def check_training(order, options):
    model, reference = parallel(order, **options), sn.add_spectral_norm(plain(), **options)
    for each in (model, reference):
        train(each)
        each(inputs()[0])
    assert_same_state(whole_state(model), whole_state(reference))
    torch.testing.assert_close(sn.monitor(model), sn.monitor(reference), rtol=1e-7, atol=0)
    assert str(sn.summary(model)) == str(sn.summary(reference))


@pytest.mark.parametrize("order", ["normalized first", "parallel first"])
@pytest.mark.parametrize(
    "options", [{}, {"update": "forward"}, {"mode": "cap", "coefficient": 0.7}], ids=["step", "forward", "cap"]
)
def test_training_equals_that_in_one_process(pair, order, options):
    pair.run(check_training, order=order, options=options)


def check_initialized_before():
    model = sn.add_spectral_norm(plain())
    nn.init.constant_(model[0].weight, 0.5)
    model = parallelize_module(model, init_device_mesh("cpu", (2,)), PLAN)
    model(inputs()[0])
    raw = whole(model[0].parametrizations.weight.original.detach())
    assert torch.equal(raw, torch.full_like(raw, 0.5))


def test_initialization_before_distribution_is_distributed(pair):
    pair.run(check_initialized_before)


def check_part(order):
    model = parallel(order)
    for index, dim, size in ((0, 0, (16, 24)), (2, 1, (20, 16))):
        weight = model[index].weight
        assert weight.placements[0].is_shard(dim)
        assert weight.to_local().shape == size
        assert abs(torch.linalg.matrix_norm(weight.full_tensor().double(), 2) - 1) < 1e-5
    parameters = list(model.parameters())
    assert len(parameters) == 4
    assert all(hasattr(parameter, "full_tensor") for parameter in parameters)


@pytest.mark.parametrize("order", ["normalized first", "parallel first"])
def test_each_process_holds_its_part_and_the_norm_is_that_of_the_whole(pair, order):
    pair.run(check_part, order=order)


def check_embedding(style, order):
    torch.manual_seed(0)
    layer, mesh = nn.Embedding(7, 6), init_device_mesh("cpu", (2,))
    reference = sn.add_spectral_norm(nn.Embedding(7, 6, _weight=layer.weight.detach().clone()))
    if order == "normalized first":
        layer = parallelize_module(sn.add_spectral_norm(layer), mesh, style(input_layouts=Replicate()))
    else:
        layer = sn.add_spectral_norm(parallelize_module(layer, mesh, style(input_layouts=Replicate())))
    found = layer(torch.arange(7))
    expected = reference(torch.arange(7))
    if style is ColwiseParallel:
        expected = expected.chunk(2, -1)[dist.get_rank()]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("order", ["normalized first", "parallel first"])
@pytest.mark.parametrize("style", [ColwiseParallel, RowwiseParallel])
def test_embedding_equals_that_in_one_process(pair, style, order):
    pair.run(check_embedding, style=style, order=order)


def check_with_fsdp2(shape, order):
    mesh, reference = init_device_mesh("cpu", shape, mesh_dim_names=("data", "model")), sn.add_spectral_norm(plain())
    model = plain()
    if order == "normalized first":
        sn.add_spectral_norm(model)
    fully_shard(parallelize_module(model, mesh["model"], PLAN), mesh=mesh["data"])
    if order != "normalized first":
        sn.add_spectral_norm(model)
    share = slice(dist.get_rank(), None, 2) if shape[0] == 2 else slice(None)
    for each in (model, reference):
        optimizer = torch.optim.Adam(each.parameters(), lr=1e-2)
        for batch in inputs():
            optimizer.zero_grad()
            each(batch[share] if each is model else batch).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(sn.monitor(model), sn.monitor(reference), rtol=1e-7, atol=0)
    torch.testing.assert_close(model(inputs()[0]), reference(inputs()[0]), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("order", ["normalized first", "parallel first"])
@pytest.mark.parametrize("shape", [(1, 2), (2, 1)], ids=["1x2", "2x1"])
def test_both_dimensions_of_a_mesh_with_fsdp2_work_together(pair, shape, order):
    pair.run(check_with_fsdp2, shape=shape, order=order)
