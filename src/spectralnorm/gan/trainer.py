"""The training loop: Algorithm 1 of Miyato et al. 2018, and nothing else on the page.

Logging, averaging, samples, metrics and checkpoints observe the loop (`spectralnorm.gan.observers`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from spectralnorm.gan.augment import compose
from spectralnorm.gan.checkpoint import under
from spectralnorm.gan.config import Config, augmentation_names
from spectralnorm.gan.data import Batch, Batches
from spectralnorm.gan.ema import GeneratorAverage
from spectralnorm.gan.losses import LOSSES
from spectralnorm.gan.optimizers import make_optimizer
from spectralnorm.gan.penalties import PENALTIES, path_length_penalty, path_lengths
from spectralnorm.gan.weight_control import OrthonormalPenalty, clip_weights
from spectralnorm.transform import load_tracking_state, tracking_state

__all__ = ["Clock", "Observer", "RunningMeans", "Trainer"]


class Observer(Protocol):
    """Something that watches a run. It is called after every step, and may read anything of the trainer."""

    def __call__(self, trainer: Trainer) -> None: ...


class Trainer:
    """Two networks, their optimizers and the state of the run.

    Args:
        config: the settings.
        generator: latents ``(batch, latent_dim)`` to images ``(batch, channels, size, size)`` in [-1, 1].
        discriminator: images to logits ``(batch,)``, already normalized as the config asks.
        images: training images, uint8, ``(num, channels, size, size)``.
        labels: their classes, int64 ``(num,)``: both networks get labels as a second argument; None: they do not.
        device: where the networks and their data live.

    Raises:
        UserError: the batch is larger than the data, or the optimizer does not take the networks' weights.
    """

    def __init__(
        self,
        config: Config,
        *,
        generator: nn.Module,
        discriminator: nn.Module,
        images: Tensor,
        labels: Tensor | None = None,
        device: torch.device,
    ) -> None:
        self.config = config
        self.device = device
        self.generator = _prepare(generator, device)
        self.discriminator = _prepare(discriminator, device)
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
        self.average = GeneratorAverage(self.generator, half_life_images=1000 * config.ema_half_life_kimg)
        self.batches = Batches(images, labels, batch_size=config.batch_size, seed=config.seed, device=device)
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
        self.augment = compose(augmentation_names(config.augmentation))

        self.step = 0
        self.images_seen = 0
        self.clock = Clock(device)
        self.means = RunningMeans()
        self.stop_reason: str | None = None

    def run(self, observers: Sequence[Observer]) -> None:
        """Train until the budget is spent or an observer sets `stop_reason`."""
        self.stop_reason = self.stop_reason or self.spent_budget()
        self.clock.start()
        while self.stop_reason is None:
            for _ in range(self.config.num_discriminator_steps):
                real = next(self.batches)
                fake = self.generate(self.config.batch_size, real.labels)
                self.update_discriminator(real, fake)
            # The images that the discriminator has just learned from serve the generator too: no need to make others.
            if self.config.generator_batch_size is not None:
                num = self.config.generator_batch_size
                fake = self.generate(num, self._draw_labels(num))
            self.update_generator(fake, real)
            self.step += 1
            self.stop_reason = self.stop_reason or self.spent_budget()
            for observer in observers:
                observer(self)
        self.clock.stop()

    def generate(self, num: int, labels: Tensor | None = None) -> Batch:
        """Images of fresh latents, with the graph that leads to the generator."""
        latents = self.latents(num)
        return Batch(self.generator(latents) if labels is None else self.generator(latents, labels), labels)

    def update_discriminator(self, real: Batch, fake: Batch) -> None:
        """One step of the discriminator on a batch of real images and one of generated images."""
        config = self.config
        fake = Batch(fake.images.detach(), fake.labels)
        real_logits, fake_logits = self._judge(real, fake)
        loss = self.loss.discriminator(real_logits, fake_logits)
        if self.penalty is not None and self.images_seen // config.batch_size % config.penalty_interval == 0:
            # Generated images have the labels of the real ones, and so has what lies between them.
            judge = partial(self._judge_augmented, labels=real.labels)
            penalty = self.penalty(judge, real.images, fake.images, random=self.random)
            loss = loss + config.penalty_weight * config.penalty_interval * penalty
            self.means.add("penalty/discriminator", penalty)
        if self._orthonormal is not None:
            penalty = self._orthonormal()
            loss = loss + config.orthonormal_weight * penalty
            self.means.add("penalty/orthonormal", penalty)
        self.discriminator_optimizer.zero_grad()
        loss.backward()
        self.discriminator_optimizer.step()
        if config.weight_clip:
            clip_weights(self._trained, config.weight_clip)
        self.images_seen += len(real.images)
        self.means.add("loss/discriminator", loss)
        self.means.add("logits/real", real_logits.mean())
        self.means.add("logits/fake", fake_logits.mean())

    def update_generator(self, fake: Batch, real: Batch | None = None) -> None:
        """One step of the generator, whose graph the images carry, against the discriminator as it is.

        Args:
            fake: of the generator.
            real: as many; only losses with a ``paired_generator`` look at them, and only they need them.
        """
        # The discriminator's own gradients are not wanted here, and cost a third of its backward pass.
        for parameter in self._trained:
            parameter.requires_grad_(False)
        if self.loss.paired_generator is None or real is None:
            loss = self.loss.generator(self._judge_augmented(*fake))
        else:
            loss = self.loss.paired_generator(*self._judge(real, fake))
        self.means.add("loss/generator", loss)
        if self.config.path_length_weight and self.step % self.config.path_length_interval == 0:
            loss = loss + self.config.path_length_weight * self.config.path_length_interval * self._path_lengths()
        self.generator_optimizer.zero_grad()
        loss.backward()
        self.generator_optimizer.step()
        for parameter in self._trained:
            parameter.requires_grad_(True)

    def _path_lengths(self) -> Tensor:
        """How unevenly images move with styles, on half a batch, as Karras et al. 2020 save time (appendix B)."""
        generator: Any = self.generator
        styles = generator.styles(self.latents(max(1, self.config.batch_size // 2)))
        lengths = path_lengths(generator.synthesize(styles), styles, random=self.random)
        penalty, self.average_path_length = path_length_penalty(lengths, self.average_path_length)
        self.means.add("penalty/path_length", penalty)
        return penalty

    def _judge_together(self, real: Batch, fake: Batch) -> Sequence[Tensor]:
        images = torch.cat([real.images, fake.images])
        labels = None if real.labels is None or fake.labels is None else torch.cat([real.labels, fake.labels])
        return self._judge_augmented(images, labels).split([len(real.images), len(fake.images)])

    def _judge_apart(self, real: Batch, fake: Batch) -> Sequence[Tensor]:
        return [self._judge_augmented(*batch) for batch in (real, fake)]

    def _judge_augmented(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        images = self.augment(images, self.random)
        return self.discriminator(images) if labels is None else self.discriminator(images, labels)

    def _draw_labels(self, num: int) -> Tensor | None:
        """Labels of training images drawn at random, ``(num,)``; None where labels play no part."""
        if self._labels is None:
            return None
        chosen = torch.randint(len(self._labels), (num,), generator=self.random, device=self.device)
        return self._labels[chosen]

    def latents(self, num: int) -> Tensor:
        """Draw z ~ N(0, I), shape ``(num, latent_dim)``."""
        return torch.randn(num, self.config.latent_dim, generator=self.random, device=self.device)

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
        tensors = {f"generator.{k}": v for k, v in self.generator.state_dict().items()}
        tensors |= {f"discriminator.{k}": v for k, v in self.discriminator.state_dict().items()}
        tensors |= {f"tracking.{k}": v for k, v in tracking_state(self.discriminator).items()}
        tensors |= {f"generator_tracking.{k}": v for k, v in tracking_state(self.generator).items()}
        tensors |= {f"average.{k}": v for k, v in self.average.module.state_dict().items()}
        for name, optimizer in self._optimizers():
            for index, slots in optimizer.state_dict()["state"].items():
                filled = {slot: value for slot, value in slots.items() if value is not None}
                tensors |= {f"{name}.{index}.{slot}": torch.as_tensor(value) for slot, value in filled.items()}
        if self.config.path_length_weight:
            tensors["average_path_length"] = self.average_path_length
        tensors["random.run"] = self.random.get_state()
        tensors["random.torch"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        numbers = {
            "step": self.step,
            "images_seen": self.images_seen,
            "training_seconds": self.clock.seconds,
            "batches": self.batches.state_dict(),
        }
        return tensors, numbers

    def load_state(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Go back to what `state` returned."""
        self.generator.load_state_dict(under("generator.", tensors))
        self.discriminator.load_state_dict(under("discriminator.", tensors))
        load_tracking_state(self.discriminator, under("tracking.", tensors))
        load_tracking_state(self.generator, under("generator_tracking.", tensors))
        self.average.module.load_state_dict(under("average.", tensors))
        for name, optimizer in self._optimizers():
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in under(f"{name}.", tensors).items():
                index, slot = key.split(".", 1)
                state.setdefault(int(index), {})[slot] = _laid_out_like(parameters[int(index)], value)
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        if "average_path_length" in tensors:
            self.average_path_length = tensors["average_path_length"].to(self.device)
        self.random.set_state(tensors["random.run"])
        torch.set_rng_state(tensors["random.torch"])
        if self.device.type == "cuda" and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"], self.device)
        self.step = numbers["step"]
        self.images_seen = numbers["images_seen"]
        self.clock.seconds = numbers["training_seconds"]
        self.batches.load_state_dict(numbers["batches"])

    def _optimizers(self) -> list[tuple[str, torch.optim.Optimizer]]:
        return [
            ("generator_optimizer", self.generator_optimizer),
            ("discriminator_optimizer", self.discriminator_optimizer),
        ]


class Clock:
    """Measures training time: runs while the networks are trained, stands still in `paused`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._elapsed = 0.0
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """Training time so far, in seconds."""
        return self._elapsed + (0.0 if self._since is None else time.perf_counter() - self._since)

    @seconds.setter
    def seconds(self, value: float) -> None:
        self._elapsed = value

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Stand still, once the work already handed to the device is done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._elapsed, self._since = self.seconds, None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For work that is not training: metrics, samples, checkpoints."""
        was_running = self._since is not None
        self.stop()
        try:
            yield
        finally:
            if was_running:
                self.start()


class RunningMeans:
    """Means of scalars over the steps since they were last read, kept on the device so that the loop never waits."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, value: Tensor) -> None:
        value = value.detach()
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self._counts.get(name, 0) + 1

    def pop(self) -> dict[str, float]:
        """The means by name; starts anew. Waits for the device."""
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means


def _prepare(network: nn.Module, device: torch.device) -> nn.Module:
    # Convolutions are faster in channels-last order, on CPUs and on tensor cores.
    network = network.to(device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return network.train()


def _laid_out_like(parameter: Tensor, value: Tensor) -> Tensor:
    # A checkpoint is contiguous; fused optimizers walk through a weight and its moments in the weight's own order.
    return torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value
