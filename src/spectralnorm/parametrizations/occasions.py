"""When weights may have been written through ``.data``: then numbers are compared, and not always."""

from __future__ import annotations

from typing import ClassVar

import torch

__all__ = ["Occasions"]


class Occasions:
    """What is done before weights are written by hand, wherever it happens.

    An update by hand follows a backward pass, and that of an average the step of an optimizer; averaged weights are
    swapped in to be used without a graph, and out again to be trained; and most code asks a model for its parameters
    before it writes into them.

    Attributes:
        num: how many backward passes through normalized weights there were, steps of optimizers, of weights that nobody
            watches too, looks at the parameters of a normalized layer, as for a state dict or a copy, and changes
            between uses under grad and uses without it.
        with_grad: whether the last use was under grad.
    """

    num: ClassVar[int] = 0
    with_grad: ClassVar[bool] = True

    @classmethod
    def count_use(cls) -> None:
        """Look whether a use is under grad."""
        with_grad = torch.is_grad_enabled()
        if with_grad is not cls.with_grad:
            cls.with_grad = with_grad
            cls.num += 1
