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

import torch
from drawing import drawing
from hardware import RESULTS, hardware, write_result
from normalization_contenders import (
    CONTENDERS,
    PEERS,
    TORCHS,
    DiscriminatorStep,
    OtherWork,
    Step,
    hook,
    ours,
    parametrization,
    weight_sets,
)
from timing import Spread, in_turns


def copy_time(numel, repeats, device):
    source, target = torch.randn(numel, device=device), torch.empty(numel, device=device)
    return in_turns({"copy": lambda: torch.mul(source, 1.5, out=target)}, repeats, device)["copy"]


def normalization(shapes, repeats, device, names, *, before=None):
    """Milliseconds of each contender's step, the plain one's too."""
    steps = {name: Step(shapes, CONTENDERS[name], device) for name in names}
    between = {name: step.change for name, step in steps.items()}
    return in_turns(steps, repeats, device, before=before, between=between)


def net(found, name):
    return Spread(*(getattr(found[name], each) - getattr(found["plain"], each) for each in ("median", "lowest")))


NETS = ("plain", "ours", "P")
COLOURS = {"P": "#b3541e", "ours": "#1a7f5a"}


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
    titles = {"depth": "layers of 64x64", "width": "width of one square layer"}
    # What is not above zero has no place on a logarithmic axis; the table tells it.
    curves = {
        titles[kind]: {
            name: [(size, net(found, name).median) for size, found in points if net(found, name).median > 0]
            for name in COLOURS
        }
        for kind, points in series.items()
    }
    return lines, drawing(curves, COLOURS, of="net ms")


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
