"""The feature extractors that come with the package, and the way to all others.

Both networks are in the package, so nothing is downloaded. Others are read from a file of one's own; see
:mod:`spectralnorm.metrics.extractor_files`. A network of one's own takes part by keeping the protocol
:class:`FeatureExtractor`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import load
from torch import nn

from spectralnorm.errors import UserError
from spectralnorm.metrics.classifier import GarmentClassifier
from spectralnorm.metrics.extractor_files import EXTRACTORS_FROM_FILE, is_torchscript, load_torchscript
from spectralnorm.metrics.network_extractor import FeatureExtractor, NetworkExtractor
from spectralnorm.metrics.squeezenet import SqueezeNet

__all__ = ["EXTRACTORS", "load_extractor"]


def load_extractor(
    name: str, device: torch.device | str = "cpu", *, weights: str | Path | None = None
) -> FeatureExtractor:
    """Load an extractor.

    Args:
        name: ``classifier`` (for the built-in garments) or ``squeezenet`` (for any images), which come with the
            package; ``inception`` or ``dinov2``, which need ``weights``; or the path of a TorchScript file that maps
            uint8 images (n, 3, height, width) to features (n, d), or to features and logits.
        device: where it runs.
        weights: a file, never downloaded: for ``inception`` torch-fidelity's
            ``weights-inception-2015-12-05-6726825d.pth``, for ``dinov2`` a safetensors file of its weights or a
            TorchScript file of the network.

    Raises:
        UserError: there is none of that name, or its file is missing or does not fit.
    """
    if name in EXTRACTORS:
        if weights is not None:
            raise UserError(f"The extractor {name!r} comes with its weights; leave out the file {str(weights)!r}.")
        return EXTRACTORS[name](device)
    if name in EXTRACTORS_FROM_FILE:
        if weights is None:
            raise UserError(
                f"The extractor {name!r} needs a file of weights, which is never downloaded; give it as weights."
            )
        return EXTRACTORS_FROM_FILE[name](Path(weights), device)
    if is_torchscript(name):
        return load_torchscript(Path(name), device)
    raise UserError(
        f"Unknown feature extractor {name!r}; choose one of {', '.join((*EXTRACTORS, *EXTRACTORS_FROM_FILE))}, or the "
        "path of a TorchScript file (.pt, .ts, .torchscript)."
    )


def _classifier(device: torch.device | str) -> FeatureExtractor:
    network = GarmentClassifier()
    digest = _load_weights(network, "classifier", "classifier.safetensors")
    return _extractor("Classifier", network, digest, batch_size=250, device=device)


def _squeezenet(device: torch.device | str) -> FeatureExtractor:
    network = SqueezeNet()
    digest = _load_weights(network, "squeezenet", "squeezenet1_1_features.safetensors")
    # Activations of 64 images fit the caches of a CPU better than more do, and take about 150 MB.
    return _extractor("SqueezeNet", network, digest, batch_size=64, device=device)


EXTRACTORS: Mapping[str, Callable[[torch.device | str], FeatureExtractor]] = MappingProxyType(
    {"classifier": _classifier, "squeezenet": _squeezenet}
)
"""What :func:`load_extractor` knows."""


def _extractor(
    name: str, network: GarmentClassifier | SqueezeNet, digest: str, *, batch_size: int, device: torch.device | str
) -> NetworkExtractor:
    return NetworkExtractor(
        name=name,
        network=network,
        weights_sha256=digest,
        image_size=network.image_size,
        channels=network.channels,
        num_features=network.num_features,
        batch_size=batch_size,
        device=device,
    )


def _load_weights(network: nn.Module, folder: str, file: str) -> str:
    """Fill the network from a file of the package; returns the file's SHA-256."""
    data = (resources.files("spectralnorm") / "assets" / folder / file).read_bytes()
    weights = load(data)
    # Stored in half precision, or not: both are computed with in float32. Counters of batch norm are not stored.
    missing, unexpected = network.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise RuntimeError(f"{file} does not fit its network: {missing} missing, {unexpected} not expected.")
    return hashlib.sha256(data).hexdigest()
