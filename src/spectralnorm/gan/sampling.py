"""A trained generator: loaded from a run or a file, sampled, interpolated."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from spectralnorm.errors import UserError
from spectralnorm.gan.checkpoint import read_tensors, save_tensors
from spectralnorm.gan.config import Config, config_from_json, config_to_json
from spectralnorm.gan.latents import Labels, label_tensor, slerp, truncated, walk_latents
from spectralnorm.gan.models import ARCHITECTURES
from spectralnorm.gan.networks import build_generator

__all__ = ["GENERATOR_FILE", "TrainedGenerator", "load", "save_generator"]

GENERATOR_FILE = "generator.safetensors"
_BATCH = 256
_TRAINED = ("step", "images_seen", "training_seconds")


class TrainedGenerator(nn.Module):
    """A generator in eval mode with its averaged weights.

    Args:
        network: latents ``(batch, latent_dim)`` to images ``(batch, channels, size, size)`` in [-1, 1].
        config: the settings it was trained with.
        step: generator updates it has had.
        images_seen: real images its discriminator has seen.
        training_seconds: time it was trained.
    """

    def __init__(
        self, network: nn.Module, config: Config, *, step: int = 0, images_seen: int = 0, training_seconds: float = 0.0
    ) -> None:
        super().__init__()
        self.network = network
        self.config = config
        self.step = step
        self.images_seen = images_seen
        self.training_seconds = training_seconds
        self.eval()

    def forward(self, latents: Tensor, labels: Tensor | None = None, **options: float) -> Tensor:
        return self.network(latents, **options) if labels is None else self.network(latents, labels, **options)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes that labels number; () for a generator without labels."""
        return self.config.class_names

    def sample(
        self,
        num: int | None = None,
        *,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        labels: Labels | None = None,
        truncation: float = 1.0,
    ) -> Tensor:
        """Generate images.

        Args:
            num: how many, at least 1; None: as many as ``seeds``.
            seed: of the latents; the same seed gives the same images, on every device up to rounding.
            seeds: instead, one for each image, which then depends on its own alone.
            labels: of a conditional generator: one class for all, or one for each image, by name or number; None: drawn
                in the proportions of the training data.
            truncation: below 1 images are more typical and vary less. StyleGAN2 moves its styles towards the mean
                style, to which 0 leads (psi of Karras et al. 2019). For other networks each number of a latent is
                drawn from a normal distribution cut off at ``2 * truncation`` (Brock et al. 2019); 1: not cut off.

        Returns:
            uint8 tensor ``(num, channels, height, width)`` on the CPU; points are float32 ``(num, 2, 1, 1)``.

        Raises:
            UserError: num, a seed, a label or the truncation is out of range.
        """
        if seeds is None:
            if num is None:
                raise UserError("Neither num nor seeds says how many images to make; give one of them.")
            latents = self.latents(num, seed=seed, truncation=truncation)
            labels = self.draw_labels(num, seed=seed) if labels is None else labels
        else:
            if num not in (None, len(seeds)):
                raise UserError(f"num is {num}, but there are {len(seeds)} seeds; leave out num.")
            if not seeds:
                raise UserError("seeds is empty; give at least one.")
            num = len(seeds)
            latents = torch.cat([self.latents(1, seed=seed, truncation=truncation) for seed in seeds])
            if labels is None:
                drawn = [self.draw_labels(1, seed=seed) for seed in seeds]
                labels = [int(label) for label in drawn if label is not None] or None
        return self.render(latents, None if labels is None else self._labels(labels, num), truncation=truncation)

    def draw_labels(self, num: int, *, seed: int) -> Tensor | None:
        """Labels ``(num,)`` in the proportions of the training data; None for a generator without labels."""
        if not self.config.conditional:
            return None
        shares = torch.tensor(self.config.class_counts, dtype=torch.float64)
        # Another stream of numbers than that of the latents, which a label must not depend on.
        random = torch.Generator().manual_seed((seed ^ 0x5EED_1AB5) & 0x7FFF_FFFF_FFFF_FFFF)
        return torch.multinomial(shares, num, replacement=True, generator=random)

    def interpolate(
        self, rows: int, columns: int, *, seed: int = 0, labels: Labels | None = None, truncation: float = 1.0
    ) -> Tensor:
        """Walk between pairs of latents on the sphere (spherical interpolation, White 2016).

        Args:
            rows: walks.
            columns: images a walk, both ends included, at least 2.
            seed: of the latents.
            labels: as for `sample`, one for all or one a walk.
            truncation: as for `sample`.

        Returns:
            uint8 tensor ``(rows * columns, channels, height, width)`` on the CPU, row after row.

        Raises:
            UserError: an argument is out of range.
        """
        if columns < 2:
            raise UserError(f"An interpolation needs at least 2 columns, got {columns}.")
        start, end = self.latents(2 * rows, seed=seed, truncation=truncation).chunk(2)
        walk = slerp(start[:, None], end[:, None], torch.linspace(0, 1, columns)[None, :, None])
        return self._render_walks(walk, seed=seed, labels=labels, truncation=truncation).flatten(0, 1)

    def walk(
        self,
        num: int,
        frames: int,
        *,
        stops: int = 4,
        loop: bool = True,
        seed: int = 0,
        labels: Labels | None = None,
        truncation: float = 1.0,
    ) -> Tensor:
        """Frames of a video: walks through several latents each, all at the same time.

        Args:
            num: walks, to be seen side by side.
            frames: of the whole way, at least 2.
            stops: latents that a walk passes, at least 2.
            loop: come back to the first, so that the video can be repeated without a jump.
            seed: of the latents.
            labels: as for `sample`, one for all or one a walk.
            truncation: as for `sample`.

        Returns:
            uint8 tensor ``(num, frames, channels, height, width)`` on the CPU.

        Raises:
            UserError: an argument is out of range.
        """
        if frames < 2 or stops < 2:
            raise UserError(f"A walk needs at least 2 frames and 2 stops, got {frames} and {stops}.")
        latents = self.latents(num * stops, seed=seed, truncation=truncation).unflatten(0, (num, stops))
        walk = walk_latents(latents, frames, loop=loop)
        return self._render_walks(walk, seed=seed, labels=labels, truncation=truncation)

    def latents(self, num: int, *, seed: int, truncation: float = 1.0) -> Tensor:
        """z ~ N(0, I), shape ``(num, latent_dim)``, on the CPU, so that a seed means the same on every device.

        A truncation below 1 cuts the distribution off, unless the network truncates by itself (see `sample`).
        """
        if num < 1:
            raise UserError(f"The number of images must be at least 1, got {num}.")
        if not 0 <= seed < 2**63:
            raise UserError(f"seed must be a whole number from 0 to 2^63 - 1, got {seed}.")
        latents = torch.randn(num, self.config.latent_dim, generator=torch.Generator().manual_seed(seed))
        if self.truncates_styles:
            if not math.isfinite(truncation):
                raise UserError(f"truncation must be a number, got {truncation}.")
            return latents
        if not 0 < truncation <= 1:
            raise UserError(f"truncation must be a number above 0 and at most 1, got {truncation}.")
        return truncated(latents, truncation)

    @property
    def truncates_styles(self) -> bool:
        """Whether the network takes a truncation itself, as StyleGAN2 does with its styles."""
        return "truncation" in inspect.signature(self.network.forward).parameters

    @torch.inference_mode()
    def render(self, latents: Tensor, labels: Tensor | None = None, *, truncation: float = 1.0) -> Tensor:
        """Images of the given latents ``(num, latent_dim)`` and labels ``(num,)``, in small batches: uint8 (CPU).

        The truncation is that of the styles; other networks have theirs in the latents.
        """
        device = next(self.network.parameters()).device
        options = {"truncation": truncation} if truncation != 1 and self.truncates_styles else {}
        batches = []
        for start in range(0, len(latents), _BATCH):
            part = slice(start, start + _BATCH)
            given = latents[part].to(device), None if labels is None else labels[part].to(device)
            samples = self(*given, **options)
            batches.append((samples.float() if self.makes_points else _to_uint8(samples)).cpu())
        return torch.cat(batches).contiguous()

    @property
    def makes_points(self) -> bool:
        """Whether it makes points in the plane, and no images."""
        return ARCHITECTURES[self.config.architecture].makes_points

    def _render_walks(self, latents: Tensor, *, seed: int, labels: Labels | None, truncation: float) -> Tensor:
        """Images ``(walks, steps, channels, height, width)`` of latents ``(walks, steps, dim)``, one label a walk."""
        walks, steps, _ = latents.shape
        labels = self.draw_labels(walks, seed=seed) if labels is None else labels
        each = None if labels is None else self._labels(labels, walks).repeat_interleave(steps)
        return self.render(latents.flatten(0, 1), each, truncation=truncation).unflatten(0, (walks, steps))

    def _labels(self, labels: Labels, num: int) -> Tensor:
        return label_tensor(labels, num, self.class_names)


def _to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] to uint8, rounded to the nearest level."""
    return (images.float() * 127.5 + 127.5).round_().clamp_(0, 255).to(torch.uint8)


def save_generator(path: Path, generator: TrainedGenerator) -> None:
    """Write the weights of a generator, with its config and how long it was trained in the file's header.

    Raises:
        OSError: the file cannot be written; an earlier one is left as it was.
    """
    state = generator.network.state_dict()
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    trained = {name: getattr(generator, name) for name in _TRAINED}
    metadata = {"format": "pt", "config": config_to_json(generator.config), "trained": json.dumps(trained)}
    save_tensors(path, tensors, metadata)


def load(run_or_file: str | Path, *, generator: nn.Module | None = None, device: str = "cpu") -> TrainedGenerator:
    """Load a trained generator.

    Args:
        run_or_file: a run folder, or a ``generator.safetensors``.
        generator: the network to load into, for a run that trained one's own generator.
        device: where to put it.

    Returns:
        The generator with averaged weights, in eval mode; ``.config`` holds the settings of its run.

    Raises:
        UserError: there is no such run or file, or the weights do not fit the network.
    """
    path = Path(run_or_file)
    file = path / GENERATOR_FILE if path.is_dir() else path
    if not file.exists():
        what = "has no trained generator yet" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {what}; give a run folder made by 'spectralnorm train', or a {GENERATOR_FILE}.")
    try:
        tensors, metadata = read_tensors(file)
    except SafetensorError as error:
        raise UserError(f"{file} is not a readable safetensors file ({error}); copy it again.") from error
    if "config" not in metadata:
        raise UserError(f"{file} has no config in its header; it was not written by 'spectralnorm train'.")
    config = config_from_json(metadata["config"])
    network = generator if generator is not None else build_generator(config)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        hint = "pass the network it was trained with as generator=" if generator is None else "pass the right network"
        raise UserError(f"The weights in {file} do not fit {type(network).__name__}; {hint}.") from error
    return TrainedGenerator(
        network.to(device).requires_grad_(False),
        config,
        **json.loads(metadata.get("trained", "{}")),
    )
