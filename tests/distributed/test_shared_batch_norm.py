"""Batch normalization on two processes is that of one process with the images of both."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from spectralnorm.errors import UserError
from spectralnorm.gan.shared_batch_norm import SharedBatchNorm, share_batch_norm


def mine(batch):
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def network(momentum=0.1):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, bias=False),
        nn.BatchNorm2d(3, momentum=momentum),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(48, 4),
        nn.BatchNorm1d(4, affine=False),
        nn.Tanh(),
        nn.Linear(4, 1),
    ).double()


def gradients(network, images, *, of_gradients):
    """Of a loss, or of R1 for the gradient of the sum of all logits, averaged over processes."""
    images = images.requires_grad_(True)
    loss = network(images).square().mean()
    if of_gradients:
        (slopes,) = torch.autograd.grad(network(images).sum(), images, create_graph=True)
        loss = loss + slopes.flatten(1).square().sum(1).mean()
    found = torch.autograd.grad(loss, list(network.parameters()))
    if dist.get_world_size() > 1 and any(isinstance(module, SharedBatchNorm) for module in network.modules()):
        for each in found:
            dist.all_reduce(each)
            each /= dist.get_world_size()
    return found


def check(momentum, of_gradients):
    whole = network(momentum)
    shared = copy.deepcopy(whole)
    share_batch_norm(shared)
    assert list(shared.state_dict()) == list(whole.state_dict())
    for step in range(3):
        images = 3 + torch.randn(8, 2, 6, 6, dtype=torch.float64)
        expected = gradients(whole, images.clone(), of_gradients=of_gradients)
        found = gradients(shared, mine(images), of_gradients=of_gradients)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(shared.state_dict(), whole.state_dict(), rtol=1e-12, atol=1e-14, msg=f"step {step}")
    whole.eval(), shared.eval()
    torch.testing.assert_close(shared(images), whole(images), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("momentum", "of_gradients"), [(0.1, False), (None, False), (0.1, True)])
def test_gradients_and_statistics_are_those_of_one_process(pair, momentum, of_gradients):
    pair.run(check, momentum=momentum, of_gradients=of_gradients)


def test_a_batch_normalization_of_unknown_kind_is_refused():
    class Own(nn.BatchNorm2d):
        pass

    with pytest.raises(UserError, match="Own is a batch normalization of its own kind"):
        share_batch_norm(nn.Sequential(Own(3)))
