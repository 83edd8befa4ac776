"""Differentiable augmentations of what the discriminator sees (DiffAugment, Zhao et al. 2020; ADA is in `ada`).

Real and fake images pass through the same random transformation, and gradients flow through it to the generator, so
the generator learns the distribution of the images, not of their augmented copies. Every function takes images of
shape ``(batch, channels, height, width)`` in [-1, 1] and a generator of random numbers on the same device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from spectralnorm.errors import UserError
from spectralnorm.gan import ada

__all__ = [
    "AUGMENTATIONS",
    "POLICIES",
    "Augmentation",
    "Augmenter",
    "Plan",
    "compose",
    "make_augmenter",
    "read_augmentation",
]

Augmentation = Callable[[Tensor, torch.Generator], Tensor]
Transform = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""As an `Augmentation`, with the probability p, a scalar on the device, that each image takes each of its parts."""


def shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image by up to an eighth of its size on both axes; what comes in is background (-1)."""
    return _moved(images, generator, background=-1.0)  # black after scaling to [-1, 1]


def translation(images: Tensor, generator: torch.Generator) -> Tensor:
    """As `shift`, but what comes in is mid-gray (0), as in the reference code of DiffAugment."""
    return _moved(images, generator, background=0.0)


def cutout(images: Tensor, generator: torch.Generator) -> Tensor:
    """Set a square of half the image's size, at a random place, to mid-gray (0)."""
    batch, _, height, width = images.shape
    top = _integers(batch, height + 1, generator)[:, None] - height // 4
    left = _integers(batch, width + 1, generator)[:, None] - width // 4
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    in_rows = (rows >= top) & (rows < top + height // 2)
    in_columns = (columns >= left) & (columns < left + width // 2)
    keep = ~(in_rows[:, :, None] & in_columns[:, None, :])
    return images * keep[:, None].to(images.dtype)


def flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability one half."""
    mirrored = _integers(images.shape[0], 2, generator).bool()
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def color(images: Tensor, generator: torch.Generator) -> Tensor:
    """Change brightness, saturation and contrast of each image at random, as in the reference code of DiffAugment."""

    def uniform() -> Tensor:
        return torch.rand(images.shape[0], 1, 1, 1, generator=generator, device=images.device, dtype=images.dtype)

    images = images + (uniform() - 0.5)
    gray = images.mean(dim=1, keepdim=True)
    images = gray + (images - gray) * (2 * uniform())
    middle = images.mean(dim=(1, 2, 3), keepdim=True)
    return middle + (images - middle) * (0.5 + uniform())


AUGMENTATIONS: dict[str, Augmentation] = {
    "shift": shift,
    "cutout": cutout,
    "flip": flip,
    "color": color,
    "translation": translation,
}
"""Augmentations by name."""

POLICIES: dict[str, tuple[str, ...]] = {"none": (), "diffaugment": ("color", "translation", "cutout")}
"""Names for lists of augmentations. ``diffaugment`` is what Zhao et al. 2020 use where there are few images."""

_ADA = "ada"
_TARGET = 0.6
_KIMG = 500.0
_INTERVAL = 4


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an augmentation's name says, checked."""

    names: tuple[str, ...]
    """Members of `AUGMENTATIONS` in order, or ``ada`` alone; empty: none."""
    p: float | None
    """Probability of each part on each image, at the start if there is a target; None: always."""
    target: float | None
    """r_t that p is led to; None: p stays."""
    kimg: float
    """Thousands of real images in which p can go from 0 to 1."""


def read_augmentation(augmentation: str) -> Plan:
    """Take apart ``"none"``, ``"shift,cutout"``, ``"diffaugment:p=0.5"``, ``"ada"``, ``"ada:target=0.6:kimg=500"``.

    Options follow the names: ``p`` a constant probability, ``target`` the r_t of an adaptive one, ``kimg`` its speed.
    ``ada`` alone has target 0.6; anything else without options acts on every image.

    Raises:
        UserError: a name or an option is not known, or a number out of range.
    """
    listed, *parts = augmentation.split(":")
    names = POLICIES.get(listed) if listed in POLICIES else tuple(name.strip() for name in listed.split(","))
    assert names is not None
    if names != (_ADA,):
        for name in names:
            if name in (*POLICIES, _ADA):
                raise UserError(
                    f"The augmentation '{name}' stands alone, not in a list; a list may hold "
                    f"{', '.join(AUGMENTATIONS)}."
                )
            if name not in AUGMENTATIONS:
                choices = ", ".join([*POLICIES, _ADA, *AUGMENTATIONS])
                raise UserError(f"Unknown augmentation '{name}'; choose one of {choices}.")
    options = dict(_option(part) for part in parts)
    if "p" in options and {"target", "kimg"} & set(options):
        raise UserError(f"'{augmentation}' gives p and how p adapts; give p for a constant one, or target and kimg.")
    target = options.get("target", _TARGET if "kimg" in options or (names == (_ADA,) and "p" not in options) else None)
    return Plan(
        names=names,
        p=0.0 if target is not None else options.get("p"),
        target=target,
        kimg=options.get("kimg", _KIMG),
    )


def _option(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    # Written so that NaN, which fails every comparison, is refused too.
    match name:
        case "p" if 0 <= number <= 1:
            return name, number
        case "target" if 0 < number < 1:
            return name, number
        case "kimg" if 0 < number < math.inf:
            return name, number
    raise UserError(
        f"Unknown option '{text}' of an augmentation; write p=NUMBER from 0 to 1, or target=NUMBER between 0 and 1 "
        "and kimg=NUMBER above 0, each after a colon, such as ada:target=0.6."
    )


def compose(names: Sequence[str]) -> Augmentation:
    """One augmentation that applies the named ones in order; none for an empty list."""
    steps = [AUGMENTATIONS[name] for name in names]

    def augment(images: Tensor, generator: torch.Generator) -> Tensor:
        for step in steps:
            images = step(images, generator)
        return images

    return augment


def _always(names: Sequence[str]) -> Transform:
    """The named ones in order, on every image: no draws for whether."""
    augment = compose(names)
    return lambda images, p, random: augment(images, random)


def _with_probability(names: Sequence[str]) -> Transform:
    """The named ones in order, each on each image with probability p."""
    steps = [AUGMENTATIONS[name] for name in names]

    def transform(images: Tensor, p: Tensor, random: torch.Generator) -> Tensor:
        for step in steps:
            happens = torch.rand(len(images), 1, 1, 1, generator=random, device=random.device) < p
            images = torch.where(happens, step(images, random), images)
        return images

    return transform


class Augmenter:
    """An augmentation as the trainer applies it: on the device, with a probability that stays or adapts.

    The adaptive one is that of Karras et al. 2020, section 3: ``r_t``, the mean sign of the discriminator's logits of
    real images, tells how far it has learned them by heart; every few batches p rises by a fixed step if r_t is above
    its target, and falls by it if it is below. Nothing here waits for the device.

    Args:
        transform: images, p and random numbers to images.
        device: of the images.
        p: probability, at the start if there is a target.
        target: of r_t; None: p stays.
        kimg: thousands of real images in which p can go from 0 to 1.
        interval: calls of `adapt` from one step of p to the next.
    """

    def __init__(
        self,
        transform: Transform,
        *,
        device: torch.device | str,
        p: float = 1.0,
        target: float | None = None,
        kimg: float = _KIMG,
        interval: int = _INTERVAL,
    ) -> None:
        self._transform = transform
        self.p = torch.tensor(p, device=device)
        """The probability now: a scalar on the device, always the same tensor."""
        self.signs = torch.zeros(2, device=device)
        """Sum and number of the signs observed since the last step of p. To adapt one p in several processes, sum
        this over them before `adapt`."""
        self.target = target
        self._kimg = kimg
        self._interval = interval
        self._calls = 0
        self._adapted_at = 0

    def __call__(self, images: Tensor, random: torch.Generator) -> Tensor:
        """Augment images ``(batch, channels, height, width)`` with random numbers of the same device."""
        return self._transform(images, self.p, random)

    @property
    def is_adaptive(self) -> bool:
        """Whether p changes, so that `observe` and `adapt` do something."""
        return self.target is not None

    def observe(self, real_logits: Tensor) -> None:
        """Count the signs of logits of real, augmented images."""
        if self.is_adaptive:
            logits = real_logits.detach()
            self.signs[0] += logits.sign().sum()
            self.signs[1] += logits.numel()

    def adapt(self, images_seen: int) -> None:
        """To be called after each batch of real images; every fourth time p moves.

        Args:
            images_seen: real images since the run began.
        """
        if self.target is None:
            return
        self._calls += 1
        if self._calls % self._interval:
            return
        total, number = self.signs
        # Without a logit seen 0 / 1 - target would say that p is too large.
        direction = (total / number.clamp(min=1) - self.target).sign() * (number > 0)
        self.p += direction * ((images_seen - self._adapted_at) / (1000 * self._kimg))
        self.p.clamp_(0, 1)
        self.signs.zero_()
        self._adapted_at = images_seen

    def state_dict(self) -> dict[str, Tensor]:
        """What exact resuming needs; empty if p does not change."""
        if not self.is_adaptive:
            return {}
        counts = torch.tensor([self._calls, self._adapted_at])
        return {"p": self.p.clone(), "signs": self.signs.clone(), "counts": counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go back to what `state_dict` returned."""
        if self.is_adaptive:
            self.p.copy_(state["p"])
            self.signs.copy_(state["signs"])
            self._calls, self._adapted_at = state["counts"].tolist()


def make_augmenter(augmentation: str, *, device: torch.device | str) -> Augmenter:
    """The augmentation of a name.

    Args:
        augmentation: as `read_augmentation` takes it.
        device: of the images.

    Raises:
        UserError: the name says nothing known.
    """
    plan = read_augmentation(augmentation)
    if plan.names == (_ADA,):
        transform = ada.transform
    else:
        transform = _always(plan.names) if plan.p is None else _with_probability(plan.names)
    p = 1.0 if plan.p is None else plan.p
    return Augmenter(transform, device=device, p=p, target=plan.target, kimg=plan.kimg)


def _moved(images: Tensor, generator: torch.Generator, *, background: float) -> Tensor:
    batch, _, height, width = images.shape
    reach_y, reach_x = height // 8, width // 8
    # One padded gather moves every image by its own offset without a loop.
    padded = F.pad(images, (reach_x, reach_x, reach_y, reach_y), value=background)
    rows = _integers(batch, 2 * reach_y + 1, generator)[:, None] + torch.arange(height, device=images.device)
    columns = _integers(batch, 2 * reach_x + 1, generator)[:, None] + torch.arange(width, device=images.device)
    index = torch.arange(batch, device=images.device)
    return padded.permute(0, 2, 3, 1)[index[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _integers(batch: int, high: int, generator: torch.Generator) -> Tensor:
    return torch.randint(high, (batch,), generator=generator, device=generator.device)
