"""What a kept value rests on, as tensors: saved with a checkpoint, it makes a resumed training exact.

The buffers u and v are enough to go on from: the norm is found again from the weight to 1e-4. But a run that was killed
and resumed then differs from one that was not, by that much at first and by everything later. With the tracked vectors
it is the same run to the last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectralnorm.linalg import Frame, TrackedTriplet
from spectralnorm.linalg.leading_of_map import LeadingImages
from spectralnorm.parametrizations import engine
from spectralnorm.parametrizations.arithmetic import plain_arithmetic
from spectralnorm.parametrizations.kept import Kept
from spectralnorm.parametrizations.promise import shorter_vectors
from spectralnorm.parametrizations.spectral_norm import SpectralNorm

__all__ = ["fits_tracking", "restore_tracking", "tracking_of"]


def tracking_of(normalization: SpectralNorm, weight: Tensor) -> dict[str, Tensor]:
    """What is tracked of one weight, by name; empty where nothing is kept.

    Entries that belong to columns of the weight's matrix are in torch's order, whatever the layout in memory.
    """
    kept = _kept(normalization, weight)
    if kept is None:
        return {}
    state = {
        "age": torch.tensor(kept.age, device="cpu"),
        "is_exact": torch.tensor(kept.is_exact, device="cpu"),
    }
    for number, (view, triplet) in enumerate(zip(normalization.views, kept.triplets, strict=True)):
        rows, is_left = triplet.frame
        parts = {
            "u": triplet.u,
            "v": view.in_torch_order(triplet.v, weight),
            "sigma": triplet.sigma,
            "frame": rows if is_left else view.in_torch_order(rows, weight),
            "is_left": torch.tensor(is_left, device="cpu"),
        }
        state |= {f"{number}.{name}": part for name, part in parts.items()}
    if kept.quotient.upper is not None:
        state |= {"upper": kept.quotient.upper, "upper_of": _checksums(weight)}
        if normalization.symbol_vectors is not None:
            state["symbol_vectors"] = normalization.symbol_vectors
    images = normalization.leading_images
    if normalization.follows_map and images is not None:
        state |= {f"map.{name}": part for name, part in images._asdict().items()}
        state["map.is_learned"] = torch.tensor(normalization.learned_size is not None, device="cpu")
    return state


def fits_tracking(normalization: SpectralNorm, weight: Tensor, state: dict[str, Tensor]) -> bool:
    """Whether what `tracking_of` returned is of a weight of this shape, read as the same matrices."""
    kept = _kept(normalization, weight)
    triplets = () if kept is None else kept.triplets
    return all(
        f"{number}.{name}" in state and state[f"{number}.{name}"].shape == part.shape
        for number, triplet in enumerate(triplets)
        for name, part in (("u", triplet.u), ("v", triplet.v))
    )


def restore_tracking(normalization: SpectralNorm, weight: Tensor, state: dict[str, Tensor]) -> None:
    """Go on from what `tracking_of` returned, for the same weight as then.

    Args:
        normalization: of the weight.
        weight: the raw weight, already loaded.
        state: as saved, and found to fit by `fits_tracking`; on any device.
    """
    if _kept(normalization, weight) is None:
        return

    def part(number: int, name: str) -> Tensor:
        return state[f"{number}.{name}"].to(weight.device, copy=True)

    with plain_arithmetic(weight):
        triplets = []
        for number, view in enumerate(normalization.views):
            is_left = bool(state[f"{number}.is_left"])
            rows = part(number, "frame")
            frame = Frame(rows if is_left else view.in_memory_order(rows, weight), is_left)
            v = view.in_memory_order(part(number, "v"), weight)
            triplets.append(TrackedTriplet(part(number, "u"), v, part(number, "sigma"), frame))
        leading = shorter_vectors(triplets[0].u, triplets[0].v)
        vectors = state.get("symbol_vectors")
        normalization.symbol_vectors = None if vectors is None else vectors.to(weight.device, copy=True)
        upper = _same_bound(normalization, weight, leading, state)
        found_map = None
        if normalization.follows_map and "map.images" in state:
            images = LeadingImages(
                *(state[f"map.{name}"].to(weight.device, copy=True) for name in LeadingImages._fields)
            )
            if bool(state["map.is_learned"]):
                normalization.learned_size = tuple(images.images.shape[2:])
            found_map = normalization.map_again(weight, images)
        age, is_exact = int(state["age"]), bool(state.get("is_exact", False))
        engine.keep_triplets(
            normalization, weight, triplets, age=age, is_exact=is_exact, upper=upper, found_map=found_map
        )


def _same_bound(
    normalization: SpectralNorm, weight: Tensor, leading: Tensor, state: dict[str, Tensor]
) -> Tensor | None:
    """The bound that was saved, if it was of this very weight; else a new one, which may differ a little."""
    if not normalization.strict:
        return None
    if "upper" in state and torch.equal(state["upper_of"].cpu(), _checksums(weight).cpu()):
        return state["upper"].to(weight.device, copy=True)
    return normalization.upper_bound(weight, leading)


def _checksums(weight: Tensor) -> Tensor:
    """Two sums over the bits of the entries, which another weight would have to hit both: (2,), int64."""
    size = weight.element_size()
    bits = weight.detach().contiguous().flatten().view(torch.uint8).view(-1, size).long()
    words = (bits * torch.tensor([257**place % (2**31 - 1) for place in range(size)], device=bits.device)).sum(1)
    places = torch.arange(1, len(words) + 1, device=bits.device)
    return torch.stack([words.sum(), (words * (places * 2654435761 % (2**31 - 1))).sum()])


def _kept(normalization: SpectralNorm, weight: Tensor) -> Kept | None:
    if normalization._is_vector or not normalization._can_keep(weight):
        return None
    return normalization._current(weight)
