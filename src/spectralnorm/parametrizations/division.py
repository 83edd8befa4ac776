"""Weights that kernels have divided by their norms, and their gradients.

One object for all weights of a step, whose lists grow with the model; what autograd and the user may want of one weight
(`Quotient`) is made when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spectralnorm.linalg.cpu.tables import Ends, integers
from spectralnorm.parametrizations.arithmetic import plain_arithmetic
from spectralnorm.parametrizations.memory import Memory
from spectralnorm.parametrizations.quotient import Quotient, gradients_of, is_batched
from spectralnorm.parametrizations.weight_clock import Moment

if TYPE_CHECKING:
    from spectralnorm.parametrizations.plans import Plans

__all__ = ["Division", "SomeOf"]

_Pairs = Sequence[tuple[Tensor, Tensor]]


class Division:
    """Weights divided by norms that are known: a `Batch`.

    Attributes:
        plans: of the weights.
        sigmas: the norms, (weights,).
        values: the weights divided.
        gradients_memory: on the CPU that of the last gradients.
        ends: where the vectors are, if that is known: `Ends`, on a GPU those of its kernels.
        rounded: the values of another type for uses under autocast, and that type; None: there are none.
        uppers: of strict weights, by place, what the norm is guaranteed not to exceed.
    """

    def __init__(
        self,
        plans: Plans,
        sigmas: Tensor,
        pairs: Callable[[], _Pairs],
        values: Memory,
        gradients_memory: Memory,
        ends: Any = None,
        *,
        uppers: Mapping[int, Tensor] | None = None,
        rules: Tensor | None = None,
    ) -> None:
        """Keep what was computed.

        Args:
            plans: as the attribute.
            sigmas: as the attribute.
            pairs: gives the whole vectors u and v of each.
            values: as the attribute.
            gradients_memory: as the attribute.
            ends: as the attribute.
            uppers: as the attribute; None: no weight is strict.
            rules: that the weights were divided by; None: those of the plans.
        """
        self.uppers, self._rules = uppers or {}, rules
        self.plans, self.sigmas, self.values = plans, sigmas, values
        self.gradients_memory = gradients_memory
        self.ends, self._pairs = ends, pairs
        self._found_pairs: _Pairs | None = None
        self._ends_of_pairs: Ends | None = None
        self.rounded: tuple[torch.dtype, Memory] | None = None
        self._numbers: tuple[Sequence[Any], Sequence[Any]] | None = None

    @property
    def pairs(self) -> _Pairs:
        """The whole vectors u and v of each weight."""
        if self._found_pairs is None:
            # Whoever asks first may do so under autocast, which would round the products that fill up grouped vectors.
            with plain_arithmetic(self.sigmas):
                self._found_pairs = self._pairs()
        return self._found_pairs

    def quotient(self, place: int, moment: Moment) -> Quotient:
        """What is to be known of one weight, which was read at a ``moment``.

        That is not kept here: who goes on with one of the weights is not to hold the others, which may be of a model
        that is gone.
        """
        divisors, active = self._found_numbers()
        coefficient, is_cap = self.plans.rules[place]
        return Quotient(
            weight=moment.clock.weight,
            moment=moment,
            value=self.values[place],
            sigma=self.sigmas[place],
            divisor=divisors[place],
            active=active[place],
            pairs=(self.pairs[place],),
            views=(self.plans.views[place],),
            flat_v=None,
            coefficient=coefficient,
            cap=is_cap,
            eps=self.plans.eps,
            upper=self.uppers.get(place),
            batch=self,
            place=place,
        )

    def divisor(self, place: int) -> float | Tensor:
        """What one weight was divided by."""
        return self._found_numbers()[0][place]

    def _found_numbers(self) -> tuple[Sequence[Any], Sequence[Any]]:
        """What each weight was divided by, and whether that depends on its norm."""
        if self._numbers is None:
            with plain_arithmetic(self.sigmas):
                divisors, active = self.plans.quotients.divisors(self.sigmas, **self._rules_if_any())
            is_of_host = self.plans.kernels.are_of_host
            self._numbers = (divisors.tolist(), active.tolist()) if is_of_host else (divisors.unbind(), active.unbind())
        return self._numbers

    def gradients(self, quotients: Sequence[Quotient], grads: Sequence[Sequence[Tensor]]) -> Sequence[Tensor]:
        """As `Batch` has it, of any of the weights, or of copies that have their values elsewhere."""
        places = [quotient.place for quotient in quotients]
        values, pairs = [quotient.value for quotient in quotients], [quotient.pairs[0] for quotient in quotients]
        return self._gradients_of(places, values, pairs, grads)

    def _gradients_of(
        self, places: Sequence[int], values: Sequence[Tensor], pairs: _Pairs, grads: Sequence[Sequence[Tensor]]
    ) -> Sequence[Tensor]:
        firsts, others = self._laid_out(places, grads)
        return self.plans.quotients.gradients(
            firsts,
            values,
            [u for u, _ in pairs],
            [v for _, v in pairs],
            self.sigmas,
            more_grads=others,
            places=places,
            are_checked=True,
            **self._rules_if_any(),
        )

    def _rules_if_any(self) -> dict[str, Any]:
        return {} if self._rules is None else {"rules": self._rules}

    def gradients_at(
        self, places: Sequence[int], grads: Sequence[Sequence[Tensor]], dtype: torch.dtype | None = None
    ) -> Sequence[Tensor]:
        """The same of the weights at ``places``, for the sums of one or two each, of their own type or of ``dtype``."""
        firsts, others = self._laid_out(places, grads, dtype)
        quotients = self.plans.quotients
        is_whole = places == list(range(len(self.plans.prototypes)))
        if not self.plans.kernels.are_of_host:
            if self.ends is None:
                values, pairs = [self.values[place] for place in places], [self.pairs[place] for place in places]
                us, vs = [u for u, _ in pairs], [v for _, v in pairs]
                return quotients.gradients(
                    firsts, values, us, vs, self.sigmas, more_grads=others, places=places, are_checked=True
                )
            addresses = self.values.addresses.tolist()
            if is_whole:
                return quotients.differentiate(firsts, others, addresses, self.ends, self.sigmas, None)
            addresses = [addresses[place] for place in places]
            return quotients.differentiate(firsts, others, addresses, self.ends, self.sigmas, places)
        ends = self._ends_of_pairs if self.ends is None else self.ends
        if ends is None:
            ends = self._ends_of_pairs = Ends(None, integers([[u.data_ptr(), v.data_ptr()] for u, v in self.pairs]))
        outs = self.gradients_memory.free_at(places, self.plans.prototypes)
        quotients.differentiate(
            firsts,
            others,
            self.values.addresses,
            self.gradients_memory.addresses,
            ends,
            self.sigmas,
            None if is_whole else places,
            self._rules,
        )
        return [out.data for out in outs]  # sooner than `detach`

    def _laid_out(
        self, places: Sequence[int], grads: Sequence[Sequence[Tensor]], dtype: torch.dtype | None = None
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """The first and the second of what comes for each weight, in memory as the weight."""
        plans = self.plans
        prototypes = plans.prototypes if dtype is None else plans.prototypes_of(dtype)
        expected = prototypes[0].dtype
        if plans.are_contiguous and all(
            grad.dtype is expected and grad.is_contiguous() for of_one in grads for grad in of_one
        ):  # sooner than one by one
            return [of_one[0] for of_one in grads], [of_one[1] if len(of_one) > 1 else None for of_one in grads]
        likes = [prototypes[place] for place in places]
        firsts = [_laid_out(of_one[0], like) for of_one, like in zip(grads, likes, strict=True)]
        others = [_laid_out(each[1], like) if len(each) > 1 else None for each, like in zip(grads, likes, strict=True)]
        return firsts, others


class SomeOf:
    """The weights at some places of a division, as `NormalizedWeights` takes them."""

    def __init__(
        self, division: Division, places: list[int], moments: Sequence[Moment], *, are_rounded: bool = False
    ) -> None:
        self.division, self.places, self._moments = division, places, moments
        self._dtype, self._values = None, division.values
        if are_rounded and division.rounded is not None:
            self._dtype, self._values = division.rounded

    @property
    def values(self) -> list[Tensor]:
        """The weights divided."""
        return [self._values[place] for place in self.places]

    def gradients(self, grads: Sequence[Sequence[Tensor]]) -> list[Tensor | None]:
        """dL/dW of each for the sum of what came from its uses; None where nothing came."""
        indices = [index for index, of_uses in enumerate(grads) if of_uses]
        if torch.is_grad_enabled() or any(grad.is_sparse or is_batched(grad) for of_uses in grads for grad in of_uses):
            return gradients_of([*map(self.division.quotient, self.places, self._moments)], grads)
        results: list[Tensor | None] = [None] * len(grads)
        if len(indices) == len(grads):
            return [*self.division.gradients_at(self.places, grads, self._dtype)]
        places = [self.places[index] for index in indices]
        found = self.division.gradients_at(places, [grads[index] for index in indices], self._dtype)
        for index, result in zip(indices, found, strict=True):
            results[index] = result
        return results


def _laid_out(grad: Tensor, like: Tensor) -> Tensor:
    """``grad`` with the type and strides of ``like``; the same memory, if only strides of single entries differ."""
    if grad.dtype is like.dtype:
        if grad.is_contiguous() if like.is_contiguous() else grad.stride() == like.stride():
            return grad
        pairs = zip(grad.shape, grad.stride(), like.stride(), strict=True)
        if all(size == 1 or mine == its for size, mine, its in pairs):
            return grad.as_strided(like.shape, like.stride())
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=grad.device).copy_(grad)
