"""One call that trains: claims the folder, resumes, watches the loop, and leaves a complete run folder behind."""

from __future__ import annotations

import dataclasses
import datetime
import errno
import json
import os
import platform
import resource
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import spectralnorm
from spectralnorm.errors import UserError
from spectralnorm.gan.checkpoint import latest_checkpoint
from spectralnorm.gan.config import Config
from spectralnorm.gan.data import ImageSet, ImageStream
from spectralnorm.gan.distributed import Processes, started
from spectralnorm.gan.evaluation import extractors_for, require_measurable
from spectralnorm.gan.final import finish
from spectralnorm.gan.inputs import GIVEN_DATA, check_run_data, open_data, open_run_data, resolve_device
from spectralnorm.gan.networks import build_discriminator, build_generator
from spectralnorm.gan.normalizations import normalize
from spectralnorm.gan.observers import (
    Averaging,
    Checkpoints,
    Evaluations,
    NoLog,
    RecordLog,
    SampleGrids,
    ScalarLog,
    StepSizeDecay,
)
from spectralnorm.gan.run_folder import (
    CHECKPOINTS,
    DATA_FILE,
    RECORDS_FILE,
    check,
    claimed,
    default_folder,
    write_config,
)
from spectralnorm.gan.trainer import Observer, Trainer
from spectralnorm.metrics import FeatureExtractor
from spectralnorm.records import Ending, RecordFile, Scalars, Session, read_records, replace_text

__all__ = ["Display", "Run", "train"]

_QUICK_SAMPLES = 2000
_MIN_STEPS_FOR_METRICS = 100
"""A shorter run is a trial: its metrics would take longer than it did."""


@dataclasses.dataclass(frozen=True)
class Run:
    """How a call of `train` ended."""

    folder: Path
    step: int
    reason: str
    """``steps`` or ``minutes`` (the budget that is spent), ``interrupted``, ``already finished``."""
    is_first: bool = True
    """Whether this process wrote the folder; of several that train together one does."""


class Display:
    """Shows a run to a person; this one shows nothing. A method is called when there is something new to show."""

    def data(self, images: ImageSet | ImageStream) -> None:
        """The images have been read and checked."""

    def begin(self, trainer: Trainer) -> None:
        """Training begins, or goes on at ``trainer.step``."""

    def log(self, trainer: Trainer, record: Scalars) -> None:
        """New numbers."""

    def phase(self, text: str) -> None:
        """Training is over, and something else takes a while."""


def train(
    config: Config,
    *,
    out: str | Path | None = None,
    generator: nn.Module | None = None,
    discriminator: nn.Module | None = None,
    data: Any = None,
    observers: Sequence[Observer] = (),
    display: Display | None = None,
) -> Run:
    """Train a GAN, or go on with a run in the same folder from its last checkpoint.

    Args:
        config: the settings; see `spectralnorm.gan.recipes.make_config`.
        out: the run folder; None: ``runs/<recipe>``, or ``runs/<name of the data>`` for images of one's own.
        generator: one's own, latents ``(batch, config.latent_dim)`` to images in [-1, 1]; None: the architecture's.
        discriminator: one's own, images to logits ``(batch,)``; ``config.normalization`` is applied to it; None: the
            architecture's.
        data: images in place of ``config.data``: an `ImageSet`, a path, a uint8 or float tensor ``(num, channels,
            height, width)``, or a map-style dataset of images or (image, label) pairs.
        observers: called after every step, in this order, after the built-in ones.
        display: shows the run to a person while it goes on; None: silent.

    Where `torchrun` or Slurm has started several processes, all of them call this, with the same arguments; they train
    together, each with its share of every batch, and the first one writes the folder and has the display. Observers are
    called on each.

    Returns:
        The run folder and how the training ended. Ctrl-C or SIGTERM end it after the current step, with a checkpoint.

    Raises:
        UserError: something in the settings, the data or the folder makes training impossible, training diverged,
            another process ended, or the disk is full; the message says what to do.
    """
    display = Display() if display is None else display
    with started(resolve_device(config.device)) as (processes, device):
        return _train(
            config,
            out=out,
            generator=generator,
            discriminator=discriminator,
            data=data,
            observers=observers,
            display=display if processes.is_first else Display(),
            processes=processes,
            device=device,
        )


def _train(
    config: Config,
    *,
    out: str | Path | None,
    generator: nn.Module | None,
    discriminator: nn.Module | None,
    data: Any,
    observers: Sequence[Observer],
    display: Display,
    processes: Processes,
    device: torch.device,
) -> Run:
    began = time.monotonic()
    if data is not None:
        config = dataclasses.replace(config, data=str(data) if isinstance(data, str | os.PathLike) else GIVEN_DATA)
    folder = default_folder(config) if out is None else Path(out)
    processes.first_does(partial(check, folder, config))
    images = processes.first_before_others(
        partial(open_run_data, folder, config, data),
        lambda loading: open_data(config, data, loading=loading),
        tell=lambda images: "stream" if images.summary.streamed else "prepare",
    )
    display.data(images)
    if config.conditional:
        config = _with_classes(config, images)
    if config.batch_size > images.num_training:
        raise UserError(
            f"batch_size must be at most the number of training images ({images.num_training}), got "
            f"{config.batch_size}."
        )
    require_measurable(config, images)
    # The caller's global random state is left as it was; inside, it is the run's own and part of its checkpoints.
    with ExitStack() as held, _full_disk_told(folder), torch.random.fork_rng():
        extractors = extractors_for(images, device=device) if processes.is_first else []
        torch.manual_seed(config.seed)
        trainer = _build(config, images, device, generator, discriminator, processes)
        # Last, so that what is refused leaves no folder behind.
        processes.first_does(partial(_take, folder, config, held))
        checkpoint = latest_checkpoint(folder / CHECKPOINTS)
        if checkpoint is not None:
            check_run_data(folder, images, advice="choose another --out")
            trainer.load_state(checkpoint.tensors, checkpoint.numbers)
        if checkpoint is not None and trainer.spent_budget() and _is_complete(folder, trainer.step):
            return Run(folder, trainer.step, "already finished", processes.is_first)
        # Not before, so that what is refused leaves the folder as it is.
        processes.first_does(partial(write_config, folder, config))
        log = _open_log(folder, images, trainer, resumed=checkpoint is not None) if processes.is_first else NoLog()
        try:
            log.append(_session(trainer))
            display.begin(trainer)
            checkpoints = Checkpoints(folder, minutes=config.checkpoint_minutes)
            watchers: list[Observer] = [
                Averaging(),
                StepSizeDecay(trainer),
                ScalarLog(log, display.log, trainer=trainer),
                SampleGrids(folder, log, checkpoints, trainer=trainer, images=images),
                *_evaluations(trainer, images, extractors, log),
                checkpoints,
                *observers,
            ]
            with _interruptible(trainer):
                trainer.run(watchers)
            checkpoints.save(trainer)
            reason = trainer.stop_reason or "interrupted"
            if reason != "interrupted":
                display.phase("Drawing and measuring the final samples")
                measured = trainer.step >= _MIN_STEPS_FOR_METRICS
                finish(folder, log, trainer, images, extractors, measured=measured)
            log.append(
                Ending(
                    step=trainer.step,
                    reason=reason,
                    images_seen=trainer.images_seen,
                    training_seconds=trainer.clock.seconds,
                    total_seconds=time.monotonic() - began,
                    peak_memory_bytes=_peak_memory(device),
                )
            )
        finally:
            log.close()
    return Run(folder, trainer.step, reason, processes.is_first)


def _take(folder: Path, config: Config, held: ExitStack) -> None:
    held.enter_context(claimed(folder, config))


def _open_log(folder: Path, images: ImageSet | ImageStream, trainer: Trainer, *, resumed: bool) -> RecordLog:
    replace_text(folder / DATA_FILE, json.dumps(images.summary.to_json(), indent=2, ensure_ascii=False) + "\n")
    last_kept = trainer.step if resumed else -1
    file = RecordFile(folder / RECORDS_FILE, keep_until_step=last_kept)
    # TensorBoard drops what is of that step too.
    return RecordLog(file, SummaryWriter(str(folder / "tensorboard"), purge_step=last_kept + 1))


def _with_classes(config: Config, images: ImageSet | ImageStream) -> Config:
    images.require_labels()
    assert images.labels is not None
    counts = torch.bincount(images.labels, minlength=len(images.class_names)).tolist()
    return dataclasses.replace(config, class_names=tuple(images.class_names), class_counts=tuple(counts))


def _build(
    config: Config,
    images: ImageSet | ImageStream,
    device: torch.device,
    generator: nn.Module | None,
    discriminator: nn.Module | None,
    processes: Processes,
) -> Trainer:
    if generator is None:
        generator = build_generator(config)
    else:
        normalize(generator, config.generator_normalization)
    if discriminator is None:
        discriminator = build_discriminator(config)
    else:
        normalize(discriminator, config.normalization)
    return Trainer(
        config,
        generator=generator,
        discriminator=discriminator,
        images=images if isinstance(images, ImageStream) else images.images,
        labels=images.labels if config.conditional else None,
        device=device,
        processes=processes,
    )


def _evaluations(
    trainer: Trainer, images: ImageSet | ImageStream, extractors: Sequence[FeatureExtractor], log: RecordLog
) -> list[Observer]:
    is_trial = trainer.config.steps is not None and trainer.config.steps < _MIN_STEPS_FOR_METRICS
    if is_trial or not trainer.processes.is_first:
        return []
    evaluations = Evaluations(
        log,
        trainer=trainer,
        images=images,
        extractors=extractors[:1],
        num_samples=min(_QUICK_SAMPLES, trainer.config.num_evaluation_samples),
    )
    return [evaluations]


def _is_complete(folder: Path, step: int) -> bool:
    """Whether the run was not only trained but also finished: measured and drawn."""
    records = folder / RECORDS_FILE
    return records.exists() and any(
        isinstance(record, Ending) and record.step == step and record.reason != "interrupted"
        for record in read_records(records)
    )


@contextmanager
def _interruptible(trainer: Trainer) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run after the current step; a second one ends it at once."""

    def stop(signum: int, frame: FrameType | None) -> None:
        trainer.request_stop("interrupted")
        for number, handler in previous.items():
            signal.signal(number, handler)

    previous: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, stop)
    except ValueError:  # not in the main thread: signals are its business
        pass
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _full_disk_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        checkpoint = latest_checkpoint(folder / CHECKPOINTS)
        kept = (
            f"the checkpoint of step {checkpoint.numbers['step']} is intact"
            if checkpoint
            else "there is no checkpoint yet"
        )
        raise UserError(
            f"The disk that holds {folder} is full; {kept}; free some space and run the same command to go on."
        ) from error


def _session(trainer: Trainer) -> Session:
    hardware = {
        "cpu": platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "device": str(trainer.device),
    }
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        models = [line for line in cpu_info.read_text().splitlines() if line.startswith("model name")]
        hardware["cpu"] = models[0].partition(":")[2].strip() if models else hardware["cpu"]
    if trainer.device.type == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name(trainer.device)
    if trainer.processes.size > 1:
        hardware["processes"] = str(trainer.processes.size)
    hardware["threads"] = str(torch.get_num_threads())
    return Session(
        step=trainer.step,
        started_at=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        versions={
            "spectralnorm": spectralnorm.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(terse=True),
        },
        hardware=hardware,
    )


def _peak_memory(device: torch.device) -> int:
    """Peak resident memory of the process, or of the GPU, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
