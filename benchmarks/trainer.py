"""How fast the trainer trains, in one run against torch-mimicry and a plain script with torch's spectral norm.

All contenders of a row train the same sizes: architecture, batch, updates of D for one of G, 32-bit floats, threads.
They take turns, a block of updates each, so that whatever else the machine does falls on all. A ratio is taken within a
round; reported are its median and its range, by the clock and, on a CPU, by processor time, which a busy machine
disturbs less. What is equal and what is not:

- Against mimicry (SNGAN-32), G has images of its own for its update in both (as many passes of G). Its networks differ
  in detail from ours: bilinear in place of nearest upsampling, and every step of a residual block by itself, where ours
  takes the cheapest order that is equal in exact arithmetic. That is part of the result.
- Against the script, G learns from the last images that D has seen, in both. The modules are the same, but for the
  residual blocks, which the script takes step by step as published; the row "our blocks" gives it ours. It normalizes
  with torch's parametrization (one power iteration per pass), ours finds what its own layer finds.
- Ours passes real and generated images through D together, gives D's weights no gradients in G's update, and stores
  convolutions in channels-last order; the results are those of the separate passes but for rounding. It also averages
  G's weights, keeps records and lets step sizes fall, which the script does not.

Peak memory is of a process that trains one contender alone. mimicry takes part where it can be found: it needs
``pip install --no-deps torch-mimicry==0.1.16`` or ``--mimicry FOLDER`` with its sources (not its dependencies).

    python benchmarks/trainer.py                              # everything at true size, and the result page
    python benchmarks/trainer.py --quick                      # narrow networks, small batches: minutes
    python benchmarks/trainer.py --parts speed memory         # some of it
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from drawing import drawing
from hardware import hardware, write_result
from trainer_contenders import CONTENDERS, Ours, Task, has_mimicry
from trainer_scaling import COLOURS, scaling

PARTS = ("speed", "memory", "loading", "startup", "scaling")
TARGETS = {"mimicry": 1.3, "script": 1.1}


def tasks(device, *, quick):
    """Name of the row, task, rival."""
    narrow = {"generator_width": 16, "discriminator_width": 16} if quick else {}
    batch = 16 if quick else 64
    sizes = {"batch_size": batch, **narrow}
    resnet, fresh, ours = "sngan-resnet-cifar10", {"fresh": True}, {"our_blocks": True}
    found = [
        (f"ResNet-32, batch {batch}, n_dis 5, fresh images for G", resnet, sizes, fresh, "mimicry"),
        (f"ResNet-32, batch {batch}, n_dis 5", resnet, sizes, {}, "script"),
        (f"ResNet-32, batch {batch}, n_dis 5, our blocks", resnet, sizes, ours, "script"),
        (f"SN-CNN-32, batch {batch}, n_dis 5", "miyato-a", sizes, {}, "script"),
        (f"SN-CNN-32, batch {batch}, n_dis 1", "sncnn-cifar10", sizes, {}, "script"),
        ("fashion (DCGAN-32, gray), batch 16, n_dis 1", "fashion", {}, {}, "script"),
    ]
    rows = [
        (name, Task(recipe, tuple(settings.items()), device, **how), rival)
        for name, recipe, settings, how, rival in found
    ]
    return [row for row in rows if row[2] != "mimicry" or has_mimicry()]


def timed(contender, steps, device):
    """Seconds by the clock, and of processor time."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter(), time.process_time()
    contender(steps)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began[0], time.process_time() - began[1]


def in_turns(contenders, rounds, device, *, seconds):
    """Seconds an update in each round, by the clock and of processor time; a block takes about ``seconds``."""
    for contender in contenders.values():
        contender(1)  # warms up, and fills Adam's state
    slowest = max(timed(contender, 1, device)[0] for contender in contenders.values())
    steps = max(1, round(seconds / slowest))
    times = {name: [] for name in contenders}
    for number in range(rounds):
        # Whoever comes second finds warmer caches and a hotter processor: they change places.
        names = list(contenders) if number % 2 == 0 else list(reversed(contenders))
        for name in names:
            times[name].append([each / steps for each in timed(contenders[name], steps, device)])
    return times


def ratio(rival, ours, *, clock=0):
    """Median and range of the ratios within the rounds; ``clock`` 1: of processor time."""
    ratios = [b[clock] / a[clock] for a, b in zip(ours, rival, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", statistics.median(ratios)


def of_speed(rounds, device, seconds, *, quick):
    lines = [
        "| | trainer, images/s | rival | images/s | ratio | by processor time | target |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, task, rival in tasks(device, quick=quick):
        times = in_turns({"trainer": Ours(task), rival: CONTENDERS[rival](task)}, rounds, device, seconds=seconds)
        config = task.config()
        images = config.batch_size * config.num_discriminator_steps
        ours, other = (images / statistics.median(wall for wall, _ in times[each]) for each in ("trainer", rival))
        by_clock, middle = ratio(times[rival], times["trainer"])
        by_processor = ratio(times[rival], times["trainer"], clock=1)[0] if device == "cpu" else ""
        verdict = f"{TARGETS[rival]}, {'met' if middle >= TARGETS[rival] else 'missed'}"
        cells = name, f"{ours:.4g}", rival, f"{other:.4g}", by_clock, by_processor, verdict
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return lines


def memory_of(name, task):
    """Peak of a process that trains one contender for two updates, and what it had before it built anything, GiB."""
    scale = 2**30 if sys.platform == "darwin" else 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
    CONTENDERS[name](task)(2)
    if task.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30, 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale, before


def of_memory(arguments, device, *, quick):
    lines = ["| | trainer | rival | | libraries alone |", "|---|---|---|---|---|"]
    for index, (name, _, rival) in enumerate(tasks(device, quick=quick)):
        found = {}
        for each in ("trainer", rival):
            words = [sys.executable, __file__, "--device", device, "--memory-of", str(index), each]
            words += ["--quick"] * quick + (["--mimicry", arguments.mimicry] if arguments.mimicry else [])
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            found[each] = json.loads(done.stdout.splitlines()[-1])
        (ours, before), (other, _) = found["trainer"], found[rival]
        lines.append(f"| {name} | {ours:.2f} GiB | {rival} | {other:.2f} GiB | {before:.2f} GiB |")
        print(lines[-1], flush=True)
    return lines


def of_loading(rounds, device, *, quick):
    """The share of an update that is spent on picking and scaling real images."""
    lines = ["| | update, ms | of it loading, ms | share |", "|---|---|---|---|"]
    for name, task, rival in tasks(device, quick=quick):
        if rival == "mimicry" or task.our_blocks:
            continue  # the trainer does what it does in another row
        ours = Ours(task)
        ours(2)
        whole = statistics.median(timed(ours, 1, device)[0] for _ in range(rounds))
        num = task.config().num_discriminator_steps
        load = statistics.median(
            timed(lambda steps, ours=ours: [next(ours.trainer.batches) for _ in range(steps)], num, device)[0]
            for _ in range(5 * rounds)
        )
        lines.append(f"| {name} | {1e3 * whole:.1f} | {1e3 * load:.2f} | {load / whole:.1%} |")
        print(lines[-1], flush=True)
    return lines


STARTUP = """
import sys, tempfile, time
from spectralnorm import gan
def first(trainer):
    print(time.time() - float(sys.argv[1]), flush=True)
    trainer.stop_reason = "interrupted"
folder = tempfile.mkdtemp(prefix="benchmark-")
gan.train(gan.make_config("fashion", device=sys.argv[2], num_evaluations=1), out=folder + "/run", observers=[first])
"""


def of_startup(device, *, repeats=3):
    """Seconds from the start of Python to the end of the first update: imports, reading images, building."""
    seconds, processor_seconds = [], []
    for _ in range(repeats):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        words = [sys.executable, "-c", STARTUP, str(time.time()), device]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(float(done.stdout.splitlines()[0]))
        processor_seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    lines = [
        f"{min(seconds):.1f} s at best of {repeats} (median {statistics.median(seconds):.1f} s); the target is 5 s.",
        f"The whole process, with its last pictures, took {min(processor_seconds):.1f} s of processor time.",
    ]
    print("\n".join(lines), flush=True)
    return lines


def page(sections, arguments):
    titles = {
        "speed": "Images/s of training",
        "memory": "Peak memory",
        "loading": "Time lost to loading",
        "startup": "From the command to the first update",
        "scaling": "How it grows",
    }
    command = " ".join(["python benchmarks/trainer.py", *arguments])
    lines = ["# How fast the trainer trains", "", hardware(), "", f"`{command}`.", ""]
    lines += [(__doc__ or "").split("\n\n", 1)[1].split("\n\n    python")[0], ""]
    for part, body in sections.items():
        lines += [f"## {titles[part]}", "", *body, ""]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--rounds", type=int, help="turns of each; default 7, or 5 with --quick")
    parser.add_argument("--seconds", type=float, default=2.0, help="about what a turn takes, at least one update")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="narrow networks, batch 16, fewer points and rounds")
    parser.add_argument("--mimicry", metavar="FOLDER", help="the folder that holds torch_mimicry")
    parser.add_argument("--out", type=Path, help="result page; default: results/trainer_..., none with --quick")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.mimicry:
        sys.path.append(os.path.abspath(arguments.mimicry))
    device, quick, rounds = arguments.device, arguments.quick, arguments.rounds or (5 if arguments.quick else 7)
    if arguments.memory_of:
        index, name = arguments.memory_of
        print(json.dumps(memory_of(name, tasks(device, quick=quick)[int(index)][1])))
        return
    sections, picture = {}, None
    for part in arguments.parts:
        print(part, flush=True)
        if part == "speed":
            sections[part] = of_speed(rounds, device, arguments.seconds, quick=quick)
            if not has_mimicry():
                sections[part] += ["", "torch-mimicry was not found."]
        elif part == "memory":
            sections[part] = of_memory(arguments, device, quick=quick)
        elif part == "loading":
            sections[part] = of_loading(rounds, device, quick=quick)
        elif part == "startup":
            sections[part] = of_startup(device)
        else:
            sections[part], curves = scaling(in_turns, rounds, device, quick=quick)
            picture = drawing(curves, COLOURS, of="images/s")
    text = page(sections, sys.argv[1:])
    if arguments.out is None and quick:
        return
    path = arguments.out or write_result("trainer", text, device=device)
    if picture is not None:
        figure = path.with_suffix(".svg")
        figure.write_text(picture, encoding="utf-8")
        text += f"![Images/s against batch, width and resolution]({figure.name})\n"
    path.write_text(text, encoding="utf-8")
    print(f"Written: {path}")


if __name__ == "__main__":
    main()
