"""What every recipe costs on this machine: peak memory and images/s at its true size.

Each recipe trains for a few updates in a process of its own, by the call that any user makes, with its own images where
they are built in and random ones of its size else. Memory is the most that the process ever held, libraries (about 0.4
GiB) and images among it; on a GPU what torch held there. The pace counts real images over the updates after the first
ones, which take longer: those of three seconds, or one.
The numbers go into the table that ``spectralnorm recipes`` shows; an entry of the same machine is replaced.

    python benchmarks/recipes.py                            # all
    python benchmarks/recipes.py --recipes fashion miyato-c
    python benchmarks/recipes.py --memory-only              # on a machine that is busy: its pace means nothing
    python benchmarks/recipes.py --device cuda
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from hardware import processor

from spectralnorm import gan
from spectralnorm.gan.recipe_costs import Cost, telling_settings, write_costs
from spectralnorm.records import Ending, read_records

BUILT_IN_SIZES = (32,)
"""Larger ones would only be the built-in images blown up."""


WARM_UP_SECONDS = 3


class Pace:
    """An observer: images/s after the first updates; stops when it has seen enough."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.began = None
        self.images_per_second = None

    def __call__(self, trainer):
        if self.began is None:
            if trainer.clock.seconds >= min(WARM_UP_SECONDS, self.seconds):
                self.began = trainer.clock.seconds, trainer.images_seen
            return
        seconds, images = trainer.clock.seconds - self.began[0], trainer.images_seen - self.began[1]
        self.images_per_second = images / seconds
        if seconds >= self.seconds and trainer.step >= 3:
            trainer.stop_reason = "interrupted"


def measure(recipe, device, seconds, memory_limit):
    """Train for a moment; prints one line of JSON."""
    if device == "cpu":
        # A recipe that asks for more fails, instead of taking the machine down.
        resource.setrlimit(resource.RLIMIT_DATA, (memory_limit, memory_limit))
    config = gan.make_config(
        recipe, steps=10**6, device=device, num_sample_grids=1, num_evaluations=1, num_evaluation_samples=100
    )
    data = None
    if config.data is None and not config.conditional and config.image_size not in BUILT_IN_SIZES:
        shape = (4 * config.batch_size, config.channels, config.image_size, config.image_size)
        data = torch.randint(256, shape, dtype=torch.uint8)
    pace = Pace(seconds)
    with tempfile.TemporaryDirectory() as folder:
        gan.train(config, out=Path(folder) / "run", data=data, observers=[pace])
        endings = [record for record in read_records(Path(folder) / "run" / "metrics.jsonl") if type(record) is Ending]
    print(json.dumps({"memory": endings[-1].peak_memory_bytes, "pace": pace.images_per_second}))


def machine(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(gan.RECIPES), metavar="NAME")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=20, help="of training, for the pace; at least two updates")
    parser.add_argument("--timeout-seconds", type=float, default=900, help="for one recipe in all")
    parser.add_argument("--memory-gib", type=float, default=12, help="what one recipe may take on the CPU")
    parser.add_argument("--memory-only", action="store_true", help="leave the pace out")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    seconds = 0.0 if arguments.memory_only else arguments.seconds
    if arguments.one:
        measure(arguments.one, arguments.device, seconds, round(arguments.memory_gib * 2**30))
        return
    for recipe in arguments.recipes:
        began = time.monotonic()
        words = [sys.executable, __file__, "--one", recipe, "--device", arguments.device, "--seconds", str(seconds)]
        words += ["--memory-gib", str(arguments.memory_gib)]
        found = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run(words, capture_output=True, text=True, timeout=arguments.timeout_seconds)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
                print(f"{recipe}: not measured ({reason})", flush=True)
                continue
            found = json.loads(done.stdout.strip().splitlines()[-1])
        if found is None:
            print(f"{recipe}: not measured (took more than {arguments.timeout_seconds:g} s)", flush=True)
            continue
        cost = Cost(
            machine=machine(arguments.device),
            versions=f"Python {platform.python_version()}, torch {torch.__version__}",
            date=str(datetime.date.today()),
            settings=telling_settings(gan.make_config(recipe)),
            peak_memory_bytes=found["memory"],
            images_per_second=None if arguments.memory_only else round(found["pace"], 3),
        )
        write_costs(recipe, cost)
        pace = "" if cost.images_per_second is None else f", {cost.images_per_second:.1f} images/s"
        print(f"{recipe}: {found['memory'] / 2**30:.2f} GiB{pace} ({time.monotonic() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
