"""Every rule against what the operation does: the largest stretch found, the explicit matrix where it is linear."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spectralnorm as sn


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, inputs):
        return self.function(inputs)


def _matrix(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Of a model that is linear up to a constant."""
    model = model.eval().double()
    size = math.prod(shape)
    basis = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
    with torch.no_grad():
        return (model(basis).reshape(size, -1) - model(torch.zeros_like(basis)).reshape(size, -1)).T


LINEAR = {
    "linear": (nn.Linear(5, 7), (5,)),
    "linear on sequences": (nn.Linear(5, 7), (3, 5)),
    "identity": (nn.Identity(), (4,)),
    "conv1d circular": (nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), (2, 8)),
    "conv2d, small image": (nn.Conv2d(2, 3, 3, padding=1), (2, 4, 4)),
    "conv2d, no padding": (nn.Conv2d(2, 3, 4), (2, 4, 4)),
    "conv2d, stride and groups": (nn.Conv2d(4, 6, 4, stride=2, padding=1, groups=2), (4, 6, 6)),
    "conv2d, same": (nn.Conv2d(2, 2, 4, padding="same"), (2, 5, 5)),
    "conv2d, reflect": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 5, 5)),
    "conv2d, replicate": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="replicate"), (2, 5, 5)),
    "conv3d": (nn.Conv3d(1, 2, 2), (1, 3, 3, 3)),
    "transposed": (nn.ConvTranspose2d(3, 2, 4, stride=2, padding=1), (3, 3, 3)),
    "transposed, output padding, groups": (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1, groups=2), (4, 5)),
    "average pool": (nn.AvgPool2d(2), (2, 6, 6)),
    "average pool, overlapping, padded": (nn.AvgPool2d(3, stride=2, padding=1), (2, 7, 7)),
    "average pool, padding not counted": (nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False), (1, 7, 7)),
    "average pool, ceil": (nn.AvgPool1d(3, stride=2, ceil_mode=True), (2, 8)),
    "average pool, divisor": (nn.AvgPool2d(2, divisor_override=3), (1, 4, 4)),
    "adaptive average pool": (nn.AdaptiveAvgPool2d((3, 2)), (2, 7, 5)),
    "global mean": (Lambda(lambda x: x.mean((2, 3))), (2, 3, 3)),
    "global sum": (Lambda(lambda x: x.sum(dim=(1, 2, 3))), (2, 3, 3)),
    "nearest": (nn.Upsample(scale_factor=2), (2, 3, 3)),
    "nearest to a size": (nn.Upsample(size=(5, 7)), (1, 3, 3)),
    "nearest-exact down": (nn.Upsample(size=4, mode="nearest-exact"), (1, 6)),
    "bilinear": (nn.Upsample(scale_factor=2, mode="bilinear"), (1, 4, 4)),
    "bilinear, corners": (nn.Upsample(size=(7, 3), mode="bilinear", align_corners=True), (1, 4, 5)),
    "area": (Lambda(lambda x: F.interpolate(x, size=(2, 3), mode="area")), (1, 5, 6)),
    "pixel shuffle": (nn.PixelShuffle(2), (4, 3, 3)),
    "pixel unshuffle": (nn.PixelUnshuffle(2), (2, 4, 4)),
    "flatten": (nn.Flatten(), (2, 3)),
    "zero padding": (nn.ZeroPad2d((1, 0, 2, 1)), (1, 3, 3)),
    "reflection padding": (nn.ReflectionPad2d(1), (1, 4, 4)),
    "replication padding": (nn.ReplicationPad1d((2, 1)), (2, 4)),
    "circular padding": (nn.CircularPad2d((1, 0, 1, 1)), (1, 3, 3)),
    "crop": (Lambda(lambda x: x[:, :, 1:-1, 1:]), (1, 4, 4)),
    "batch norm": (nn.BatchNorm2d(3), (3, 2, 2)),
    "batch norm after conv": (nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)), (2, 4, 4)),
    "batch norm before conv": (nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3)), (2, 4, 4)),
    "batch norm after transposed": (
        nn.Sequential(nn.ConvTranspose2d(2, 4, 3, groups=2), nn.BatchNorm2d(4)),
        (2, 3, 3),
    ),
    "batch norm between dense": (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), (3,)),
    "scaling": (Lambda(lambda x: -3 * x / 2 + 1), (4,)),
    "scaling of channels": (Lambda(lambda x: x * torch.tensor([1.0, -4.0])[:, None]), (2, 3)),
    "repetition": (Lambda(lambda x: x[:, :, None].expand(-1, -1, 5)), (3,)),
    "repetition by adding": (Lambda(lambda x: x[:, :, None] + torch.zeros(5)), (3,)),
    "repetition by multiplying": (Lambda(lambda x: x[:, :, None] * torch.tensor([1.0, 2.0])), (3,)),
    "matrix from the right": (Lambda(lambda x: x @ torch.arange(6.0).reshape(3, 2).to(x.dtype)), (3,)),
    "matrix from the left": (Lambda(lambda x: torch.arange(6.0).reshape(2, 3).to(x.dtype) @ x), (3, 4)),
    "index_select": (Lambda(lambda x: x.index_select(1, torch.tensor([0, 0, 2]))), (3,)),
    "flip and roll": (Lambda(lambda x: x.flip(1).roll(1, dims=1)), (4,)),
    "linear after linear": (nn.Sequential(nn.Linear(5, 40), nn.Linear(40, 6)), (5,)),
    "x + linear": (Lambda(lambda x: x + x @ -torch.eye(3, dtype=x.dtype)), (3,)),
    "linear + linear": (
        Lambda(lambda x: x @ torch.eye(3, dtype=x.dtype) - 0.5 * (x @ torch.ones(3, 3, dtype=x.dtype))),
        (3,),
    ),
}


@pytest.fixture(autouse=True)
def _running_statistics():
    for model, _ in LINEAR.values():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                with torch.no_grad():
                    module.running_var.uniform_(0.5, 2)
                    module.weight.uniform_(-2, 2)


@pytest.mark.parametrize("name", LINEAR)
def test_linear_rule_gives_the_norm_of_the_explicit_matrix(name: str):
    model, shape = LINEAR[name]
    upper = sn.certify(model, shape, ascent_steps=0).upper_bound

    norm = torch.linalg.matrix_norm(_matrix(model, shape), 2).item()

    assert norm * (1 - 1e-12) <= upper <= norm * (1 + 1e-6) + 1e-12
