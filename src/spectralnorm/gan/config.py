"""The settings of one training run, all of them, checked once."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from spectralnorm.errors import UserError
from spectralnorm.gan.augment import AUGMENTATIONS
from spectralnorm.gan.initialization import INITIALIZATIONS
from spectralnorm.gan.losses import LOSSES
from spectralnorm.gan.models import ARCHITECTURES, NORMALIZATIONS
from spectralnorm.gan.penalties import PENALTIES

__all__ = ["Config", "choose", "config_from_json", "config_to_json", "differing_lines"]


def _setting(default: Any, *, resumable: bool = False) -> Any:
    """A field of `Config`; a resumable one may change when a run goes on (it does not alter what was trained)."""
    return dataclasses.field(default=default, metadata={"resumable": resumable})


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that defines a run. A recipe (`spectralnorm.gan.recipes`) is a function that returns one.

    Raises:
        UserError: a setting is out of its range, or a name is not one of the choices.
    """

    recipe: str = _setting("custom")
    """Name of the recipe that these settings started from."""

    # Data.
    data: str | None = _setting(None)
    """Folder, ZIP, IDX or .npy/.npz file of images; none: the built-in Fashion-MNIST."""
    image_size: int = _setting(32)
    """Height and width in pixels: 32, 48, 64 or 128 (sagan, stylegan2 and r3gan: not 48; stylegan2 also 256)."""
    channels: int = _setting(1)
    """1 for gray, 3 for colour."""
    augmentation: str = _setting("none")
    """Of what the discriminator sees, real and fake: none, or a comma-separated list of shift, cutout, flip, color."""

    # Networks.
    architecture: str = _setting("dcgan")
    """dcgan, sncnn, sndcgan, resnet, sagan, stylegan2, r3gan or mlp."""
    generator_width: int = _setting(64)
    """Of the generator: 64 gives the published channels, another number scales them."""
    discriminator_width: int = _setting(64)
    """Of the discriminator: 64 gives the published channels, another number scales them."""
    latent_dim: int = _setting(128)
    """Dimensions of the latent z ~ N(0, I)."""
    initialization: str = _setting("published")
    """Of the weights of both networks: published (the architecture's own) or orthogonal."""
    lipschitz: float | None = _setting(None)
    """The discriminator in the form whose parts without weights have norm at most 1, its logits times this number; none:
    as published."""
    normalization: str = _setting("spectral")
    """Of the discriminator's weights: spectral or none."""

    # Optimization.
    loss: str = _setting("hinge")
    """hinge, nonsaturating, minimax, wasserstein, least-squares or relativistic."""
    penalty: str | None = _setting(None)
    """Of the discriminator's gradients: none, r1, r2, r1-r2, gradient-penalty (WGAN-GP, GAN-GP) or dragan."""
    penalty_weight: float = _setting(10.0)
    """Factor of the penalty: gamma of R1 and R2 (which carry a half of their own), lambda of the others."""
    penalty_interval: int = _setting(1)
    """Discriminator updates from one with the penalty to the next, whose penalty counts that many times."""
    batch_size: int = _setting(64)
    """Real images per discriminator update, and fake images per update of either network."""
    num_discriminator_steps: int = _setting(1)
    """Discriminator updates per generator update (n_dis in Miyato et al. 2018)."""
    generator_lr: float = _setting(2e-4)
    """Adam's step size for the generator."""
    discriminator_lr: float = _setting(2e-4)
    """Adam's step size for the discriminator."""
    beta1: float = _setting(0.5)
    """Adam's decay of the first moment."""
    beta2: float = _setting(0.999)
    """Adam's decay of the second moment."""
    lr_decay_from: float = _setting(1.0)
    """Fraction of the budget after which both step sizes fall linearly to zero; 1: never."""
    ema_half_life_kimg: float = _setting(1.0)
    """Half-life of the generator's moving average, in thousands of real images seen; 0: no averaging."""

    # Budget.
    steps: int | None = _setting(None, resumable=True)
    """Stop after this many generator updates."""
    minutes: float | None = _setting(None, resumable=True)
    """Stop after this much training time; metrics, samples and checkpoints are not counted."""
    seed: int = _setting(0)
    """Of initial weights, latents and the order of the images."""
    device: str = _setting("auto", resumable=True)
    """auto (CUDA if present), cpu or cuda."""

    # Records.
    log_every: int = _setting(10, resumable=True)
    """Generator updates between two lines of metrics.jsonl."""
    num_sample_grids: int = _setting(24, resumable=True)
    """Sample grids over the whole budget, denser at its start."""
    num_evaluations: int = _setting(6, resumable=True)
    """Evaluations of the metrics over the whole budget, the final one included."""
    num_evaluation_samples: int = _setting(5000, resumable=True)
    """Generated images in the final evaluation."""
    checkpoint_minutes: float = _setting(1.0, resumable=True)
    """At most this much time between two checkpoints."""

    def __post_init__(self) -> None:
        choose("architecture", self.architecture, ARCHITECTURES)
        choose("initialization", self.initialization, INITIALIZATIONS)
        choose("normalization", self.normalization, NORMALIZATIONS)
        choose("loss", self.loss, LOSSES)
        if self.lipschitz is not None:
            self._require("lipschitz", above=0)
        if self.penalty is not None:
            choose("penalty", self.penalty, PENALTIES)
        choose("device", self.device, ("auto", "cpu", "cuda"))
        for name in augmentation_names(self.augmentation):
            choose("augmentation", name, AUGMENTATIONS)
        choose("image_size", self.image_size, ARCHITECTURES[self.architecture].image_sizes)
        choose("channels", self.channels, (1, 3))
        for name in ("generator_width", "discriminator_width", "latent_dim", "num_discriminator_steps", "log_every"):
            self._require(name, at_least=1)
        for name in ("num_sample_grids", "num_evaluations"):
            self._require(name, at_least=1)
        self._require("penalty_interval", at_least=1)
        self._require("penalty_weight", at_least=0)
        self._require("batch_size", at_least=2)
        self._require("num_evaluation_samples", at_least=100)
        self._require("seed", at_least=0, at_most=2**32 - 1)
        for name in ("generator_lr", "discriminator_lr", "checkpoint_minutes"):
            self._require(name, above=0)
        for name in ("beta1", "beta2"):
            self._require(name, at_least=0, below=1)
        self._require("lr_decay_from", at_least=0, at_most=1)
        self._require("ema_half_life_kimg", at_least=0)
        if self.steps is None and self.minutes is None:
            raise UserError("steps and minutes are both missing; give at least one, so that the run has an end.")
        if self.steps is not None:
            self._require("steps", at_least=1)
        if self.minutes is not None:
            self._require("minutes", above=0)

    def _require(
        self,
        name: str,
        *,
        at_least: float = -math.inf,
        above: float = -math.inf,
        at_most: float = math.inf,
        below: float = math.inf,
    ) -> None:
        value = getattr(self, name)
        # Written so that NaN, which fails every comparison, is refused too; infinity is no setting either.
        if at_least <= value <= at_most and above < value < below and abs(value) != math.inf:
            return
        lower = f"above {above}" if math.isfinite(above) else f"at least {at_least}"
        upper = f" and below {below}" if math.isfinite(below) else ""
        upper = f" and at most {at_most}" if math.isfinite(at_most) else upper
        raise UserError(f"{name} must be a number {lower}{upper}, got {value}.")


def augmentation_names(augmentation: str) -> tuple[str, ...]:
    """Split ``"shift,cutout"`` into its parts; ``"none"`` has none."""
    if augmentation == "none":
        return ()
    return tuple(part.strip() for part in augmentation.split(","))


def choose(setting: str, name: Any, choices: Iterable[Any]) -> None:
    """Check that a name is one of the choices.

    Raises:
        UserError: it is not; the message lists the choices.
    """
    choices = list(choices)
    if name not in choices:
        raise UserError(f"Unknown {setting} '{name}'; choose one of {', '.join(map(str, choices))}.")


def config_to_json(config: Config) -> str:
    """The text of ``config.json``: one setting a line, in the order of the class."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def config_from_json(text: str) -> Config:
    """Read what `config_to_json` wrote; settings that a newer version added take their defaults.

    Raises:
        UserError: the text is not such a file, or a setting is not known here.
    """
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"config.json is not valid JSON ({error}); restore it, or train into another --out.") from error
    known = {field.name for field in dataclasses.fields(Config)}
    if not isinstance(fields, Mapping) or not set(fields) <= known:
        unknown = ", ".join(sorted(set(fields) - known)) if isinstance(fields, Mapping) else type(fields).__name__
        raise UserError(f"config.json holds settings that this version does not know ({unknown}); update spectralnorm.")
    return Config(**fields)


def differing_lines(old: Config, new: Config) -> list[str]:
    """The settings in which a run cannot go on as another one: ``name: old -> new``, empty when it can."""
    return [
        f"{field.name}: {getattr(old, field.name)} -> {getattr(new, field.name)}"
        for field in dataclasses.fields(Config)
        if not field.metadata["resumable"] and getattr(old, field.name) != getattr(new, field.name)
    ]
