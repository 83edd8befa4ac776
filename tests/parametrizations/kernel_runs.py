"""A model of many layers, and training it with kernels and without."""

import pytest
import torch
from torch import Tensor, nn

import spectralnorm as sn
from spectralnorm.linalg import tracking
from spectralnorm.parametrizations import plans
from spectralnorm.parametrizations.by_kernels import ByKernels

COMPILED, TRITON = "compiled", "triton"


class Mixed(nn.Module):
    """Layers of most kinds, with sizes that share no alignment."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 10)
        self.same = nn.Linear(12, 10)
        self.narrow = nn.Linear(10, 3)
        self.convolution = nn.Conv2d(3, 9, 3, padding=1)
        self.grouped = nn.Conv2d(9, 6, 3, groups=3, padding=1)
        self.transposed = nn.ConvTranspose2d(6, 10, 3, padding=1)
        self.grouped_transposed = nn.ConvTranspose2d(10, 12, 3, groups=2)
        self.last = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        image = x[:, :3, None, None] * torch.linspace(-1, 1, 16, device=x.device).view(1, 1, 4, 4)
        image = self.transposed(self.grouped(self.convolution(image).tanh()).tanh()).tanh()
        image = self.last(self.grouped_transposed(image).tanh()).mean((1, 2, 3))
        return self.narrow(self.linear(x) + self.same(x).tanh()).sum(1) + image


def without_kernels(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(plans, "are_usable", lambda weight: False)
    if kind == COMPILED:
        return
    # On the CPU all rows of a frame are put in order; the kernels, as torch on a GPU, settle the first.
    monkeypatch.setattr(tracking, "_ritz_rotation", tracking._ritz_reflection)


def normalizations(model: nn.Module) -> dict[str, sn.SpectralNorm]:
    return {name: each for name, each in model.named_modules() if isinstance(each, sn.SpectralNorm)}


def are_kept_by_kernels(model: nn.Module) -> list[bool]:
    found = normalizations(model).values()
    return [each._kept is not None and isinstance(each._kept.followed, ByKernels) for each in found]


def trained(model: nn.Module, steps: int, device: torch.device, lr: float = 0.02) -> list[dict[str, Tensor]]:
    """What a model hands out, its gradients and buffers after each step of training on the same numbers."""
    torch.manual_seed(1)
    inputs = torch.randn(steps, 2, 7, 12, dtype=torch.float32).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    seen = []
    for real, fake in inputs:
        optimizer.zero_grad()
        (model(real).sigmoid().sum() + model(fake).square().mean()).backward()
        of_step = {
            f"grad {name}": each.grad.clone() for name, each in model.named_parameters() if each.grad is not None
        }
        of_step |= {f"buffer {name}": each.clone() for name, each in model.named_buffers()}
        of_step |= {f"value {name}": layer.weight.detach().clone() for name, layer in _layers(model).items()}
        seen.append({name: each.float() for name, each in of_step.items()})
        optimizer.step()
    return seen


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: each for name, each in model.named_modules() if isinstance(getattr(each, "weight", None), Tensor)}


def assert_equal_runs(
    mine: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]], tolerance: float, of_vectors: float
) -> None:
    assert mine
    for step, (of_mine, of_theirs) in enumerate(zip(mine, theirs, strict=True)):
        assert of_mine.keys() == of_theirs.keys()
        for name, each in of_mine.items():
            if name.startswith("buffer"):  # singular vectors are those up to a sign
                each = each * (1 if float((each * of_theirs[name]).sum()) > 0 else -1)
            scale = float(of_theirs[name].abs().max())
            difference = float((each - of_theirs[name]).abs().max())
            allowed = of_vectors if name.startswith("buffer") else tolerance
            assert difference <= allowed * max(scale, 1e-3), f"{name} at step {step}: {difference} of {scale}"
