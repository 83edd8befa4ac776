"""Optimizers by name, with options of their own: ``adam``, ``rmsprop:alpha=0.9``, ``Muon:momentum=0.9``.

Any optimizer of `torch.optim` that takes steps by gradients alone has its place here, by its name in any case.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from spectralnorm.errors import UserError
from spectralnorm.gan.spec import check_kinds, parse_spec

__all__ = ["Muon", "check_optimizer", "make_optimizer", "optimizer_names"]

# Of them, L-BFGS asks for the loss again and again, and SparseAdam for sparse gradients.
_UNFIT = {"Optimizer", "LBFGS", "SparseAdam"}
# The step size is a setting of its own; steps are neither differentiated nor captured in a graph of CUDA.
_NO_OPTIONS = {"params", "lr", "differentiable", "capturable"}
# Those with one kernel for all weights, and where torch has it.
_EVERYWHERE = ("cpu", "cuda", "mps")
_FUSED = {"adam": _EVERYWHERE, "adamw": _EVERYWHERE, "sgd": _EVERYWHERE, "adagrad": ("cpu",)}


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalized by Newton-Schulz (Jordan et al. 2024) for matrices and kernels, Adam for the rest.

    A kernel is the matrix of its outputs against all else. `torch.optim.Muon` takes matrices alone, and a GAN's weights
    are mostly kernels; vectors (biases, gains) have no matrix to orthogonalize.

    Args:
        params: parameters.
        lr: step size of Adam; that of the orthogonalized steps is ``muon_lr``.
        betas: Adam's decays.
        eps: Adam's.
        muon_lr: step size of the orthogonalized steps, times ``sqrt(max(1, rows / columns))``.
        momentum: of the orthogonalized steps, Nesterov's.
        ns_steps: Newton-Schulz iterations.
        weight_decay: decoupled, of all parameters.

    Raises:
        ValueError: a step size is negative.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        muon_lr: float = 0.02,
        momentum: float = 0.95,
        ns_steps: int = 5,
        weight_decay: float = 0.0,
    ) -> None:
        if lr < 0 or muon_lr < 0:
            raise ValueError(f"step sizes must not be negative, got lr={lr} and muon_lr={muon_lr}")
        # The ratio is kept, so that a schedule that lowers ``lr`` lowers both.
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "ratio": muon_lr / lr if lr else 0.0, "momentum": momentum,
            "ns_steps": ns_steps, "weight_decay": weight_decay,
        }  # fmt: skip
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of all parameters that have a gradient."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                move = self._orthogonal_step if parameter.ndim >= 2 else self._adam_step
                move(parameter, gradient, group)
        return loss

    def _orthogonal_step(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        average: Tensor = state["momentum_buffer"]
        average.lerp_(gradient, 1 - group["momentum"])
        update = torch.lerp(gradient, average, group["momentum"])
        matrix = orthogonalize(update.flatten(1), num_steps=group["ns_steps"])
        size = group["lr"] * group["ratio"] * max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
        parameter.sub_(matrix.view(update.shape), alpha=size)

    def _adam_step(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        beta1, beta2 = group["betas"]
        state["step"] += 1
        count = float(state["step"])
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (state["exp_avg_sq"] / (1 - beta2**count)).sqrt_().add_(group["eps"])
        parameter.addcdiv_(state["exp_avg"], root, value=-group["lr"] / (1 - beta1**count))


def orthogonalize(matrix: Tensor, *, num_steps: int = 5) -> Tensor:
    """Bring the singular values of a matrix near 1 (0.68 to 1.21) by a quintic Newton-Schulz iteration.

    The coefficients of Jordan et al. 2024, which trade exactness for speed. After 5 iterations the range holds for all
    that are at least 0.002 of the matrix's Frobenius norm; smaller ones stay smaller.

    Args:
        matrix: (m, n).
        num_steps: iterations.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(num_steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x


def optimizer_names() -> list[str]:
    """The names `make_optimizer` takes, in lower case."""
    return sorted(name.lower() for name in _classes())


def make_optimizer(
    which: str, setting: str, parameters: Iterable[nn.Parameter], *, lr: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """An optimizer of the given parameters.

    Args:
        which: the name of the setting, for messages.
        setting: the optimizer's name, with options or without.
        parameters: what it moves.
        lr: step size.
        betas: decays of both moments, for optimizers that have ``betas``; they are overridden by the option of that
            name (``adam:betas=0/0.9``).

    Raises:
        UserError: there is no such optimizer, or it does not take an option.
    """
    spec = parse_spec(which, setting)
    name, given = spec
    classes = {key.lower(): value for key, value in _classes().items()}
    if name.lower() not in classes:
        raise UserError(f"Unknown {which} '{name}'; choose one of {', '.join(sorted(classes))}.")
    kind = classes[name.lower()]
    known = inspect.signature(kind).parameters
    for option in given:
        if option not in known or option in _NO_OPTIONS:
            choices = ", ".join(option for option in known if option not in _NO_OPTIONS)
            advice = "the step size is a setting of its own" if option == "lr" else f"choose among {choices}"
            raise UserError(f"{which} '{name}' has no option '{option}'; {advice}.")
    check_kinds(which, spec, known)
    parameters = list(parameters)
    devices = {parameter.device.type for parameter in parameters}
    options: dict[str, Any] = {"lr": lr}
    if "betas" in known:
        options["betas"] = betas
    if devices.issubset(_FUSED.get(name.lower(), ())) and "foreach" not in given:
        options["fused"] = True
    try:
        return kind(parameters, **{**options, **given})
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{which} '{setting}' cannot be: {error}") from error


def check_optimizer(which: str, setting: str) -> None:
    """See that there is such an optimizer, that it takes the options, and can step with them.

    Raises:
        UserError: there is not, or it does not, or cannot.
    """
    parameters = [nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))]
    optimizer = make_optimizer(which, setting, parameters, lr=1e-3, betas=(0.9, 0.999))
    if ":" not in setting:
        return
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    try:
        optimizer.step()
    except Exception as error:  # whatever torch meets in a combination that nobody has tried
        first = str(error).strip().partition("\n")[0]
        raise UserError(f"{which} '{setting}' cannot take a step: {first}") from error


def _classes() -> dict[str, type[torch.optim.Optimizer]]:
    found = {
        name: value
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and name not in _UNFIT
    }
    return {**found, "Muon": Muon}
