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
from spectralnorm.gan.data import Batches
from spectralnorm.gan.ema import GeneratorAverage
from spectralnorm.gan.losses import LOSSES
from spectralnorm.gan.penalties import PENALTIES
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
        device: where the networks and their data live.
    """

    def __init__(
        self, config: Config, *, generator: nn.Module, discriminator: nn.Module, images: Tensor, device: torch.device
    ) -> None:
        self.config = config
        self.device = device
        self.generator = _prepare(generator, device)
        self.discriminator = _prepare(discriminator, device)
        self._trained = [parameter for parameter in discriminator.parameters() if parameter.requires_grad]
        adam = partial(torch.optim.Adam, betas=(config.beta1, config.beta2), fused=True)
        self.generator_optimizer = adam(self.generator.parameters(), lr=config.generator_lr)
        self.discriminator_optimizer = adam(self.discriminator.parameters(), lr=config.discriminator_lr)
        self.average = GeneratorAverage(self.generator, half_life_images=1000 * config.ema_half_life_kimg)
        self.batches = Batches(images, batch_size=config.batch_size, seed=config.seed, device=device)
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
                fake_images = self.generator(self.latents(self.config.batch_size))
                real_images = next(self.batches)
                self.update_discriminator(real_images, fake_images.detach())
            # The images that the discriminator has just learned from serve the generator too: no need to make others.
            self.update_generator(fake_images, real_images)
            self.step += 1
            self.stop_reason = self.stop_reason or self.spent_budget()
            for observer in observers:
                observer(self)
        self.clock.stop()

    def update_discriminator(self, real_images: Tensor, fake_images: Tensor) -> None:
        """One step of the discriminator on a batch of real images and one of generated images."""
        real_logits, fake_logits = self._judge(real_images, fake_images)
        loss = self.loss.discriminator(real_logits, fake_logits)
        if self.penalty is not None and self.images_seen // self.config.batch_size % self.config.penalty_interval == 0:
            penalty = self.penalty(self._judge_augmented, real_images, fake_images, random=self.random)
            loss = loss + self.config.penalty_weight * self.config.penalty_interval * penalty
            self.means.add("penalty/discriminator", penalty)
        self.discriminator_optimizer.zero_grad()
        loss.backward()
        self.discriminator_optimizer.step()
        self.images_seen += len(real_images)
        self.means.add("loss/discriminator", loss)
        self.means.add("logits/real", real_logits.mean())
        self.means.add("logits/fake", fake_logits.mean())

    def update_generator(self, fake_images: Tensor, real_images: Tensor | None = None) -> None:
        """One step of the generator, whose graph the images carry, against the discriminator as it is.

        Args:
            fake_images: of the generator.
            real_images: as many; only losses with a ``paired_generator`` look at them, and only they need them.
        """
        # The discriminator's own gradients are not wanted here, and cost a third of its backward pass.
        for parameter in self._trained:
            parameter.requires_grad_(False)
        if self.loss.paired_generator is None or real_images is None:
            loss = self.loss.generator(self._judge_augmented(fake_images))
        else:
            loss = self.loss.paired_generator(*self._judge(real_images, fake_images))
        self.generator_optimizer.zero_grad()
        loss.backward()
        self.generator_optimizer.step()
        for parameter in self._trained:
            parameter.requires_grad_(True)
        self.means.add("loss/generator", loss)

    def _judge_together(self, real_images: Tensor, fake_images: Tensor) -> Sequence[Tensor]:
        images = torch.cat([real_images, fake_images])
        return self._judge_augmented(images).split([len(real_images), len(fake_images)])

    def _judge_apart(self, real_images: Tensor, fake_images: Tensor) -> Sequence[Tensor]:
        return [self._judge_augmented(images) for images in (real_images, fake_images)]

    def _judge_augmented(self, images: Tensor) -> Tensor:
        return self.discriminator(self.augment(images, self.random))

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
        tensors |= {f"average.{k}": v for k, v in self.average.module.state_dict().items()}
        for name, optimizer in self._optimizers():
            for index, slots in optimizer.state_dict()["state"].items():
                tensors |= {f"{name}.{index}.{slot}": torch.as_tensor(value) for slot, value in slots.items()}
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
        self.average.module.load_state_dict(under("average.", tensors))
        for name, optimizer in self._optimizers():
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in under(f"{name}.", tensors).items():
                index, slot = key.split(".", 1)
                state.setdefault(int(index), {})[slot] = _laid_out_like(parameters[int(index)], value)
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
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
