"""Dividing a weight so that the norm of what is handed out is at most the coefficient, every rounding counted.

Say ||W|| <= b, the norm of the value is wanted to be at most c, and the value is fl(W / d). Dividing rounds d and, on
some devices, 1/d: together a factor of at most 1 + 4 u. Storing rounds each entry on its own, by at most u of it, which
changes the norm by at most u ||W / d||_F; and entries that underflow by at most the smallest number. So with

    d = (b (1 + 4 u) + 1.01 u ||W||_F) / (c - underflow)

the norm of the value is at most c. In float32 this costs about 1e-6. In the half types it would cost percents, because
the rounding of the entries hardly adds up, but can. So there a divisor that leaves that out is tried first, the value
that comes of it is bounded itself, and only if that is above c the careful divisor is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, overload

import torch
from torch import Tensor

from spectralnorm.linalg import compute_dtype
from spectralnorm.parametrizations.arithmetic import is_eager
from spectralnorm.parametrizations.quotient import divided

__all__ = ["Bounded", "Target", "autocast_dtype", "bounded", "careful_divisor", "frobenius_above", "rounded_within"]

_U64 = 2.0**-53
_LEAST, _MOST = 1e-12, 1e18  # norms in float32 for which no square that counts underflows, and none overflows
_FEW = 2**22  # entries of which a sum in float32 is off by a quarter at most, whatever the order


class Bounded(NamedTuple):
    """A divided weight whose norm is at most what is wanted.

    Attributes:
        value: of the weight's shape and type; with entries of the target's type.
        divisor: float64, a scalar.
        active: whether the divisor depends on the weight's norm.
    """

    value: Tensor
    divisor: Tensor
    active: Tensor


@dataclass(frozen=True, slots=True)
class Target:
    """What a value has to be.

    Attributes:
        coefficient: the norm that is wanted at most.
        cap: whether a weight of a smaller norm is left alone.
        eps: a norm up to here counts as zero.
        dtype: the type whose numbers the entries are rounded to.
        gain: the norm of the layer's map is at most this many times the Frobenius norm of its weight.
    """

    coefficient: float
    cap: bool
    eps: float
    dtype: torch.dtype
    gain: float = 1.0


def frobenius_above(weight: Tensor) -> Tensor:
    """An upper bound of the Frobenius norm, in float64: a scalar; NaN for a weight that is not finite."""
    detached = weight.detach()
    if detached.dtype == torch.float32 and detached.numel() <= _FEW:
        # It is multiplied by the unit roundoff, so a percent more is nothing, and float64 takes several times as long.
        share = 1 + 2 * (detached.numel() + 16) * 2.0**-24
        if detached.device.type == "cpu" and is_eager(detached):
            norm = torch.linalg.vector_norm(detached)
            if _LEAST < float(norm) < _MOST:
                return norm.double() * share
        least, most = torch.aminmax(detached)
        largest = torch.maximum(-least, most)
        scaled = detached / torch.where(largest > 0, largest, 1)
        return torch.linalg.vector_norm(scaled).double() * largest.double() * share
    double = detached.to(torch.promote_types(detached.dtype, torch.float64))
    double = torch.view_as_real(double.resolve_conj()) if double.is_complex() else double
    largest = double.abs().amax()
    # To about one, so that no square overflows.
    scaled = double / torch.where(largest > 0, largest, 1)
    margin = 1 + (2 * double.numel() + 16) * _U64
    return torch.linalg.vector_norm(scaled) * largest * margin


@overload
def careful_divisor(weight: Tensor, upper: Tensor, target: Target) -> tuple[Tensor, Tensor]: ...
@overload
def careful_divisor(weight: Tensor, upper: float, target: Target) -> tuple[float, bool]: ...
def careful_divisor(
    weight: Tensor, upper: Tensor | float, target: Target
) -> tuple[Tensor, Tensor] | tuple[float, bool]:
    """The divisor of this module's introduction, and whether it depends on the weight's norm.

    Args:
        weight: raw.
        upper: not below the norm of the layer's map with ``weight``: a float64 scalar, or a number where the host has
            it, which spares a dozen operations on scalars.
        target: what the value has to be.
    """
    unit, wide_unit = _roundoffs(weight.dtype, target.dtype)
    underflow = (_underflow(target.dtype) + _underflow(weight.dtype)) * math.sqrt(weight.numel()) * target.gain
    room = target.coefficient - underflow
    spread = frobenius_above(weight) * target.gain
    if isinstance(upper, Tensor):
        return _divisor(upper, upper * (1 + 4 * wide_unit) + 1.01 * unit * spread, room, weight, target)
    return _host_divisor(upper, upper * (1 + 4 * wide_unit) + 1.01 * unit * float(spread), room, weight, target)


def bounded(weight: Tensor, upper: Tensor, target: Target, bound: Callable[[Tensor], Tensor] | None) -> Bounded:
    """``weight`` divided.

    Args:
        weight: raw, detached.
        upper: as for `careful_divisor`.
        target: what the value has to be.
        bound: the upper bound of a value's norm, as ``upper`` is of the weight's; None: do not try.
    """
    wide = compute_dtype(weight.dtype)
    divisor, active = careful_divisor(weight, upper, target)
    is_rounded_twice = weight.dtype not in (wide, target.dtype)
    if target.dtype == wide or is_rounded_twice or bound is None:
        return Bounded(_value(weight, divisor, target), divisor, active)
    unit, _ = _roundoffs(weight.dtype, target.dtype)
    bold, is_divided = _divisor(upper, upper * (1 + unit / 8), target.coefficient, weight, target)
    value = _value(weight, bold, target)
    is_good = bound(value) <= target.coefficient
    if weight.device.type == "cpu":
        if bool(is_good):
            return Bounded(value, bold, is_divided)
        return Bounded(_value(weight, divisor, target), divisor, active)
    value = torch.where(is_good, value, _value(weight, divisor, target))
    return Bounded(value, torch.where(is_good, bold, divisor), torch.where(is_good, is_divided, active))


def rounded_within(value: Tensor, target: Target, dtype: torch.dtype) -> Tensor:
    """A real value that is as ``target`` says, divided a little more, so that it is so in numbers of ``dtype`` as well.

    There is no branch on values in it, so that it can be compiled.
    """
    rounded = Target(target.coefficient, True, target.eps, dtype, target.gain)
    with torch.no_grad(), torch.autocast(value.device.type, enabled=False):
        upper = torch.full((), target.coefficient, dtype=torch.float64, device=value.device)
        divisor, _ = careful_divisor(value.detach(), upper, rounded)
    return divided(value, divisor.to(compute_dtype(value.dtype))).to(dtype).to(value.dtype)


def autocast_dtype(weight: Tensor) -> torch.dtype | None:
    """The type that autocast will round ``weight`` to before it is used; None if it will not."""
    kind = weight.device.type
    if not torch.is_autocast_enabled(kind) or weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return None
    dtype = torch.get_autocast_dtype(kind)
    return None if dtype == weight.dtype else dtype


def _divisor(upper: Tensor, needed: Tensor, room: float, weight: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    divisor = needed / max(room, 0.0) * (1 + 16 * _U64)
    active = (upper > target.eps) & upper.isfinite()
    if target.cap:
        # What is not divided is not rounded either, unless to a narrower type.
        is_as_it_is = weight.dtype == target.dtype
        active = active & ((upper > target.coefficient) if is_as_it_is else (divisor > 1))
        divisor = divisor.clamp_min(1)
    constant = 1.0 if target.cap else 1 / target.coefficient
    return torch.where(active, divisor, constant), active


def _host_divisor(upper: float, needed: float, room: float, weight: Tensor, target: Target) -> tuple[float, bool]:
    """As `_divisor`, of numbers."""
    divisor = needed / room * (1 + 16 * _U64) if room > 0 else math.inf
    active = upper > target.eps and math.isfinite(upper)
    if not target.cap:
        return (divisor if active else 1 / target.coefficient), active
    active = active and (upper > target.coefficient if weight.dtype == target.dtype else divisor > 1)
    return (max(divisor, 1.0) if active else 1.0), active


def _value(weight: Tensor, divisor: Tensor, target: Target) -> Tensor:
    real = compute_dtype(weight.dtype).to_real()
    value = divided(weight, divisor.to(real))
    return value if weight.dtype == target.dtype else value.to(target.dtype).to(weight.dtype)


def _roundoffs(weight_dtype: torch.dtype, dtype: torch.dtype) -> tuple[float, float]:
    """Of an entry of the value, and of one operation."""
    wide = torch.finfo(compute_dtype(weight_dtype)).eps / 2
    narrow = max(torch.finfo(dtype).eps, torch.finfo(weight_dtype).eps) / 2
    # Dividing rounds, too; a complex number by a real one may be done as one by a complex one.
    entry = wide if narrow == wide else narrow + 2 * wide
    return entry * (8 if weight_dtype.is_complex else 1), wide * (4 if weight_dtype.is_complex else 1)


def _underflow(dtype: torch.dtype) -> float:
    """What an entry may be off by where it is too small for the type; denormal numbers may be flushed to zero."""
    info = torch.finfo(dtype)
    return info.smallest_normal if dtype != torch.float16 else info.eps * info.smallest_normal
