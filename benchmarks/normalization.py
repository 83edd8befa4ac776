"""What spectral normalization costs: this package against torch's two implementations, in one run.

    python benchmarks/normalization.py                  # everything, and the result page
    python benchmarks/normalization.py --quick          # fewer repeats, prints only

The work of one discriminator step is two uses of every weight (real and generated images), one backward, and a change
of the weights in between. It is done with the weights alone, without the layers' products: each weight is read twice,
and the backward starts from given gradients. The contenders take turns, step by step, so that whatever else the machine
does falls on all of them, in an order that is drawn anew for each round, so that nobody always finds in the caches what
the same one has left there. What is reported is the *net* time: a model without normalization goes along, does the same
(reads, sums of gradients), and is taken off. The floor is what memory allows: reading every weight and writing the
normalized one, reading every gradient and writing the new one, at the speed of a copy in the same run.

The same is measured once more with a convolution of images before every step, as in a network, where the caches hold
something else when a weight is wanted.

With the extra `peers` installed, two more are measured, in rounds of their own with ours: the spectral normalization of
deel-torchlip's layers (without its orthonormalization), and orthogonium's power iteration on the reshaped weight.
"""

import argparse
import math
import random
import statistics
import time
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec

import torch
from hardware import RESULTS, hardware, write_result
from torch import nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize

import spectralnorm as sn
from spectralnorm.gan.models import ARCHITECTURES


def weight_sets():
    """Shapes of the weights of discriminators, by name."""
    sncnn = [(64, 3, 3, 3), (64, 64, 4, 4), (128, 64, 3, 3), (128, 128, 4, 4), (256, 128, 3, 3), (256, 256, 4, 4)]
    dcgan = [(64, 3, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (512, 256, 4, 4), (1, 8192)]
    channels = {256: 128, 128: 256, 64: 512, 32: 512, 16: 512, 8: 512, 4: 512}
    stylegan2 = [(128, 3, 1, 1)]
    for size in (256, 128, 64, 32, 16, 8):
        inner, outer = channels[size], channels[size // 2]
        stylegan2 += [(inner, inner, 3, 3), (outer, inner, 3, 3), (outer, inner, 1, 1)]
    resnet = [(64, 3, 3, 3), (64, 64, 3, 3), (64, 3, 1, 1)]
    for inner, outer in ((64, 128), (128, 256), (256, 512), (512, 1024)):
        resnet += [(inner, inner, 3, 3), (outer, inner, 3, 3), (outer, inner, 1, 1)]
    return {
        "30 of 64x64": [(64, 64)] * 30,
        "SN-CNN 32 px": [*sncnn, (512, 256, 3, 3), (1, 8192)],
        "DCGAN 64 px": dcgan,
        "SN-ResNet 64 px": [*resnet, (1, 1024)],
        "StyleGAN2 256 px": [*stylegan2, (512, 513, 3, 3), (512, 8192), (1, 512)],
    }


def layer_of(shape):
    if len(shape) == 2:
        return nn.Linear(shape[1], shape[0], bias=False)
    return nn.Conv2d(shape[1], shape[0], shape[2:], bias=False)


def ours(layers):
    return sn.add_spectral_norm(layers)


def parametrization(layers):
    for layer in layers:
        torch_parametrizations.spectral_norm(layer)
    return layers


def hook(layers):
    for layer in layers:
        nn.utils.spectral_norm(layer)
    return layers


def torchlip(layers):
    modules = import_module("deel.torchlip")
    replaced = []
    for layer in layers:
        if isinstance(layer, nn.Linear):
            new = modules.SpectralLinear(layer.in_features, layer.out_features, bias=False, eps_bjorck=None)
        else:
            sizes = layer.in_channels, layer.out_channels, layer.kernel_size
            new = modules.SpectralConv2d(*sizes, bias=False, eps_bjorck=None)
        replaced.append(new.to(layer.weight.device))
    return nn.ModuleList(replaced)


class Reshaped(nn.Module):
    """orthogonium's power iteration on the weight as a matrix."""

    def __init__(self, weight):
        super().__init__()
        matrix = weight.flatten(1)
        self.normalize = import_module("orthogonium.reparametrizers").BatchedPowerIteration(matrix.shape)
        self.normalize.to(weight.device)

    def forward(self, weight):
        return self.normalize(weight.flatten(1)).reshape(weight.shape)


def orthogonium(layers):
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", Reshaped(layer.weight))
    return layers


TORCHS = {"P": parametrization, "O": hook}
PEERS = {}
if find_spec("deel") and find_spec("deel.torchlip"):
    PEERS["deel-torchlip"] = torchlip
if find_spec("orthogonium"):
    PEERS["orthogonium"] = orthogonium
CONTENDERS = {"plain": lambda layers: layers, "ours": ours, **TORCHS, **PEERS}


class Step:
    """The normalization of one discriminator step for one contender."""

    def __init__(self, shapes, normalize, device):
        torch.manual_seed(0)
        self.layers = normalize(nn.ModuleList(layer_of(shape) for shape in shapes).to(device))
        self.optimizer = torch.optim.SGD(self.layers.parameters(), lr=1e-6)
        self.grads = [torch.randn(shape, device=device) for shape in shapes] * 2

    def read(self):
        weights = []
        for layer in self.layers:
            for pre_hook in layer._forward_pre_hooks.values():  # the old hook computes its weight in the forward
                pre_hook(layer, None)
            weights.append(layer.weight)
        return weights

    def __call__(self):
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward([*self.read(), *self.read()], self.grads)

    def change(self):
        self.optimizer.step()


@dataclass
class Spread:
    """Milliseconds over the repeats."""

    median: float
    lowest: float
    rounds: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, seconds):
        return cls(1e3 * statistics.median(seconds), 1e3 * min(seconds), [1e3 * each for each in seconds])

    def over(self, plain):
        """What it takes more, relative: the median of the rounds, in each of which both ran."""
        return statistics.median(mine / its for mine, its in zip(self.rounds, plain.rounds, strict=True)) - 1


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def in_turns(calls, repeats, device, *, before=None, between=None):
    """Time each of ``calls`` (name to function) ``repeats`` times, once in every round, in an order drawn for it.

    What is in ``before`` and ``between``, by name, is called before and after each; neither is timed.
    """
    times, order, draw = {name: [] for name in calls}, list(calls), random.Random(0)
    for round_number in range(repeats + 3):
        draw.shuffle(order)
        for name in order:
            call = calls[name]
            if before is not None:
                before[name]()
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            if round_number >= 3:
                times[name].append(time.perf_counter() - start)
            if between is not None:
                between[name]()
    return {name: Spread.of(seconds) for name, seconds in times.items()}


def copy_time(numel, repeats, device):
    source, target = torch.randn(numel, device=device), torch.empty(numel, device=device)
    return in_turns({"copy": lambda: torch.mul(source, 1.5, out=target)}, repeats, device)["copy"]


def normalization(shapes, repeats, device, names, *, before=None):
    """Milliseconds of each contender's step, the plain one's too."""
    steps = {name: Step(shapes, CONTENDERS[name], device) for name in names}
    between = {name: step.change for name, step in steps.items()}
    return in_turns(steps, repeats, device, before=before, between=between)


class OtherWork:
    """What fills the caches between two uses of a network's weights: a convolution of 16 images of 64 x 32 x 32."""

    def __init__(self, device):
        self.images = torch.randn(16, 64, 32, 32, device=device)
        self.layer = nn.Conv2d(64, 64, 3, device=device)

    @torch.no_grad()
    def __call__(self):
        self.layer(self.images)


def net(found, name):
    return Spread(*(getattr(found[name], each) - getattr(found["plain"], each) for each in ("median", "lowest")))


NETS = ("plain", "ours", "P")


def of_sets(repeats, device):
    """The table of torch's two, and that of the peers, if there are any."""
    lines = [
        "| weights | layers | numbers | floor | ours | P | O | P / ours | O / ours | ours / floor | "
        "ours, after other work | P | P / ours |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    peers = [
        "| weights | ours |" + "".join(f" {peer} | {peer} / ours |" for peer in PEERS),
        "|---|---|" + "---|---|" * len(PEERS),
    ]
    for name, shapes in weight_sets().items():
        numel = sum(math.prod(shape) for shape in shapes)
        rounds = repeats if numel < 1e7 else max(5, repeats // 4)
        found = normalization(shapes, rounds, device, ("plain", "ours", *TORCHS))
        chilled = normalization(shapes, rounds, device, NETS, before=dict.fromkeys(NETS, OtherWork(device)))
        copy = copy_time(numel, rounds, device)
        # Two copies: the weight and its gradient, each read once and written once.
        cells = [name, str(len(shapes)), f"{numel / 1e6:.2f} M", f"{2 * copy.median:.2f}", *_cells(found, TORCHS)]
        cells += [f"{net(found, 'ours').median / (2 * copy.median):.1f}", *_cells(chilled, ["P"])]
        lines.append(f"| {' | '.join(cells)} |")
        if PEERS:
            with_peers = normalization(shapes, max(5, rounds // 2), device, ("plain", "ours", *PEERS))
            mine, *others = _cells(with_peers, PEERS)
            times, ratios = others[: len(PEERS)], others[len(PEERS) :]
            cells = [name, mine, *(cell for pair in zip(times, ratios, strict=True) for cell in pair)]
            peers.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *peers] if PEERS else lines


def _cells(found, rivals):
    """The net times of ours and of rivals, and theirs over ours, as a table has them."""
    mine, others = net(found, "ours"), [net(found, rival) for rival in rivals]
    times = [f"{each.median:.2f} ({each.lowest:.2f})" for each in (mine, *others)]
    return [*times, *(f"{each.median / mine.median:.1f} ({each.lowest / mine.lowest:.1f})" for each in others)]


def of_growth(repeats, device):
    """How the net time grows with the number of layers and with their width, as a table and a drawing."""
    series = {"depth": [], "width": []}
    for depth in (10, 30, 100, 300, 1000):
        series["depth"].append((depth, normalization([(64, 64)] * depth, max(5, repeats // 4), device, NETS)))
    for width in (64, 256, 1024, 4096, 8192):
        series["width"].append((width, normalization([(width, width)], max(3, repeats // 8), device, NETS)))
    lines = ["| | ours | P | P / ours |", "|---|---|---|---|"]
    for kind, points in series.items():
        for size, found in points:
            what = f"{size} layers of 64x64" if kind == "depth" else f"one layer of {size}x{size}"
            mine, theirs = net(found, "ours").median, net(found, "P").median
            # Else less than the plain model: its gradients are in new memory, and ours lie where the last ones did.
            ratio = f"{theirs / mine:.1f}" if mine > 0 else "-"
            lines.append(f"| {what} | {mine:.2f} | {theirs:.2f} | {ratio} |")
    curves = {
        kind: {name: [(size, net(found, name).median) for size, found in points] for name in ("ours", "P")}
        for kind, points in series.items()
    }
    return lines, drawing(curves)


def drawing(curves):
    """Two panels with logarithmic axes, as SVG."""
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 300" font-family="sans-serif" font-size="12">']
    parts.append('<rect width="720" height="300" fill="white"/>')
    titles = {"depth": "layers of 64x64", "width": "width of one square layer"}
    for panel, (kind, lines) in enumerate(curves.items()):
        left, top, width, height = 60 + 350 * panel, 30, 270, 210
        # What is not above zero has no place on a logarithmic axis; the table tells it.
        lines = {name: [point for point in points if point[1] > 0] for name, points in lines.items()}
        values = [(math.log10(x), math.log10(y)) for points in lines.values() for x, y in points]
        (x0, x1), (y0, y1) = ((min(each), max(each)) for each in zip(*values, strict=True))
        y0, y1 = math.floor(y0), math.ceil(y1)

        def place(x, y, left=left, top=top, width=width, height=height, x0=x0, x1=x1, y0=y0, y1=y1):
            across = (math.log10(x) - x0) / (x1 - x0)
            up = (math.log10(y) - y0) / (y1 - y0)
            return left + width * across, top + height * (1 - up)

        for power in range(y0, y1 + 1):
            y = place(10**x0, 10.0**power)[1]
            parts.append(f'<path d="M{left} {y:.0f}h{width}" stroke="#ddd"/>')
            parts.append(f'<text x="{left - 6}" y="{y + 4:.0f}" text-anchor="end">{10.0**power:g} ms</text>')
        for name, colour in (("ours", "#1a7f5a"), ("P", "#b3541e")):
            points = [place(*point) for point in lines[name]]
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
            parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
            x, y = points[-1]
            parts.append(f'<text x="{x + 6:.0f}" y="{y + 4:.0f}" fill="{colour}">{name}</text>')
        for x, _ in lines["P"]:
            parts.append(f'<text x="{place(x, 1)[0]:.0f}" y="258" text-anchor="middle">{x}</text>')
        parts.append(f'<text x="{left + width / 2}" y="285" text-anchor="middle">{titles[kind]}</text>')
    return "\n".join([*parts, "</svg>", ""])


class DiscriminatorStep:
    """One whole hinge step of the SN-CNN discriminator, 32 px."""

    def __init__(self, normalize, batch, device, *, penalty=0.0):
        torch.manual_seed(0)
        network = ARCHITECTURES["sncnn"].discriminator(image_size=32, channels=3, width=64).to(device)
        layers = [layer for layer in network.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
        normalize(nn.ModuleList(layers))
        self.layers = layers
        self.network, self.penalty = network, penalty
        self.real, self.fake = torch.randn(2, batch, 3, 32, 32, device=device)
        self.optimizer = torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.0, 0.9))

    def __call__(self):
        self.optimizer.zero_grad(set_to_none=True)
        loss = (1 - self.network(self.real)).relu().mean() + (1 + self.network(self.fake)).relu().mean()
        if self.penalty:
            share = torch.rand(len(self.real), 1, 1, 1, device=self.real.device)
            between = (share * self.real + (1 - share) * self.fake).requires_grad_()
            (slope,) = torch.autograd.grad(self.network(between).sum(), between, create_graph=True)
            loss = loss + self.penalty * (slope.flatten(1).norm(dim=1) - 1).square().mean()
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def judge(self):
        self.network(self.real)

    @torch.no_grad()
    def read(self):
        for layer in self.layers:
            layer.weight  # noqa: B018


def of_whole_steps(repeats, device, batch=64):
    steps = {
        "plain": DiscriminatorStep(CONTENDERS["plain"], batch, device),
        # What differs between two that are the same is the machine's.
        "plain, another": DiscriminatorStep(CONTENDERS["plain"], batch, device),
        "ours": DiscriminatorStep(ours, batch, device),
        "P": DiscriminatorStep(parametrization, batch, device),
        "O": DiscriminatorStep(hook, batch, device),
        "WGAN-GP": DiscriminatorStep(CONTENDERS["plain"], batch, device, penalty=10.0),
    }
    found = in_turns(steps, max(5, repeats // 2), device)
    lines = ["| step | ms | over plain |", "|---|---|---|"]
    lines += [
        f"| {name} | {each.median:.1f} ({each.lowest:.1f}) | {each.over(found['plain']):+.1%} |"
        for name, each in found.items()
    ]
    judges = {name: steps[name] for name in ("plain", "plain, another", "ours", "P", "O")}
    for step in judges.values():
        step.network.eval()
    seen = in_turns({name: step.judge for name, step in judges.items()}, max(10, repeats), device)
    lines += ["", "| forward in eval mode | ms | over plain |", "|---|---|---|"]
    lines += [
        f"| {name} | {each.median:.1f} ({each.lowest:.1f}) | {each.over(seen['plain']):+.2%} |"
        for name, each in seen.items()
    ]
    # Each after a whole forward of its own, which leaves nothing of it in a cache, and as long after the last use.
    names = ("plain", "ours", "P")
    forwards = {name: judges[name].judge for name in names}
    reads = in_turns({name: judges[name].read for name in names}, max(10, repeats), device, before=forwards)
    lines += ["", "| reading all weights in eval mode | ms | over plain, of its forward |", "|---|---|---|"]
    lines += [
        f"| {name} | {reads[name].median:.3f} ({reads[name].lowest:.3f}) | "
        f"{net(reads, name).median / seen['plain'].median:+.2%} |"
        for name in names
    ]
    return lines


def launches(device):
    """Kernels per step on CUDA, net of the plain model's."""
    counts = {}
    for name in NETS:
        step = Step(weight_sets()["SN-CNN 32 px"], CONTENDERS[name], device)
        for _ in range(3):
            step()
            step.change()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
        counts[name] = sum(event.count for event in profile.key_averages())
    return [f"{name}: {counts[name] - counts['plain']} launches" for name in NETS[1:]]


def main():
    parser = argparse.ArgumentParser(description="What spectral normalization costs")
    parser.add_argument("--repeats", type=int, default=60, help="rounds in which the contenders take turns")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="the weight sets alone, 10 rounds, no page")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    sets = of_sets(10 if arguments.quick else arguments.repeats, device)
    print("\n".join(sets), flush=True)
    if arguments.quick:
        return
    whole = of_whole_steps(arguments.repeats, device)
    print("\n".join(whole), flush=True)
    growth, picture = of_growth(arguments.repeats, device)
    print("\n".join(growth), flush=True)
    kernels = ["", "## Kernel launches", "", *launches(device)] if device.type == "cuda" else []
    page = [
        "# What spectral normalization costs",
        "",
        hardware(),
        "",
        f"`python benchmarks/normalization.py --repeats {arguments.repeats} --device {arguments.device}`. "
        "Milliseconds, median over the rounds, in parentheses the lowest. P is torch's parametrization, O its hook.",
        "",
        "## The normalization of one discriminator step",
        "",
        "Two uses of every weight, one backward, the weights changed in between; net of the same without "
        "normalization. The floor is two copies of the weights: each weight and each gradient read and written once. "
        "After other work: a convolution of images before every step, which leaves nothing of it in a cache.",
        "",
        *sets,
        "",
        "## Whole steps: SN-CNN, 32 px, batch 64",
        "",
        *whole,
        "",
        "What is over plain is the median of the rounds' ratios, in each of which all took turns.",
        "",
        "## How it grows",
        "",
        *growth,
        "",
    ]
    path = write_result("normalization", "\n".join([*page, *kernels]), device=device.type)
    figure = path.with_suffix(".svg")
    figure.write_text(picture, encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:
        file.write(f"\n![Net time against depth and width]({figure.name})\n")
    print(f"Written: {path.relative_to(RESULTS.parent.parent)}")


if __name__ == "__main__":
    main()
