"""What metrics see images through: a network that turns images into features, and how images are made to fit it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralnorm.errors import UserError

__all__ = ["FeatureExtractor", "Features", "NetworkExtractor", "check_images", "full_precision"]


class Features(NamedTuple):
    """What an extractor sees in n images; on the CPU, wherever the network ran."""

    features: Tensor
    """float32 (n, num_features)."""
    logits: Tensor | None
    """float32 (n, classes), or None if the network does not classify."""


@runtime_checkable
class FeatureExtractor(Protocol):
    """Turns images into features that can be compared."""

    name: str
    """As it stands in the names of metrics: ``FD-SqueezeNet``."""
    weights_sha256: str
    """Of the weights file: two numbers compare only if they come from the same weights."""
    num_features: int

    def resize_description(self, height: int, width: int, *, channels: int = 3) -> str:
        """How images of this size are made to fit, for the provenance of a number."""
        ...

    def __call__(self, images: Tensor) -> Features:
        """Compute features of images, uint8 (n, channels, height, width), in batches."""
        ...


class NetworkExtractor:
    """A network with weights from a file, fed with images of any size, gray or RGB.

    Images are resized with antialiasing, in float32 and without rounding. Gray is repeated for a network that wants
    RGB; RGB is averaged for one that wants gray.

    Args:
        name: as it stands in the names of metrics.
        network: maps float32 images (n, channels, image_size, image_size) of 0 to 255 to features and logits.
        weights_sha256: of the file its weights come from.
        image_size: height and width it takes.
        channels: that it takes, 1 or 3.
        num_features: that it gives.
        batch_size: images at once.
        device: where it runs.
        resize: ``bilinear`` or ``bicubic``; the latter is cut off at 0 and 255.
    """

    def __init__(
        self,
        *,
        name: str,
        network: nn.Module,
        weights_sha256: str,
        image_size: int,
        channels: int,
        num_features: int,
        batch_size: int,
        device: torch.device | str = "cpu",
        resize: str = "bilinear",
    ) -> None:
        self.name = name
        self.weights_sha256 = weights_sha256
        self.num_features = num_features
        self.device = torch.device(device)
        self._image_size = image_size
        self._channels = channels
        self._batch_size = batch_size
        self._resize = resize
        network = network.eval().requires_grad_(False).to(self.device)
        self._network = network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.num_features} features, {self.weights_sha256[:8]})"

    def resize_description(self, height: int, width: int, *, channels: int = 3) -> str:
        """How images of this size are made to fit: ``bilinear, antialiased, 32 -> 128; gray repeated to RGB``."""
        came = str(height) if height == width else f"{height} x {width}"
        text = (
            f"none, {came}"
            if self._fits(height, width)
            else f"{self._resize}, antialiased, {came} -> {self._image_size}"
        )
        if channels < self._channels:
            text += "; gray repeated to RGB"
        if channels > self._channels:
            text += "; RGB averaged to gray"
        return text

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """Compute the features of images.

        Args:
            images: uint8 (n, 1 or 3, height, width), on any device.

        Raises:
            UserError: they are of another type or shape.
        """
        check_images(images)
        features: list[Tensor] = []
        logits: list[Tensor] = []
        with full_precision(self.device):
            for batch in images.split(self._batch_size):
                output, scores = self._network(self._prepared(batch))
                features.append(output.cpu())
                if scores is not None:
                    logits.append(scores.cpu())
        return Features(torch.cat(features), torch.cat(logits) if logits else None)

    @torch.inference_mode()
    def of_floats(self, images: Tensor) -> Tensor:
        """Features of images that were not rounded to levels, as small differences between them need.

        Args:
            images: float (n, 1 or 3, height, width) of 0 to 255; as many as fit on the device at once.

        Returns:
            float32 (n, num_features), on the extractor's device.
        """
        with full_precision(self.device):
            return self._network(self._prepared(images))[0]

    def _fits(self, height: int, width: int) -> bool:
        return height == width == self._image_size

    def _prepared(self, images: Tensor) -> Tensor:
        images = images.to(self.device).float()
        if images.shape[1] > self._channels:
            images = images.mean(dim=1, keepdim=True)
        if not self._fits(*images.shape[2:]):
            size = (self._image_size, self._image_size)
            images = F.interpolate(images, size=size, mode=self._resize, align_corners=False, antialias=True)
            # Only the bicubic filter goes beyond the levels it was given.
            images = images.clamp(0, 255)
        # Gray is repeated last, so that it is resized once.
        images = images.expand(-1, self._channels, -1, -1)
        return images.contiguous(memory_format=torch.channels_last)


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Convolve in float32 also where a run allows less: TF32 and autocast would move the features by about 1e-3."""
    # torch 2.9 replaced the old switch, and refuses to read it once the new one has been used.
    new = getattr(torch.backends.cudnn, "conv", None)
    owner, switch, full = (
        (torch.backends.cudnn, "allow_tf32", False) if new is None else (new, "fp32_precision", "ieee")
    )
    before = getattr(owner, switch)
    setattr(owner, switch, full)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        setattr(owner, switch, before)


def check_images(images: Tensor) -> None:
    """Check that images are what every extractor takes.

    Raises:
        UserError: they are not.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise UserError(
            "Images must be uint8 of shape (n, 1 or 3, height, width) with n > 0, "
            f"got {str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}."
        )
