"""Data parallelism on two processes: each has all of the model and half of the batch."""

import pytest
import torch
import torch.distributed as dist
from rank_checks import assert_ranks_agree, assert_same_state
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import spectralnorm as sn


class Critic(nn.Module):
    """Two linear layers after a convolution; one of them can be passed by."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(2, 16, 3), nn.ReLU(), nn.Flatten())
        self.hidden = nn.Linear(256, 256)
        self.head = nn.Linear(256, 1)

    def forward(self, images, pass_by=False):
        features = self.features(images)
        return self.head(features if pass_by else self.hidden(features).relu())


def normalized(seed=0, **options):
    """The same weights always; whatever else is random, by ``seed``."""
    torch.manual_seed(0)
    model = Critic().double()
    torch.manual_seed(seed)
    return sn.add_spectral_norm(model, **options)


def batches(num_steps=4):
    return torch.randn(num_steps, 2, 8, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def mine(batch):
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def everything(batch):
    return batch


def one_backward(model, share, real, fake):
    ((1 - model(share(real))).relu().mean() + (1 + model(share(fake))).relu().mean()).backward()


def two_backwards(model, share, real, fake):
    (1 - model(share(real))).relu().mean().backward()
    (1 + model(share(fake))).relu().mean().backward()


def accumulated(model, share, real, fake):
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            model(share(real)).square().mean().backward()
    else:
        model(share(real)).square().mean().backward()
    model(share(fake)).square().mean().backward()


def with_unused_layer(model, share, real, fake):
    model(share(real), pass_by=real.sum() < 0).square().mean().backward()


def train(model, share, backward, optimizer=None):
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.0, 0.9))
    for real, fake in batches():
        optimizer.zero_grad()
        backward(model, share, real, fake)
        optimizer.step()
    model(share(batches()[0, 0]))


def check_ddp(backward, options):
    model = DistributedDataParallel(normalized(seed=dist.get_rank()), **options)
    reference = normalized()
    # Read before DDP has ever synchronized a buffer.
    assert_ranks_agree(model.module.named_buffers())
    train(model, mine, globals()[backward])
    train(reference, everything, globals()[backward])
    assert_same_state(model.module.state_dict(), reference.state_dict())
    torch.testing.assert_close(sn.monitor(model.module), sn.monitor(reference), rtol=1e-7, atol=0)
    assert_ranks_agree(model.module.named_buffers())
    weights = ((name, model.module.get_submodule(name).weight) for name in ("features.0", "hidden", "head"))
    assert_ranks_agree(weights)


@pytest.mark.parametrize(
    ("backward", "options"),
    [
        ("one_backward", {}),
        ("one_backward", {"broadcast_buffers": False}),
        ("one_backward", {"broadcast_buffers": False, "static_graph": True}),
        ("one_backward", {"broadcast_buffers": False, "gradient_as_bucket_view": True}),
        ("two_backwards", {"broadcast_buffers": False}),
        ("accumulated", {}),
        ("with_unused_layer", {"find_unused_parameters": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "defaults",
)
def test_ddp_equals_one_process_and_ranks_agree(pair, backward, options):
    pair.run(check_ddp, backward=backward, options=options)


def check_zero():
    model = DistributedDataParallel(normalized(), broadcast_buffers=False)
    reference = normalized()
    settings = {"lr": 1e-2, "betas": (0.0, 0.9)}
    sharded = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.Adam, **settings)
    train(model, mine, one_backward, sharded)
    train(reference, everything, one_backward, torch.optim.Adam(reference.parameters(), **settings))
    assert_same_state(model.module.state_dict(), reference.state_dict())
    assert_ranks_agree(model.module.named_buffers())


def test_parameters_that_zero_redundancy_optimizer_receives_from_other_ranks_are_seen_to_change(pair):
    pair.run(check_zero)


def check_fsdp1(use_orig_params):
    reference = normalized(update="forward")
    model = normalized(update="forward")
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    with pytest.raises(sn.UserError, match="summon_full_params"):
        model.hidden.weight  # noqa: B018
    train(wrapped, mine, one_backward)
    train(reference, everything, one_backward)
    with FullyShardedDataParallel.summon_full_params(wrapped), torch.no_grad():
        torch.testing.assert_close(model.eval().hidden.weight, reference.eval().hidden.weight, rtol=1e-7, atol=1e-9)
    with FullyShardedDataParallel.state_dict_type(wrapped, StateDictType.FULL_STATE_DICT):
        state = wrapped.state_dict()
    assert_same_state(state, reference.state_dict())


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_equals_one_process_with_an_update_per_forward(pair, use_orig_params):
    pair.run(check_fsdp1, use_orig_params=use_orig_params)


def check_fsdp1_per_step(use_orig_params):
    model = normalized()
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    train(wrapped, mine, one_backward)
    with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False), torch.no_grad():
        weight = model.hidden.weight
        assert abs(torch.linalg.matrix_norm(weight.double(), 2) - 1) < 0.05
        assert_ranks_agree(model.named_buffers())


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_with_the_default_rule_stays_near_the_norm_and_ranks_agree(pair, use_orig_params):
    pair.run(check_fsdp1_per_step, use_orig_params=use_orig_params)


def replicated(model):
    """What `torch.nn.parallel.replicate` makes for one device, whose broadcast works on GPUs alone."""
    modules = list(model.modules())
    replicas = {id(module): module._replicate_for_data_parallel() for module in modules}
    for module in modules:
        replica = replicas[id(module)]
        for name, child in module._modules.items():
            setattr(replica, name, replicas[id(child)])
        for name, parameter in module._parameters.items():
            setattr(replica, name, parameter.clone())
    return replicas[id(model)]


def test_replicas_divide_by_the_norm_of_their_original_and_pass_it_their_gradients():
    model, reference = normalized(), normalized()
    optimizers = [torch.optim.Adam(each.parameters(), lr=1e-2) for each in (model, reference)]
    for real, fake in batches():
        for each in (model, reference):
            each.zero_grad()
        for batch in (real, fake):
            first, second = batch.chunk(2)
            outputs = [replicated(model)(first), replicated(model)(second)]
            torch.cat(outputs).square().mean().backward()
            reference(batch).square().mean().backward()
        torch.testing.assert_close(
            [each.grad for each in model.parameters()],
            [each.grad for each in reference.parameters()],
            rtol=1e-7,
            atol=1e-9,
        )
        for optimizer in optimizers:
            optimizer.step()
    replicated(model)
    reference(batches()[0, 0])
    assert_same_state(model.state_dict(), reference.state_dict())


def test_replicas_of_a_recurrent_layer_hold_a_list_of_weights_of_their_own():
    layer = sn.spectral_norm(nn.LSTM(4, 3), "weight_hh_l0")
    replica, inputs = replicated(layer), torch.randn(5, 2, 4)
    assert layer._flat_weights == [None] * 4
    torch.testing.assert_close(replica(inputs), layer(inputs))


@pytest.mark.gpu
def test_data_parallel_equals_one_device():
    model, reference = normalized().cuda(), normalized().cuda()
    devices = list(range(torch.cuda.device_count()))
    for each in (nn.DataParallel(model, devices), reference):
        train(each, lambda batch: batch.cuda(), one_backward)
    assert_same_state(model.state_dict(), reference.state_dict())
