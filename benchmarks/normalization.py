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

Whole steps are measured as they are, and with the discriminator compiled.

The same is measured once more with a convolution of images before every step, as in a network, where the caches hold
something else when a weight is wanted.

With the extra `peers` installed, two more are measured, in rounds of their own with ours: the spectral normalization of
deel-torchlip's layers (without its orthonormalization), and orthogonium's power iteration on the reshaped weight.

On a GPU the clock runs from an idle device to an idle device, so it shows the longer of two things: what the processor
takes to launch a step's work, and what the device takes to do it. The page has the second by itself as well, the time
that the device is busy, and whole steps also as CUDA graphs, which are launched at once. It also tells the launches,
the memory, and, where Nsight Compute's `ncu` is there, the bytes that a step moves in device memory. Kernels are
compiled before anything is timed.
"""

import argparse
import math
import time
import traceback
from importlib import import_module

import torch
from drawing import drawing
from hardware import RESULTS, hardware, write_result
from normalization_contenders import (
    CONTENDERS,
    NETS,
    PEERS,
    TORCHS,
    DiscriminatorStep,
    Floor,
    OtherWork,
    Step,
    weight_sets,
)
from normalization_on_cuda import (
    busy_in_turns,
    captured,
    in_one_line,
    of_launches,
    of_moved_bytes,
    step_under_ncu,
)
from timing import Spread, in_turns

import spectralnorm
from spectralnorm.linalg import cuda

COLOURS = {"P": "#b3541e", "ours": "#1a7f5a"}


def normalization(shapes, repeats, device, names, *, before=None, measure=in_turns):
    """Milliseconds of each contender's step, the plain one's too."""
    steps = {name: Step(shapes, CONTENDERS[name], device) for name in names}
    between = {name: step.change for name, step in steps.items()}
    return measure(steps, repeats, device, before=before, between=between)


def net(found, name):
    return Spread(*(getattr(found[name], each) - getattr(found["plain"], each) for each in ("median", "lowest")))


def digits(device):
    """Of milliseconds in a table, after the point."""
    return 3 if device.type == "cuda" else 2


def of_sets(repeats, device, measure=in_turns):
    """The table of torch's two."""
    lines = [
        "| weights | layers | numbers | floor | plain | ours | P | O | P / ours | O / ours | ours / floor | "
        "ours, after other work | P | P / ours |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    form = f".{digits(device)}f"
    for name, shapes in weight_sets().items():
        numel, rounds = sum(math.prod(shape) for shape in shapes), rounds_for(shapes, repeats, device)
        found = normalization(shapes, rounds, device, ("plain", "ours", *TORCHS), measure=measure)
        other_work = dict.fromkeys(NETS, OtherWork(device))
        chilled = normalization(shapes, rounds, device, NETS, before=other_work, measure=measure)
        floor = measure({"floor": Floor(numel, device)}, rounds, device)["floor"].median
        cells = [name, str(len(shapes)), f"{numel / 1e6:.2f} M", f"{floor:{form}}", f"{found['plain'].median:{form}}"]
        cells += [*_cells(found, TORCHS, form), f"{net(found, 'ours').median / floor:.1f}"]
        cells += _cells(chilled, ["P"], form)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def rounds_for(shapes, repeats, device):
    # On a GPU a step of large weights takes about as long as one of small ones.
    is_small = sum(math.prod(shape) for shape in shapes) < 1e7
    return repeats if is_small or device.type == "cuda" else max(5, repeats // 4)


def of_peers(repeats, device):
    """The table of the peers."""
    lines = [
        "| weights | ours |" + "".join(f" {peer} | {peer} / ours |" for peer in PEERS),
        "|---|---|" + "---|---|" * len(PEERS),
    ]
    for name, shapes in weight_sets().items():
        rounds = max(5, rounds_for(shapes, repeats, device) // 2)
        found = normalization(shapes, rounds, device, ("plain", "ours", *PEERS))
        mine, *others = _cells(found, PEERS, f".{digits(device)}f")
        times, ratios = others[: len(PEERS)], others[len(PEERS) :]
        cells = [name, mine, *(cell for pair in zip(times, ratios, strict=True) for cell in pair)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cells(found, rivals, form):
    """The net times of ours and of rivals, and theirs over ours, as a table has them."""
    mine, others = net(found, "ours"), [net(found, rival) for rival in rivals]
    times = [f"{each:{form}}" for each in (mine, *others)]
    return [*times, *(f"{ratio(each.median, mine.median)} ({ratio(each.lowest, mine.lowest)})" for each in others)]


def ratio(theirs, ours):
    """As a table has it; none where ours takes less than the plain model, as its gradients lie where the last did."""
    return f"{theirs / ours:.1f}" if ours > 0 else "-"


def growth(repeats, device):
    """Times of the contenders by the number of layers, and by their width."""
    depths, widths = (10, 30, 100, 300, 1000), (64, 256, 1024, 4096, 8192)
    return {
        "depth": {each: normalization([(64, 64)] * each, max(5, repeats // 4), device, NETS) for each in depths},
        "width": {each: normalization([(each, each)], max(5, repeats // 8), device, NETS) for each in widths},
    }


def of_growth(series, device):
    """How the net time grows with the number of layers and with their width, as a table."""
    lines, form = ["| | ours | P | P / ours |", "|---|---|---|---|"], f".{digits(device)}f"
    for kind, points in series.items():
        for size, found in points.items():
            what = f"{size} layers of 64x64" if kind == "depth" else f"one layer of {size}x{size}"
            mine, theirs = net(found, "ours").median, net(found, "P").median
            lines.append(f"| {what} | {mine:{form}} | {theirs:{form}} | {ratio(theirs, mine)} |")
    return lines


def picture(series):
    """The same as a drawing."""
    titles = {"depth": "layers of 64x64", "width": "width of one square layer"}
    # What is not above zero has no place on a logarithmic axis; the table tells it.
    curves = {
        titles[kind]: {
            name: [(size, net(found, name).median) for size, found in points.items() if net(found, name).median > 0]
            for name in COLOURS
        }
        for kind, points in series.items()
    }
    return drawing(curves, COLOURS, of="net ms")


BUSY_ROUNDS = 3  # the durations of kernels vary little
BATCH = 64
WHOLE_STEPS = {
    "SN-CNN, 32 px": {"architecture": "sncnn"},
    "SN-ResNet, 32 px, bfloat16, fused Adam": {"architecture": "resnet", "in_half": True},
}
"""Settings of `DiscriminatorStep`; on a CPU the first alone."""


def whole_steps(settings, device):
    """Steps of the contenders by name; WGAN-GP's in float32 alone."""
    # What differs between two that are the same is the machine's.
    names = {"plain": "plain", "plain, another": "plain", "ours": "ours", "P": "P", "O": "O"}
    steps = {name: DiscriminatorStep(CONTENDERS[each], BATCH, device, **settings) for name, each in names.items()}
    if "in_half" not in settings:
        steps["WGAN-GP"] = DiscriminatorStep(CONTENDERS["plain"], BATCH, device, penalty=10.0, **settings)
    return steps


def of_whole_steps(steps, rounds, device, measure=in_turns, title="step, after those of others", **options):
    """The table of what whole steps take, and what over the plain one."""
    found, form = measure(steps, rounds, device, **options), ".3f" if device.type == "cuda" else ".1f"
    return [
        f"| {title} | ms | over plain |",
        "|---|---|---|",
        *(f"| {name} | {each:{form}} | {each.over(found['plain']):+.1%} |" for name, each in found.items()),
    ]


def of_busy_steps(steps, device):
    """The same by the time that the device is busy."""
    return of_whole_steps(steps, BUSY_ROUNDS, device, busy_in_turns, "time of a busy device")


def of_captured_steps(settings, repeats, device):
    """The same of steps captured in CUDA graphs, and why some cannot be."""
    graphs, errors = captured(whole_steps(settings, device))
    if "plain" in errors:
        raise RuntimeError(f"the plain step cannot be captured ({errors['plain']})")
    lines = of_whole_steps(graphs, repeats, device, title="step as a CUDA graph")
    lines += [f"| {name} | cannot be captured: {error} |" for name, error in errors.items()]
    return [*lines, "", *told(of_busy_steps, graphs, device)]


def of_compiled_steps(settings, rounds, device):
    """The same of steps whose discriminators are compiled."""
    makers = {
        "plain": ("plain", torch.compile),
        "ours, by spectralnorm.compile": ("ours", spectralnorm.compile),
        "ours, by torch.compile": ("ours", torch.compile),
        "P, by torch.compile": ("P", torch.compile),
    }
    steps = {
        name: DiscriminatorStep(CONTENDERS[each], BATCH, device, compiler=compiler, **settings)
        for name, (each, compiler) in makers.items()
    }
    errors = {}
    for name, step in steps.items():
        try:
            step()
        except Exception as error:  # whatever a compiler makes of a contender: the page says it
            errors[name] = in_one_line(error)
    steps = {name: step for name, step in steps.items() if name not in errors}
    lines = of_whole_steps(steps, rounds, device, title="step with a compiled discriminator")
    lines += [f"| {name} | does not run: {error} |" for name, error in errors.items()]
    return [*lines, "", *told(of_busy_steps, steps, device)] if device.type == "cuda" else lines


def of_evaluation(steps, repeats, device):
    """The tables of a forward in eval mode and of the reading of all weights in it."""
    judges = {name: steps[name] for name in ("plain", "plain, another", "ours", "P", "O")}
    for step in judges.values():
        step.network.eval()
    seen = in_turns({name: step.judge for name, step in judges.items()}, max(10, repeats), device)
    form = ".3f" if device.type == "cuda" else ".1f"
    lines = ["| forward in eval mode | ms | over plain |", "|---|---|---|"]
    lines += [f"| {name} | {each:{form}} | {each.over(seen['plain']):+.2%} |" for name, each in seen.items()]
    # Each after a whole forward of its own, which leaves nothing of it in a cache, and as long after the last use.
    forwards = {name: judges[name].judge for name in NETS}
    reads = in_turns({name: judges[name].read for name in NETS}, max(10, repeats), device, before=forwards)
    lines += ["", "| reading all weights in eval mode | ms | over plain, of its forward |", "|---|---|---|"]
    lines += [
        f"| {name} | {reads[name]:.3f} | {net(reads, name).median / seen['plain'].median:+.2%} |" for name in NETS
    ]
    return lines


class Page:
    """The result page: every part is printed as soon as it is there."""

    def __init__(self, *lines):
        self.lines, self.began, self.figure = [*lines], time.perf_counter(), None
        print("\n".join(lines), flush=True)

    def add(self, title, *lines):
        text = ["", f"## {title}", "", *lines]
        print("\n".join([*text, "", f"({time.perf_counter() - self.began:.0f} s so far)"]), flush=True)
        self.lines += text

    def write(self, device):
        path = write_result("normalization", "\n".join([*self.lines, ""]), device=device.type)
        if self.figure is not None:
            figure = path.with_suffix(".svg")
            figure.write_text(self.figure, encoding="utf-8")
            with path.open("a", encoding="utf-8") as file:
                file.write(f"\n![Net time against depth and width]({figure.name})\n")
        print(f"Written: {path.relative_to(RESULTS.parent.parent)}")


def told(section, *arguments):
    """The lines of a section, or one that says how it failed: what else was measured is kept."""
    try:
        return section(*arguments)
    except Exception as error:
        traceback.print_exc()
        return [f"Not measured: {in_one_line(error)}."]


def kernels_in_use(device):
    """One sentence; on a GPU it compiles the kernels, before anything is timed."""
    if device.type != "cuda":
        return []
    if cuda.is_trusted(device, torch.float32):
        return ["", f"Ours runs by its kernels (Triton {import_module('triton').__version__})."]
    return ["", "Ours runs by torch's operations: its kernels are not used on this device."]


SETS = (
    "Two uses of every weight, one backward, the weights changed in between; net of the same without normalization, "
    "whose own time is in the column plain. The floor is two copies of the weights: each weight and each gradient read "
    "and written once. After other work: a convolution of images before every step, which leaves nothing of it in a "
    "cache."
)
PEERS_TOO = "In rounds of their own, net of the plain model as above."
BUSY = (
    "Durations of the device's kernels and copies, summed; net of the plain model's, which adds the gradients of the "
    "two uses weight by weight. The floor is measured in the same way, one copy after the other: smaller sets stay in "
    "the device's cache, as they do in all columns but those after other work."
)
LAUNCHES = (
    "Kernels and copies, net of the plain model's: of the first reading of all weights after a change, of the second, "
    "and of the backward of both. Memory: the most that is allocated in a step, over the plain model's."
)
GRAPHS = "The same steps, each captured once in a CUDA graph, which is replayed."
COMPILED = (
    "The discriminators compiled by torch's default compiler. What `torch.compile` makes normalizes each weight at "
    "every use; to what `spectralnorm.compile` makes the weights are given, normalized together."
)
MOVED = (
    "What the kernels of one step read and write in device memory, counted by `ncu` with caches as they are; ours and "
    "P net of plain. The floor is every weight and every gradient, read and written once."
)
OVER = (
    "What is over plain is the median of the rounds' ratios, in each of which all took turns. After one of its own: a "
    "step that is not timed comes before, as in a training; after those of others the weights come from memory."
)


def measure_all(page, repeats, device):
    """Every section after the first, those that are asked for most before others."""
    on_gpu = device.type == "cuda"
    if PEERS and not on_gpu:
        page.add("Beside the peers", PEERS_TOO, "", *of_peers(repeats, device))
    for title, settings in WHOLE_STEPS.items() if on_gpu else [next(iter(WHOLE_STEPS.items()))]:
        steps = whole_steps(settings, device)
        rounds = repeats if on_gpu else max(5, repeats // 2)
        lines = of_whole_steps(steps, rounds, device, title="step, after one of its own", before=steps)
        lines += ["", *of_whole_steps(steps, rounds, device)]
        if on_gpu:
            lines += ["", *told(of_busy_steps, steps, device)]
        lines += ["", *of_evaluation(steps, repeats, device)]
        page.add(f"Whole steps: {title}, batch {BATCH}", *lines, "", OVER)
    if on_gpu:
        sets = told(of_sets, BUSY_ROUNDS, device, busy_in_turns)
        page.add("The normalization by the time that the device is busy", BUSY, "", *sets)
        page.add("Launches and memory", LAUNCHES, "", *told(of_launches, device))
        for title, settings in WHOLE_STEPS.items():
            lines = told(of_captured_steps, settings, repeats, device)
            page.add(f"Whole steps as CUDA graphs: {title}, batch {BATCH}", GRAPHS, "", *lines)
    for title, settings in WHOLE_STEPS.items() if on_gpu else [next(iter(WHOLE_STEPS.items()))]:
        rounds = repeats if on_gpu else max(5, repeats // 2)
        page.add(
            f"Whole steps, compiled: {title}, batch {BATCH}",
            COMPILED,
            "",
            *told(of_compiled_steps, settings, rounds, device),
        )
    series = growth(repeats, device)
    page.figure = picture(series)
    page.add("How it grows", *of_growth(series, device))
    if on_gpu:
        page.add("Bytes moved in device memory", MOVED, "", *told(of_moved_bytes))
        if PEERS:
            page.add("Beside the peers", PEERS_TOO, "", *of_peers(repeats // 2, device))


def main():
    parser = argparse.ArgumentParser(description="What spectral normalization costs")
    parser.add_argument("--repeats", type=int, help="rounds in which the contenders take turns (60, on a GPU 20)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="the weight sets alone, 10 rounds, no page")
    parser.add_argument("--under-ncu", help=argparse.SUPPRESS)  # the process that `of_moved_bytes` starts
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.under_ncu:
        step_under_ncu(arguments.under_ncu, device)
        return
    repeats = arguments.repeats or (20 if device.type == "cuda" else 60)
    page = Page(
        "# What spectral normalization costs",
        "",
        hardware(),
        *kernels_in_use(device),
        "",
        f"`python benchmarks/normalization.py --repeats {repeats} --device {arguments.device}`. "
        "Milliseconds, median over the rounds, in parentheses the lowest. P is torch's parametrization, O its hook.",
    )
    sets = of_sets(10 if arguments.quick else repeats, device)
    page.add("The normalization of one discriminator step", SETS, "", *sets)
    if arguments.quick:
        return
    try:
        measure_all(page, repeats, device)
    except KeyboardInterrupt:  # what was measured until then is kept
        page.lines += ["", "Interrupted: what would follow was not measured."]
    page.write(device)


if __name__ == "__main__":
    main()
