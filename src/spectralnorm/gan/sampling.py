"""A trained generator: loaded from a run or a file, sampled, interpolated."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from spectralnorm.errors import UserError
from spectralnorm.gan.checkpoint import read_tensors, save_tensors
from spectralnorm.gan.config import Config, config_from_json, config_to_json
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

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.network(latents) if labels is None else self.network(latents, labels)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes that labels number; () for a generator without labels."""
        return self.config.class_names

    def sample(self, num: int, *, seed: int = 0, labels: Tensor | None = None) -> Tensor:
        """Generate images.

        Args:
            num: how many, at least 1.
            seed: of the latents; the same seed gives the same images, on every device up to rounding.
            labels: int64 ``(num,)``, for a conditional generator; None: drawn in the proportions of the training data.

        Returns:
            uint8 tensor ``(num, channels, height, width)`` on the CPU.

        Raises:
            UserError: num or seed is out of range.
        """
        latents = self.latents(num, seed=seed)
        return self.render(latents, self.draw_labels(num, seed=seed) if labels is None else labels)

    def draw_labels(self, num: int, *, seed: int) -> Tensor | None:
        """Labels ``(num,)`` in the proportions of the training data; None for a generator without labels."""
        if not self.config.conditional:
            return None
        shares = torch.tensor(self.config.class_counts, dtype=torch.float64)
        # Another stream of numbers than that of the latents, which a label must not depend on.
        random = torch.Generator().manual_seed((seed ^ 0x5EED_1AB5) & 0x7FFF_FFFF_FFFF_FFFF)
        return torch.multinomial(shares, num, replacement=True, generator=random)

    def interpolate(self, rows: int, columns: int, *, seed: int = 0) -> Tensor:
        """Walk between pairs of latents on the sphere (spherical interpolation, White 2016).

        Args:
            rows: walks.
            columns: images a walk, both ends included, at least 2.
            seed: of the latents.

        Returns:
            uint8 tensor ``(rows * columns, channels, height, width)`` on the CPU, row after row.

        Raises:
            UserError: rows, columns or seed is out of range.
        """
        if columns < 2:
            raise UserError(f"An interpolation needs at least 2 columns, got {columns}.")
        start, end = self.latents(2 * rows, seed=seed).chunk(2)
        cosine = torch.cosine_similarity(start, end, dim=1).clamp(-1 + 1e-6, 1 - 1e-6)
        angle = torch.arccos(cosine)[:, None, None]
        share = torch.linspace(0, 1, columns)[None, :, None]
        walk = torch.sin((1 - share) * angle) * start[:, None] + torch.sin(share * angle) * end[:, None]
        labels = self.draw_labels(rows, seed=seed)
        labels = None if labels is None else labels.repeat_interleave(columns)
        return self.render((walk / torch.sin(angle)).flatten(0, 1), labels)

    def latents(self, num: int, *, seed: int) -> Tensor:
        """z ~ N(0, I), shape ``(num, latent_dim)``, on the CPU, so that a seed means the same on every device."""
        if num < 1:
            raise UserError(f"The number of images must be at least 1, got {num}.")
        if not 0 <= seed < 2**63:
            raise UserError(f"seed must be a whole number from 0 to 2^63 - 1, got {seed}.")
        return torch.randn(num, self.config.latent_dim, generator=torch.Generator().manual_seed(seed))

    @torch.inference_mode()
    def render(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images of the given latents ``(num, latent_dim)`` and labels ``(num,)``, in small batches: uint8 (CPU)."""
        device = next(self.network.parameters()).device
        batches = []
        for start in range(0, len(latents), _BATCH):
            part = slice(start, start + _BATCH)
            batches.append(self(latents[part].to(device), None if labels is None else labels[part].to(device)))
        return torch.cat([_to_uint8(batch).cpu() for batch in batches]).contiguous()


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
