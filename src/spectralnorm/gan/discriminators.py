"""The discriminator as a run or a file holds it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor, nn

from spectralnorm.errors import UserError
from spectralnorm.gan.checkpoint import latest_checkpoint, read_tensors, under
from spectralnorm.gan.config import Config, config_from_json
from spectralnorm.gan.models import ARCHITECTURES
from spectralnorm.gan.models.resnet import ProjectionHead
from spectralnorm.gan.networks import build_discriminator, normalize_discriminator
from spectralnorm.gan.run_folder import CHECKPOINTS, CONFIG_FILE
from spectralnorm.linalg.rounding import gamma
from spectralnorm.transform import load_tracking_state

__all__ = ["discriminator_of_file", "discriminator_of_run", "of_steepest_class"]

# In the names of a normalized weight: torch's parametrization and ours, and torch's older hook.
_NORMALIZED = (".parametrizations.", "weight_orig")
# The embedding of a `ProjectionHead`, whose rows are the classes: plain, or normalized in one of these ways.
_EMBEDDING = re.compile(r"head\.embedding\.(weight|weight_orig|parametrizations\.weight\.original1?)")


def discriminator_of_run(run: Path) -> tuple[nn.Module, Config, int]:
    """The discriminator as the last checkpoint of a run holds it, normalized as it was trained, in eval mode.

    Returns:
        The discriminator, the run's config, and the checkpoint's step.

    Raises:
        UserError: ``run`` is not a run folder or has no checkpoint that can be read, or a discriminator of one's own
            was trained in it.
    """
    try:
        config = config_from_json((run / CONFIG_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{run} is not a run folder ({CONFIG_FILE}: {error.strerror}); give the folder that train wrote."
        ) from error
    checkpoint = latest_checkpoint(run / CHECKPOINTS)
    if checkpoint is None:
        raise UserError(f"{run} has no checkpoint yet, so there is no discriminator; train for a while first.")
    discriminator = build_discriminator(config)
    _load(discriminator, under("discriminator.", checkpoint.tensors), checkpoint.path)
    # With what was followed from step to step, its weights are divided by the very numbers of the training.
    load_tracking_state(discriminator, under("tracking.", checkpoint.tensors))
    return discriminator.eval(), config, checkpoint.numbers["step"]


def discriminator_of_file(file: Path, config: Config) -> tuple[nn.Module, Config]:
    """The discriminator of a config with the weights of a safetensors file, in eval mode.

    Args:
        file: a state dict; a checkpoint of a run will do. Weights that were normalized by this package or by torch are
            normalized; plain ones are taken as they are.
        config: says what the network is, but for its classes: as many as the file's embedding has rows.

    Returns:
        The discriminator, and the config with its classes, which have numbers for names.

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
    config = _with_classes(config, tensors, file)
    is_normalized = any(mark in name for name in tensors for mark in _NORMALIZED)
    divides = config.normalization.partition(":")[0] in ("spectral", "strict", "none")
    # Whether weights were divided by their norms the file itself tells; other normalizations belong to the network.
    discriminator = build_discriminator(config, normalized=not divides)
    if divides and is_normalized:
        normalize_discriminator(discriminator, config, "spectral" if config.normalization == "none" else None)
    _load(discriminator, tensors, file)
    load_tracking_state(discriminator, tracked)
    return discriminator.eval(), config


def _with_classes(config: Config, tensors: dict[str, Tensor], file: Path) -> Config:
    rows = next((len(tensor) for name, tensor in tensors.items() if _EMBEDDING.fullmatch(name)), 0)
    if rows and ARCHITECTURES[config.architecture].conditional:
        return dataclasses.replace(config, conditional=True, class_names=tuple(map(str, range(rows))))
    if config.conditional:
        raise UserError(
            f"The weights in {file} have no embedding of classes, and the recipe '{config.recipe}' is conditional; "
            "give the recipe that they were trained with."
        )
    return config


class _Classes(nn.Module):
    """A conditional discriminator for some of its classes, which are counted anew."""

    labels: Tensor

    def __init__(self, discriminator: nn.Module, labels: Tensor) -> None:
        super().__init__()
        self.discriminator = discriminator
        self.register_buffer("labels", labels, persistent=False)

    def forward(self, images: Tensor, places: Tensor) -> Tensor:
        return self.discriminator(images, self.labels[places])


def of_steepest_class(discriminator: nn.Module) -> tuple[nn.Module, int]:
    """A conditional discriminator for the class of which it may be the steepest.

    With projection (Miyato and Koyama 2018) a logit is the product of the features with psi + e_y, the row of a dense
    layer plus that of the class in an embedding. The features come from a ReLU and a sum over pixels, so the bound
    grows with the length of psi + e_y alone: what is certified for the longest holds for all classes. Lengths that
    rounding may have put in the wrong order count as the same, and every different psi + e_y among them is kept.

    Args:
        discriminator: in eval mode; it stays as it is.

    Returns:
        A module of images and labels, and how many classes it has left, nearly always one: what `spectralnorm.certify`
        takes with ``num_classes=``.

    Raises:
        UserError: it is not conditional by projection.
    """
    heads = [module for module in discriminator.modules() if isinstance(module, ProjectionHead)]
    head = heads[0] if len(heads) == 1 else None
    if head is None or head.embedding is None:
        raise UserError(
            f"{type(discriminator).__name__} has no projection of classes, so no class is known to be the steepest; "
            "certify it for all classes with spectralnorm.certify and num_classes=."
        )
    # The weights as they are used, normalized or not; a sum in float64 is rounded once.
    rows = head.dense.weight.detach().double() + head.embedding.weight.detach().double()
    lengths = rows.norm(dim=1)
    is_shorter = lengths < lengths.max() * (1 - 4 * gamma(rows.shape[1] + 8))
    labels = {tuple(rows[label].tolist()): label for label in (~is_shorter).nonzero().flatten().tolist()}
    chosen = lengths.new_tensor(list(labels.values())).long()
    return _Classes(discriminator, chosen).eval(), len(chosen)


def _load(discriminator: nn.Module, tensors: dict[str, Tensor], file: Path) -> None:
    try:
        discriminator.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(
            f"The weights in {file} do not fit {type(discriminator).__name__} with these settings; give the recipe and "
            "settings that they were trained with."
        ) from error
