"""FSDP2 on two processes: a sharded model computes and learns what the same model in one process does."""

import copy
import gc

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoints
from rank_checks import assert_ranks_agree, assert_same_state
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

import spectralnorm as sn

BATCH = 8


class Critic(nn.Module):
    """A convolution, a grouped one, and linear layers with an uneven number of rows, and with only one."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(2, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3, groups=2), nn.Flatten())
        self.hidden = nn.Linear(128, 17)
        self.head = nn.Linear(17, 1)

    def forward(self, images):
        return self.head(self.hidden(self.features(images)).relu())


def normalized(**options):
    torch.manual_seed(0)
    return sn.add_spectral_norm(Critic().double(), **options)


def split(module, mesh=None, **options):
    # Left to itself torch moves the parts to a GPU where there is one, which gloo does not serve.
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    return fully_shard(module, mesh=mesh, **options)


def shard(model, **options):
    split(model.features, **options)
    split(model.hidden, **options)
    return split(model, **options)


def sharded(order, **options):
    torch.manual_seed(0)
    model = Critic().double()
    if order == "normalized first":
        return shard(sn.add_spectral_norm(model), **options)
    return sn.add_spectral_norm(shard(model, **options))


def batches(num_steps):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_steps, 2, BATCH, 2, 6, 6, dtype=torch.float64, generator=generator)


def mine(batch):
    """This rank's share of a batch."""
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def loss_of(model, real, fake):
    return (1 - model(real)).relu().mean() + (1 + model(fake)).relu().mean()


def train(model, share, num_steps=4, make_optimizer=None):
    optimizer = (make_optimizer or adam)(model.parameters())
    for real, fake in batches(num_steps):
        optimizer.zero_grad()
        loss_of(model, share(real), share(fake)).backward()
        optimizer.step()
    return optimizer


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-2, betas=(0.0, 0.9))


def full_state(model):
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def check_training(order, make_optimizer=None):
    model, reference = sharded(order), normalized()
    train(model, mine, make_optimizer=make_optimizer)
    train(reference, lambda batch: batch, make_optimizer=make_optimizer)
    # As the next forward would have it.
    for each in (model, reference):
        each(batches(1)[0, 0])
    assert_same_state(full_state_on_all(model), reference.state_dict())
    torch.testing.assert_close(sn.monitor(model), sn.monitor(reference), rtol=1e-7, atol=0)


@pytest.mark.parametrize("order", ["normalized first", "sharded first"])
def test_training_equals_that_in_one_process(pair, order):
    pair.run(check_training, order=order)


def check_update_that_is_written_out():
    model, reference = sharded("normalized first"), normalized()
    for each, share in ((model, mine), (reference, lambda batch: batch)):
        for real, fake in batches(4):
            each.zero_grad()
            loss_of(each, share(real), share(fake)).backward()
            with torch.no_grad(), sn.optimizer_step(each):
                for parameter in each.parameters():
                    parameter -= 0.01 * parameter.grad
        each(batches(1)[0, 0])
    torch.testing.assert_close(sn.monitor(model), sn.monitor(reference), rtol=1e-7, atol=0)
    assert_same_state(full_state_on_all(model), reference.state_dict())
    assert model.hidden.parametrizations.weight[0]._norm_alone.age == 4  # followed, and not computed anew


def test_update_that_is_written_out_is_followed(pair):
    pair.run(check_update_that_is_written_out)


def check_training_on_gpu():
    alone = dist.new_group([0], backend="nccl")
    if dist.get_rank() > 0:
        return
    model, reference = shard(normalized().cuda(), mesh=DeviceMesh.from_group(alone, "cuda")), normalized().cuda()
    for each in (model, reference):
        train(each, lambda batch: batch.cuda())
        each(batches(1)[0, 0].cuda())
    assert_same_state(full_state(model), reference.state_dict())


@pytest.mark.gpu
def test_training_on_a_gpu_equals_that_of_the_whole_model(pair):
    """Of one process, because two need two GPUs: the streams on which weights are gathered are there all the same."""
    pair.run(check_training_on_gpu)


def mean_square(model, inputs):
    return model(inputs).square().mean()


class Checkpointed(nn.Sequential):
    def forward(self, inputs):
        for layer in self:
            inputs = checkpoint(layer, inputs, use_reentrant=False)
        return inputs


def stack_of_layers(kind=nn.Sequential, size=64):
    torch.manual_seed(0)
    model = sn.add_spectral_norm(kind(*(nn.Linear(size, size) for _ in range(3))))
    for layer in model:
        split(layer)
    return split(model)


def whole_weights_alive(size=64):
    """How many tensors of a whole weight's shape occupy memory."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor) and each.shape == (size, size)]
    return sum(
        each.untyped_storage().nbytes() > 0 for each in tensors if type(each).__name__ != "DTensor" and not each.is_meta
    )


def check_memory():
    model, inputs = stack_of_layers(), torch.randn(4, 64)
    assert whole_weights_alive() > 0  # the values from before it was sharded
    sn.invalidate(model)
    assert whole_weights_alive() == 0
    optimizer = adam(model.parameters())
    for _ in range(2):
        mean_square(model, inputs).backward()
        optimizer.step()
        assert whole_weights_alive() == 0
    with torch.no_grad():
        model(inputs)
        assert model[0].weight.shape == (64, 64)
    assert whole_weights_alive() == 0
    sn.keep_values(model, True)
    mean_square(model, inputs).backward()
    assert whole_weights_alive() == 3
    sn.keep_values(model, False)
    assert whole_weights_alive() == 0


def test_no_whole_weight_is_kept_between_uses_unless_that_is_wished(pair):
    pair.run(check_memory)


def check_checkpointing():
    gradients = []
    for kind, expected in ((nn.Sequential, True), (Checkpointed, False)):
        model, saved = stack_of_layers(kind), []
        inputs = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
        # A view of the parameter itself is freed with it; what was computed from it is not.
        with torch.autograd.graph.saved_tensors_hooks(lambda each, saved=saved: saved.append(each) or each, id):
            output = model(inputs)
        assert any(each.shape == (64, 64) for each in saved) == expected
        del output
        mean_square(model, inputs).backward()
        gradients.append([parameter.grad.full_tensor() for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_checkpointed_layers_hold_no_whole_weight_between_forward_and_backward(pair):
    pair.run(check_checkpointing)


def check_one_norm_per_step(keep):
    model, (real, fake) = sharded("normalized first"), batches(1)[0]
    sn.keep_values(model, keep)
    optimizer = adam(model.parameters())
    for _ in range(2):
        outputs = model(real)
        vectors = {name: each.clone() for name, each in model.named_buffers()}
        model(fake)
        with torch.no_grad():
            torch.testing.assert_close(model(real), outputs, rtol=0, atol=0)
        assert all(torch.equal(vectors[name], each) for name, each in model.named_buffers())
        outputs.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        model(real)
        # The head has one row: its u can only be 1.
        assert not any(torch.equal(vectors[name], each) for name, each in model.named_buffers() if len(each) > 1)


@pytest.mark.parametrize("keep", [False, True])
def test_uses_between_two_optimizer_steps_divide_by_one_norm(pair, keep):
    pair.run(check_one_norm_per_step, keep=keep)


def check_kept_values():
    kept, reference = sharded("normalized first"), sharded("normalized first")
    sn.keep_values(kept, True)
    train(kept, mine)
    train(reference, mine)
    for name, value in kept.state_dict().items():
        expected = reference.state_dict()[name]
        assert torch.equal(getattr(value, "_local_tensor", value), getattr(expected, "_local_tensor", expected)), name


def test_kept_values_are_those_that_would_be_computed(pair):
    pair.run(check_kept_values)


def check_gradient_accumulation():
    model, reference = sharded("normalized first"), normalized()
    (real, fake), optimizers = batches(1)[0], []
    for each, share in ((model, mine), (reference, lambda batch: batch)):
        optimizers.append(adam(each.parameters()))
        for batch, is_last in ((real, False), (fake, True)):
            if each is model:
                model.set_requires_gradient_sync(is_last)
            mean_square(each, share(batch)).backward()
        optimizers[-1].step()
        each(share(real))
    assert_same_state(full_state_on_all(model), reference.state_dict())


def test_separate_backwards_add_up_as_in_one_process(pair):
    pair.run(check_gradient_accumulation)


def check_mixed_precision():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded("normalized first", mp_policy=policy)
    train(model, lambda batch: mine(batch).bfloat16())
    seen = {}
    # Its parent is what fully_shard was called for, so it is whole here.
    model.features[0].register_forward_hook(lambda layer, *_: seen.update(weight=layer.weight.detach().clone()))
    with torch.no_grad():
        model(batches(1)[0, 0].bfloat16())
    assert seen["weight"].dtype == torch.bfloat16
    # Rounded to eight bits once, after the division.
    norm = torch.linalg.matrix_norm(seen["weight"].double().flatten(1), 2).item()
    assert abs(norm - 1) < 4e-3
    assert all(buffer.dtype == torch.float64 for buffer in model.buffers())


def test_bfloat16_copy_of_the_parameters_is_normalized_after_the_rounding(pair):
    pair.run(check_mixed_precision)


def check_reading_and_writing():
    with torch.device("meta"):
        model = sn.add_spectral_norm(Critic().double())
    shard(model).to_empty(device="cpu")
    for layer in model.modules():
        if hasattr(layer, "reset_parameters"):
            torch.manual_seed(2)
            layer.reset_parameters()
    images, state = batches(1)[0, 0], full_state(model)
    outputs = model(images)
    if dist.get_rank() == 0:
        # `nn.Linear.reset_parameters` draws from (-b, b), b = 1 / sqrt(128 inputs), into what ``layer.weight`` returns.
        drawn = state["hidden.parametrizations.weight.original"]
        bound = 128**-0.5
        assert drawn.abs().max() <= bound
        assert abs(drawn.std() - bound / 3**0.5) < 0.1 * bound
    weight = model.hidden.weight.full_tensor()
    assert abs(torch.linalg.matrix_norm(weight.double(), 2) - 1) < 1e-4
    reference = normalized()
    reference.load_state_dict(full_state_on_all(model))
    torch.testing.assert_close(outputs, reference(images), rtol=1e-7, atol=1e-9)


def full_state_on_all(model):
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in model.state_dict().items()
    }


def test_model_made_on_meta_can_be_initialized_after_sharding(pair):
    pair.run(check_reading_and_writing)


def check_weight_outside_of_forward():
    model, reference = sharded("normalized first"), normalized()
    for layer, expected in ((model.hidden, reference.hidden), (model.features[2], reference.features[2])):
        weight = layer.weight
        torch.testing.assert_close(weight.full_tensor(), expected.weight)
        # The gradient goes to this rank's part of the parameter, and through the norm of the whole.
        factor = torch.randn(weight.shape, dtype=weight.dtype, generator=torch.Generator().manual_seed(3))
        (layer.weight.full_tensor() * factor).sum().backward()
        (expected.weight * factor).sum().backward()
        original = layer.parametrizations.weight.original
        torch.testing.assert_close(original.grad.full_tensor(), expected.parametrizations.weight.original.grad)
        with torch.no_grad():
            layer.weight.mul_(3).add_(1)
            expected.weight.mul_(3).add_(1)
        torch.testing.assert_close(layer.weight.full_tensor(), expected.weight)
        torch.testing.assert_close(original.full_tensor(), expected.parametrizations.weight.original)
    assert str(sn.summary(model)) == str(sn.summary(reference))


def test_weight_can_be_read_and_written_outside_of_forward(pair):
    pair.run(check_weight_outside_of_forward)


def check_written_and_kept_waiting(look):
    model = sharded("normalized first")
    nn.init.constant_(model.hidden.weight, 0.5)
    {"keep_values": sn.keep_values, "invalidate": sn.invalidate}[look](model)
    model(batches(1)[0, 0])
    model.hidden.reshard()
    raw = model.hidden.parametrizations.weight.original.full_tensor()
    assert torch.equal(raw, torch.full_like(raw, 0.5))


@pytest.mark.parametrize("look", ["keep_values", "invalidate"])
def test_what_was_written_outside_of_forward_waits_for_it(pair, look):
    pair.run(check_written_and_kept_waiting, look=look)


class Sealed(nn.Linear):
    def __init_subclass__(cls):
        raise TypeError("no class may come from this one")


def check_refused_halfway():
    model = split(nn.Sequential(nn.Linear(6, 6), Sealed(6, 6)).double())
    images = torch.ones(1, 6, dtype=torch.float64)
    before = model(images)
    model.reshard()
    with pytest.raises(TypeError, match="no class may come"):
        sn.add_spectral_norm(model)
    assert torch.equal(model(images), before)


def test_call_that_fails_halfway_leaves_a_model_that_runs(pair):
    pair.run(check_refused_halfway)


def check_written_then_used():
    model, reference = sharded("normalized first"), normalized()
    images = batches(1)[0, 0]
    for each in (model, reference):
        each(images)
        nn.init.constant_(each.hidden.weight, 0.5)
        with torch.no_grad():
            each.head.weight.mul_(3)
    torch.testing.assert_close(model(images), reference(images), rtol=1e-7, atol=1e-9)
    assert_same_state(full_state_on_all(model), reference.state_dict())


def test_what_was_written_outside_of_forward_is_seen_in_it(pair):
    pair.run(check_written_then_used)


def check_upkeep(order):
    model, reference, images = sharded(order), normalized(), batches(1)[0, 0]
    for each in (model, reference):
        sn.update_(each)
    assert_same_state(full_state_on_all(model), reference.state_dict())
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    sn.remove_spectral_norm(model)
    sn.remove_spectral_norm(reference)
    assert sorted(parameters.values()) == sorted(id(parameter) for parameter in model.parameters())
    assert isinstance(model.hidden, nn.Linear)
    torch.testing.assert_close(model(images), reference(images), rtol=1e-7, atol=1e-9)
    model.reshard()  # an optimizer must get the sharded parameters
    train(model, mine, num_steps=1)
    train(reference, lambda batch: batch, num_steps=1)
    assert_same_state(full_state_on_all(model), reference.state_dict())


@pytest.mark.parametrize("order", ["normalized first", "sharded first"])
def test_updating_and_removing_do_what_they_do_in_one_process(pair, order):
    pair.run(check_upkeep, order=order)


def check_sharing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)).double()
    model[1].weight = model[0].weight
    sn.spectral_norm(model[1])
    split(model)
    tokens = torch.tensor([3, 1, 4])
    before = model(tokens)
    model.reshard()
    with pytest.raises(sn.UserError, match="1 and 0 share a weight of which each process holds a part"):
        sn.remove_spectral_norm(model)
    torch.testing.assert_close(model(tokens), before, rtol=0, atol=0)


def test_removing_does_not_end_the_sharing_of_a_sharded_weight(pair):
    pair.run(check_sharing)


def check_whole_refused():
    torch.manual_seed(0)
    model = shard(Critic().double(), reshard_after_forward=False)
    model(batches(1)[0, 0])
    with pytest.raises(sn.UserError, match=r"reshard\(\)"):
        sn.add_spectral_norm(model)
    for module in (model, model.features, model.hidden):
        module.reshard()
    sn.add_spectral_norm(model)
    torch.testing.assert_close(model(batches(1)[0, 0]), normalized()(batches(1)[0, 0]), rtol=1e-7, atol=1e-9)


def test_normalizing_a_weight_that_is_whole_for_the_moment_is_refused(pair):
    pair.run(check_whole_refused)


def check_seeds():
    torch.manual_seed(0)
    model = Critic().double()
    torch.manual_seed(dist.get_rank())
    sn.add_spectral_norm(model)
    shard(model)
    train(model, mine, num_steps=2)
    assert_ranks_agree(model.named_buffers())


def test_ranks_that_were_seeded_differently_have_the_same_vectors(pair):
    pair.run(check_seeds)


def check_state_dicts(folder):
    model = sharded("normalized first")
    train(model, mine)
    images = batches(1)[0, 1]
    # The norm of a loaded weight is computed anew, so it is compared with one that is as well.
    sn.invalidate(model.eval())
    expected = model(images)

    # Whole on rank 0, sent to the others.
    loaded = sharded("sharded first").eval()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state = full_state(model)
    set_model_state_dict(loaded, state if dist.get_rank() == 0 else {}, options=options)
    torch.testing.assert_close(loaded(images), expected, rtol=1e-7, atol=1e-9)

    # In parts, in a folder.
    saved, loaded = get_model_state_dict(model), sharded("normalized first").eval()
    checkpoints.save(saved, checkpoint_id=folder)
    parts = get_model_state_dict(loaded)
    checkpoints.load(parts, checkpoint_id=folder)
    set_model_state_dict(loaded, parts)
    torch.testing.assert_close(loaded(images), expected, rtol=1e-7, atol=1e-9)

    # Of the same model in one process, and there.
    reference = normalized().eval()
    reference.load_state_dict(full_state_on_all(model))
    torch.testing.assert_close(reference(images), expected, rtol=1e-7, atol=1e-9)

    # From a sharded model without normalization.
    torch.manual_seed(3)
    plain, reference = shard(Critic().double()), normalized().eval()
    loaded.load_state_dict(plain.state_dict())
    reference.load_state_dict(full_state_on_all(plain))
    torch.testing.assert_close(loaded(images), reference(images), rtol=1e-7, atol=1e-9)


def test_state_dicts_move_whole_and_in_parts(pair, tmp_path):
    pair.run(check_state_dicts, folder=str(tmp_path))


def check_update_rules(update):
    model, reference = shard(normalized(update=update)), normalized(update=update)
    train(model, mine)
    train(reference, lambda batch: batch)
    for each in (model, reference):
        sn.update_(each)
    assert_same_state(full_state_on_all(model), reference.state_dict())


@pytest.mark.parametrize("update", ["forward", "manual"])
def test_other_update_rules_equal_those_in_one_process(pair, update):
    pair.run(check_update_rules, update=update)


def check_compiled():
    model, reference = normalized(), normalized()
    model.hidden.compile(backend="eager")
    shard(model)
    images = batches(1)[0, 0]
    for each in (model, reference):
        for _ in range(3):
            outputs = each.eval()(images)
    torch.testing.assert_close(model(images), outputs, rtol=1e-3, atol=1e-4)
    model.train()
    train(model, mine, num_steps=2)


def test_layers_that_are_compiled_before_sharding_work(pair):
    pair.run(check_compiled)


def check_changed_options():
    model, reference = sharded("normalized first"), normalized()
    for each, share in ((model, mine), (reference, lambda batch: batch)):
        each(share(batches(1)[0, 0]))
        if each is model:
            model.reshard()  # an optimizer must get the sharded parameters
        sn.add_spectral_norm(each, coefficient=0.5, mode="cap")
        train(each, share, num_steps=2)
        each(share(batches(1)[0, 0]))
    assert_same_state(full_state_on_all(model), reference.state_dict())


def test_options_can_be_changed_after_sharding(pair):
    pair.run(check_changed_options)


def check_learnable():
    model = shard(Critic())
    sn.add_spectral_norm(model, mode="learnable")
    model(batches(1)[0, 0].float())


def test_learned_scale_is_refused(pair):
    with pytest.raises(AssertionError, match=r"learnable.* is not offered for weights that FSDP2"):
        pair.run(check_learnable)


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(32, 24)
        self.lstm = nn.LSTM(24, 20, num_layers=2, batch_first=True)
        self.attention = nn.MultiheadAttention(20, 2, batch_first=True)

    def forward(self, tokens):
        states, _ = self.lstm(self.embedding(tokens))
        attended, _ = self.attention(states, states, states)
        return attended.square().mean() + states.sum(-1).mean()


def check_other_layers(norm):
    torch.manual_seed(0)
    model = Reader().double()
    reference = copy.deepcopy(model)
    tokens = torch.arange(4 * 8).view(4, 8)
    for each in (model, reference):
        sn.add_spectral_norm(each, norm=norm)
    for module in (model.embedding, model.lstm, model.attention, model):
        split(module)
    for each, batch in ((model, mine(tokens)), (reference, tokens)):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            each(batch).backward()
            optimizer.step()
    torch.testing.assert_close(sn.monitor(model), sn.monitor(reference), rtol=1e-7, atol=0)


@pytest.mark.parametrize("norm", ["matrix", "bidirectional"])
def test_recurrent_attention_and_embedding_layers_equal_those_in_one_process(pair, norm):
    pair.run(check_other_layers, norm=norm)
