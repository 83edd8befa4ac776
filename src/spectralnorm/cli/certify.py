"""``spectralnorm certify``: parse, call, print; exit status 1 when the bound is above what was allowed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import tyro

from spectralnorm.cli.arguments import parse
from spectralnorm.errors import UserError
from spectralnorm.gan.recipes import make_config
from spectralnorm.records import replace_text
from spectralnorm.report import build_report

__all__ = ["run"]

_CERTIFICATE_FILE = "certificate.json"


@dataclass(frozen=True)
class CertifyOptions:
    """Prove a Lipschitz constant of a run's discriminator: a rigorous upper bound, a lower one, and each layer's share.

    Writes certificate.json, and for a run a section of its report.
    """

    source: tyro.conf.Positional[Path]
    """Run folder, or a safetensors file of a discriminator's weights."""
    recipe: str | None = None
    """For a file: the recipe that says which network the weights are of; how many classes it has, they tell."""
    image_size: int | None = None
    """For a file, where it is not the recipe's."""
    channels: int | None = None
    """For a file, where they are not the recipe's."""
    discriminator_width: int | None = None
    """For a file, where it is not the recipe's."""
    max: float | None = None
    """Exit with status 1 if the upper bound is above this."""
    out: Path | None = None
    """Where to write the certificate; none: certificate.json in the run, or beside the file."""


def run(words: list[str]) -> int:
    """Certify, print the table, write the files."""
    options = parse(CertifyOptions, words, prog="spectralnorm certify")
    # Here, and not above: a help page needs no torch.
    from spectralnorm.gan.discriminators import discriminator_of_file, discriminator_of_run, of_steepest_class
    from spectralnorm.lipschitz import certify
    from spectralnorm.lipschitz.text import text_above

    if options.max is not None and not 0 < options.max < math.inf:
        raise UserError(f"max must be a positive number, got {options.max}.")
    settings = {
        name: getattr(options, name)
        for name in ("image_size", "channels", "discriminator_width")
        if getattr(options, name) is not None
    }
    is_run, of_training = options.source.is_dir(), {}
    if is_run:
        if settings or options.recipe is not None:
            raise UserError("A run knows its own settings; leave out --recipe and what belongs to it.")
        discriminator, config, step = discriminator_of_run(options.source)
        of_training = {"step": step}
    else:
        if options.recipe is None:
            if not options.source.exists():
                raise UserError(f"{options.source} does not exist; give a run folder or a file of weights.")
            raise UserError(f"{options.source} does not say which network it holds; give --recipe NAME with it.")
        config = make_config(options.recipe, **settings)
        discriminator, config = discriminator_of_file(options.source, config)
    discriminator, num_classes = of_steepest_class(discriminator) if config.conditional else (discriminator, None)
    shape = (config.channels, config.image_size, config.image_size)
    certificate = certify(discriminator, shape, num_classes=num_classes)
    print(certificate)
    folder = options.source if is_run else options.source.parent
    out = folder / _CERTIFICATE_FILE if options.out is None else options.out
    try:
        replace_text(out, json.dumps(of_training | json.loads(certificate.to_json()), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"Cannot write {out} ({error.strerror}); choose another --out.") from error
    print(f"\nCertificate: {out}")
    if is_run and options.out is None:
        print(f"Report: {build_report(options.source)}")
    if options.max is not None and certificate.upper_bound > options.max:
        print(f"The upper bound {text_above(certificate.upper_bound)} is above the maximum {options.max:g}.")
        return 1
    return 0
