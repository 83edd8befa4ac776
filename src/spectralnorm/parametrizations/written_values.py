"""How what is written into a value that was handed out, as by ``nn.init.normal_(layer.weight)``, becomes the weight."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from spectralnorm.parametrizations.arithmetic import is_eager
from spectralnorm.parametrizations.fsdp import sharded_of
from spectralnorm.parametrizations.kept import Kept
from spectralnorm.parametrizations.same_numbers import is_same
from spectralnorm.parametrizations.threads import one_at_a_time
from spectralnorm.parametrizations.weight_clock import Moment, WeightClock

__all__ = ["HandedOut", "WrittenValues", "is_ordinary"]


def is_ordinary(weight: Tensor) -> bool:
    """Whether ``weight`` is a parameter that is all here."""
    # The type is exact, so it is no DTensor, and FSDP2 is all that may change another parameter instead.
    return type(weight) is nn.Parameter and sharded_of(weight) is None


class HandedOut(NamedTuple):
    """A value that was handed out without being kept.

    Attributes:
        value: detached.
        version: its version then.
        moment: of the weight then.
        numbers: a copy of the value, where one was asked for.
    """

    value: Tensor
    version: int
    moment: Moment
    numbers: Tensor | None

    def was_written_to(self) -> bool:
        """Whether somebody wrote into the value."""
        return self.value._version != self.version

    def was_changed_unseen(self) -> bool:
        """Whether somebody wrote into it through ``.data``, as far as its numbers tell."""
        return self.numbers is not None and not self.was_written_to() and not is_same(self.value, self.numbers)


class WrittenValues:
    """A part of `SpectralNorm`: what was written into the value that it has handed out becomes the weight.

    Attributes:
        handed_out: the last value that was handed out without being kept.
        remembers_numbers: whether a copy of its numbers is kept then.
        awaits_initialization: whether the next value that is kept is that of a weight that is being initialized.
    """

    handed_out: HandedOut | None
    remembers_numbers: bool
    awaits_initialization: bool = False
    _kept: Kept | None

    def sees_writes(self, weight: Tensor) -> bool:
        """Whether what is written into the value of ``weight`` is to reach it: a parameter that is all here."""
        return is_eager(weight) and is_ordinary(weight) and weight.numel() > 0

    def _hand_out(self, value: Tensor, weight: Tensor) -> None:
        """Remember a value that is not kept, so that a write into it is noticed."""
        if value.is_inference():  # it has no version; a write into it stays unseen
            self.handed_out = None
            return
        numbers = value.detach().clone() if self.remembers_numbers else None
        clock = self.watched(weight)
        clock.observe()
        self.handed_out = HandedOut(value.detach(), value._version, clock.now(), numbers)

    def settle(self) -> Tensor | None:
        """Let what was written into the value that was handed out be the weight, if nothing has changed that since.

        Returns:
            The weight, if something was.
        """
        if torch.compiler.is_compiling():  # traced values are not written into, and nobody can wait for a lock there
            return None
        with one_at_a_time:  # and `no_grad` only where it is needed: that takes longer than to look
            kept, handed = self._kept, self.handed_out
            if (
                kept is not None
                and kept.moment.is_now()
                and (kept.was_written_to() or kept.looks.find_initialization(kept.value))
            ):
                self.awaits_initialization = True  # which may go on
                with torch.no_grad():
                    return kept.moment.clock.weight.copy_(kept.written_value())
            if handed is not None and handed.was_written_to():
                return self._settle_handed_out(handed)
        return None

    @torch.no_grad()
    def _settle_handed_out(self, handed: HandedOut) -> Tensor | None:
        self.handed_out = None
        if not handed.moment.is_now():
            return None
        weight = handed.moment.clock.weight
        weight.copy_(handed.value)
        self._restore_scale()
        self.find_vectors_of_start(weight)  # what was found since was of memory that held anything
        return weight

    # What it has to be given

    def watched(self, weight: Tensor) -> WeightClock:
        raise NotImplementedError

    def find_vectors_of_start(self, weight: Tensor) -> None:
        raise NotImplementedError

    def _restore_scale(self) -> None:
        raise NotImplementedError
