"""How long the metrics of 10,000 generated images take, and how often their intervals hold.

    python benchmarks/metrics.py                                 # all metrics with the classifier's features; a page
    python benchmarks/metrics.py --extractor squeezenet --device cuda
    python benchmarks/metrics.py --coverage                      # how often the intervals hold, and the result page

Generated images are those of an untrained generator: how long metrics take does not depend on how good they are. The
cache is empty at first, so features of all training and held-out images are part of the first time; the second
evaluation finds them. Coverage is measured on normal distributions, whose distances are known: how often does
the interval of 95 % hold what it is about?
"""

import argparse
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch
from hardware import hardware, write_result

from spectralnorm.gan import load_images, make_config
from spectralnorm.gan.evaluation import measure
from spectralnorm.gan.sampling import TrainedGenerator, build_generator
from spectralnorm.metrics import frechet_bootstrap, frechet_distance, kernel_bootstrap, kernel_distance, load_extractor


class Clock:
    """Seconds, and seconds of processors, spent on each thing that progress is told of."""

    def __init__(self):
        self.seconds = {}
        self._last = self._now()

    def __call__(self, what, done, total):
        now = self._now()
        if done:
            spent = now - self._last
            self.seconds[what] = self.seconds.get(what, 0) + spent
        self._last = now

    @staticmethod
    def _now():
        return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


def duration(num, extractor_name, device):
    """The result page: what took how long, with an empty cache and with a full one."""
    torch.manual_seed(0)
    config = make_config("fashion")
    generator = TrainedGenerator(build_generator(config).to(device), config)
    images = load_images(None, image_size=config.image_size, channels=config.channels)
    extractor = load_extractor(extractor_name, device=device)
    found, clocks = (), []
    for _ in ("empty", "full"):
        clock, began = Clock(), Clock._now()
        found = measure(
            generator, images, extractors=[extractor], num=num, metrics=("all",), with_intervals=True, progress=clock
        )
        clocks.append({**clock.seconds, "in all": Clock._now() - began})
    lines = ["| | empty cache: s | CPU s | full cache: s | CPU s |", "|---|---|---|---|---|"]
    for what in clocks[0]:
        cells = [f"{value:.1f}" for clock in clocks for value in clock.get(what, (0.0, 0.0))]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    memory = [f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB of the process"]
    if device == "cuda":
        memory.append(f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the GPU")
    aim = 20 if device == "cuda" else 180
    verdict = "met" if float(clocks[0]["in all"][0]) <= aim else "missed"
    judged = f" The aim is {aim} s with an empty cache: {verdict}." if num >= 10_000 else ""
    return "\n".join(
        [
            f"# How long the metrics of {num:,} generated images take",
            "",
            hardware(),
            "",
            f"`python benchmarks/metrics.py --num {num} --extractor {extractor_name} --device {device}`: "
            f"{len(found)} metrics ({', '.join(metric.name for metric in found)}), with intervals. "
            f"With an empty cache the features of the {images.num_training:,} training and {len(images.held_out):,} "
            "held-out images are part of it."
            f"{judged} Peak memory: {', '.join(memory)}.",
            "",
            *lines,
            "",
        ]
    )


def coverage(num_repeats, num, width):
    """Rows of a table, one for each shift of two normal distributions."""
    rows = []
    for shift in (0.0, 0.1, 0.5):
        generator = torch.Generator().manual_seed(0)
        found = [_once(num, width, shift, generator, seed) for seed in range(num_repeats)]
        frechet, frechet_errors, bias, kernel, kernel_errors = zip(*found, strict=True)
        true_frechet, true_kernel = width * shift**2, _true_kernel(width, shift)
        mean = statistics.fmean(frechet)
        for name, values, errors, wanted in (
            ("Fréchet", frechet, frechet_errors, mean),
            ("kernel", kernel, kernel_errors, true_kernel),
        ):
            held = sum(abs(v - wanted) <= 1.96 * e for v, e in zip(values, errors, strict=True)) / num_repeats
            rows.append(
                f"| {name} | {shift} | {statistics.stdev(values):.4g} | {statistics.fmean(errors):.4g} | {held:.1%} | "
                + (f"{mean - true_frechet:.4g} | {statistics.fmean(bias):.4g} |" if name == "Fréchet" else "| |")
            )
            print(rows[-1])
    return rows


def _once(num, width, shift, generator, seed):
    real = torch.randn(num, width, generator=generator)
    fake = torch.randn(num, width, generator=generator) + shift
    frechet = frechet_bootstrap(real, fake, seed=seed)
    kernel, spread = kernel_distance(real, fake, seed=seed)
    error = (kernel_bootstrap(real, fake, seed=seed).standard_error ** 2 + spread**2 / 100) ** 0.5
    return frechet_distance(real, fake), frechet.standard_error, frechet.bias, kernel, error


def _true_kernel(width, shift):
    """Squared discrepancy with ``(x.y / width + 1)^3`` of N(0, I) and N(shift, I).

    For independent x, y of means a, b and s = x.y: E s = a.b, E s^2 = width + a.a + b.b + (a.b)^2, and the odd part of
    the cube in the means is E s^3 = (a.b)^3 + 3 (width + 2) a.b + 3 a.b (a.a + b.b).
    """
    square = width * shift**2

    def kernel(aa, bb, ab):
        first, second = ab, width + aa + bb + ab**2
        third = ab**3 + 3 * (width + 2) * ab + 3 * ab * (aa + bb)
        return 1 + 3 * first / width + 3 * second / width**2 + third / width**3

    return kernel(0, 0, 0) + kernel(square, square, square) - 2 * kernel(0, square, 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=10_000)
    parser.add_argument("--extractor", default="classifier")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--coverage", action="store_true")
    parser.add_argument("--repeats", type=int, default=400)
    options = parser.parse_args()
    if not options.coverage:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["SPECTRALNORM_CACHE"] = str(Path(folder))
            text = duration(options.num, options.extractor, options.device)
        print(text, write_result("metrics", text, device=options.device), sep="\n")
        return
    rows = coverage(options.repeats, num=500, width=16)
    text = "\n".join(
        [
            "# Intervals of the Fréchet and the kernel distance",
            "",
            f"`python benchmarks/metrics.py --coverage --repeats {options.repeats}`. Two normal distributions in 16",
            "dimensions, 500 draws each, the second shifted in each direction. 95 % of the intervals should hold the",
            "mean of all Fréchet distances (their value at this number of draws), or the true kernel distance.",
            "",
            "| distance | shift | spread over repeats | mean standard error | held | bias | bias as estimated |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            hardware(),
            "",
        ]
    )
    print(write_result("metrics-coverage", text))


if __name__ == "__main__":
    main()
