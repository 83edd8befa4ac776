"""The training loop: Algorithm 1 of Miyato et al. 2018, and nothing else on the page.

Logging, averaging, samples, metrics and checkpoints observe the loop (`spectralnorm.gan.observers`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from spectralnorm.errors import UserError
from spectralnorm.gan.augment import make_augmenter
from spectralnorm.gan.clock import Clock, RunningMeans
from spectralnorm.gan.config import Config
from spectralnorm.gan.data import Batch, Batches, ImageStream, StreamedBatches
from spectralnorm.gan.distributed import Processes
from spectralnorm.gan.ema import GeneratorAverage
from spectralnorm.gan.in_training import InTraining
from spectralnorm.gan.losses import LOSSES
from spectralnorm.gan.optimizers import make_optimizer
from spectralnorm.gan.penalties import PENALTIES, Discriminator, path_length_penalty, path_lengths
from spectralnorm.gan.precision import Precision
from spectralnorm.gan.trainer_state import restore, state_of
from spectralnorm.gan.weight_control import OrthonormalPenalty, clip_weights

__all__ = ["Clock", "Generated", "Observer", "RunningMeans", "Trainer"]


class Observer(Protocol):
    """Something that watches a run. It is called after every step, and may read anything of the trainer."""

    def __call__(self, trainer: Trainer) -> None: ...


class Generated(NamedTuple):
    """Images of the generator."""

    images: Tensor
    """float32 ``(batch, channels, height, width)``, with the graph that leads to the generator if it is kept."""
    labels: Tensor | None
    """int64 ``(batch,)``; None where classes play no part."""
    latents: Tensor
    """``(batch, latent_dim)``"""


class Trainer:
    """Two networks, their optimizers and the state of the run.

    Args:
        config: the settings.
        generator: latents ``(batch, latent_dim)`` to images ``(batch, channels, size, size)`` in [-1, 1].
        discriminator: images to logits ``(batch,)``, already normalized as the config asks.
        images: training images, uint8, ``(num, channels, size, size)``, or a set that is read while training goes on.
        labels: their classes, int64 ``(num,)``: both networks get labels as a second argument; None: they do not.
        device: where the networks and their data live.
        processes: that train them together, each with its share of every batch; None: this one alone.

    Raises:
        UserError: the batch is larger than the data or cannot be shared, the optimizer does not take the networks'
            weights, or settings do not go together.
    """

    def __init__(
        self,
        config: Config,
        *,
        generator: nn.Module,
        discriminator: nn.Module,
        images: Tensor | ImageStream,
        labels: Tensor | None = None,
        device: torch.device,
        processes: Processes | None = None,
    ) -> None:
        self.config = config
        self.device = device
        self.processes = Processes() if processes is None else processes
        _check_shares(config, self.processes.size)
        # FSDP2 takes parameters in the usual order only.
        in_parts = config.strategy == "fsdp" and self.processes.size > 1
        self.generator = _prepare(generator, device, channels_last=not in_parts)
        self.discriminator = _prepare(discriminator, device, channels_last=not in_parts)
        self.average = GeneratorAverage(self.generator, half_life_images=1000 * config.ema_half_life_kimg)
        precision = Precision(config.precision, device)
        # How the loop calls the networks. What is held in parts gets new parameters: the optimizers come afterwards.
        self._generate, self._discriminate = (
            InTraining(
                network,
                precision=precision,
                processes=self.processes,
                strategy=config.strategy,
                compile=config.compile,
            )
            for network in (self.generator, self.discriminator)
        )
        self.average.follow(self.generator)
        self.scalers = {"generator": precision.scaler(), "discriminator": precision.scaler()}
        self._trained = [parameter for parameter in discriminator.parameters() if parameter.requires_grad]
        self.generator_optimizer, self.discriminator_optimizer = (
            make_optimizer(
                f"{role}_optimizer", setting, network.parameters(), lr=lr, betas=(config.beta1, config.beta2)
            )
            for role, setting, network, lr in (
                ("generator", config.generator_optimizer, self.generator, config.generator_lr),
                ("discriminator", config.discriminator_optimizer, self.discriminator, config.discriminator_lr),
            )
        )
        stream: dict[str, Any] = {"batch_size": config.batch_size, "seed": config.seed, "device": device}
        if isinstance(images, ImageStream):
            self.batches = StreamedBatches(images, with_labels=labels is not None, **stream)
        else:
            share = partial(self.processes.mine, parts=config.accumulate)
            self.batches = Batches(images, labels, share=share, **stream)
        self._labels = None if labels is None else labels.to(device)
        self.random = torch.Generator(device).manual_seed(config.seed)
        # One pass over both batches is faster than two, but what mixes the images of a batch, such as batch
        # normalization, must not see real and fake together.
        mixes_images = any(
            isinstance(module, _BatchNorm) or getattr(module, "mixes_images", False)
            for module in discriminator.modules()
        )
        self._judge = self._judge_apart if mixes_images else self._judge_together
        self.loss = LOSSES[config.loss]
        self.penalty = None if config.penalty is None else PENALTIES[config.penalty]
        self._orthonormal = OrthonormalPenalty(self.discriminator) if config.orthonormal_weight else None
        self.average_path_length = torch.zeros((), device=device)
        self.augment = make_augmenter(config.augmentation, device=device)

        self.step = 0
        self.images_seen = 0
        self.clock = Clock(device)
        self.means = RunningMeans()
        self.stop_reason: str | None = None
        self._stop_request: str | None = None
        self._is_first_step = True
        self.wall = time.monotonic()
        """A clock that never stands still, in seconds, the same on all processes at every step."""
        # The networks are made, from the same random numbers everywhere.
        self.processes.vary_noise(config.seed)

    def run(self, observers: Sequence[Observer]) -> None:
        """Train until the budget is spent or an observer sets `stop_reason`.

        Raises:
            UserError: the generator's images have not the shape of the data's.
        """
        self.stop_reason = self.stop_reason or self.spent_budget()
        self.clock.start()
        while self._goes_on():
            with self._compiling():
                self._take_step()
            self.step += 1
            self.stop_reason = self.stop_reason or self.spent_budget()
            for observer in observers:
                observer(self)
        self.clock.stop()

    def request_stop(self, reason: str) -> None:
        """End the run after the current step, at any moment and from any of the processes."""
        if self.processes.size == 1:
            self.stop_reason = reason
        else:
            self._stop_request = reason

    def _goes_on(self) -> bool:
        """Whether there is another step; several processes agree on it, and on the time."""
        if self.processes.size > 1:
            reason = self.stop_reason or self._stop_request
            times = (self.clock.measured, time.monotonic())
            self.stop_reason, (self.clock.agreed, self.wall) = self.processes.agree(reason, times)
        else:
            self.wall = time.monotonic()
        return self.stop_reason is None

    @contextmanager
    def _compiling(self) -> Iterator[None]:
        """The first step of compiled networks, most of which is compiling: it is measured, but is no training time."""
        if not (self.config.compile and self._is_first_step):
            yield
            return
        began = time.perf_counter()
        with self.clock.paused():
            yield
        self._is_first_step = False
        self.means.add("seconds/first_step", torch.tensor(time.perf_counter() - began))

    def _take_step(self) -> None:
        """Updates of the discriminator and one of the generator."""
        # Observers have looked at them. Memory is scarcest where the discriminator's gradients are computed.
        self.generator_optimizer.zero_grad()
        for remaining in reversed(range(self.config.num_discriminator_steps)):
            real = self._next_real()
            # Only the last images may serve the generator as well, and need the graph that leads to it.
            with torch.set_grad_enabled(remaining == 0 and self.config.generator_batch_size is None):
                fake = self.generate(self.config.batch_size, real.labels)
            _check_images(fake.images, real.images)
            self.update_discriminator(real, fake)
        # The images that the discriminator has just learned from serve the generator too: no need to make others.
        if self.config.generator_batch_size is not None:
            num = self.config.generator_batch_size
            fake = self.generate(num, self._draw_labels(num))
        self.update_generator(fake, real)

    def _next_real(self) -> Batch:
        """This process's share of the next batch; a source of images that does not share gives all of it."""
        batch = next(self.batches)
        if len(batch.images) * self.processes.size == self.config.batch_size:
            return batch
        share = partial(self.processes.mine, parts=self.config.accumulate)
        return Batch(share(batch.images), None if batch.labels is None else share(batch.labels))

    def generate(self, num: int, labels: Tensor | None = None) -> Generated:
        """Images of fresh latents, with the graph that leads to the generator unless gradients are accumulated.

        Args:
            num: of all processes together; each makes its share.
            labels: of this process's share.
        """
        latents = self.latents(num)
        if self.config.accumulate == 1:
            return Generated(self._generate(latents, labels), labels, latents)
        with torch.no_grad():
            images = [self._generate(*part) for part in self._parts(latents, labels)]
        return Generated(torch.cat(images), labels, latents)

    def update_discriminator(self, real: Batch, fake: Generated) -> None:
        """One step of the discriminator on a batch of real images and one of generated images."""
        config = self.config
        self.discriminator_optimizer.zero_grad()
        for number, parts in enumerate(self._parts(*real, fake.images.detach(), fake.labels), start=1):
            with self._discriminate.summing(is_last=number == config.accumulate):
                loss = self._discriminator_loss(Batch(*parts[:2]), Batch(*parts[2:]))
                self.scalers["discriminator"].scale(self._share_of(loss)).backward()
        Precision.step(self.discriminator_optimizer, self.scalers["discriminator"])
        if config.weight_clip:
            clip_weights(self._trained, config.weight_clip)
        self.images_seen += config.batch_size
        if self.augment.is_adaptive:
            self.augment.signs.copy_(self.processes.mean_tensor(self.augment.signs))
            self.augment.adapt(self.images_seen)
            self.means.add("augmentation_probability", self.augment.p.clone())

    def _discriminator_loss(self, real: Batch, fake: Batch) -> Tensor:
        config = self.config
        real_logits, fake_logits = self._judge(real, fake)
        self.augment.observe(real_logits)
        loss = self.loss.discriminator(real_logits, fake_logits)
        if self._is_penalty_due():
            # Generated images have the labels of the real ones, and so has what lies between them.
            judge = partial(self._judge_exactly, labels=real.labels)
            with self.processes.draws(len(real.images)):
                weighted = partial(self._weighted_penalty, judge, real.images, fake.images)
                loss = loss + self._discriminate.penalty(weighted, share=1 / config.accumulate)
        if self._orthonormal is not None:
            penalty = self._orthonormal()
            loss = loss + config.orthonormal_weight * penalty
            self.means.add("penalty/orthonormal", penalty)
        self.means.add("loss/discriminator", loss)
        self.means.add("logits/real", real_logits.mean())
        self.means.add("logits/fake", fake_logits.mean())
        return loss

    def _weighted_penalty(self, judge: Discriminator, real: Tensor, fake: Tensor) -> Tensor:
        assert self.penalty is not None
        penalty = self.penalty(judge, real, fake, random=self.random)
        self.means.add("penalty/discriminator", penalty)
        return self.config.penalty_weight * self.config.penalty_interval * penalty

    def _is_penalty_due(self) -> bool:
        update = self.images_seen // self.config.batch_size
        return self.penalty is not None and update % self.config.penalty_interval == 0

    def update_generator(self, fake: Generated, real: Batch | None = None) -> None:
        """One step of the generator, whose graph the images carry, against the discriminator as it is.

        Where gradients are accumulated, the images are made anew, part by part, so that one part has a graph at a time.

        Args:
            fake: of the generator.
            real: as many; only losses with a ``paired_generator`` look at them, and only they need them.
        """
        paired = real if self.loss.paired_generator is not None else None
        self.generator_optimizer.zero_grad()
        # The discriminator's own gradients are not wanted here, and cost a third of its backward pass.
        with self._discriminate.frozen():
            parts = self._parts(*fake, *(paired or (None, None)))
            for number, (images, labels, latents, *real_part) in enumerate(parts, start=1):
                with self._generate.summing(is_last=number == self.config.accumulate):
                    images = images if self.config.accumulate == 1 else self._generate(latents, labels)
                    loss = self._generator_loss(Batch(images, labels), Batch(*real_part))
                    self.scalers["generator"].scale(self._share_of(loss)).backward()
        Precision.step(self.generator_optimizer, self.scalers["generator"])

    def _generator_loss(self, fake: Batch, real: Batch) -> Tensor:
        if self.loss.paired_generator is None or real.images is None:
            loss = self.loss.generator(self._judge_augmented(*fake, rows=len(fake.images)))
        else:
            loss = self.loss.paired_generator(*self._judge(real, fake))
        self.means.add("loss/generator", loss)
        if self.config.path_length_weight and self.step % self.config.path_length_interval == 0:
            loss = loss + self.config.path_length_weight * self.config.path_length_interval * self._path_lengths()
        return loss

    def _parts(self, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
        """What belongs to the images of a batch, in as many parts as their gradients are accumulated from."""
        num = self.config.accumulate
        if num == 1:
            return iter([tensors])
        return zip(*((None,) * num if each is None else each.chunk(num) for each in tensors), strict=True)

    def _share_of(self, loss: Tensor) -> Tensor:
        """A part's contribution to the mean over the batch."""
        return loss if self.config.accumulate == 1 else loss / self.config.accumulate

    def _path_lengths(self) -> Tensor:
        """How unevenly images move with styles, on half a batch, as Karras et al. 2020 save time (appendix B)."""
        generator: Any = self.generator
        num = self.config.batch_size // (2 * self.config.accumulate * self.processes.size)
        latents = self.latents(max(1, num) * self.processes.size, parts=1)
        styles = generator.styles(latents)
        with self.processes.draws(len(latents)):
            lengths = path_lengths(generator.synthesize(styles), styles, random=self.random)
        penalty, average = path_length_penalty(lengths, self.average_path_length)
        self.average_path_length = self.processes.mean_tensor(average)
        self.means.add("penalty/path_length", penalty)
        return penalty

    def _judge_together(self, real: Batch, fake: Batch) -> Sequence[Tensor]:
        images = torch.cat([real.images, fake.images])
        labels = None if real.labels is None or fake.labels is None else torch.cat([real.labels, fake.labels])
        logits = self._judge_augmented(images, labels, rows=len(real.images))
        return logits.split([len(real.images), len(fake.images)])

    def _judge_apart(self, real: Batch, fake: Batch) -> Sequence[Tensor]:
        return [self._judge_augmented(*batch, rows=len(batch.images)) for batch in (real, fake)]

    def _judge_augmented(self, images: Tensor, labels: Tensor | None, *, rows: int) -> Tensor:
        """Logits of images, of which ``rows`` are of one batch."""
        with self.processes.draws(rows):
            images = self.augment(images, self.random)
        return self._discriminate(images, labels)

    def _judge_exactly(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """The same for a penalty, which draws for itself too and differentiates twice."""
        return self._discriminate.exactly(self.augment(images, self.random), labels)

    def _draw_labels(self, num: int) -> Tensor | None:
        """Labels of training images drawn at random, of this process's share; None where labels play no part."""
        if self._labels is None:
            return None
        chosen = torch.randint(len(self._labels), (num,), generator=self.random, device=self.device)
        return self._labels[self.processes.mine(chosen, parts=self.config.accumulate)]

    def latents(self, num: int, *, parts: int | None = None) -> Tensor:
        """Draw z ~ N(0, I) for all processes: ``(num, latent_dim)``, of which each has its share."""
        drawn = torch.randn(num, self.config.latent_dim, generator=self.random, device=self.device)
        return self.processes.mine(drawn, parts=self.config.accumulate if parts is None else parts)

    def spent_budget(self) -> str | None:
        """``"steps"`` or ``"minutes"`` once that budget is spent, else None."""
        if self.config.steps is not None and self.step >= self.config.steps:
            return "steps"
        if self.config.minutes is not None and self.clock.seconds >= 60 * self.config.minutes:
            return "minutes"
        return None

    @property
    def progress(self) -> float:
        """The share of the budget that is spent, from 0 to 1."""
        by_steps = self.step / self.config.steps if self.config.steps is not None else 0.0
        by_time = self.clock.seconds / (60 * self.config.minutes) if self.config.minutes is not None else 0.0
        return min(1.0, max(by_steps, by_time))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything needed to go on exactly from here: tensors by name, and the numbers JSON can hold."""
        return state_of(self)

    def load_state(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Go back to what `state` returned, on as many processes as there are now."""
        restore(self, tensors, numbers)


def _prepare(network: nn.Module, device: torch.device, *, channels_last: bool) -> nn.Module:
    network = network.to(device).train()
    # Convolutions are faster in that order, on CPUs and on tensor cores.
    return network.to(memory_format=torch.channels_last) if channels_last else network  # pyright: ignore[reportCallIssue]


def _check_images(fake: Tensor, real: Tensor) -> None:
    """A generator of one's own may make images that the data do not have."""
    if fake.shape[1:] != real.shape[1:]:
        raise UserError(
            f"The generator makes images of shape {tuple(fake.shape[1:])}, and those of the data are "
            f"{tuple(real.shape[1:])}; change the generator, or image_size and channels."
        )


def _check_shares(config: Config, size: int) -> None:
    num = size * config.accumulate
    if num == 1:
        return
    for name in ("batch_size", "generator_batch_size"):
        value = getattr(config, name)
        if value is not None and (value % num or value < 2 * num):
            raise UserError(
                f"{name} must be a multiple of {num} ({size} processes, accumulate {config.accumulate}) and at least "
                f"{2 * num}, got {value}."
            )
    if size > 1 and config.strategy == "fsdp":
        for name in ("orthonormal_weight", "path_length_weight"):
            if getattr(config, name):
                raise UserError(
                    f"strategy fsdp gathers weights within the forward of a network only, and {name} needs them "
                    "outside of it; leave it out, or use strategy ddp."
                )
