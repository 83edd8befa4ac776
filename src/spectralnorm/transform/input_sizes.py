"""Which sizes of images the convolutions of a model meet, from one forward without values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy

from spectralnorm.errors import UserError
from spectralnorm.parametrizations.image_size import geometry_of
from spectralnorm.parametrizations.snapshot import Snapshot
from spectralnorm.transform.selection import Candidate

__all__ = ["input_sizes"]


def input_sizes(
    model: nn.Module, candidates: Iterable[Candidate], input_shape: Sequence[int]
) -> dict[int, tuple[int, ...]]:
    """The size of the images that each convolution reads, by the id of its weight; those that are not met are missing.

    Args:
        model: takes one tensor. It stays as it is.
        candidates: weights of its layers.
        input_shape: of one sample, without the batch.

    Raises:
        UserError: the shape is none, the model cannot be run without values, or a convolution reads images of several
            sizes.
    """
    is_shape = isinstance(input_shape, Sequence) and not isinstance(input_shape, str) and len(input_shape) > 0
    if not is_shape or not all(isinstance(size, int) and size > 0 for size in input_shape):
        raise UserError(f"input_shape must be positive integers, (channels, height, width), got {input_shape!r}.")
    found: dict[int, tuple[int, ...]] = {}
    candidates = list(candidates)
    for candidate in candidates:
        if is_lazy(candidate.weight):
            raise UserError(
                f"input_shape needs weights that have shapes, and {candidate.label} has none yet; run one forward with "
                "real inputs first."
            )
    before = Snapshot(model)
    try:
        for candidate in candidates:
            if geometry_of(candidate.module, candidate.tensor_name, candidate.weight) is not None:
                candidate.module.register_forward_pre_hook(_Look(candidate, found), with_kwargs=True)
        model.eval()  # so that no statistics are made of a batch
        _run_without_values(model, tuple(input_shape))
    finally:
        before.restore()  # hooks, modes, and what the model keeps of a forward
    return found


class _Look:
    """A forward pre-hook that writes down the size of the images."""

    def __init__(self, candidate: Candidate, found: dict[int, tuple[int, ...]]) -> None:
        self._candidate, self._found = candidate, found

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        images = args[0] if args else kwargs["input"]
        num_axes = self._candidate.weight.ndim - 2
        size = tuple(images.shape[-num_axes:])
        before = self._found.setdefault(id(self._candidate.weight), size)
        if before != size:
            raise UserError(
                f"{self._candidate.label} reads images of sizes {before} and {size}, so no one size is right for it; "
                "leave input_shape out."
            )


def _run_without_values(model: nn.Module, input_shape: tuple[int, ...]) -> None:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    dtypes = (tensor.dtype for _, tensor in named if tensor.is_floating_point())
    images = torch.empty(2, *input_shape, dtype=next(dtypes, torch.get_default_dtype()), device="meta")
    try:
        with torch.no_grad():
            of_each: dict[int, Tensor] = {}
            tensors = {
                name: of_each.setdefault(id(tensor), torch.empty_like(tensor, device="meta")) for name, tensor in named
            }
            functional_call(model, tensors, (images,))
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"input_shape={input_shape} needs a forward of {type(model).__name__} with one tensor that has no values, "
            f"which failed ({reason}); leave it out, or give each convolution its input_size by spectral_norm."
        ) from error
