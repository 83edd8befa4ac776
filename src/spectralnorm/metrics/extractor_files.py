"""Extractors that are read from a file of one's own: torch-fidelity's Inception, DINOv2, any TorchScript network.

Nothing here is downloaded. The hash of the file goes into every number's provenance.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from spectralnorm.errors import UserError
from spectralnorm.metrics.dinov2 import DINOv2, dinov2_from_weights
from spectralnorm.metrics.network_extractor import (
    FeatureExtractor,
    Features,
    NetworkExtractor,
    check_images,
    full_precision,
)

__all__ = ["EXTRACTORS_FROM_FILE", "PUBLISHED_INCEPTION", "FileExtractor", "is_torchscript", "load_torchscript"]

PUBLISHED_INCEPTION = "6726825d"
"""How the SHA-256 of torch-fidelity's file of Inception weights begins; by convention it is part of the file's name."""
_TORCHSCRIPT = (".pt", ".ts", ".torchscript")


class FileExtractor:
    """A network that takes uint8 RGB images of any size, and resizes and normalizes them itself.

    Args:
        name: as it stands in the names of metrics.
        network: maps uint8 (n, 3, height, width) to features (n, d), or to features and logits (n, classes).
        weights_sha256: of the file it comes from.
        what: the file, for messages.
        resizing: how it resizes, for the provenance.
        is_published_inception: whether its metrics may be called FID, KID and IS.
        batch_size: images at once.
        device: where it runs.

    Raises:
        UserError: the network gives something else.
    """

    def __init__(
        self,
        *,
        name: str,
        network: Callable[[Tensor], Any],
        weights_sha256: str,
        what: str,
        resizing: str = "by the network",
        is_published_inception: bool = False,
        batch_size: int = 50,
        device: torch.device | str = "cpu",
    ) -> None:
        self.name = name
        self.weights_sha256 = weights_sha256
        self.device = torch.device(device)
        self.is_published_inception = is_published_inception
        self._network = network
        self._what = what
        self._resizing = resizing
        self._batch_size = batch_size
        self.num_features = self(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).features.shape[1]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.num_features} features, {self.weights_sha256[:8]})"

    def resize_description(self, height: int, width: int, *, channels: int = 3) -> str:
        """How images of this size are made to fit."""
        came = str(height) if height == width else f"{height} x {width}"
        return f"{self._resizing}, {came}" + ("; gray repeated to RGB" if channels == 1 else "")

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """Compute features of images, uint8 (n, 1 or 3, height, width), in batches."""
        check_images(images)
        features, logits = [], []
        with full_precision(self.device):
            for batch in images.split(self._batch_size):
                seen, scores = self._see(batch.to(self.device).expand(-1, 3, -1, -1).contiguous())
                features.append(seen.float().cpu())
                if scores is not None:
                    logits.append(scores.float().cpu())
        return Features(torch.cat(features), torch.cat(logits) if logits else None)

    def _see(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        try:
            output = self._network(images)
        # What a network of any origin raises is not known.
        except Exception as error:
            line = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise UserError(
                f"{self._what} cannot compute features of uint8 images {tuple(images.shape)} ({line}); it must resize "
                "and normalize them itself."
            ) from error
        parts = output if isinstance(output, tuple | list) else (output,)
        fits = 1 <= len(parts) <= 2 and all(
            isinstance(part, Tensor) and part.ndim == 2 and len(part) == len(images) for part in parts
        )
        if not fits:
            raise UserError(f"{self._what} must give features (n, d), or features and logits (n, classes).")
        return parts[0], parts[1] if len(parts) == 2 else None


def is_torchscript(name: str) -> bool:
    """Whether a name is that of a TorchScript file."""
    return name.endswith(_TORCHSCRIPT)


def load_torchscript(path: Path, device: torch.device | str) -> FeatureExtractor:
    """A TorchScript file of any origin, which resizes and normalizes by itself; its name is the file's.

    Raises:
        UserError: it cannot be read, or gives something else than features.
    """
    digest = _hash(path)
    return FileExtractor(
        name=path.stem, network=_script(path, device), weights_sha256=digest, what=str(path), device=device
    )


def _inception(path: Path, device: torch.device | str) -> FeatureExtractor:
    """torch-fidelity's Inception v3, the network of the published FID, with its own resize."""
    digest = _hash(path)
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import (  # pyright: ignore[reportMissingImports]
            FeatureExtractorInceptionV3,
        )
    except ImportError as error:
        raise UserError(
            "The extractor 'inception' is torch-fidelity's, which is not installed; "
            "install it with: pip install 'spectralnorm[inception]'."
        ) from error
    try:
        # torch-fidelity would run code that the file holds; a file that holds tensors alone is safe.
        torch.load(path, map_location="cpu", weights_only=True)
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
        )
    except Exception as error:
        line = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{path} does not hold the weights of torch-fidelity's Inception ({line}); give its file "
            "weights-inception-2015-12-05-6726825d.pth."
        ) from error
    return FileExtractor(
        name="Inception",
        network=network.to(device).eval(),
        weights_sha256=digest,
        what=str(path),
        resizing="bilinear as in TensorFlow 1, not antialiased, to 299",
        is_published_inception=digest.startswith(PUBLISHED_INCEPTION),
        device=device,
    )


def _dinov2(path: Path, device: torch.device | str) -> FeatureExtractor:
    digest = _hash(path)
    if is_torchscript(path.name):
        network: nn.Module = _Normalized(_script(path, device))
        with torch.inference_mode():
            num_features = network(torch.zeros(1, 3, DINOv2.image_size, DINOv2.image_size, device=device))[0].shape[1]
    else:
        try:
            weights = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is no readable safetensors or TorchScript file ({error}).") from error
        network = dinov2_from_weights(weights, what=str(path))
        num_features = network.num_features
    return NetworkExtractor(
        name="DINOv2",
        network=network,
        weights_sha256=digest,
        image_size=DINOv2.image_size,
        channels=DINOv2.channels,
        num_features=num_features,
        batch_size=32,
        device=device,
        resize="bicubic",
    )


EXTRACTORS_FROM_FILE: Mapping[str, Callable[[Path, torch.device | str], FeatureExtractor]] = MappingProxyType(
    {"inception": _inception, "dinov2": _dinov2}
)
"""What :func:`load_extractor` can read from a file."""


class _Normalized(nn.Module):
    """A network for images normalized with ImageNet's mean and deviation, fed with levels of 0 to 255."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor([123.675, 116.28, 103.53]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor([58.395, 57.12, 57.375]).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        mean, deviation = self.mean.to(images.device), self.deviation.to(images.device)
        features = self.network((images - mean) / deviation)
        if not isinstance(features, Tensor) or features.ndim != 2:
            raise UserError("A TorchScript file of DINOv2 must map images to one matrix of features, (n, d).")
        return features, None


def _script(path: Path, device: torch.device | str) -> nn.Module:
    try:
        return torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as error:
        line = str(error).strip().splitlines()[0][:200]
        raise UserError(f"{path} is no readable TorchScript file ({line}).") from error


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"The extractor's file {str(path)!r} cannot be read ({error.strerror}).") from error
