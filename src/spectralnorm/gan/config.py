"""The settings of one training run, all of them, checked once."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import tyro

from spectralnorm.errors import UserError

__all__ = ["GIVEN_DATA", "Config", "choose", "config_from_json", "config_to_json", "differing_lines"]


GIVEN_DATA = "given-from-python"
"""What ``config.data`` says when the images were passed as objects: no path leads back to them."""


def _setting(default: Any, group: str, *, resumable: bool = False) -> Any:
    """A field of `Config`; a resumable one may change when a run goes on (it does not alter what was trained)."""
    return dataclasses.field(default=default, metadata={"group": group, "resumable": resumable})


_DATA = partial(_setting, group="Data")
_NETWORKS = partial(_setting, group="Networks")
_NORMALIZATION = partial(_setting, group="Normalization")
_LOSS = partial(_setting, group="Loss and penalty")
_OPTIMIZATION = partial(_setting, group="Optimization")
_BUDGET = partial(_setting, group="Budget")
_HARDWARE = partial(_setting, group="Hardware")
_RECORDS = partial(_setting, group="Records", resumable=True)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that defines a run. A recipe (`spectralnorm.gan.recipes`) is a function that returns one.

    Raises:
        UserError: a setting is out of its range, or a name is not one of the choices.
    """

    recipe: str = _setting("custom", "Recipe")
    """Name of the recipe that these settings started from."""

    data: str | None = _DATA(None)
    """Images: a folder, ZIP, tar, Parquet, IDX, .npy/.npz, CIFAR or STL-10 file, or hf:NAME; none: the built-in
    Fashion-MNIST; toy-ring or toy-grid: points in the plane."""
    image_size: int = _DATA(32)
    """Height and width in pixels: 32, 48, 64 or 128 (sagan, stylegan2 and r3gan: not 48; stylegan2 also 256)."""
    channels: int = _DATA(1)
    """1 for gray, 3 for colour; 2 for points."""
    augmentation: str = _DATA("none")
    """Of what the discriminator sees, real and fake: none; a comma-separated list of shift, cutout, flip, color,
    translation; diffaugment; or ada, whose probability adapts. A constant probability is written ada:p=0.2."""
    data_loading: str = _DATA("auto", resumable=True)
    """prepare (all images before training begins), stream (read them while it goes on), or auto: by size. A run that
    goes on loads them as when it began."""
    stream_cache_gb: float = _DATA(32.0, resumable=True)
    """What decoded images of all sets that are streamed may take in the user's cache folder; 0: keep none."""
    conditional: bool = _DATA(False)
    """Give the labels of the data to both networks (resnet, sagan)."""
    class_names: Annotated[tuple[str, ...], tyro.conf.Suppress] = _DATA((), resumable=True)
    """The classes of a conditional run; taken from the data."""
    class_counts: Annotated[tuple[int, ...], tyro.conf.Suppress] = _DATA((), resumable=True)
    """Training images of each class; generated images have classes in the same proportions."""

    architecture: str = _NETWORKS("dcgan")
    """dcgan, sncnn, sndcgan, resnet, sagan, stylegan2, r3gan, mlp, or points (dense networks for the plane)."""
    generator_width: int = _NETWORKS(64)
    """Of the generator: 64 gives the published channels (stylegan2: 16384 / image-size; r3gan: none), others scale."""
    discriminator_width: int = _NETWORKS(64)
    """Of the discriminator, as of the generator."""
    latent_dim: int = _NETWORKS(128)
    """Dimensions of the latent z ~ N(0, I)."""
    initialization: str = _NETWORKS("published")
    """Of the weights of both networks: published (the architecture's own) or orthogonal."""
    lipschitz: float | None = _NETWORKS(None)
    """The discriminator in the form whose parts without weights have norm at most 1, its logits times this number;
    none: as published."""

    normalization: str = _NORMALIZATION("spectral")
    """Of the discriminator: spectral, strict (by guaranteed bounds of each layer's own norm), weight, batch, layer or
    none; the first two with options of the layer, as in spectral:norm=operator,mode=cap,coefficient=2."""
    generator_normalization: str = _NORMALIZATION("none")
    """Of the generator, beside what its architecture has: as for the discriminator."""

    loss: str = _LOSS("hinge")
    """hinge, nonsaturating, minimax, wasserstein, least-squares or relativistic."""
    penalty: str | None = _LOSS(None)
    """Of the discriminator's gradients: none, r1, r2, r1-r2, gradient-penalty (WGAN-GP, GAN-GP) or dragan."""
    penalty_weight: float = _LOSS(10.0)
    """Factor of the penalty: gamma of R1 and R2 (which carry a half of their own), lambda of the others."""
    penalty_interval: int = _LOSS(1)
    """Discriminator updates from one with the penalty to the next, whose penalty counts that many times."""
    orthonormal_weight: float = _LOSS(0.0)
    """Factor of the orthonormal regularization of the discriminator's weights; 0: none."""
    weight_clip: float = _LOSS(0.0)
    """Bring every weight of the discriminator into plus and minus this after each update; 0: not."""
    path_length_weight: float = _LOSS(0.0)
    """Factor of the path length regularization of stylegan2's generator (2 in the paper); 0: none."""
    path_length_interval: int = _LOSS(4)
    """Generator updates from one with that regularization to the next, where it counts that many times."""

    batch_size: int = _OPTIMIZATION(64)
    """Real images per discriminator update, and fake images per update of either network."""
    generator_batch_size: int | None = _OPTIMIZATION(None)
    """Fake images per generator update, made for it alone; none: those that the discriminator has just seen."""
    num_discriminator_steps: int = _OPTIMIZATION(1)
    """Discriminator updates per generator update (n_dis in Miyato et al. 2018)."""
    generator_optimizer: str = _OPTIMIZATION("adam")
    """adam, adamw, sgd, rmsprop, adagrad, muon or any other of torch.optim, with options as in rmsprop:alpha=0.9."""
    discriminator_optimizer: str = _OPTIMIZATION("adam")
    """As the generator's."""
    generator_lr: float = _OPTIMIZATION(2e-4)
    """Step size of the generator."""
    discriminator_lr: float = _OPTIMIZATION(2e-4)
    """Step size of the discriminator."""
    beta1: float = _OPTIMIZATION(0.5)
    """Decay of the first moment, for optimizers of Adam's kind."""
    beta2: float = _OPTIMIZATION(0.999)
    """Decay of the second moment, for optimizers of Adam's kind."""
    lr_decay_from: float = _OPTIMIZATION(1.0)
    """Fraction of the budget after which both step sizes fall linearly to zero; 1: never."""
    ema_half_life_kimg: float = _OPTIMIZATION(1.0)
    """Half-life of the generator's moving average, in thousands of real images seen; 0: no averaging."""

    steps: int | None = _BUDGET(None, resumable=True)
    """Stop after this many generator updates."""
    minutes: float | None = _BUDGET(None, resumable=True)
    """Stop after this much training time; metrics, samples and checkpoints are not counted."""
    seed: int = _BUDGET(0)
    """Of initial weights, latents and the order of the images."""

    device: str = _HARDWARE("auto", resumable=True)
    """auto (CUDA or MPS if present), cpu, cuda or mps."""
    precision: str = _HARDWARE("fp32")
    """fp32, bf16-mixed or fp16-mixed: what products of both networks are computed in; weights stay in float32."""
    accumulate: int = _HARDWARE(1)
    """Parts that a batch is split into, one after the other, to save memory; their gradients make one step."""
    compile: bool = _HARDWARE(False, resumable=True)
    """Compile both networks; the first step then takes a minute or so."""
    strategy: str = _HARDWARE("ddp", resumable=True)
    """How several processes hold the networks: each all of them (ddp), or each a part (fsdp)."""

    log_every: int = _RECORDS(10)
    """Generator updates between two lines of metrics.jsonl."""
    num_sample_grids: int = _RECORDS(24)
    """Sample grids over the whole budget, denser at its start."""
    num_evaluations: int = _RECORDS(6)
    """Evaluations of the metrics over the whole budget, the final one included."""
    num_evaluation_samples: int = _RECORDS(5000)
    """Generated images in the final evaluation."""
    critic: str = _RECORDS("none", resumable=True)
    """strict: at each evaluation, also bound the Wasserstein-1 distance of the features from below, by a critic that is
    trained for it and whose constant is proved; none."""
    checkpoint_minutes: float = _RECORDS(1.0)
    """At most this much time between two checkpoints."""

    def __post_init__(self) -> None:
        # Here, and not above: what can be chosen comes with torch, and a help page needs only the settings.
        from spectralnorm.gan.augment import read_augmentation
        from spectralnorm.gan.initialization import INITIALIZATIONS
        from spectralnorm.gan.losses import LOSSES
        from spectralnorm.gan.models import ARCHITECTURES
        from spectralnorm.gan.normalizations import check_normalization
        from spectralnorm.gan.optimizers import check_optimizer
        from spectralnorm.gan.penalties import PENALTIES
        from spectralnorm.gan.precision import PRECISIONS, STRATEGIES

        if self.data == "":
            raise UserError("data is empty; give a path or a name, or leave it out for the built-in images.")
        choose("architecture", self.architecture, ARCHITECTURES)
        choose("initialization", self.initialization, INITIALIZATIONS)
        check_normalization("normalization", self.normalization)
        check_normalization("generator_normalization", self.generator_normalization)
        check_optimizer("generator_optimizer", self.generator_optimizer)
        check_optimizer("discriminator_optimizer", self.discriminator_optimizer)
        choose("loss", self.loss, LOSSES)
        if self.lipschitz is not None:
            self._require("lipschitz", above=0)
        if self.penalty is not None:
            choose("penalty", self.penalty, PENALTIES, or_none=True)
        choose("device", self.device, ("auto", "cpu", "cuda", "mps"))
        choose("precision", self.precision, PRECISIONS)
        choose("strategy", self.strategy, STRATEGIES)
        read_augmentation(self.augmentation)
        choose("critic", self.critic, ("none", "strict"))
        choose("data_loading", self.data_loading, ("auto", "prepare", "stream"))
        choose("image_size", self.image_size, ARCHITECTURES[self.architecture].image_sizes)
        choose("channels", self.channels, ARCHITECTURES[self.architecture].channels)
        for name in (
            "generator_width",
            "discriminator_width",
            "latent_dim",
            "num_discriminator_steps",
            "log_every",
            "accumulate",
        ):
            self._require(name, at_least=1)
        for name in ("num_sample_grids", "num_evaluations"):
            self._require(name, at_least=1)
        for name in ("penalty_interval", "path_length_interval"):
            self._require(name, at_least=1)
        for name in ("penalty_weight", "orthonormal_weight", "weight_clip", "path_length_weight", "stream_cache_gb"):
            self._require(name, at_least=0)
        self._require("batch_size", at_least=2)
        if self.generator_batch_size is not None:
            self._require("generator_batch_size", at_least=2)
        self._check_combinations()
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

    @classmethod
    def unchecked(cls, **values: Any) -> Config:
        """A config whose values are known to be valid, made without torch."""
        config = object.__new__(cls)
        for field in dataclasses.fields(cls):
            object.__setattr__(config, field.name, values.get(field.name, field.default))
        return config

    def _check_combinations(self) -> None:
        from spectralnorm.gan.data.points import MIXTURES
        from spectralnorm.gan.models import ARCHITECTURES

        conditional = [name for name, architecture in ARCHITECTURES.items() if architecture.conditional]
        if self.conditional and self.architecture not in conditional:
            raise UserError(
                f"The architecture '{self.architecture}' has no form with labels; choose {' or '.join(conditional)}, "
                "or leave out --conditional."
            )
        is_toy, makes_points = self.data in MIXTURES, ARCHITECTURES[self.architecture].makes_points
        if is_toy and not makes_points:
            raise UserError(
                f"The data '{self.data}' are points, not images; take --recipe {self.data}, which has the networks for "
                "them."
            )
        if makes_points and (not (is_toy or self.data == GIVEN_DATA) or self.augmentation != "none"):
            raise UserError(
                f"The architecture 'points' is for the data {' or '.join(MIXTURES)}, without augmentation; got data "
                f"'{self.data}' and augmentation '{self.augmentation}'."
            )
        if self.path_length_weight and self.architecture != "stylegan2":
            raise UserError(
                f"path_length_weight is for stylegan2, whose generator has styles; leave it out for "
                f"{self.architecture}."
            )
        if self.loss == "relativistic" and self.generator_batch_size not in (None, self.batch_size):
            raise UserError(
                "The relativistic loss pairs each generated image with a real one, so generator_batch_size must be "
                f"left out or equal batch_size ({self.batch_size}), got {self.generator_batch_size}."
            )

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
        if (
            isinstance(value, (int, float))
            and at_least <= value <= at_most
            and above < value < below
            and abs(value) != math.inf
        ):
            return
        lower = f"above {above}" if math.isfinite(above) else f"at least {at_least}"
        upper = f" and below {below}" if math.isfinite(below) else ""
        upper = f" and at most {at_most}" if math.isfinite(at_most) else upper
        raise UserError(f"{name} must be a number {lower}{upper}, got {value!r}.")


def choose(setting: str, name: Any, choices: Iterable[Any], *, or_none: bool = False) -> None:
    """Check that a name is one of the choices.

    Args:
        setting: what the name is for, as the message calls it.
        name: what was given.
        choices: the names that there are.
        or_none: whether the message offers to leave the setting out as well.

    Raises:
        UserError: it is not; the message lists the choices, and asks whether a similar one was meant.
    """
    choices = list(choices)
    if name not in choices:
        names = ", ".join(map(str, choices)) + (", or none (in Python: None)" if or_none else "")
        near = difflib.get_close_matches(str(name), map(str, choices), n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"Unknown {setting} '{name}'{meant}; choose one of {names}.")


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
    # JSON has no tuples.
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
    return Config(**values)


def differing_lines(old: Config, new: Config) -> list[str]:
    """The settings in which a run cannot go on as another one: ``name: old -> new``, empty when it can."""
    return [
        f"{field.name}: {getattr(old, field.name)} -> {getattr(new, field.name)}"
        for field in dataclasses.fields(Config)
        if not field.metadata["resumable"] and getattr(old, field.name) != getattr(new, field.name)
    ]
