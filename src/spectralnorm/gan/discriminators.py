"""The discriminator as a run or a file holds it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from spectralnorm.errors import UserError
from spectralnorm.gan.checkpoint import latest_checkpoint, read_tensors, under
from spectralnorm.gan.config import Config, config_from_json
from spectralnorm.gan.models.resnet import ProjectionHead
from spectralnorm.gan.networks import build_discriminator, normalize_discriminator
from spectralnorm.gan.run_folder import CHECKPOINTS, CONFIG_FILE
from spectralnorm.transform import load_tracking_state

__all__ = ["discriminator_of_file", "discriminator_of_run", "of_steepest_class"]

# In the names of a normalized weight: torch's parametrization and ours, and torch's older hook.
_NORMALIZED = (".parametrizations.", "weight_orig")


def discriminator_of_run(run: Path) -> tuple[nn.Module, Config]:
    """The discriminator as the last checkpoint of a run holds it, normalized as it was trained, in eval mode.

    Raises:
        UserError: ``run`` is not a run folder or has no checkpoint, or a discriminator of one's own was trained in it.
    """
    try:
        config = config_from_json((run / CONFIG_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{run} is not a run folder ({CONFIG_FILE}: {error.strerror}); give the folder that train wrote."
        ) from error
    checkpoint = latest_checkpoint(run / CHECKPOINTS)
    if checkpoint is None:
        raise UserError(f"{run} has no readable checkpoint yet, so there is no discriminator; train for a while first.")
    discriminator = build_discriminator(config)
    _load(discriminator, under("discriminator.", checkpoint.tensors), checkpoint.path)
    # With what was followed from step to step, its weights are divided by the very numbers of the training.
    load_tracking_state(discriminator, under("tracking.", checkpoint.tensors))
    return discriminator.eval(), config


def discriminator_of_file(file: Path, config: Config) -> nn.Module:
    """The discriminator of a config with the weights of a safetensors file, in eval mode.

    Args:
        file: a state dict; a checkpoint of a run will do. Weights that were normalized by this package or by torch are
            normalized; plain ones are taken as they are.
        config: says what the network is.

    Raises:
        UserError: there is no such file, it cannot be read, or its weights are not those of this network.
    """
    try:
        tensors, _ = read_tensors(file)
    except FileNotFoundError as error:
        raise UserError(f"There is no file {file}; give a run folder or a safetensors file.") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a readable safetensors file ({error}); copy it again.") from error
    tracked = under("tracking.", tensors)
    tensors = under("discriminator.", tensors) or tensors
    is_normalized = any(mark in name for name in tensors for mark in _NORMALIZED)
    divides = config.normalization.partition(":")[0] in ("spectral", "strict", "none")
    # Whether weights were divided by their norms the file itself tells; other normalizations belong to the network.
    discriminator = build_discriminator(config, normalized=not divides)
    if divides and is_normalized:
        normalize_discriminator(discriminator, config, "spectral" if config.normalization == "none" else None)
    _load(discriminator, tensors, file)
    load_tracking_state(discriminator, tracked)
    return discriminator.eval()


class _OneClass(nn.Module):
    """A conditional discriminator whose images are all of one class."""

    def __init__(self, discriminator: nn.Module, label: int) -> None:
        super().__init__()
        self.discriminator = discriminator
        self.label = label

    def forward(self, images: Tensor) -> Tensor:
        labels = torch.full((len(images),), self.label, device=images.device)
        return self.discriminator(images, labels)


def of_steepest_class(discriminator: nn.Module) -> nn.Module:
    """A conditional discriminator as a function of images alone, for the class of which it may be the steepest.

    With projection (Miyato and Koyama 2018) a logit is a dense one plus the product of the features with the row of
    the class in an embedding. Its bound grows with the length of that row, and nothing else depends on the class: what
    is certified for the longest row holds for all.

    Raises:
        UserError: it is not conditional by projection.
    """
    heads = [module for module in discriminator.modules() if isinstance(module, ProjectionHead)]
    if len(heads) != 1 or heads[0].embedding is None:
        raise UserError(
            f"{type(discriminator).__name__} has no projection of classes, so no class is known to be the steepest; "
            "certify it for one class at a time with spectralnorm.certify."
        )
    rows = heads[0].embedding.weight.detach().double()
    return _OneClass(discriminator, int(rows.square().sum(1).argmax())).eval()


def _load(discriminator: nn.Module, tensors: dict[str, Tensor], file: Path) -> None:
    try:
        discriminator.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(
            f"The weights in {file} do not fit {type(discriminator).__name__} with these settings; give the recipe and "
            "settings that they were trained with."
        ) from error
