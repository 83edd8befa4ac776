"""The command line: ``spectralnorm train``, ``recipes``, ``sample`` and more. It parses, calls and prints."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from spectralnorm.errors import UserError

__all__ = ["main"]

_COMMANDS = {
    "train": "train a GAN, or go on with a run; the same command again resumes",
    "recipes": "list the named starting points: what each trains, what it costs, where its settings are from",
    "sample": "generate images from a run",
    "export": "bring a generator elsewhere: ONNX, torch.export, a folder for a model hub, a model card",
    "evaluate": "measure a run's samples against held-out real images",
    "certify": "prove a Lipschitz constant of a run's discriminator",
    "report": "rebuild a run's report.html from its records",
}

_HELP = """usage: spectralnorm COMMAND ...

Spectrally normalized GANs: train, sample, evaluate, certify, report.

{commands}

examples:
  spectralnorm train                                  the built-in images, minutes, ends with a report
  spectralnorm train --data photos/ --image-size 64 --channels 3 --out runs/photos
  spectralnorm sample runs/photos --num 64 --out grid.png

'spectralnorm COMMAND --help' lists the options of one command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the words after ``spectralnorm``; None: those of the process.

    Returns:
        The exit status: 0 done, 1 certified above the given maximum, 2 a request that cannot be carried out, 130
        interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output, such as `head`, has left
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_HELP.format(commands="\n".join(f"  {name:<10}{text}" for name, text in _COMMANDS.items())))
        return 0
    if words[0] == "--version":
        from spectralnorm import __version__

        print(f"spectralnorm {__version__}")
        return 0
    if words[0] not in _COMMANDS:
        raise UserError(f"Unknown command '{words[0]}'; choose one of {', '.join(_COMMANDS)}.")
    try:
        command: Callable[[list[str]], int] = import_module(f"spectralnorm.cli.{words[0]}").run
        return command(words[1:])  # which imports what it needs beyond its help
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "spectralnorm":
            raise
        raise UserError(
            f"The command line needs the package '{error.name}'; install it with: pip install \"spectralnorm[gan]\"."
        ) from error
