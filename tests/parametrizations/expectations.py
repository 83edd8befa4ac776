"""What the documents promise of a normalized layer's next value, after whatever has happened to its weight."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import spectralnorm as sn

# "After any other change its norm is found to 1e-4 or better."
EXACT = 1e-4
# An estimate is at most the norm, but for the rounding of float32 sums.
ABOVE = 1e-5


def raw(layer: nn.Module) -> nn.Parameter:
    return layer.parametrizations.weight.original


def normalization(layer: nn.Module) -> sn.SpectralNorm:
    return layer.parametrizations.weight[0]


def is_transposed(layer: nn.Module) -> bool:
    return isinstance(layer, nn.ConvTranspose2d)


def is_of_map(layer: nn.Module) -> bool:
    """Whether the norm is that of the map from image to image."""
    part = normalization(layer)
    return isinstance(layer, nn.Conv2d) and (part.strict or part.norm == "operator")


def map_of(layer: nn.Conv2d, weight: Tensor) -> Tensor:
    """The matrix with a row per pixel of a padded convolution."""
    size = normalization(layer).input_size
    units = torch.eye(layer.in_channels * math.prod(size), dtype=torch.float64).view(-1, layer.in_channels, *size)
    padding, groups = layer.padding, layer.groups
    return nn.functional.conv2d(units, weight.detach().double(), padding=padding, groups=groups).flatten(1)


def norm_by_svd(layer: nn.Module, weight: Tensor) -> float:
    """What the layer divides by: of blocks the largest norm, of two reshapings the mean."""
    blocks = weight.detach().double().chunk(getattr(layer, "groups", 1))

    if is_of_map(layer):
        return torch.linalg.matrix_norm(map_of(layer, weight), 2).item()

    def norm(is_inputs_first: bool) -> float:
        matrices = [(block.transpose(0, 1) if is_inputs_first else block).flatten(1) for block in blocks]
        return max(torch.linalg.matrix_norm(matrix, 2).item() for matrix in matrices)

    first = is_transposed(layer)
    return (norm(True) + norm(False)) / 2 if normalization(layer).norm == "bidirectional" else norm(first)


def outer(layer: nn.Module, u: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    """u v^T in the weight's shape."""
    if is_transposed(layer):
        shape = weight.shape[1], weight.shape[0], *weight.shape[2:]
        return torch.outer(u, v).view(shape).transpose(0, 1)
    return torch.outer(u, v).view(weight.shape)


def is_same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def is_usable(layer: nn.Module, weight: Tensor) -> bool:
    """Whether the weight has a norm."""
    return bool(weight.isfinite().all()) and norm_by_svd(layer, weight) > normalization(layer).eps


@dataclass
class Known:
    """What was seen of a layer at its last use.

    Attributes:
        sigma: its norm, as was found, or at least as much.
        value: what was handed out outside of autocast; None: it may be divided anew.
        scale: of a learnable one.
        is_usable: whether the weight had a norm.
    """

    sigma: float
    value: Tensor | None
    scale: float | None
    is_usable: bool


@dataclass
class Held:
    """A value that is in use, with all that its gradient is to be."""

    output: Tensor
    numbers: Tensor
    parameter: nn.Parameter
    weight: Tensor
    sigma: float
    direction: Tensor
    divisor: float
    is_active: bool
    is_rounded: bool

    @property
    def tolerance(self) -> float:
        """What a gradient may be off by, relative to what it is made of."""
        rounded = [torch.bfloat16] if self.is_rounded else [self.output.dtype, self.parameter.dtype]
        eps = max(torch.finfo(dtype).eps for dtype in rounded)
        return max(1e-4, 8 * eps) if eps > 1e-9 else 1e-9

    def check_numbers(self) -> None:
        assert torch.equal(self.output.detach(), self.numbers), "a value in use was overwritten"

    def expected_gradient(self, given: Tensor) -> Tensor:
        along = (given * self.weight).sum() / self.sigma if self.is_active else 0.0
        return (given - along * self.direction) / self.divisor


# A write that changes an entry by no more leaves the value as it is (`same_numbers.is_quotient`).
_ROUNDINGS_OF_THE_SAME = 8

SAME, FOLLOWED, UNSEEN, EXACTLY = "same", "followed", "unseen", "exactly"


@dataclass
class Expected:
    """Of one layer what its next use is to be.

    Attributes:
        demand: ``SAME`` value as at the last use; ``FOLLOWED`` by one iteration from there; ``EXACTLY`` the norm;
            ``UNSEEN`` the same, unless a step of an optimizer comes before, of which the write is a part then.
        is_maybe_renewed: whether another layer's use may have renewed this one since its last change.
        path: how far the weight has moved since the last use, in the Frobenius norm.
        written: what was written into the value, and is to become the weight.
    """

    layer: nn.Module
    demand: str = EXACTLY
    is_maybe_renewed: bool = False
    path: float = 0.0
    known: Known | None = None
    written: Tensor | None = None
    seen: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        self.seen = raw(self.layer).detach().double().clone()
        self.is_used_elsewhere()  # construction finds the norm

    # What happens to it

    def note_movement(self) -> None:
        """Measure how far the weight has moved since this was last called."""
        now = raw(self.layer).detach().double()
        if now.shape != self.seen.shape or not torch.equal(now, self.seen):
            moved = (now - self.seen).norm().item()
            self.path += moved if math.isfinite(moved) else math.inf
            self.seen = now.clone()

    def is_written(self) -> None:
        """In a way that leaves a trace."""
        self.demand, self.is_maybe_renewed, self.written = EXACTLY, False, None

    def is_written_unseen(self) -> None:
        """Through ``.data``, and there is an occasion before the next use."""
        if self.demand == SAME:
            self.demand = UNSEEN

    def is_stepped(self) -> None:
        """By an optimizer."""
        could_be_followed = self.demand in (SAME, UNSEEN) or self.is_maybe_renewed
        if self.known is None or not self.known.is_usable:
            could_be_followed = False
        self.demand, self.is_maybe_renewed = FOLLOWED if could_be_followed else EXACTLY, False

    def is_used_elsewhere(self) -> None:
        """Another layer is used, and this one may be renewed with it."""
        if self.demand == SAME or self.is_maybe_renewed:
            return
        self.is_maybe_renewed = True
        if self.demand in (UNSEEN, EXACTLY):
            weight = raw(self.layer)
            usable = is_usable(self.layer, weight)
            sigma = norm_by_svd(self.layer, weight) * (1 - EXACT) if usable else math.nan
            self.note_movement()
            known = self.known
            if known is not None and self.demand == UNSEEN:
                usable = usable and known.is_usable
                sigma = min(sigma, known.sigma - self.path) if usable else math.nan
            self.known, self.path = Known(sigma, None, None if known is None else known.scale, usable), 0.0

    def is_divided_anew(self) -> None:
        """By another rule and the same norm."""
        if self.known is not None:
            self.known.value = None

    def is_settled(self) -> None:
        """Whoever looked at the parameters, what was written into the value is there."""
        if self.written is not None:
            found = raw(self.layer).detach()
            assert is_same(found, self.written.to(found.dtype)), "what was written is not the weight"
            self.written = None
            self.note_movement()

    # What is to be seen then

    def check(self, value: Tensor, dtype: torch.dtype) -> Held | None:
        """Look at a ``value`` that was just handed out of ``dtype``."""
        layer, weight, part = self.layer, raw(self.layer).detach(), normalization(self.layer)
        self.is_settled()
        self.note_movement()
        assert value.dtype == dtype, (value.dtype, dtype)
        assert value.shape == weight.shape
        scale = None if part.scale is None else float(part.scale.detach())
        numbers = value.detach().double()
        if not is_usable(layer, weight):
            if bool(weight.isfinite().all()):
                expected = weight.double() if scale is None else weight.double() * scale
                assert torch.allclose(numbers, expected, rtol=1e-2, atol=0), "a weight without a norm was divided"
            self._is_now(Known(math.nan, None, scale, False))
            return None
        true = norm_by_svd(layer, weight)
        upper = float(part.sigma_upper(raw(layer))) if part.strict else None
        sigma = self._sigma(numbers, weight.double(), scale, dtype)
        assert bool(numbers.isfinite().all()), "a finite weight has a value that is not"
        if upper is None or not is_of_map(layer):
            self._check_sigma(sigma, true)
        if upper is not None:
            assert true <= upper <= self._slack * true, f"a bound {upper} of {true}"
        divisor, is_active = self._divisor(sigma, scale, numbers, weight.double())
        self._check_quotient(numbers, weight.double(), divisor, dtype)
        is_plain = dtype == weight.dtype and not self._is_rounded_strict()
        known = self.known if self.demand == SAME and self.known is not None and self.known.scale == scale else None
        before = None if known is None else known.value
        if is_plain and before is not None:
            assert torch.equal(value.detach(), before), "the value has changed and the weight has not"
        kept = value.detach().clone() if is_plain else before
        self._is_now(Known(sigma, kept, scale, True))
        if part.norm == "bidirectional" or is_of_map(layer):
            return None
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return None
        u, v = (each.double() for each in ((part._u, part._v) if part.training else part.vectors(raw(layer))))
        found = float((outer(layer, u, v, weight) * weight.double()).sum())
        tolerance = 1e-4 if torch.finfo(weight.dtype).bits >= 32 else 2e-2
        assert abs(u.norm().item() - 1) < tolerance
        assert abs(v.norm().item() - 1) < tolerance
        assert abs(found - sigma) < tolerance * sigma, f"sigma is {sigma}, and that of u and v {found}"
        return Held(
            output=value,
            numbers=value.detach().clone(),
            parameter=raw(layer),
            weight=weight.double().clone(),
            sigma=found,
            direction=outer(layer, u, v, weight),
            divisor=divisor,
            is_active=is_active,
            is_rounded=self._is_rounded_strict(),
        )

    @property
    def _slack(self) -> float:
        """How far a bound may be from the norm: that of a padded map is one for a torus of images, here a small one."""
        return 1.6 if is_of_map(self.layer) else 1.1

    def _is_rounded_strict(self) -> bool:
        return normalization(self.layer).strict and torch.is_autocast_enabled("cpu")

    def _sigma(self, value: Tensor, weight: Tensor, scale: float | None, dtype: torch.dtype) -> float:
        """By which the weight was divided, from the numbers where they tell: whoever is asked may look anew."""
        part = normalization(self.layer)
        is_told = dtype == raw(self.layer).dtype and torch.finfo(dtype).bits >= 32
        if is_told and part.mode != "cap" and not part.strict and scale != 0:
            wanted = part.coefficient if scale is None else scale
            largest = weight.abs().max()
            return wanted * float((weight / largest).square().sum() / ((weight / largest) * (value / largest)).sum())
        return float(part.sigma(raw(self.layer)))

    def _is_now(self, known: Known) -> None:
        self.known, self.demand, self.is_maybe_renewed, self.path = known, SAME, False, 0.0

    def _check_sigma(self, sigma: float, true: float) -> None:
        assert 0 < sigma < math.inf
        assert sigma <= true * (1 + ABOVE), f"estimate {sigma} above the norm {true}"
        known = self.known
        if self.demand in (UNSEEN, EXACTLY):
            assert sigma >= true * (1 - EXACT), f"{sigma} is not the norm {true}"
        elif self.demand == FOLLOWED and known is not None and known.is_usable:
            # Rayleigh and Ritz: in the span of the frame is the last leading vector.
            least = (known.sigma - self.path) * (1 - EXACT)
            assert sigma >= least, f"{sigma} of {true}, which was {known.sigma} and has moved by {self.path}"
        elif self.demand == SAME and known is not None and known.is_usable:
            assert sigma >= known.sigma * (1 - 1e-6), f"{sigma} was {known.sigma}"

    def _divisor(self, sigma: float, scale: float | None, value: Tensor, weight: Tensor) -> tuple[float, bool]:
        part = normalization(self.layer)
        if part.strict:
            divisor = float((weight * weight).sum() / (weight * value).sum())
            norm = norm_by_svd(self.layer, value)
            assert norm <= part.coefficient * (1 + 1e-12), "a strict weight is above its coefficient"
            is_active = part.mode == "normalize" or float(part.sigma_upper(raw(self.layer))) > part.coefficient
            assert not is_active or norm >= part.coefficient / self._slack
            return divisor, is_active
        if scale is not None:
            return sigma / scale if scale else math.inf, True
        if part.mode == "cap" and sigma <= part.coefficient:
            return 1.0, False
        return sigma / part.coefficient, True

    def _check_quotient(self, value: Tensor, weight: Tensor, divisor: float, dtype: torch.dtype) -> None:
        info, of_weight = torch.finfo(dtype), torch.finfo(raw(self.layer).dtype)
        eps = max(info.eps, of_weight.eps)
        tiny = max(info.tiny, of_weight.tiny)
        # Divided, scaled and rounded, of a weight that was written since and is the same up to eight roundings; the
        # norm itself is a number of float32.
        expected = weight / divisor
        if normalization(self.layer).strict:
            eps = max(eps, 2e-7) * 4
            if torch.is_autocast_enabled("cpu"):
                eps = torch.finfo(torch.bfloat16).eps
        off = (value - expected).abs() - ((3 + _ROUNDINGS_OF_THE_SAME) * eps + 3e-7 * (eps > 1e-9)) * expected.abs()
        worst = off.max().item()
        assert worst <= 4 * tiny, f"not the weight by {divisor}: {worst}"
