"""``spectralnorm export``: parse, call, print."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

from spectralnorm.cli.arguments import parse
from spectralnorm.errors import UserError
from spectralnorm.gan.config import choose
from spectralnorm.records import replace_text

__all__ = ["run"]


@dataclass(frozen=True)
class ExportOptions:
    """Bring a trained generator elsewhere; nothing is uploaded."""

    run: tyro.conf.Positional[Path]
    """Run folder; for onnx and torch-export also a generator.safetensors."""
    format: str = "onnx"
    """onnx; torch-export: a .pt2 program; huggingface: a folder ready to upload; card: the model card alone."""
    out: Path | None = None
    """Where to write; none: generator.onnx, generator.pt2, huggingface/ or model_card.md here."""
    license: str | None = None
    """Of the weights, for the model card, such as cc-by-4.0; none: left for you to fill in."""


def run(words: list[str]) -> int:
    """Export, check, and say how far the exported generator is from the trained one."""
    options = parse(ExportOptions, words, prog="spectralnorm export")
    choose("format", options.format, _FORMATS)
    default, write = _FORMATS[options.format]
    if options.license is not None and options.format not in ("huggingface", "card"):
        raise UserError("--license belongs to a model card; leave it out, or choose --format huggingface or card.")
    out = Path(default) if options.out is None else options.out
    try:
        write(options, out)
    except OSError as error:
        raise UserError(f"Cannot write {error.filename or out} ({error.strerror}); choose another --out.") from error
    print(out)
    return 0


# What a format needs is imported where it is written: a help page needs no torch.


def _write_onnx(options: ExportOptions, out: Path) -> None:
    from spectralnorm.gan.export import export_onnx
    from spectralnorm.gan.sampling import load

    _say(export_onnx(load(options.run), out), "onnxruntime")


def _write_program(options: ExportOptions, out: Path) -> None:
    from spectralnorm.gan.export import export_program
    from spectralnorm.gan.sampling import load

    _say(export_program(load(options.run), out), "the program")


def _say(difference: float, runner: str) -> None:
    print(f"Checked: pixels in [-1, 1] from {runner} differ from the trained generator's by at most {difference:.2g}.")


def _write_folder(options: ExportOptions, out: Path) -> None:
    from spectralnorm.gan.hub_folder import write_hub_folder
    from spectralnorm.gan.sampling import load

    _require_run(options)
    write_hub_folder(options.run, load(options.run), out, license=options.license)
    if options.license is None:
        print("The license in README.md is yours to choose.")


def _write_card(options: ExportOptions, out: Path) -> None:
    from spectralnorm.gan.model_card import model_card

    _require_run(options)
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(out, model_card(options.run, license=options.license))


def _require_run(options: ExportOptions) -> None:
    if not options.run.is_dir():
        raise UserError(f"A model card tells the records of a run, and {options.run} is not a run folder; give one.")


_FORMATS: dict[str, tuple[str, Callable[[ExportOptions, Path], None]]] = {
    "onnx": ("generator.onnx", _write_onnx),
    "torch-export": ("generator.pt2", _write_program),
    "huggingface": ("huggingface", _write_folder),
    "card": ("model_card.md", _write_card),
}
"""Formats with the names they have by default."""
