"""What watches the training loop: averaging, step sizes, records, samples, metrics, checkpoints.

Each observer is called after every step and decides by itself when to act. What takes time without training anything is
done while the clock stands still.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from spectralnorm.errors import UserError
from spectralnorm.gan.checkpoint import save_checkpoint
from spectralnorm.gan.data import ImageSet, ImageStream
from spectralnorm.gan.evaluation import measure, metrics_of
from spectralnorm.gan.models import ARCHITECTURES
from spectralnorm.gan.parts import whole
from spectralnorm.gan.run_folder import CHECKPOINTS
from spectralnorm.gan.run_pictures import NUM_POINTS, save_grid, save_points
from spectralnorm.gan.sampling import GENERATOR_FILE, TrainedGenerator, save_generator
from spectralnorm.gan.trainer import Trainer
from spectralnorm.gan.weight_norms import LargestSingularValues
from spectralnorm.metrics import FeatureExtractor
from spectralnorm.records import Evaluation, Record, RecordFile, Scalars

__all__ = [
    "Averaging",
    "Checkpoints",
    "Evaluations",
    "Milestones",
    "NoLog",
    "RecordLog",
    "SampleGrids",
    "ScalarLog",
    "StepSizeDecay",
    "trained_generator",
]

_GRID_SIDE = 8


class Averaging:
    """Moves the averaged generator after every step."""

    def __call__(self, trainer: Trainer) -> None:
        batch_size = trainer.config.batch_size * trainer.config.num_discriminator_steps
        trainer.average.update(batch_size=batch_size, images_seen=trainer.images_seen)


class StepSizeDecay:
    """Lets both step sizes fall linearly to zero over the last part of the budget.

    Args:
        trainer: the run, about to begin or to go on; the size of its next step is set at once.
    """

    def __init__(self, trainer: Trainer) -> None:
        self(trainer)

    def __call__(self, trainer: Trainer) -> None:
        config = trainer.config
        remaining = (1 - trainer.progress) / (1 - config.lr_decay_from) if config.lr_decay_from < 1 else 1.0
        _set_step_size(trainer.generator_optimizer, config.generator_lr * min(1.0, remaining))
        _set_step_size(trainer.discriminator_optimizer, config.discriminator_lr * min(1.0, remaining))


class RecordLog:
    """The records of a run: ``metrics.jsonl`` is the truth, TensorBoard a view of it."""

    def __init__(self, file: RecordFile, board: SummaryWriter) -> None:
        self._file = file
        self._board = board

    def append(self, record: Record) -> None:
        self._file.append(record)
        if isinstance(record, Scalars):
            for name, value in record.values.items():
                self._board.add_scalar(name, value, record.step)
        if isinstance(record, Evaluation):
            for metric in record.metrics:
                self._board.add_scalar(f"metrics/{metric.name}", metric.value, record.step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


class NoLog(RecordLog):
    """Of the processes that leave the records to the first one."""

    def __init__(self) -> None:
        pass

    def append(self, record: Record) -> None:
        pass

    def close(self) -> None:
        pass


class ScalarLog:
    """Writes losses, logits, gradient norms, sigmas and speed every few steps, and stops a run that has diverged.

    Args:
        log: where to.
        also: called with each record, such as a progress display.
        trainer: the run, about to begin or to go on.
    """

    def __init__(self, log: RecordLog, also: Callable[[Trainer, Scalars], None], *, trainer: Trainer) -> None:
        self._log = log
        self._also = also
        self._sigmas = LargestSingularValues(trainer.discriminator)
        self._last = (trainer.images_seen, trainer.clock.seconds)

    def __call__(self, trainer: Trainer) -> None:
        if trainer.step % trainer.config.log_every and trainer.stop_reason is None:
            return
        values = trainer.processes.mean(trainer.means.pop())
        if not all(map(math.isfinite, values.values())):
            raise UserError(_describe_divergence(trainer, values))
        # The gradients are still those of the update just done: they are cleared at the start of the next.
        values["gradient_norm/discriminator"] = _gradient_norm(trainer.discriminator_optimizer)
        values["gradient_norm/generator"] = _gradient_norm(trainer.generator_optimizer)
        values |= {f"sigma/{layer}": sigma for layer, sigma in self._sigmas().items()}
        seconds = trainer.clock.seconds
        values["images_per_second"] = (trainer.images_seen - self._last[0]) / max(seconds - self._last[1], 1e-9)
        self._last = (trainer.images_seen, seconds)
        record = Scalars(
            step=trainer.step, images_seen=trainer.images_seen, training_seconds=seconds, values=values
        )  # fmt: skip
        self._log.append(record)
        self._also(trainer, record)


class Milestones:
    """Fires ``count`` times over the budget of a run; with ``power`` above 1, more often at its start."""

    def __init__(self, count: int, *, power: float = 1.0, progress: float = 0.0) -> None:
        self._count = count
        self._power = power
        self._passed = self._index(progress)

    def reached(self, progress: float) -> bool:
        index = self._index(progress)
        reached, self._passed = index > self._passed, index
        return reached

    def _index(self, progress: float) -> int:
        return math.floor(self._count * progress ** (1 / self._power) + 1e-9)


class SampleGrids:
    """Saves a grid of samples, always from the same latents, and asks for a checkpoint with each.

    Args:
        run: the run folder.
        log: its records.
        checkpoints: asked to save after the step of each grid.
        trainer: the run, about to begin or to go on.
        images: the data; points are drawn on top of real ones.
    """

    def __init__(
        self,
        run: Path,
        log: RecordLog,
        checkpoints: Checkpoints,
        *,
        trainer: Trainer,
        images: ImageSet | ImageStream,
    ) -> None:
        self._run = run
        self._log = log
        self._checkpoints = checkpoints
        self._milestones = Milestones(trainer.config.num_sample_grids, power=1.5, progress=trainer.progress)
        self._generator = trained_generator(trainer)
        self._images = images
        if trainer.step == 0:
            self.save(trainer)

    def __call__(self, trainer: Trainer) -> None:
        if self._milestones.reached(trainer.progress):
            with trainer.clock.paused():
                self.save(trainer)
            self._checkpoints.ask()

    def save(self, trainer: Trainer) -> None:
        if not trainer.processes.is_first:
            return
        file = f"samples/step-{trainer.step:09d}.png"
        if ARCHITECTURES[trainer.config.architecture].makes_points:
            real, _ = self._images.examples(NUM_POINTS)
            picture = save_points(self._run, self._generator, real, file=file, step=trainer.step, role="samples")
        else:
            images = self._generator.sample(_GRID_SIDE**2, seed=trainer.config.seed)
            picture = save_grid(self._run, images, file=file, step=trainer.step, role="samples", columns=_GRID_SIDE)
        self._log.append(picture)


class Evaluations:
    """Measures generated images against held-out real ones, a few times over the run.

    Args:
        log: where to.
        trainer: the run.
        images: the data, with the held-out images to measure against.
        extractors: what sees the images; the quick ones, since this happens during training.
        num_samples: generated images each time.
    """

    def __init__(
        self,
        log: RecordLog,
        *,
        trainer: Trainer,
        images: ImageSet | ImageStream,
        extractors: Sequence[FeatureExtractor],
        num_samples: int,
    ) -> None:
        self._log = log
        self._generator = trained_generator(trainer)
        self._images = images
        self._extractors = extractors
        self._num_samples = num_samples
        self._milestones = Milestones(trainer.config.num_evaluations, power=1.5, progress=trainer.progress)

    def __call__(self, trainer: Trainer) -> None:
        # The last milestone is the end of the run, where the full evaluation takes its place.
        if self._milestones.reached(trainer.progress) and trainer.stop_reason is None:
            with trainer.clock.paused():
                metrics = measure(
                    self._generator,
                    self._images,
                    extractors=self._extractors,
                    num=self._num_samples,
                    metrics=metrics_of(trainer.config),
                )
            self._log.append(
                Evaluation(
                    step=trainer.step,
                    images_seen=trainer.images_seen,
                    training_seconds=trainer.clock.seconds,
                    final=False,
                    metrics=metrics,
                )
            )


class Checkpoints:
    """Saves the state of the run, and the generator for use, at least once in so many minutes of wall time.

    It comes after all that is recorded of a step: what a kill cut off is recorded once the run goes on from before it.

    Args:
        run: the run folder.
        minutes: at most so long between two checkpoints.
    """

    def __init__(self, run: Path, *, minutes: float) -> None:
        self._run = run
        self._seconds = 60 * minutes
        self._saved_at: float | None = None
        self._is_asked = False

    def __call__(self, trainer: Trainer) -> None:
        self._saved_at = trainer.wall if self._saved_at is None else self._saved_at
        if self._is_asked or trainer.wall - self._saved_at >= self._seconds:
            self.save(trainer)

    def ask(self) -> None:
        """Let this step be saved, whatever time has passed."""
        self._is_asked = True

    def save(self, trainer: Trainer) -> None:
        """Save now; a state with non-finite weights is refused, so that the last good checkpoint stays.

        Raises:
            UserError: a weight is not finite.
            OSError: the disk is full.
        """
        with trainer.clock.paused():
            # The first one may have measured at this step.
            trainer.processes.meet()
            if _non_finite_weights(trainer):
                raise UserError(_describe_divergence(trainer, {}))
            # Several processes gather together what they hold in parts; the first one writes.
            tensors, numbers = trainer.state()
            if trainer.processes.is_first:
                self._write(trainer, tensors, numbers)
        self._saved_at, self._is_asked = trainer.wall, False

    def _write(self, trainer: Trainer, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        # In this order: wherever a run is killed, one that has a checkpoint has a generator to sample from.
        save_generator(self._run / GENERATOR_FILE, trained_generator(trainer))
        save_checkpoint(self._run / CHECKPOINTS, tensors=tensors, numbers=numbers)


def trained_generator(trainer: Trainer) -> TrainedGenerator:
    """The averaged generator as it is now."""
    return TrainedGenerator(
        trainer.average.module,
        trainer.config,
        step=trainer.step,
        images_seen=trainer.images_seen,
        training_seconds=trainer.clock.seconds,
    )


def _set_step_size(optimizer: torch.optim.Optimizer, step_size: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = step_size


def _gradient_norm(optimizer: torch.optim.Optimizer) -> float:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [whole(parameter.grad) for parameter in parameters if parameter.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0


def _non_finite_weights(trainer: Trainer) -> list[str]:
    """The first non-finite weight of each network that has one."""
    named = []
    for role, network in (("discriminator", trainer.discriminator), ("generator", trainer.generator)):
        bad = (name for name, weight in network.named_parameters() if not torch.isfinite(whole(weight)).all())
        named += [f"{role} {name}" for name in itertools.islice(bad, 1)]
    return named


def _describe_divergence(trainer: Trainer, values: dict[str, float]) -> str:
    losses = ", ".join(f"{name} is {value:g}" for name, value in values.items() if not math.isfinite(value))
    weights = _non_finite_weights(trainer)
    where = f"first non-finite weights: {', '.join(weights)}" if weights else "all weights are still finite"
    return (
        f"Training diverged at step {trainer.step}: {losses or 'a weight is not finite'}; {where}; the last good "
        "checkpoint is kept; train anew with a smaller --discriminator-lr or --generator-lr, or with "
        "--normalization spectral."
    )
