"""``update="forward"`` and ``update="manual"``: what holds for a norm holds there too."""


import pytest
import torch
from torch import nn

import spectralnorm as sn
from spectralnorm import export_state_dict, spectral_norm

each_update = pytest.mark.parametrize("update", ["forward", "manual"])
LAYERS = {
    "linear": lambda: nn.Linear(6, 5, bias=False),
    "conv": lambda: nn.Conv2d(3, 4, 3, bias=False),
    "grouped conv": lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False),
    "complex linear": lambda: nn.Linear(6, 5, bias=False, dtype=torch.complex64),
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def raw(layer: nn.Module) -> nn.Parameter:
    return layer.parametrizations.weight.original


@each_update
@each_layer
@pytest.mark.parametrize("norm", ["matrix", "bidirectional"])
class TestNegatedWeight:
    def test_value_is_negated_and_the_norm_is_not(self, make, norm, update):
        layer = spectral_norm(make(), update=update, norm=norm).eval()
        before, sigmas = layer.weight.detach().clone(), sn.monitor(layer)
        with torch.no_grad():
            raw(layer).neg_()
        torch.testing.assert_close(layer.weight, -before)
        assert sn.monitor(layer) == pytest.approx(sigmas)

    def test_gradient_is_the_same(self, make, norm, update):
        layer = spectral_norm(make(), update=update, norm=norm).eval()
        factors, grads = torch.randn_like(raw(layer)), []
        for sign in (1, -1):
            with torch.no_grad():
                raw(layer).mul_(sign)
            layer.zero_grad()
            (layer.weight * factors).abs().square().sum().backward()
            grads.append(sign * raw(layer).grad)
        torch.testing.assert_close(*grads)


@each_update
def test_vectors_of_a_negated_weight_are_written_for_torch_with_their_sign(update):
    layer, target = spectral_norm(nn.Linear(6, 5), update=update).eval(), nn.Linear(6, 5)
    with torch.no_grad():
        raw(layer).neg_()
    torch.nn.utils.parametrizations.spectral_norm(target)
    target.load_state_dict(export_state_dict(layer, "torch"))
    torch.testing.assert_close(target.eval()(torch.ones(6)), layer(torch.ones(6)))
