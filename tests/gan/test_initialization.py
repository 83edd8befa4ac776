import torch
from torch import nn
from torch.testing import assert_close

from spectralnorm.gan.initialization import INITIALIZATIONS


def _network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 4, 4), nn.BatchNorm2d(4), nn.Linear(20, 6))


def test_orthogonal_makes_all_singular_values_one():
    network = _network()
    INITIALIZATIONS["orthogonal"](network)
    for module in network:
        if not isinstance(module, nn.BatchNorm2d):
            values = torch.linalg.svdvals(module.weight.detach().flatten(1))
            assert_close(values, torch.ones_like(values), rtol=1e-5, atol=0)
            assert not module.bias.any()


def test_published_changes_nothing():
    network = _network()
    before = [tensor.clone() for tensor in network.state_dict().values()]
    INITIALIZATIONS["published"](network)
    assert all(torch.equal(a, b) for a, b in zip(before, network.state_dict().values(), strict=True))
