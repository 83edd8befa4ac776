"""Numbers whose products are below all floats: what is lost of them is in the bound."""

import pytest
import torch
from torch import Tensor, nn

import spectralnorm as sn

LITTLE = 2.0**-540  # its square is no float
LARGE = 2.0**1000
FOUR = torch.full((4,), LITTLE, dtype=torch.float64)


def _filled(layer: nn.Module) -> nn.Module:
    nn.init.constant_(layer.double().weight, LITTLE)
    return layer


def _linear(inputs: int, outputs: int) -> nn.Module:
    return _filled(nn.Linear(inputs, outputs, bias=False))


class Enlarged(nn.Module):
    """Layers, times a large number: what they make is seen."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs) * LARGE


class Times(nn.Module):
    """Four channels times a small number each."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * FOUR.reshape(4, *[1] * (inputs.ndim - 2))


class Added(nn.Module):
    """A value and a small multiple of a matrix times it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = _linear(4, 4), _linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.add(self.first(inputs) * LITTLE, self.second(inputs), alpha=LITTLE)


# Of each the constant in units of the square of the small number.
NETWORKS = {
    "factors of entries that are repeated": (lambda: [Times(), Times()], (1,), 2),
    "factors": (lambda: [Times(), Times()], (4,), 1),
    "factors after a matrix": (lambda: [_linear(4, 4), Times()], (4,), 4),
    "matrix after factors": (lambda: [Times(), _linear(4, 4)], (4,), 4),
    "matrices": (lambda: [_linear(16, 1), _linear(1, 16)], (16,), 16),
    "sum of matrices": (lambda: [Added()], (4,), 8),
    **{
        f"{what}, {axes} axes": (make, (4, *[1] * axes), 4)
        for axes, kind in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), 1)
        for what, make in {
            "factors after a convolution": lambda kind=kind: [_filled(kind(4, 4, 1, bias=False)), Times()],
            "convolution after factors": lambda kind=kind: [Times(), _filled(kind(4, 4, 1, bias=False))],
            "convolutions": lambda kind=kind: [
                _filled(kind(4, 1, 1, bias=False)),
                _filled(kind(1, 4, 1, bias=False)),
            ],
        }.items()
    },
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("flushes", [False, True], ids=["denormal", "flushed"])
def test_what_underflows_is_in_the_bound(name: str, flushes: bool):
    layers, shape, constant = NETWORKS[name]
    torch.set_flush_denormal(flushes)
    try:
        bound = sn.certify(Enlarged(*layers()), shape, ascent_steps=0).upper_bound
    finally:
        torch.set_flush_denormal(False)

    assert bound >= constant * 2.0**-80


def test_factors_beyond_the_range_are_refused():
    batch_norm = nn.BatchNorm1d(4).double().eval()
    nn.init.constant_(batch_norm.weight, 2.0**-1000)
    batch_norm.running_var.fill_(2.0**200)
    for layer, message in ((batch_norm, "scale is beyond the range"), (Divided(), "inverse is beyond the range")):
        with pytest.raises(sn.UserError, match=message):
            sn.certify(nn.Sequential(layer), (4,), ascent_steps=0)


class Divided(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs / 1.7e308


@pytest.mark.parametrize("exponent", [-530, -538, -540, -700])
def test_constant_that_is_shown_is_not_above_the_one_there_is(exponent: int):
    layer = nn.Linear(3, 5, bias=False).double()
    nn.init.constant_(layer.weight, 1.2 * 2.0**exponent)

    certificate = sn.certify(layer, (3,))

    assert certificate.lower_bound <= certificate.upper_bound
    assert certificate.layers[0].lower <= certificate.upper_bound
