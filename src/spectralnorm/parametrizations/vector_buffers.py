"""The buffers u and v of one weight, and when they hold vectors of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spectralnorm.errors import UserError
from spectralnorm.linalg import MatrixView, TrackedTriplet, compute_dtype, refine, seeded_direction
from spectralnorm.parametrizations.arithmetic import is_eager, plain_arithmetic
from spectralnorm.parametrizations.shards import is_distributed, local_part, whole

__all__ = ["REFINED_RTOL", "VectorBuffers"]

# Lanczos gains a constant factor per step, so ten times better than the promised 1e-4 is nearly free.
REFINED_RTOL = 1e-5
# The buffers of each view's vectors.
_BUFFERS = (("_u", "_v"), ("_u_in", "_v_in"))
_States = list[tuple[int, int]]


class VectorBuffers(nn.Module):
    """A module with buffers for the singular vectors of one weight, under the names of torch's parametrization.

    They may hold no vectors: zeros, what is not finite, or the start alone, because their memory came after
    construction (`to_empty`) or the weight had no norm then. Such ones are found anew from the weight before a use.

    Attributes:
        name: the weight's name in its layer. The start of the buffers is drawn from it and their size.
        eps: a norm up to here counts as zero.
        views: how the weight is read as matrices; each has its u and v.
    """

    name: str
    eps: float
    views: tuple[MatrixView, ...]
    _u: Tensor
    _v: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._buffer_names: list[str] = []
        # States of the buffers, as `_state_of_buffers` has them: one in which they are known to hold unit vectors, and
        # one in which they hold the start alone.
        self._known_state: _States | None = None
        self._start_state: _States | None = None

    def register_vectors(self, weight: Tensor) -> None:
        """Make the buffers, with their start."""
        for view, names in zip(self.views, _BUFFERS, strict=False):
            for name, size in zip(names, view.whole_shape(weight), strict=True):
                self.register_buffer(name, self._start_of(name, size, weight))
                self._buffer_names.append(name)

    def start_vectors_afresh(self) -> None:
        """Fill memory that came after construction as construction does without a weight."""
        for name, buffer in zip(self._buffer_names, self.buffers_of_views(), strict=True):
            buffer.copy_(self._start_of(name, len(buffer), buffer))
        self._start_state = self._state_of_buffers()

    def _start_of(self, buffer_name: str, size: int, like: Tensor) -> Tensor:
        return seeded_direction(f"{self.name}.{buffer_name[1:]}", size, like)

    def buffers_of_views(self) -> list[Tensor]:
        """The buffers u and v, view by view."""
        buffers: Any = self._buffers  # without nn.Module's search: it is asked at every step
        found = [buffers[name] for name in self._buffer_names]
        return [buffer if type(buffer) is Tensor else local_part(buffer) for buffer in found]

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """The buffers u and v of each view."""
        # Not by zip: torch.compile up to 2.9 takes its strict=False for True.
        names = _BUFFERS[: len(self.views)]
        return [(local_part(getattr(self, u)), local_part(getattr(self, v))) for u, v in names]

    @torch.no_grad()
    def write_vectors(self, *pairs: tuple[Tensor, Tensor]) -> None:
        """Write u and v of each view into the buffers."""
        are_known = is_eager(self._u) and self._known_state == self._state_of_buffers()
        # In place: DataParallel's replicas share the buffers' memory with the module they were made from.
        for buffers, vectors in zip(self.pairs(), pairs, strict=True):
            for buffer, vector in zip(buffers, vectors, strict=True):
                buffer.copy_(vector)
        if are_known:
            self._known_state = self._state_of_buffers()

    def require_vectors(self, weight: Tensor) -> None:
        """Put vectors of ``weight`` into buffers that hold none.

        It is looked at after somebody else has written into them: a GPU is waited for then.
        """
        # Without `no_grad` around it: torch.export would write that down, and cannot read it again.
        if not is_eager(self._u) or self.__dict__.get("_is_replica", False):
            return
        state = self._state_of_buffers()
        if state == self._known_state:
            return
        lengths = torch.stack([torch.linalg.vector_norm(buffer) for buffer in self.buffers_of_views()]).tolist()
        if state == self._start_state or not all(0 < length < float("inf") for length in lengths):
            self.find_vectors(whole(weight))
        else:
            self._known_state = self._state_of_buffers()

    def find_vectors_of_start(self, weight: Tensor) -> None:
        """Put vectors of the whole ``weight`` into buffers that held the start alone, whatever they hold now."""
        if self._start_state is not None:
            self._start_state = None
            self.find_vectors(weight)

    @torch.no_grad()
    def find_vectors(self, weight: Tensor) -> bool:
        """Put vectors into the buffers, from the whole ``weight`` alone; if it has no norm, another time.

        Returns:
            Whether it has one.
        """
        if not 0 < float(torch.linalg.vector_norm(weight.to(compute_dtype(weight.dtype)))) < float("inf"):
            return False
        self.write_vectors(*self.refined_vectors(weight))
        self._known_state = self._state_of_buffers()
        return True

    def find_first_vectors(self, weight: Tensor) -> None:
        """At construction: as `find_vectors`; of a weight without a norm the buffers hold the start alone."""
        self.find_vectors(whole(weight))
        if self._known_state is None:
            self._start_state = self._state_of_buffers()

    def _state_of_buffers(self) -> _States:
        """The version and the address of each buffer."""
        return [(0 if each.is_inference() else each._version, each.data_ptr()) for each in self.buffers_of_views()]

    def refined(self, view: MatrixView, weight: Tensor) -> TrackedTriplet:
        """To full accuracy, from the weight alone."""
        self.require_all_of(weight)
        blocks = view.memory_blocks(weight)
        blocks = blocks.to(compute_dtype(blocks.dtype))
        start = seeded_direction(f"{self.name}.start", blocks.shape[-1], blocks)
        return refine(blocks, start, rtol=REFINED_RTOL, eps=self.eps)

    def refined_vectors(self, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Whole u and v of each view for a ``weight`` of which nothing is known, in its type; to full accuracy."""
        with plain_arithmetic(weight):
            entries, pairs = whole(weight), []
            for view in self.views:
                u, v, sigma, _ = self.refined(view, entries)
                u, v, _ = view.whole_vectors(u, v, sigma, entries)
                pairs.append((u.to(weight.dtype), v.to(weight.dtype)))
        return pairs

    def require_all_of(self, weight: Tensor) -> None:
        """Refuse what is left of a weight while its entries are elsewhere."""
        if not is_eager(weight):
            return
        expected = self._u.numel() * self._v.numel()
        is_freed = not is_distributed(weight) and weight.untyped_storage().nbytes() == 0 < expected
        if weight.numel() != expected or is_freed:
            hint = "inputs are for the layer that spectral_norm returns, and its normalization takes the whole weight."
            if is_freed or weight.ndim < 2:  # what FSDP1 leaves is a vector
                hint = (
                    "where FSDP1 shards a model, read its weights within "
                    "FullyShardedDataParallel.summon_full_params(model)."
                )
            raise UserError(
                f"The weight {self.name!r} should have {expected} entries, but {0 if is_freed else weight.numel()} are "
                f"here; {hint}"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known_state": None, "_start_state": None}
