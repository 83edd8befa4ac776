"""How tight upper bounds of layers' norms are, what they cost, and which of them are none.

    python benchmarks/bounds.py                  # everything, and the result page
    python benchmarks/bounds.py --quick          # up to 128 channels and 512 features
    python benchmarks/bounds.py --quick --print  # no page

The exact norm is that of the real map in float64: Lanczos (scipy's ARPACK) on the layer and its adjoint. Every bound
gets the same float32 weight. In the second part many small zero-padded layers are compared with the SVD of the explicit
matrix: how often a bound lies below the norm, and by how much. With the extra `peers` installed, deel-torchlip and
orthogonium are compared too: they look at the same weights through their own functions.
"""

import argparse
import contextlib
import math
import statistics
import time
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from hardware import RESULTS, hardware, write_result
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import nn

from spectralnorm import linalg
from spectralnorm.linalg.convolution import ConvolutionGeometry
from spectralnorm.linalg.rigorous_convolution import rigorous_convolution_bound
from spectralnorm.linalg.symbol import convolution_upper_bound


def installed_peers() -> Any:
    """Their functions; None where the extra `peers` is missing."""
    try:
        return SimpleNamespace(
            spectral_normalization=import_module("deel.torchlip.normalizers").spectral_normalization,
            compute_lconv_coef=import_module("deel.torchlip.utils.lconv_norm").compute_lconv_coef,
            get_conv_sv=import_module("orthogonium.layers.conv.singular_values.get_sv").get_conv_sv,
            BatchedPowerIteration=import_module("orthogonium.reparametrizers").BatchedPowerIteration,
        )
    except ImportError:
        return None


PEERS = installed_peers()
RTOL = 1e-7  # of the exact norm, and of what counts as a violation


@dataclass
class Case:
    """A weight with the layer it belongs to."""

    name: str
    weight: torch.Tensor
    layer: Any = None
    input_size: tuple[int, ...] = ()

    @property
    def geometry(self):
        return ConvolutionGeometry.of(self.layer)

    @property
    def channels(self):
        return max(self.weight.shape[:2])


def dense_cases(largest):
    for size in (64, 256, 512, 1024, 2048):
        if size > largest:
            continue
        gaussian = torch.randn(size, size, dtype=torch.float64)
        orthogonal = torch.linalg.qr(gaussian).Q
        other = torch.linalg.qr(torch.randn_like(gaussian)).Q
        power_law = orthogonal * torch.arange(1, size + 1, dtype=torch.float64).rsqrt() @ other
        for name, matrix in (("Gaussian", gaussian), ("power law", power_law), ("orthogonal", orthogonal)):
            yield Case(f"{name} {size}", matrix.float())


def convolution_cases(largest):
    shapes = [
        *((nn.Conv2d, (width, width, 3), {"padding": 1}, 32) for width in (64, 128, 256, 512)),
        *((nn.Conv2d, (width, 2 * width, 4), {"stride": 2, "padding": 1}, 32) for width in (64, 128, 256)),
        *((nn.ConvTranspose2d, (2 * width, width, 4), {"stride": 2, "padding": 1}, 16) for width in (64, 128, 256)),
    ]
    for kind, sizes, options, image in shapes:
        if max(sizes) > largest:
            continue
        layer = kind(*sizes, bias=False, **options)
        size = f"{image}x{image}"
        stride = f" stride {options['stride']}" if "stride" in options else ""
        what = "transposed " if kind is nn.ConvTranspose2d else ""
        name = f"{what}{sizes[2]}x{sizes[2]}{stride}, {sizes[0]} to {sizes[1]}, {size}"
        yield Case(name, layer.weight.detach(), layer, (image, image))
        if sizes[0] == 64 and kind is nn.Conv2d and not stride:
            blur = torch.tensor([1.0, 2.0, 1.0])
            smooth = layer.weight.detach().mean((2, 3), keepdim=True) * (blur[:, None] * blur)
            layer = kind(*sizes, bias=False, **options)
            layer.weight.data.copy_(smooth)
            yield Case(f"smooth {name}", smooth, layer, (image, image))


def exact_norm(case):
    """Of the real map, in float64."""
    weight = case.weight.double()
    if case.layer is None:
        shape = (1, weight.shape[1])

        def normal_map(images):
            return images @ weight.mT @ weight
    else:
        geometry = case.geometry
        shape = (1, geometry.channels(weight)[0], *case.input_size)

        def normal_map(images):
            return geometry.adjoint(geometry.apply(images, weight), weight, case.input_size)

    def apply(vector):
        return normal_map(torch.from_numpy(vector).reshape(shape)).flatten().numpy()

    count = math.prod(shape)
    start = torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).numpy()
    operator = LinearOperator((count, count), matvec=apply, dtype="float64")  # pyright: ignore[reportCallIssue]
    # Values of a symmetric map are as good as the square of its residuals.
    options: Any = {"k": 1, "which": "LA", "tol": 1e-5, "ncv": 24, "v0": start, "return_eigenvectors": False}
    return math.sqrt(eigsh(operator, **options)[0])


def gram_iteration(matrices, num_iterations):
    """Norms from above in exact arithmetic, by Gram iteration scaled as in Delattre et al. 2023, algorithm 2."""
    logarithm = torch.zeros(matrices.shape[0], device=matrices.device)
    for _ in range(num_iterations):
        size = torch.linalg.vector_norm(matrices, dim=(1, 2)).clamp_min(1e-30)  # zero at some frequencies
        matrices = matrices / size[:, None, None]
        logarithm = 2 * (logarithm + size.log())
        matrices = matrices @ matrices.mH if matrices.shape[1] < matrices.shape[2] else matrices.mH @ matrices
    return (
        (torch.linalg.vector_norm(matrices, dim=(1, 2)).clamp_min(1e-30).log() + logarithm).div(2**num_iterations).exp()
    )


def refuse_dilation(case):
    """What was not published for dilated kernels is not blamed for them."""
    if max(case.geometry.dilation) > 1:
        raise ValueError("not for dilated kernels")


def published_circular(case, num_iterations=5):
    """The bound of Delattre et al. 2023 (lip4conv) for stride 1 on a torus of the image's size."""
    refuse_dilation(case)
    size = case.geometry.output_size(case.input_size) if case.geometry.transposed else case.input_size
    if max(case.geometry.kernel_size) > min(size):
        raise ValueError("the transform would cut the kernel")
    symbol = torch.fft.rfftn(case.weight, s=size, dim=tuple(range(2, case.weight.ndim)))
    return gram_iteration(symbol.flatten(2).permute(2, 0, 1), num_iterations).amax()


def gram_plain(case):
    return gram_iteration(case.weight[None], 5)[0]


def torchlip_dense(case):
    return PEERS.spectral_normalization(case.weight)[2]


def torchlip(case):
    refuse_dilation(case)
    coefficient = PEERS.compute_lconv_coef(case.layer.kernel_size, None, case.layer.stride)
    weight = case.weight.transpose(0, 1) if case.layer.transposed else case.weight
    return PEERS.spectral_normalization(weight.flatten(1))[2] / coefficient


def orthogonium_dense(case):
    with torch.no_grad():
        normalized = PEERS.BatchedPowerIteration(case.weight.shape)(case.weight)
    return case.weight.norm() / normalized.norm()  # what it divides by


def orthogonium(case):
    refuse_dilation(case)
    with torch.no_grad():
        return PEERS.get_conv_sv(case.layer, n_iter=3, return_stab_rank=False, imsize=case.input_size[0])


DENSE = {
    "ours": lambda case: linalg.gram_upper_bound(case.weight),
    "ours, rigorous": lambda case: linalg.rigorous_matrix_bound(case.weight),
    "Gram iteration as published": gram_plain,
}
CONVOLUTIONS = {
    "ours": lambda case: convolution_upper_bound(case.weight, case.geometry, case.input_size),
    "ours, rigorous": lambda case: rigorous_convolution_bound(case.weight, case.geometry, case.input_size),
    "ours, all sizes": lambda case: convolution_upper_bound(case.weight, case.geometry),
    "Singla-Feizi": lambda case: linalg.reshapings_bound(case.weight, case.geometry),
    "√patches": lambda case: linalg.patches_bound(case.weight, case.geometry),
    "circular, as published": published_circular,
}
if PEERS is not None:
    DENSE |= {"deel-torchlip": torchlip_dense, "orthogonium": orthogonium_dense}
    CONVOLUTIONS |= {"deel-torchlip": torchlip, "orthogonium": orthogonium}


@dataclass
class Measured:
    """A bound over the exact norm, and the median milliseconds."""

    ratio: float
    milliseconds: float

    def __str__(self):
        excess = self.ratio - 1
        shown = f"{self.ratio:.2f}" if abs(excess) > 0.02 else f"1 {'+' if excess > 0 else '−'} {abs(excess):.0e}"
        mark = "" if excess > -RTOL else " **below**"
        return f"{shown}{mark} ({self.milliseconds:.3g} ms)"


def measured(method, case, exact, repeats):
    torch.manual_seed(0)
    times = []
    value = math.nan
    while len(times) < repeats + 1 and sum(times) < 5:
        start = time.perf_counter()
        value = float(method(case))
        times.append(time.perf_counter() - start)
    return Measured(value / exact, 1e3 * statistics.median(times[1:] or times))


def table(cases, methods, repeats):
    lines = ["| layer | norm | " + " | ".join(methods) + " |", "|---" * (len(methods) + 2) + "|"]
    print("\n".join(lines))
    curves = {name: [] for name in methods}
    for case in cases:
        exact = exact_norm(case)
        found = {name: measured(method, case, exact, repeats) for name, method in methods.items()}
        lines.append(f"| {case.name} | {exact:.4f} | " + " | ".join(str(each) for each in found.values()) + " |")
        print(lines[-1], flush=True)
        for name, each in found.items():
            curves[name].append(each)
    return lines, curves


def small_layers(count):
    """Layers whose matrix can be written out: zero padding, random options."""
    generator = torch.Generator().manual_seed(0)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    while count:
        kernel, stride, dilation, padding = pick(2, 3, 4, 5), pick(1, 1, 2), pick(1, 1, 2), pick(0, 1, 2)
        options = {"stride": stride, "dilation": dilation, "padding": padding, "bias": False}
        kind = pick(nn.Conv2d, nn.Conv2d, nn.ConvTranspose2d)
        layer = kind(pick(1, 2, 3), pick(1, 2, 3), kernel, **options)
        size = pick(4, 5, 6, 8)
        geometry = ConvolutionGeometry.of(layer)
        if min(geometry.output_size((size, size))) < 1:
            continue
        weight = torch.randn(layer.weight.shape, generator=generator)
        if pick(True, False):
            weight = weight.abs()
        layer.weight.data.copy_(weight)
        yield Case("", weight, layer, (size, size))
        count -= 1


def violations(count):
    """How often each bound lies below the norm."""
    worst = {name: [] for name in CONVOLUTIONS}
    for case in small_layers(count):
        geometry, (height, width) = case.geometry, case.input_size
        channels = geometry.channels(case.weight)[0]
        basis = torch.eye(channels * height * width, dtype=torch.float64).reshape(-1, channels, height, width)
        exact = float(torch.linalg.matrix_norm(geometry.apply(basis, case.weight.double()).flatten(1), 2))
        for name, method in CONVOLUTIONS.items():
            with contextlib.suppress(RuntimeError, ValueError, TypeError):  # it does not take such a layer
                worst[name].append(float(method(case)) / exact)
    lines = ["| bound | layers | below the norm | smallest ratio | median ratio |", "|---|---|---|---|---|"]
    for name, ratios in worst.items():
        below = sum(not ratio >= 1 - RTOL for ratio in ratios)
        lines.append(
            f"| {name} | {len(ratios)} | {below} | {min(ratios):.4f} | {statistics.median(ratios):.4f} |"
            if ratios
            else f"| {name} | 0 | | | |"
        )
    print("\n".join(lines), flush=True)
    return lines


def drawing(curves):
    """Milliseconds across, excess above the norm upwards, both logarithmic: one point for each layer, as SVG."""
    colours = ["#1a7f5a", "#3b6fb5", "#b3541e", "#8a5fb0", "#777777", "#c2a21b", "#c23b6b", "#222222"]
    points = [(name, each.milliseconds, each.ratio - 1) for name, found in curves.items() for each in found]
    across = [math.log10(milliseconds) for _, milliseconds, _ in points]
    low, high = math.floor(min(across)), math.ceil(max(across))
    bottom, top = -4, 1
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 380" font-family="sans-serif" font-size="12">']
    parts.append('<rect width="720" height="380" fill="white"/>')
    for power in range(low, high + 1):
        x = 70 + 430 * (power - low) / max(1, high - low)
        parts.append(f'<path d="M{x:.0f} 20v300" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.0f}" y="338" text-anchor="middle">{10.0**power:g} ms</text>')
    for power in range(bottom, top + 1):
        y = 320 - 300 * (power - bottom) / (top - bottom)
        parts.append(f'<path d="M70 {y:.0f}h430" stroke="#ddd"/>')
        parts.append(f'<text x="64" y="{y + 4:.0f}" text-anchor="end">{10.0**power:g}</text>')
    for name, milliseconds, excess in points:
        colour = colours[list(curves).index(name) % len(colours)]
        x = 70 + 430 * (math.log10(milliseconds) - low) / max(1, high - low)
        share = (math.log10(max(excess, 10.0**bottom)) - bottom) / (top - bottom)
        y = 320 - 300 * min(max(share, 0), 1)
        shape = (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>'
            if excess > -RTOL
            else f'<path d="M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8" stroke="{colour}" stroke-width="2"/>'
        )
        parts.append(shape)
    for index, name in enumerate(curves):
        y = 40 + 20 * index
        parts.append(f'<circle cx="520" cy="{y}" r="4" fill="{colours[index % len(colours)]}"/>')
        parts.append(f'<text x="530" y="{y + 4}">{name}</text>')
    parts.append('<text x="285" y="362" text-anchor="middle">time; upwards: bound over norm, less one; ×: below</text>')
    return "\n".join([*parts, "</svg>", ""])


def main():
    parser = argparse.ArgumentParser(description="How tight upper bounds of norms are, and what they cost")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each bound, while they take below 5 s")
    parser.add_argument("--small-layers", type=int, default=1000, help="layers whose explicit matrix is compared")
    parser.add_argument("--quick", action="store_true", help="up to 128 channels and 512 features")
    parser.add_argument("--print", action="store_true", help="no page")
    parser.add_argument("--note", default="", help="a sentence for the page about the run")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    dense, _ = table(dense_cases(512 if arguments.quick else 2048), DENSE, arguments.repeats)
    images, curves = table(convolution_cases(128 if arguments.quick else 512), CONVOLUTIONS, arguments.repeats)
    counted = violations(arguments.small_layers)
    if arguments.print:
        return
    peers = "" if PEERS is not None else " deel-torchlip and orthogonium were not installed."
    options = " --quick" if arguments.quick else ""
    command = f"python benchmarks/bounds.py{options}"
    page = [
        "# How tight upper bounds are, and which of them are none",
        "",
        hardware(),
        "",
        f"`{command} --repeats {arguments.repeats} --small-layers {arguments.small_layers}`. "
        "In each cell the bound over the exact norm, and the median milliseconds. **below** marks a number that is "
        f"below the norm by more than {RTOL:g} of it, so no bound.{peers} {arguments.note}".rstrip(),
        "",
        "## Dense layers",
        "",
        "Square, float32. `ours` is `linalg.gram_upper_bound`; `ours, rigorous` is in float64 and for certificates. "
        "Gram iteration as published (Delattre et al. 2023) has five iterations and no rounding margin. The peers' "
        "numbers are what their layers divide by: power iteration, deel-torchlip's until it moves by less than 1e-3, "
        "orthogonium's with 3 steps.",
        "",
        *dense,
        "",
        "## Convolutions",
        "",
        "Initialized as torch does; `smooth` is one blur for all pairs of channels. `ours` and `ours, rigorous` are "
        "for the size of the images, `ours, all sizes` for any. Singla-Feizi and √patches have guaranteed norms of the "
        "reshaped kernels. `circular, as published` is the torus of the image's size with stride 1 (Delattre et al. "
        "2023, lip4conv). deel-torchlip divides by power iteration times √⌈k/s⌉ for each axis; orthogonium's is "
        "Delattre et al. 2024 for stride 1 with 3 iterations (each doubles the support, and 5 take minutes).",
        "",
        *images,
        "",
        "## Zero padding: how often a number is below the norm",
        "",
        "Small random layers, kernels of 2 to 5, stride and dilation 1 or 2, padding 0 to 2, transposed ones too, half "
        "of them with positive weights, against the SVD of the explicit matrix. The published bounds and the peers' "
        "are asked about those without dilation only.",
        "",
        *counted,
        "",
    ]
    path = write_result("bounds", "\n".join(page))
    figure = path.with_suffix(".svg")
    figure.write_text(drawing(curves), encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:
        file.write(f"![Excess against time for the convolutions]({figure.name})\n")
    print(f"Written: {path.relative_to(RESULTS.parent.parent)}")


if __name__ == "__main__":
    main()
