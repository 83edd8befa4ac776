"""What a GPU does in `normalization.py`: how long it is busy, what it launches and moves, and steps as CUDA graphs.

The clock tells how long a step takes with everything that the processor does for it, Python and launches included. How
long the device is busy is the sum of the durations of its kernels and copies, as torch's profiler (CUPTI) records them:
what remains where launches are cheap or hidden, as in a captured graph. The calls that are told apart in one record are
between marks, a kernel that nobody else launches.
"""

import csv
import gc
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import torch
from normalization_contenders import CONTENDERS, NETS, Step, weight_sets
from timing import Spread
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

MARK = "spin_kernel"


def mark():
    torch.cuda._sleep(1)


def between_marks(kernels, parts):
    """The values between the marks of each pair, as one list for each.

    Args:
        kernels: the name of each and a value, in the order of the device.
        parts: how many pairs were set.
    """
    found, is_inside = [], False
    for name, value in kernels:
        if MARK in name:
            is_inside = not is_inside
            if is_inside:
                found.append([])
        elif is_inside:
            found[-1].append(value)
    if is_inside or len(found) != parts:
        raise RuntimeError(f"of {parts} pairs of marks the record has {len(found) - is_inside}")
    return found


def on_device(profiler):
    """Name and seconds of each kernel and copy that the profiler has seen, in the order of the device."""
    events = [
        event
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation  # which span what they annotate
    ]
    events.sort(key=lambda event: event.time_range.start)
    return [(event.name, 1e-6 * event.time_range.elapsed_us()) for event in events]


def recorded(calls, rounds, device, *, before=None, between=None):
    """Seconds of every kernel and copy of ``calls`` (name to function): by name a list of them for each round."""
    before, between = before or {}, between or {}

    def turn(*, is_marked):
        for name, call in calls.items():
            if name in before:
                before[name]()
            if is_marked:
                mark()
            call()
            if is_marked:
                mark()
            if name in between:
                between[name]()

    for _ in range(3):
        turn(is_marked=False)
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        turn(is_marked=False)  # a record can lack its first events
        for _ in range(rounds):
            turn(is_marked=True)
        torch.cuda.synchronize(device)
    parts = between_marks(on_device(profiler), rounds * len(calls))
    return {name: parts[place :: len(calls)] for place, name in enumerate(calls)}


def busy_in_turns(calls, repeats, device, *, before=None, between=None):
    """As `timing.in_turns`, the time that the device is busy instead of that by the clock; always in one order."""
    found = recorded(calls, repeats, device, before=before, between=between)
    return {name: Spread.of([sum(seconds) for seconds in rounds]) for name, rounds in found.items()}


class Parts:
    """A step in three parts: the first reading of all weights after a change, the second one, and the backward."""

    def __init__(self, step):
        self.step, self.weights = step, []

    def read(self):
        self.weights += self.step.read()

    def backward(self):
        torch.autograd.backward(self.weights, self.step.grads)

    def change(self):
        self.weights.clear()
        self.step.change()
        self.step.optimizer.zero_grad(set_to_none=True)


def launches(shapes, device):
    """By contender the launches of the three parts of a step, net of the plain model's."""
    parts = {name: Parts(Step(shapes, CONTENDERS[name], device)) for name in NETS}
    calls, between = {}, {}
    for name, part in parts.items():
        calls |= {(name, "first"): part.read, (name, "second"): part.read, (name, "backward"): part.backward}
        between[name, "backward"] = part.change
    counts = {name: len(rounds[0]) for name, rounds in recorded(calls, 1, device, between=between).items()}
    return {
        name: [counts[name, part] - counts["plain", part] for part in ("first", "second", "backward")]
        for name in NETS[1:]
    }


def peak_memory(shapes, name, device):
    """Bytes that a contender's step needs at most, with all that it keeps."""
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    step = Step(shapes, CONTENDERS[name], device)
    for _ in range(3):
        step()
        step.change()
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before


def of_launches(device):
    """The table of launches and memory."""
    lines = [
        "| weights | ours: first reading | second | backward | P: first reading | second | backward | "
        "ours: memory, MB | P |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, shapes in weight_sets().items():
        counts = launches(shapes, device)
        plain, *others = (peak_memory(shapes, each, device) for each in NETS)
        cells = [*counts["ours"], *counts["P"], *(f"{(each - plain) / 1e6:.1f}" for each in others)]
        lines.append(f"| {' | '.join(map(str, [name, *cells]))} |")
    return lines


MOVED = ("SN-ResNet 64 px", "StyleGAN2 256 px")
"""The sets whose bytes are counted."""

_SECONDS = 40  # that the counting of a set's bytes may take


def step_under_ncu(name, device):
    """One step of each contender between marks, for ncu to count its bytes: all that the process does under it."""
    for each in NETS:
        step = Step(weight_sets()[name], CONTENDERS[each], device)
        for _ in range(3):
            step()
            step.change()
        torch.cuda.synchronize(device)
        with torch.cuda.profiler.profile():
            mark()
            step()
            mark()
            torch.cuda.synchronize(device)


def moved_bytes(table):
    """Bytes by contender from what ncu prints: two rows for each kernel, what it read and what it wrote."""
    kernels = {}
    for row in csv.DictReader(line for line in table.splitlines() if line.startswith('"')):
        _, before = kernels.get(row["ID"], (None, 0.0))
        kernels[row["ID"]] = row["Kernel Name"], before + float(row["Metric Value"].replace(",", ""))
    parts = between_marks(kernels.values(), len(NETS))
    return {name: sum(part) for name, part in zip(NETS, parts, strict=True)}


def of_moved_bytes():
    """The table of the bytes that a step moves in device memory, or one sentence why there is none."""
    ncu = shutil.which("ncu")
    if ncu is None:
        return ["Not counted: there is no `ncu` on the path."]
    command = [ncu, "--clock-control", "none", "--cache-control", "none", "--target-processes", "application-only"]
    command += ["--profile-from-start", "off", "--metrics", "dram__bytes_read.sum,dram__bytes_write.sum"]
    command += ["--csv", "--print-units", "base", sys.executable, str(Path(__file__).with_name("normalization.py"))]
    lines = ["| weights | floor, MB | plain | ours | P | ours / floor | P / floor |", "|---|---|---|---|---|---|---|"]
    for name in MOVED:
        try:
            moved = moved_bytes(_printed([*command, "--under-ncu", name]))
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            return [*lines, f"| {name} | not counted: {in_one_line(error)} |"]
        floor = 4 * 4 * sum(math.prod(shape) for shape in weight_sets()[name])
        mine, theirs = (moved[each] - moved["plain"] for each in NETS[1:])
        cells = [f"{each / 1e6:.0f}" for each in (floor, moved["plain"], mine, theirs)]
        lines.append(f"| {name} | {' | '.join(cells)} | {mine / floor:.2f} | {theirs / floor:.2f} |")
    return lines


def _printed(command):
    """What a process prints; it and those that it starts are ended after `_SECONDS`."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        text, _ = process.communicate(timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise RuntimeError(f"ncu took more than {_SECONDS} s") from None
    errors = [line for line in text.splitlines() if line.startswith("==ERROR==")]
    if process.returncode or errors:
        reason = [*errors, *text.splitlines()[-1:], "nothing printed"][0]
        raise RuntimeError(f"ncu ended with status {process.returncode}, {reason}")
    return text


def in_one_line(error):
    """An error's type and the first line that it says, for a cell of a table."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}, {first.rstrip('.')[:300].replace('|', '/')}"


class Captured:
    """A step captured in a CUDA graph after it has run on the stream of the capture; a call replays it."""

    def __init__(self, step):
        self.step, self.graph, stream = step, torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(4):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        step.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(self.graph, stream=stream):
            step()

    def __call__(self):
        self.graph.replay()


def captured(steps):
    """``steps`` (name to step) as graphs, and of those that cannot be captured the error, by name."""
    graphs, errors = {}, {}
    for name, step in steps.items():
        try:
            graphs[name] = Captured(step)
        except Exception as error:  # whatever a step does that a graph cannot hold: the page says it
            errors[name] = in_one_line(error)
            torch.cuda.synchronize()
    return graphs, errors
