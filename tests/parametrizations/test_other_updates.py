"""``update="forward"`` and ``update="manual"``: what holds for a norm holds there too."""

import math

import pytest
import torch
from torch import Tensor, nn

import spectralnorm as sn
from spectralnorm import export_state_dict, spectral_norm, update_
from spectralnorm.parametrizations import SpectralNorm

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


def norm_of(weight: Tensor) -> float:
    return torch.linalg.matrix_norm(weight.detach(), 2).item()


OPTIONS = {
    "forward": {"update": "forward"},
    "manual": {"update": "manual"},
    "learnable": {"mode": "learnable"},
    "learnable and forward": {"mode": "learnable", "update": "forward"},
    "learnable and manual": {"mode": "learnable", "update": "manual"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
class TestMemoryThatCameLater:
    @pytest.mark.parametrize("value", [None, math.nan, 0.0], ids=["as it is", "NaN", "zero"])
    def test_reset_parameters_fills_the_layer(self, options, value):
        with torch.device("meta"):
            layer = spectral_norm(nn.Linear(60, 50), coefficient=2.0, **options)
        layer.to_empty(device="cpu")
        if value is not None:
            with torch.no_grad():
                for tensor in (*layer.parameters(), *layer.buffers()):
                    tensor.fill_(value)
        layer.reset_parameters()
        scale = getattr(layer.parametrizations.weight[0], "scale", None)
        if value == 0.0 and scale is not None:
            nn.init.constant_(scale, 2.0)  # a scale may be zero
        layer(torch.ones(1, 60)).sum().backward()
        assert raw(layer).isfinite().all()
        assert norm_of(layer.eval().weight) == pytest.approx(2, rel=0.05)
        assert all(tensor.isfinite().all() for tensor in layer.state_dict().values())

    def test_update_recovers_vectors_and_scale(self, options):
        layer = spectral_norm(nn.Linear(60, 50), coefficient=2.0, **options)
        with torch.no_grad():
            for tensor in layer.parametrizations.weight[0].state_dict().values():
                tensor.fill_(math.nan)
        update_(layer)
        assert norm_of(layer.eval().weight) == pytest.approx(2, rel=0.05)
        assert all(tensor.isfinite().all() for tensor in layer.state_dict().values())

    def test_vectors_loaded_into_it_are_used_as_they_are(self, options):
        source = spectral_norm(nn.Linear(60, 50), **options)
        with torch.no_grad():
            raw(source).add_(torch.randn(50, 60))
        with torch.device("meta"):
            layer = spectral_norm(nn.Linear(60, 50), **options)
        layer.to_empty(device="cpu").load_state_dict(source.state_dict())
        torch.testing.assert_close(layer.eval().weight, source.eval().weight)


FLAT_SPECTRA = {  # layers and weights in whose matrix, or each of whose blocks, power iteration is slow
    "linear": (lambda: nn.Linear(8, 8), (1,)),
    "transposed": (lambda: nn.ConvTranspose1d(8, 8, 1), (1,)),
    "grouped conv": (lambda: nn.Conv2d(24, 24, 1, groups=3), (0.999, 1, 0.998)),
    "grouped transposed": (lambda: nn.ConvTranspose1d(16, 16, 1, groups=2), (1, 0.999)),
}


@each_update
@pytest.mark.parametrize("name", FLAT_SPECTRA)
class TestVectorsFromTheWeightAlone:
    """The norm is 1: of the largest block, if there are several."""

    @staticmethod
    def weight_of(name: str, like: Tensor) -> Tensor:
        values = torch.linspace(0.97, 1, 8)
        turned = [torch.linalg.qr(torch.randn(8, 8))[0] for _ in range(2)]
        blocks = [norm * turned[0] @ values.diag() @ turned[1] for norm in FLAT_SPECTRA[name][1]]
        return torch.cat(blocks).view_as(like)

    def made(self, name: str) -> nn.Module:
        layer = FLAT_SPECTRA[name][0]()
        with torch.no_grad():
            layer.weight.copy_(self.weight_of(name, layer.weight))
        return layer

    def test_at_construction(self, name, update):
        layer = self.made(name)
        assert SpectralNorm(layer, update=update).sigma(layer.weight).item() == pytest.approx(1, rel=1e-5)

    def test_in_memory_that_came_later(self, name, update):
        with torch.device("meta"):
            layer = spectral_norm(FLAT_SPECTRA[name][0](), update=update).eval()
        layer.to_empty(device="cpu")
        with torch.no_grad():
            raw(layer).copy_(self.weight_of(name, raw(layer)))
        torch.testing.assert_close(layer.weight, raw(layer), rtol=1e-5, atol=0)

    def test_where_there_were_none(self, name, update):
        layer = spectral_norm(self.made(name), update=update).eval()
        with torch.no_grad():
            layer.parametrizations.weight[0]._u.fill_(math.nan)
        torch.testing.assert_close(layer.weight, raw(layer), rtol=1e-5, atol=0)

    @pytest.mark.parametrize("value", [0.0, math.nan])
    def test_of_a_weight_that_had_no_norm_at_construction(self, name, update, value):
        layer = FLAT_SPECTRA[name][0]()
        nn.init.constant_(layer.weight, value)
        spectral_norm(layer.eval(), update=update)
        layer.weight  # noqa: B018
        with torch.no_grad():
            raw(layer).copy_(self.weight_of(name, raw(layer)))
        torch.testing.assert_close(layer.weight, raw(layer), rtol=1e-5, atol=0)


@each_update
class TestWrites:
    def test_writing_into_the_weight_reaches_the_parameter(self, update):
        layer = spectral_norm(nn.Linear(6, 5), update=update)
        written = nn.init.orthogonal_(layer.weight, gain=7.0).detach().clone()
        update_(layer)
        layer.weight  # noqa: B018
        assert torch.equal(raw(layer), written)

    def test_use_does_not_look_at_vectors_that_nobody_else_has_written(self, update, monkeypatch):
        layer = spectral_norm(nn.Linear(6, 5), update=update)
        layer(torch.ones(6))
        monkeypatch.setattr(torch, "stack", lambda *_: pytest.fail("the vectors were looked at"))
        layer.weight, layer.eval().weight
