"""A certificate is never looser than the layer that it certifies."""

import pytest
import torch
from torch import nn

import spectralnorm as sn

LAYERS = {
    "linear": (nn.Linear(12, 7), (12,)),
    "conv1d, dilated": (nn.Conv1d(3, 4, 3, padding=2, dilation=2), (3, 9)),
    "conv2d": (nn.Conv2d(3, 5, 3, padding=1), (3, 12, 12)),
    "conv2d, stride": (nn.Conv2d(3, 6, 4, stride=2, padding=1), (3, 12, 12)),
    "conv2d, groups": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 8, 8)),
    "conv2d, small image": (nn.Conv2d(3, 4, 4), (3, 4, 4)),
    "conv2d, circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 8, 8)),
    "conv2d, reflect": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 8, 8)),
    "conv2d, large image": (nn.Conv2d(2, 3, 3, padding=1), (2, 90, 90)),
    "conv3d": (nn.Conv3d(2, 2, 3, padding=1), (2, 5, 5, 5)),
    "transposed": (nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1), (4, 6, 6)),
    "transposed, output padding": (nn.ConvTranspose1d(3, 2, 3, stride=2, output_padding=1), (3, 7)),
}
# What is asked of the division by the bound, and of the product with the coefficient, in float32.
ROUNDING = 4 * 2.0**-24


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("sizes", ["given", "all"])
def test_one_strict_layer_certifies_with_its_coefficient(name: str, sizes: str):
    layer, shape = LAYERS[name]
    torch.manual_seed(0)
    layer.reset_parameters()
    model = nn.Sequential(sn.spectral_norm(layer, strict=True, coefficient=0.7)).train()
    model(torch.randn(2, *shape))  # it sees what size its images have

    certificate = sn.certify(model.eval(), shape, input_sizes=sizes, ascent_steps=0)
    nn.utils.parametrize.remove_parametrizations(layer, "weight")

    assert 0 < certificate.upper_bound <= 0.7 * (1 + ROUNDING)


@pytest.mark.parametrize("strict", [False, True], ids=["plain", "strict"])
def test_zero_weight_makes_a_constant_and_one_that_is_not_finite_is_refused(strict: bool):
    layer = nn.Linear(3, 3)
    weight = layer.weight
    model = nn.Sequential(sn.spectral_norm(layer, strict=True) if strict else layer, nn.ReLU(), nn.Linear(3, 3)).eval()

    with torch.no_grad():
        weight.zero_()
    certificate = sn.certify(model, (3,))

    assert certificate.upper_bound == certificate.lower_bound == 0
    assert [line.upper == 0 for line in certificate.layers] == [True, False, False]
    with torch.no_grad():
        weight[0, 0] = float("nan")
    with pytest.raises(sn.UserError, match=r"linear at '0'.*not finite"):
        sn.certify(model, (3,))
