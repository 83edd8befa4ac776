"""A critic whose Lipschitz constant is proved after training: a network of orthonormal layers and MaxMin."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spectralnorm.errors import UserError
from spectralnorm.layers import MaxMin
from spectralnorm.linalg.orthogonal import bjorck
from spectralnorm.linalg.rigorous import rigorous_matrix_bound

__all__ = ["CriticOptions", "StrictCritic", "train_critic"]

_UNIT = 2.0**-53
_VALIDATION_SHARE = 0.2
_NUM_LOOKS = 20


@dataclass(frozen=True, kw_only=True)
class CriticOptions:
    """How large a critic is and how long it learns; no choice can make a bound untrue, only weak."""

    width: int = 64
    """Features of each hidden layer, an even number."""
    num_hidden: int = 3
    """Hidden layers."""
    num_steps: int = 400
    batch_size: int = 512
    """Real and as many fake samples a step, drawn with replacement."""
    learning_rate: float = 0.01
    """Of Adam at the start; it falls to zero along a cosine."""

    def __post_init__(self) -> None:
        if self.width < 2 or self.width % 2:
            raise UserError(f"The width of a critic must be an even number of at least 2, got {self.width}.")
        for name in ("num_hidden", "num_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}.")


class StrictCritic(nn.Module):
    """A scalar function of vectors, in float64, with a proved Lipschitz constant in the 2-norm.

    ``f(x) = scale * network((x - center) / scale)``, where the network's layers are linear ones and MaxMin. The scale
    is a power of two, so that it rounds nothing, and does not change the constant.

    Args:
        weights: of the linear layers, (out, in) each; the last has one row.
        biases: (out,) each.
        center: (d,)
        scale: a power of two.
    """

    center: Tensor

    def __init__(self, *, weights: list[Tensor], biases: list[Tensor], center: Tensor, scale: float) -> None:
        super().__init__()
        if math.frexp(scale)[0] != 0.5:
            raise UserError(f"The scale of a critic must be a power of two, got {scale}.")
        layers: list[nn.Module] = []
        for weight, bias in zip(weights, biases, strict=True):
            rows, columns = weight.shape
            # Without the usual random weights, which would move the global random numbers.
            linear = nn.utils.skip_init(nn.Linear, columns, rows, dtype=torch.float64, device=weight.device)
            linear.load_state_dict({"weight": weight, "bias": bias})
            layers += [linear, MaxMin()]
        self.network = nn.Sequential(*layers[:-1]).requires_grad_(False)
        self.register_buffer("center", center.detach().double())
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """(n, ...) of any floating-point type -> (n,) float64."""
        return self.scale * self.network((x.flatten(1).double() - self.center) / self.scale).squeeze(1)

    def lipschitz_bound(self) -> float:
        """An upper bound of the constant of the function that the stored weights define, all rounding counted."""
        bound = 1.0
        for layer in self._linear_layers():
            bound = math.nextafter(bound * rigorous_matrix_bound(layer.weight), math.inf)
        return bound

    def rounding_error_bound(self, x: Tensor) -> float:
        """How far a computed value may be from the true one at any of these inputs.

        Each linear layer adds ``gamma_(n+2) | |W| |x| + |b| |`` (Higham 2002, section 3.5) and multiplies what came by
        its norm; MaxMin rounds nothing and is 1-Lipschitz.
        """
        x = x.flatten(1).double()
        # Computed in rounded numbers itself, which a factor of two covers many times over.
        size = (x.abs() + self.center.abs()) / self.scale
        error = float(_UNIT * size.norm(dim=1).max())
        hidden = (x - self.center) / self.scale
        for layer in self._linear_layers():
            num = layer.in_features + 2
            gamma = num * _UNIT / (1 - num * _UNIT)
            sizes = hidden.abs() @ layer.weight.abs().T + layer.bias.abs()
            error = error * rigorous_matrix_bound(layer.weight) + gamma * float(sizes.norm(dim=1).max())
            hidden = layer(hidden)
            if layer.out_features > 1:
                hidden = MaxMin()(hidden)
        return 2 * self.scale * error

    def _linear_layers(self) -> list[nn.Linear]:
        return [layer for layer in self.network if isinstance(layer, nn.Linear)]


def train_critic(real: Tensor, fake: Tensor, *, options: CriticOptions | None = None, seed: int = 0) -> StrictCritic:
    """Search a 1-Lipschitz function that is as much larger on real than on fake samples as it can be.

    Weights are orthonormalised in every step (Björck & Bowie 1971) and activations are MaxMin, so that gradients keep
    their length (Anil et al. 2019): networks of ReLU with the same norms cannot come near the best function. A fifth of
    the samples is set aside, and the network that does best on it is kept; or the linear function along the difference
    of the means, where that does better, as it may with few samples in many dimensions.

    Args:
        real: (n, ...) samples, n >= 10; flattened.
        fake: (m, ...) samples of the same shape, m >= 10.
        options: size and training.
        seed: of weights and batches; the global random numbers are left alone.

    Raises:
        UserError: the samples do not fit together, are too few or not finite.
    """
    options = options or CriticOptions()
    real, fake = _checked(real, fake)
    generator = torch.Generator().manual_seed(seed)
    center = (real.mean(0) + fake.mean(0)) / 2
    spread = float(torch.cat([real, fake]).sub(center).square().sum(1).mean().sqrt())
    scale = 2.0 ** round(math.log2(spread)) if spread > 0 else 1.0
    train_real, check_real = _parted((real - center) / scale, generator)
    train_fake, check_fake = _parted((fake - center) / scale, generator)

    def finished(weights: list[Tensor], biases: list[Tensor]) -> StrictCritic:
        return StrictCritic(weights=weights, biases=biases, center=center, scale=scale)

    difference = (train_real.mean(0) - train_fake.mean(0))[None]
    length = difference.norm()
    linear = difference / length if float(length) > 0 else difference
    best = finished([linear], [linear.new_zeros(1)])
    best_score = float((check_real @ linear.T).mean() - (check_fake @ linear.T).mean())

    network = _Network(real[0].numel(), options, generator).to(real.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=options.learning_rate, betas=(0.5, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.num_steps)
    look_every = max(1, options.num_steps // _NUM_LOOKS)
    train_real, train_fake, check_real, check_fake = (
        part.float() for part in (train_real, train_fake, check_real, check_fake)
    )
    for step in range(1, options.num_steps + 1):
        batch = [
            part[torch.randint(len(part), (options.batch_size,), generator=generator).to(part.device)]
            for part in (train_real, train_fake)
        ]
        values = network(torch.cat(batch))
        loss = values[options.batch_size :].mean() - values[: options.batch_size].mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % look_every == 0 or step == options.num_steps:
            with torch.no_grad():
                score = float(network(check_real).mean() - network(check_fake).mean())
                if score > best_score:
                    best_score = score
                    best = finished(*network.orthonormal())
    return best


class _Network(nn.Module):
    """The critic while it learns, in float32: free weights, orthonormalised where they are used."""

    def __init__(self, num_inputs: int, options: CriticOptions, generator: torch.Generator) -> None:
        super().__init__()
        sizes = [num_inputs, *[options.width] * options.num_hidden, 1]
        shapes = list(zip(sizes[1:], sizes[:-1], strict=True))
        self.weights = nn.ParameterList(torch.randn(shape, generator=generator) for shape in shapes)
        self.biases = nn.ParameterList(torch.zeros(shape[0]) for shape in shapes)
        self.activation = MaxMin()

    def forward(self, x: Tensor) -> Tensor:
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = nn.functional.linear(x, bjorck(weight), bias)
            if index + 1 < len(self.weights):
                x = self.activation(x)
        return x.squeeze(1)

    def orthonormal(self) -> tuple[list[Tensor], list[Tensor]]:
        """Weights, orthonormalised in float64, and biases."""
        return [bjorck(weight.detach().double()) for weight in self.weights], [bias.detach() for bias in self.biases]


def _checked(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    if real.ndim < 2 or real.shape[1:] != fake.shape[1:]:
        raise UserError(
            "Samples must be two batches of vectors or images of one shape, "
            f"got {tuple(real.shape)} and {tuple(fake.shape)}."
        )
    if min(len(real), len(fake)) < 10:
        raise UserError(f"A critic needs at least ten samples on each side, got {len(real)} and {len(fake)}.")
    real, fake = real.detach().flatten(1).double(), fake.detach().flatten(1).double()
    if not bool(real.isfinite().all() and fake.isfinite().all()):
        raise UserError("Samples must be finite, but some are infinite or NaN.")
    return real, fake


def _parted(samples: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(samples), generator=generator).to(samples.device)
    num_check = round(_VALIDATION_SHARE * len(samples))
    return samples[order[num_check:]], samples[order[:num_check]]
