"""What `certify` found, as a table, as JSON and as a picture."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spectralnorm.errors import UserError
from spectralnorm.lipschitz.drawing import drawn
from spectralnorm.lipschitz.text import text_above, text_below

__all__ = ["Certificate", "LayerBound"]

_DIGITS = 5  # of a number in the table


@dataclass(frozen=True, slots=True)
class LayerBound:
    """One operation of the network.

    Attributes:
        name: of the layer that performs it; of the operation, outside of layers.
        op: the operation.
        output_shape: of one sample.
        lower: its Lipschitz constant at least; None where the rule gives a known constant, or no factor.
        upper: its Lipschitz constant at most; None where it joins branches that count differently.
        product: Lipschitz constant from the input up to here, at most.
        merged_with: the value from which it was bounded together with the layers in between; None if it was not.
    """

    name: str
    op: str
    output_shape: tuple[int, ...]
    lower: float | None
    upper: float | None
    product: float
    merged_with: str | None = None

    @property
    def gap(self) -> float | None:
        """``upper / lower``: how loose the bound may be at most; None where one is not known."""
        return self.upper / self.lower if self.upper is not None and self.lower else None


@dataclass(frozen=True, slots=True)
class Certificate:
    """A guaranteed Lipschitz constant, and how it comes about; prints as a table, upper bounds rounded up, lower down.

    Attributes:
        upper_bound: Lipschitz constant of the network at most, in the 2-norm of flattened samples: rigorous.
        lower_bound: at least: the largest quotient that a search found, computed in float64.
        layers: one line per operation; those that only move entries are left out.
        input_shape: of one sample.
        mode: ``"eval"`` or ``"train"``.
        input_sizes: the sizes that convolutions were bounded for: ``"given"`` or ``"all"``.
        weights_sha256: of names, types, shapes and bytes in the model's state dict.
        torch_version: that computed it.
        package_version: of this package.
        seconds: that it took.
    """

    upper_bound: float
    lower_bound: float
    layers: tuple[LayerBound, ...]
    input_shape: tuple[int, ...]
    mode: str
    input_sizes: str
    weights_sha256: str
    torch_version: str
    package_version: str
    seconds: float

    def __str__(self) -> str:
        header = ("layer", "operation", "output", "lower", "upper", "gap", "product", "")
        lines = [header, *(_cells(layer) for layer in self.layers)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        left = {0, 1, 2, 7}
        table = [
            "  ".join(
                cell.ljust(width) if column in left else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        sizes = "" if self.input_sizes == "given" else ", convolutions for every image size"
        return "\n".join(
            [
                f"Lipschitz constant at most {text_above(self.upper_bound)}, at least {text_below(self.lower_bound)}",
                f"inputs {'x'.join(map(str, self.input_shape))}, {self.mode} mode{sizes}; 2-norm, "
                "exact arithmetic on the stored weights",
                "",
                *table,
                "",
                f"weights sha256 {self.weights_sha256[:16]}...; torch {self.torch_version}, spectralnorm "
                f"{self.package_version}; {self.seconds:.2f} s",
            ]
        )

    def to_json(self) -> str:
        """All of it, to be kept beside the weights; every float survives exactly."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Certificate:
        """What `to_json` wrote, whatever else has been written beside it.

        Raises:
            UserError: ``text`` is not a certificate.
        """
        try:
            fields: dict[str, Any] = json.loads(text)
            layers = tuple(
                LayerBound(**(layer | {"output_shape": tuple(layer["output_shape"])})) for layer in fields["layers"]
            )
            given = {name: fields[name] for name in cls.__dataclass_fields__}
            return cls(**(given | {"layers": layers, "input_shape": tuple(fields["input_shape"])}))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"Expected the JSON of a certificate, as to_json writes it, but {error}.") from error

    def draw(self, path: str | Path) -> Path:
        """Write a picture of the layers' bounds and of their running product, as SVG.

        Args:
            path: of a file to write; its name ends in ``.svg``.

        Raises:
            UserError: the name ends otherwise, or the file cannot be written.
        """
        path = Path(path)
        if path.suffix != ".svg":
            raise UserError(f"Certificate.draw writes SVG; give a name that ends in .svg, not {path.name!r}.")
        try:
            path.write_text(drawn(self), encoding="utf-8")
        except OSError as error:
            raise UserError(f"Cannot write {path} ({error.strerror}); choose another path.") from error
        return path


def _cells(layer: LayerBound) -> tuple[str, ...]:
    return (
        layer.name,
        layer.op,
        "x".join(map(str, layer.output_shape)) or "1",
        "" if layer.lower is None else text_below(layer.lower, _DIGITS),
        "" if layer.upper is None else text_above(layer.upper, _DIGITS),
        "" if layer.gap is None else f"{layer.gap:.5g}",
        text_above(layer.product, _DIGITS),
        f"one map from {layer.merged_with}" if layer.merged_with else "",
    )
