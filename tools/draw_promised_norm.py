"""Draw what the README shows: the true norm of a layer whose norm was promised to be one.

    python tools/draw_promised_norm.py            # computes, prints, and writes docs/assets/promised-norm.svg

Each situation normalizes a fresh layer, does to it what training and deployment do to layers, and then measures the
weight that the layer computes with by a singular value decomposition.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm as torch_spectral_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from spectralnorm import spectral_norm

OUTPUT = Path(__file__).parents[1] / "docs" / "assets" / "promised-norm.svg"

# Any: a normalized layer's attributes are its class's, which neither function's type tells.
Normalize = Callable[[nn.Module], Any]


def norm_of(weight: Tensor) -> float:
    """Largest singular value, by SVD; NaN if an entry is not finite."""
    return torch.linalg.matrix_norm(weight.double(), 2).item() if weight.isfinite().all() else math.nan


def norm_in_eval(layer: Any) -> float:
    """The norm of the weight that ``layer`` computes with in eval mode."""
    with torch.no_grad():
        return norm_of(layer.eval().weight)


def trained_by_adam(normalize: Normalize, *, lr: float) -> float:
    """The largest norm that a forward in training mode uses, over 100 steps of a regression."""
    return max(norm for norm, _ in _regression(normalize, lr=lr))


def averaged_copy(normalize: Normalize) -> float:
    """The moving average of the weights over 100 such steps, as ``AveragedModel`` keeps it, used for inference."""
    average: Any = None
    for _, layer in _regression(normalize, lr=1e-2):
        average = average or AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.99))
        average.update_parameters(layer)
    return norm_in_eval(average.module)


def _regression(normalize: Normalize, *, lr: float) -> Iterator[tuple[float, nn.Module]]:
    """Yield, after each of 100 steps, the norm that its forward used and the layer."""
    layer, teacher = normalize(nn.Linear(128, 128)), nn.Linear(128, 128)
    optimizer = torch.optim.Adam(layer.parameters(), lr=lr, betas=(0.0, 0.9))
    for _ in range(100):
        inputs = torch.randn(64, 128)
        with parametrize.cached():  # the measurement sees the very weight of the forward
            outputs = layer(inputs)
            norm = norm_of(layer.weight.detach())
        optimizer.zero_grad()
        (outputs - teacher(inputs).detach()).square().mean().backward()
        optimizer.step()
        yield norm, layer


def weights_loaded_then_eval(normalize: Normalize) -> float:
    """Weights of a model without the normalization are loaded, and the layer is used for inference."""
    layer = normalize(nn.Linear(128, 128))
    layer.load_state_dict({"parametrizations.weight.original": torch.randn(128, 128) / 128**0.5}, strict=False)
    return norm_in_eval(layer)


def another_direction_grew(normalize: Normalize) -> float:
    """A direction orthogonal to the largest one becomes the largest; then five forwards in training mode."""
    layer = normalize(nn.Linear(2, 2, bias=False))
    original = layer.parametrizations.weight.original
    for second, forwards in ((0.5, 50), (10.0, 5)):
        with torch.no_grad():
            original.copy_(torch.tensor([[1.0, 0.0], [0.0, second]]))
        for _ in range(forwards):
            layer(torch.ones(1, 2))
    return norm_in_eval(layer)


def after_one_nan(normalize: Normalize) -> float:
    """One step writes NaN, the weights are restored, and training goes on for five forwards."""
    layer = normalize(nn.Linear(128, 128))
    original = layer.parametrizations.weight.original
    good = original.detach().clone()
    for values in (torch.full_like(good, math.nan), good):
        with torch.no_grad():
            original.copy_(values)
        for _ in range(5):
            layer(torch.ones(1, 128))
    return norm_in_eval(layer)


SITUATIONS: dict[str, Callable[[Normalize], float]] = {
    "trained by Adam, lr 0.001": partial(trained_by_adam, lr=1e-3),
    "trained by Adam, lr 0.01": partial(trained_by_adam, lr=1e-2),
    "averaged copy (EMA)": averaged_copy,
    "weights loaded, then eval": weights_loaded_then_eval,
    "another direction grew": another_direction_grew,
    "after one NaN step, undone": after_one_nan,
}


def measure() -> list[tuple[str, float, float]]:
    """For each situation its name and the true norm, a median over seeds, with torch's function and with this one."""
    return [
        (name, median_norm(situation, torch_spectral_norm), median_norm(situation, spectral_norm))
        for name, situation in SITUATIONS.items()
    ]


def median_norm(situation: Callable[[Normalize], float], normalize: Normalize) -> float:
    """The norm that a situation leaves, the median over seeds; NaN if any is."""
    norms = []
    for seed in range(11):
        torch.manual_seed(seed)
        norms.append(situation(normalize))
    return math.nan if any(map(math.isnan, norms)) else statistics.median(norms)


# The drawing: one row per situation, a logarithmic axis, the promise as a vertical line, the numbers at the right.
WIDTH, LEFT, RIGHT, TOP, ROW = 760, 210, 210, 48, 38
THEIRS, OURS = WIDTH - 130, WIDTH - 10
AXIS = (0.9, 30.0)
STYLE = """
  text { font: 14px system-ui, sans-serif; fill: #24292f }
  .small { font-size: 12px; fill: #57606a }
  .value { font-weight: 600; text-anchor: end; font-variant-numeric: tabular-nums }
  .grid { stroke: #d0d7de }
  .promise { stroke: #57606a; stroke-width: 2; stroke-dasharray: 4 3 }
  .gap { stroke: #d1242f; opacity: .3; stroke-width: 6 }
  .torch { fill: #d1242f } .ours { fill: #0969da }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .small { fill: #9198a1 } .grid { stroke: #3d444d } .promise { stroke: #9198a1 }
    .torch { fill: #ff7b72 } .ours { fill: #58a6ff } .gap { stroke: #ff7b72 }
  }
"""


def position(norm: float) -> float:
    """Where ``norm`` is on the horizontal axis, in pixels; what is not finite goes to the right edge."""
    low, high = (math.log(value) for value in AXIS)
    share = (math.log(norm) - low) / (high - low) if math.isfinite(norm) else 1.0
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def show(norm: float) -> str:
    """Two decimals, or ``NaN``."""
    return f"{norm:.2f}" if math.isfinite(norm) else "NaN"


def draw(rows: list[tuple[str, float, float]]) -> str:
    """The figure as SVG text; it follows the reader's light or dark scheme."""
    bottom = TOP + ROW * len(rows)
    described = "; ".join(f"{name}: torch {show(theirs)}, spectralnorm {show(ours)}" for name, theirs, ours in rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 44}" role="img">',
        "<title>True norm of a layer whose norm should be 1</title>",
        f"<desc>{described}</desc>",
        f"<style>{STYLE}</style>",
    ]
    for tick in (1, 2, 5, 10, 20):
        x = position(tick)
        kind = "promise" if tick == 1 else "grid"
        parts.append(f'<line class="{kind}" x1="{x:.1f}" y1="{TOP - 10}" x2="{x:.1f}" y2="{bottom}"/>')
        parts.append(f'<text class="small" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{tick}</text>')
    parts.append(f'<text class="small" x="{position(1):.1f}" y="{TOP - 18}" text-anchor="middle">promised</text>')
    caption = "true norm of the weight the layer computes with (log scale)"
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="small" x="{middle:.0f}" y="{bottom + 38}" text-anchor="middle">{caption}</text>')
    for kind, x, heading in (("torch", THEIRS, "torch"), ("ours", OURS, "spectralnorm")):
        parts.append(f'<text class="value {kind}" x="{x}" y="{TOP - 18}">{heading}</text>')
    for index, (name, theirs, ours) in enumerate(rows):
        y = TOP + ROW * (index + 0.5)
        parts += [
            f'<text x="0" y="{y + 5:.0f}">{name}</text>',
            f'<line class="gap" x1="{position(ours):.1f}" y1="{y:.0f}" x2="{position(theirs):.1f}" y2="{y:.0f}"/>',
        ]
        for kind, norm, column in (("torch", theirs, THEIRS), ("ours", ours, OURS)):
            parts += [
                f'<circle class="{kind}" cx="{position(norm):.1f}" cy="{y:.0f}" r="7"/>',
                f'<text class="value {kind}" x="{column}" y="{y + 5:.0f}">{show(norm)}</text>',
            ]
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the true norm of layers whose norm should be one.")
    parser.add_argument("--out", type=Path, default=OUTPUT, help="where the SVG goes (default: %(default)s)")
    out: Path = parser.parse_args().out
    rows = measure()
    for name, theirs, ours in rows:
        print(f"{name:<32} torch {show(theirs):>6}   spectralnorm {show(ours):>6}")
    out.write_text(draw(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
