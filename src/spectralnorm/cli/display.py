"""A run on the terminal: the data table, then a progress bar, or plain lines where there is no terminal."""

from __future__ import annotations

import math
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from spectralnorm.gan.config import Config
from spectralnorm.gan.data import ImageSet, ImageStream
from spectralnorm.gan.run import Display
from spectralnorm.gan.trainer import Trainer
from spectralnorm.records import Scalars
from spectralnorm.report.text import bytes_text

__all__ = ["TerminalDisplay", "print_table"]

_SECONDS_BETWEEN_LINES = 10


class TerminalDisplay(Display):
    """Shows a run as it goes on."""

    def __init__(self, config: Config) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._config = config
        self._progress: Progress | None = None
        self._last_line = -math.inf
        self._began = 0.0

    def __enter__(self) -> TerminalDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def data(self, images: ImageSet | ImageStream) -> None:
        summary = images.summary
        print_table(self._console, f"Data: {summary.name}", summary.rows())
        if isinstance(images, ImageStream):
            self._console.print(_what_is_kept(images))

    def begin(self, trainer: Trainer) -> None:
        sizes = [sum(p.numel() for p in network.parameters()) for network in (trainer.generator, trainer.discriminator)]
        self._console.print(
            f"Training {self._config.architecture} on {trainer.device}: generator {sizes[0] / 1e6:.2f} M parameters, "
            f"discriminator {sizes[1] / 1e6:.2f} M, batch {self._config.batch_size}, {_budget(self._config)}."
        )
        if trainer.step:
            self._console.print(f"Going on from the checkpoint of step {trainer.step}.")
        self._began = trainer.progress
        if self._console.is_terminal:
            columns = [SpinnerColumn(), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), _Numbers()]
            self._progress = Progress(*columns, console=self._console)
            task = self._progress.add_task("", total=1.0, text="")
            self._progress.update(task, completed=trainer.progress)
            self._progress.start()

    def log(self, trainer: Trainer, record: Scalars) -> None:
        if self._progress is not None:
            task = self._progress.task_ids[0]
            self._progress.update(task, completed=trainer.progress, text=self._line(trainer, record))
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES or trainer.stop_reason is not None:
            self._last_line = time.monotonic()
            self._console.print(f"{100 * trainer.progress:3.0f}%  {self._line(trainer, record)}")

    def phase(self, text: str) -> None:
        self._close()
        self._console.print(f"{text} ...")

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _line(self, trainer: Trainer, record: Scalars) -> str:
        values = record.values
        parts = [
            f"step {record.step}",
            f"{values.get('images_per_second', math.nan):.0f} images/s",
            f"{_duration(self._remaining(trainer))} left",
            f"loss D {values['loss/discriminator']:.2f} G {values['loss/generator']:.2f}",
        ]
        sigmas = [value for name, value in values.items() if name.startswith("sigma/")]
        return "  ".join([*parts, f"largest sigma {max(sigmas):.2f}"] if sigmas else parts)

    def _remaining(self, trainer: Trainer) -> float:
        if trainer.config.minutes is not None and trainer.config.steps is None:
            return 60 * trainer.config.minutes - trainer.clock.seconds
        done = trainer.progress
        return trainer.clock.seconds * (1 - done) / done if done else math.nan


class _Numbers(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields["text"])


def print_table(console: Console, title: str, rows: list[tuple[str, str]]) -> None:
    """A table of names and values."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    console.print(table)


def _what_is_kept(images: ImageStream) -> str:
    kept = images.kept
    if isinstance(kept, str):
        return f"Decoded images are not kept: {kept}."
    which = f"The first {kept.num_kept_at_most:,} decoded images"
    if kept.num_kept_at_most == kept.num_images:
        which = "Decoded images"
    return f"{which} are kept for later epochs in {kept.path.parent} (at most {bytes_text(kept.max_bytes)})."


def _budget(config: Config) -> str:
    parts = [f"{config.steps} steps"] if config.steps is not None else []
    if config.minutes is not None:
        parts.append("1 minute" if config.minutes == 1 else f"{config.minutes:g} minutes")
    return " or ".join(parts)


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
