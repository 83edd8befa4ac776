"""Does a guaranteed Lipschitz constant cost quality? The recipes `fashion` and `fashion-strict` at equal time.

For every seed both train at once, each in a process and on one thread of its own, for ``--seconds`` by the clock, so
that whatever else the machine does falls on both. Then both are judged by the same held-out images. The difference of a
seed's two runs is what counts: its mean over the seeds, with a 95% interval (Student's t). "No worse" is claimed only
if zero or less lies in that interval; how much worse the strict one may still be is its upper end.

    python benchmarks/strict_training.py --seconds 120 --seeds 5
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys

import torch
from default_recipe import COLUMNS, measure, provenance, train_recipe
from hardware import hardware, write_result
from scipy.stats import t

from spectralnorm import gan
from spectralnorm.metrics import load_extractor

RECIPES = {"plain": "fashion", "strict": "fashion-strict"}


def child(name, seed, seconds, num):
    """Train and measure one run; prints one line of JSON."""
    torch.set_num_threads(1)
    samples, steps = train_recipe(seconds, seed, num, recipe=RECIPES[name])
    images = gan.load_images(None, image_size=32, channels=1)
    metrics = measure(samples, images, [load_extractor(each) for each in ("classifier", "squeezenet")])
    values = {column: metrics[column].value for column in COLUMNS}
    floors = {column: metrics[column].floor for column in COLUMNS}
    print(json.dumps({"steps": steps, "values": values, "floors": floors, "provenance": provenance(metrics)}))


def together(seed, seconds, num):
    """Both recipes, at the same time."""
    words = [sys.executable, __file__, "--seconds", str(seconds), "--num", str(num), "--child"]
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    running = {
        name: subprocess.Popen([*words, name, str(seed)], stdout=subprocess.PIPE, text=True, env=alone)
        for name in RECIPES
    }
    found = {}
    for name, process in running.items():
        output, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"{name}, seed {seed}: ended with status {process.returncode}.")
        found[name] = json.loads(output.splitlines()[-1])
    return found


def interval(values):
    """Mean and half the width of its 95% interval."""
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), half


def compared(results, column):
    """One row: means, their difference, and what follows."""
    plain, strict = ([result[name]["values"][column] for result in results] for name in RECIPES)
    means = [interval(values) for values in (plain, strict)]
    difference, half = interval([b - a for a, b in zip(plain, strict, strict=True)])
    # Of these only coverage is better when it is larger.
    low, high = difference - half, difference + half
    if column == "Class coverage":
        low, high = -high, -low
    verdict = "better" if high < 0 else "no worse" if low <= 0 else "worse"
    floor = results[0]["plain"]["floors"][column]
    cells = [column, *(f"{mean:.4g} ± {each:.2g}" for mean, each in means), f"{difference:.3g} ± {half:.2g}"]
    cells += [f"{difference / means[0][0]:+.1%}", verdict, "" if floor is None else f"{floor:.3g}"]
    return "| " + " | ".join(cells) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120, help="training time of each run")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each, at least 2")
    parser.add_argument("--num", type=int, default=5000, help="generated images that are measured")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], int(arguments.child[1]), arguments.seconds, arguments.num)
        return
    results = []
    lines = [f"| seed | | steps | {' | '.join(COLUMNS)} |", f"|---|---|---|{'---|' * len(COLUMNS)}"]
    print("\n".join(lines))
    for seed in range(arguments.seeds):
        results.append(together(seed, arguments.seconds, arguments.num))
        for name, found in results[-1].items():
            cells = " | ".join(f"{found['values'][column]:.4g}" for column in COLUMNS)
            lines.append(f"| {seed} | {name} | {found['steps']} | {cells} |")
            print(lines[-1], flush=True)
    head = [
        "| | plain | strict | strict - plain | of plain | strict is | real images |",
        "|---|---|---|---|---|---|---|",
    ]
    summary = [*head, *(compared(results, column) for column in COLUMNS)]
    print("\n".join(summary))
    method = (__doc__ or "").split("\n\n")[1]
    text = "\n".join(
        [
            "# What a guaranteed Lipschitz constant costs in quality",
            "",
            hardware(),
            "",
            f"`python benchmarks/strict_training.py --seconds {arguments.seconds:g} --seeds {arguments.seeds} "
            f"--num {arguments.num}`.",
            "",
            method,
            "",
            "Lower is better but for class coverage (classes with at least 2% of the images).",
            "",
            *summary,
            "",
            *lines,
            "",
            results[0]["plain"]["provenance"],
        ]
    )
    print(f"written to {write_result('strict_training', text)}")


if __name__ == "__main__":
    main()
