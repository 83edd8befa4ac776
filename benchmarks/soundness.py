"""Bounds of convolutions against the norm of the explicit operator: how often they are violated (never), how tight.

    python benchmarks/soundness.py --num 20000

Random layers of all kinds with random and degenerate weights. The reference is LAPACK's largest singular value, in
float64, of the matrix that the layer's own operation makes of the unit vectors.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spectralnorm.linalg import convolution_upper_bound, gram_upper_bound, matrix_lower_bound, rigorous_matrix_bound
from spectralnorm.linalg.convolution import PADDING_MODES, ConvolutionGeometry
from spectralnorm.linalg.rigorous_convolution import rigorous_convolution_bound

__all__ = ["Case", "random_case", "violations", "weights"]

_KINDS = [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
_MAX_SIZE = {1: 9, 2: 5, 3: 3}
# What float64 itself may be off by: LAPACK's error is a modest multiple of 2^-53.
REFERENCE_ERROR = 1e-12


class Case(NamedTuple):
    """A layer, its weight, the input size, and the kind of weight by name."""

    geometry: ConvolutionGeometry
    weight: Tensor
    input_size: tuple[int, ...]
    kind: str


def weights() -> dict[str, Callable[[Tensor], Tensor]]:
    """Kinds of weights: from a tensor of normal numbers, (out, in, *kernel)."""
    return {
        "normal": lambda normal: normal,
        "constant": torch.ones_like,
        "rank one": lambda normal: normal[:1] * torch.linspace(-1, 1, len(normal)).view(-1, *[1] * (normal.ndim - 1)),
        "orthogonal": lambda normal: nn.init.orthogonal_(torch.empty_like(normal)),
        "sparse": lambda normal: normal * (torch.rand_like(normal) < 0.2),
        "huge": lambda normal: normal * 1e30,
        "tiny": lambda normal: normal * 1e-36,
        "denormal": lambda normal: normal * 1e-42,
        "zero": torch.zeros_like,
    }


def random_case(draw: random.Random) -> Case:
    """A layer of any kind, stride, padding, dilation and number of groups, small enough for its explicit matrix."""
    while True:
        kind = draw.choice(_KINDS)
        axes, transposed = int(kind.__name__[-2]), "Transpose" in kind.__name__
        groups = draw.choice([1, 1, 2])
        channels = groups * draw.randint(1, 3), groups * draw.randint(1, 3)

        def each(low: int, high: int, axes: int = axes) -> tuple[int, ...]:
            return tuple(draw.randint(low, high) for _ in range(axes))

        kernel, stride, dilation, padding = each(1, 6 - axes), each(1, 3), each(1, 2 if axes == 3 else 3), each(0, 3)
        size = each(1, _MAX_SIZE[axes])
        if transposed:
            extra = tuple(draw.randint(0, max(s, d) - 1) for s, d in zip(stride, dilation, strict=True))
            options = {"stride": stride, "padding": padding, "output_padding": extra}
        else:
            same = draw.random() < 0.15
            options = {"stride": 1 if same else stride, "padding": "same" if same else padding}
            options |= {"padding_mode": draw.choice(PADDING_MODES)}
        layer = kind(*channels, kernel, **options, dilation=dilation, groups=groups, bias=False)
        geometry = ConvolutionGeometry.of(layer)
        if min(geometry.output_size(size)) < 1:
            continue
        name, make = draw.choice(list(weights().items()))
        dtype = draw.choice([torch.float32, torch.float64, torch.bfloat16, torch.float16])
        normal = torch.randn_like(layer.weight.detach())
        weight = make(normal).to(dtype)
        if not bool(weight.isfinite().all()):
            continue  # float16 has no such numbers
        try:  # torch refuses some paddings of small images
            geometry.apply(torch.zeros(1, channels[0], *size), torch.zeros_like(normal))
        except RuntimeError:
            continue
        return Case(geometry, weight, size, name)


def exact_norm(case: Case) -> float:
    """The largest singular value of the explicit matrix."""
    channels, _ = case.geometry.channels(case.weight)
    basis = torch.eye(channels * math.prod(case.input_size), dtype=torch.float64).view(-1, channels, *case.input_size)
    weight = case.weight.double()
    scale = float(weight.abs().amax()) or 1.0
    matrix = case.geometry.apply(basis, weight / scale).flatten(1)
    return float(torch.linalg.matrix_norm(matrix, 2)) * scale


def violations(case: Case) -> tuple[list[str], dict[str, float]]:
    """Which bounds are below the exact norm or the wrong way round, and each bound over the exact norm."""
    exact = exact_norm(case)
    fast = float(convolution_upper_bound(case.weight, case.geometry, case.input_size))
    fast_everywhere = float(convolution_upper_bound(case.weight, case.geometry))
    rigorous = rigorous_convolution_bound(case.weight, case.geometry, case.input_size)
    bounds = {"fast": fast, "fast, all sizes": fast_everywhere, "rigorous": rigorous}
    wrong = [name for name, bound in bounds.items() if not bound >= exact * (1 - REFERENCE_ERROR)]
    if not rigorous <= min(fast, fast_everywhere) * (1 + 1e-8):
        wrong.append("rigorous above fast")
    return wrong, {name: bound / exact for name, bound in bounds.items() if exact > 0}


def _dense_violations(draw: random.Random) -> list[str]:
    shape = draw.randint(1, 24), draw.randint(1, 24)
    dtype = draw.choice([torch.float32, torch.float64, torch.bfloat16])
    matrix = draw.choice(list(weights().values()))(torch.randn(shape)).to(dtype)
    double = matrix.double()
    scale = float(double.abs().amax()) or 1.0
    exact = float(torch.linalg.matrix_norm(double / scale, 2)) * scale
    fast, rigorous = float(gram_upper_bound(matrix)), rigorous_matrix_bound(matrix)
    wrong = [
        name for name, bound in (("dense fast", fast), ("dense rigorous", rigorous)) if bound < exact * (1 - 1e-12)
    ]
    return wrong + (["dense lower"] if matrix_lower_bound(matrix) > exact * (1 + REFERENCE_ERROR) else [])


def main() -> int:
    """Count violations; exit status 1 if there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=20_000, help="layers: as many convolutions, and as many matrices")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", action="store_true", help="write the result page")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    torch.manual_seed(options.seed)
    begin, ratios, wrong = time.perf_counter(), {}, []
    counts: dict[str, int] = {}
    for _ in range(options.num):
        case = random_case(draw)
        found, of_case = violations(case)
        wrong += [(name, case) for name in found]
        counts[case.kind] = counts.get(case.kind, 0) + 1
        for name, ratio in of_case.items():
            ratios.setdefault(name, []).append(ratio)
        wrong += [(name, None) for name in _dense_violations(draw)]
    lines = [
        f"{options.num:,} convolutions and {options.num:,} matrices, seed {options.seed}, torch {torch.__version__}."
    ]
    lines += [
        f"Violations: {len(wrong)}.",
        "",
        "| bound over exact norm | median | 95% | largest |",
        "|---|---|---|---|",
    ]
    for name, values in ratios.items():
        values.sort()
        tail = values[int(0.95 * len(values))]
        lines.append(f"| {name} | {statistics.median(values):.4f} | {tail:.4f} | {values[-1]:.4f} |")
    lines += ["", "Weights: " + ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items())) + "."]
    print("\n".join(lines), f"\n{time.perf_counter() - begin:.0f} s", sep="")
    for name, case in wrong[:20]:
        print("VIOLATED:", name, case, file=sys.stderr)
    if options.out:
        from hardware import hardware, write_result  # tests load this file from elsewhere

        head = [
            "# Soundness of the bounds",
            "",
            hardware(),
            "",
            f"`python benchmarks/soundness.py --num {options.num}`.",
            "",
        ]
        write_result("soundness", "\n".join([*head, *lines, ""]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
