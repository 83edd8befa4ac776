"""What guaranteed bounds cost: one step of the SN-CNN discriminator with each normalization, in one run.

    python benchmarks/strict_cost.py                    # everything, printed
    python benchmarks/strict_cost.py --out              # and written as a page of benchmarks/results
    python benchmarks/strict_cost.py --quick            # few rounds

The steps take turns, so that whatever else the machine does falls on all of them, in an order that is drawn anew for
each round; each makes two steps, and the second counts. Each has a process of its own, because the memory that others
have left makes the same optimizer's step take twice as long. What is reported is the median, and the median of the
ratios to the plain step of the same round. ``--clock process`` counts the time of each process alone, for a machine
that others use as well: give it one thread then.

A change of one weight is the time from an Adam step to the normalized weight, for shapes by themselves, and how far the
norm of what is handed out is below one at most: of dense weights by a singular value decomposition, of convolutions
against the bound in float64 for the same size.
"""

import argparse
import multiprocessing
import random
import statistics
import time

import torch
from hardware import RESULTS, hardware, write_result
from torch import nn

import spectralnorm as sn
from spectralnorm.gan.models import ARCHITECTURES
from spectralnorm.linalg import ConvolutionGeometry, rigorous_convolution_bound

CLOCKS = {"wall": time.perf_counter, "process": time.process_time}
SHAPE = (3, 32, 32)

NORMALIZATIONS = {
    "plain": lambda network: network,
    "spectral": sn.add_spectral_norm,
    "operator": lambda network: sn.add_spectral_norm(network, norm="operator", input_shape=SHAPE),
    "strict, sizes given": lambda network: sn.add_spectral_norm(network, strict=True, input_shape=SHAPE),
    "strict, all sizes": lambda network: sn.add_spectral_norm(network, strict=True),
    "WGAN-GP": lambda network: network,
}

WEIGHTS = {
    "dense 512x512": (lambda: nn.Linear(512, 512, bias=False), None),
    "dense 1024x4096": (lambda: nn.Linear(4096, 1024, bias=False), None),
    "conv 64->64 4x4 stride 2, 32 px": (lambda: nn.Conv2d(64, 64, 4, 2, 1, bias=False), (32, 32)),
    "conv 128->256 3x3, 8 px": (lambda: nn.Conv2d(128, 256, 3, padding=1, bias=False), (8, 8)),
    "conv 128->256 3x3, all sizes": (lambda: nn.Conv2d(128, 256, 3, padding=1, bias=False), None),
    "conv 256->512 3x3, 4 px": (lambda: nn.Conv2d(256, 512, 3, padding=1, bias=False), (4, 4)),
    "conv 256->512 3x3, all sizes": (lambda: nn.Conv2d(256, 512, 3, padding=1, bias=False), None),
}


class DiscriminatorStep:
    """One whole hinge step with Adam; of WGAN-GP with its penalty on images in between."""

    def __init__(self, name, batch):
        torch.manual_seed(0)
        network = ARCHITECTURES["sncnn"].discriminator(image_size=32, channels=3, width=64)
        self.network = NORMALIZATIONS[name](network)
        self.penalty = 10.0 if name == "WGAN-GP" else 0.0
        self.real, self.fake = torch.randn(2, batch, *SHAPE)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=2e-4, betas=(0.0, 0.9))

    def __call__(self):
        self.optimizer.zero_grad(set_to_none=True)
        loss = (1 - self.network(self.real)).relu().mean() + (1 + self.network(self.fake)).relu().mean()
        if self.penalty:
            share = torch.rand(len(self.real), 1, 1, 1)
            between = (share * self.real + (1 - share) * self.fake).requires_grad_()
            (slope,) = torch.autograd.grad(self.network(between).sum(), between, create_graph=True)
            loss = loss + self.penalty * (slope.flatten(1).norm(dim=1) - 1).square().mean()
        loss.backward()
        self.optimizer.step()


class Contender:
    """A `DiscriminatorStep` in a process of its own, as a training is: its memory is not that of the others."""

    def __init__(self, name, batch, clock):
        context = multiprocessing.get_context("spawn")
        self._pipe, its_end = context.Pipe()
        arguments = its_end, name, batch, clock, torch.get_num_threads()
        self._process = context.Process(target=_answer, args=arguments, daemon=True)
        self._process.start()

    def __call__(self):
        """Seconds of a step, after another one."""
        self._pipe.send(True)
        return self._pipe.recv()

    def end(self):
        self._pipe.send(False)
        self._process.join()


def _answer(pipe, name, batch, clock, num_threads):
    torch.set_num_threads(num_threads)
    step, clock = DiscriminatorStep(name, batch), CLOCKS[clock]
    while pipe.recv():
        step()
        start = clock()
        step()
        pipe.send(clock() - start)


class WeightChange:
    """One weight after an Adam step of random direction, until its normalized value is there."""

    def __init__(self, make, size, clock, *, strict):
        torch.manual_seed(0)
        self.layer, self.size, self.clock = make(), size, CLOCKS[clock]
        nn.init.normal_(self.layer.weight, 0.0, 0.02)
        sn.spectral_norm(self.layer, strict=strict, input_size=size if strict else None)
        self.raw = self.layer.parametrizations.weight.original
        self.optimizer = torch.optim.Adam([self.raw], lr=2e-4, betas=(0.0, 0.9))

    def __call__(self):
        """Seconds from a change to the normalized weight."""
        self.raw.grad = torch.randn_like(self.raw)
        self.optimizer.step()
        start = self.clock()
        _ = self.layer.weight
        return self.clock() - start

    def looseness(self):
        """1 / the norm of what is handed out, which is at least one."""
        weight = self.layer.weight.detach().double()
        if weight.ndim == 2:
            return 1 / torch.linalg.matrix_norm(weight, 2).item()
        geometry = ConvolutionGeometry.of(self.layer)
        return 1 / float(rigorous_convolution_bound(weight, geometry, self.size))


AIMS = {"operator": 0.25, "strict, sizes given": 0.10}
"""What a whole step may cost more than a plain one."""


def in_turns(contenders, rounds, *, warm_up=3):
    """Seconds of each of ``contenders`` (name to what tells its seconds), round by round."""
    times = {name: [] for name in contenders}
    draw = random.Random(0)
    for number in range(rounds + warm_up):
        # Shuffled, not rotated: nobody is always the one after the step that has moved the most memory.
        for name in draw.sample(list(contenders), len(contenders)):
            seconds = contenders[name]()
            if number >= warm_up:
                times[name].append(seconds)
    return times


def of_steps(rounds, batch, clock):
    contenders = {name: Contender(name, batch, clock) for name in NORMALIZATIONS}
    times = in_turns(contenders, rounds)
    for contender in contenders.values():
        contender.end()
    verdicts = []
    lines = ["| step | ms | over plain | over plain, quartiles |", "|---|---|---|---|"]
    for name, seconds in times.items():
        ratios = [each / plain - 1 for each, plain in zip(seconds, times["plain"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        lines.append(f"| {name} | {1e3 * statistics.median(seconds):.1f} | {middle:+.1%} | {low:+.1%} to {high:+.1%} |")
        if name in AIMS:
            verdicts.append(f"{name} at most {AIMS[name]:+.0%}: {'met' if middle <= AIMS[name] else 'missed'}")
    return [*lines, "", f"Aims for the median: {'; '.join(verdicts)}."]


def of_weights(rounds, clock):
    lines = ["| weight | estimate, ms | strict, ms | norm below one by |", "|---|---|---|---|"]
    for name, (make, size) in WEIGHTS.items():
        changes = {kind: WeightChange(make, size, clock, strict=kind == "strict") for kind in ("estimate", "strict")}
        times = in_turns(changes, rounds)
        estimate, strict = (1e3 * statistics.median(times[kind]) for kind in ("estimate", "strict"))
        loose = changes["strict"].looseness() - 1
        lines.append(f"| {name} | {estimate:.2f} | {strict:.2f} | {loose:.2%} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description="What guaranteed bounds cost")
    parser.add_argument("--rounds", type=int, default=30, help="in which the contenders take turns")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--quick", action="store_true", help="5 rounds")
    parser.add_argument("--out", action="store_true", help="write a page of benchmarks/results")
    arguments = parser.parse_args()
    rounds, clock = 5 if arguments.quick else arguments.rounds, arguments.clock
    steps = of_steps(rounds, arguments.batch, clock)
    print("\n".join(steps), flush=True)
    weights = of_weights(rounds, clock)
    print("\n".join(weights), flush=True)
    if not arguments.out:
        return
    page = [
        "# What guaranteed bounds cost",
        "",
        hardware(),
        "",
        f"`python benchmarks/strict_cost.py --rounds {rounds} --batch {arguments.batch} --clock {arguments.clock} "
        "--out`. Medians over the rounds.",
        "",
        f"## One step of the SN-CNN discriminator, 32 px, batch {arguments.batch}",
        "",
        "Real and generated images, hinge loss, backward, Adam. The ratio is to the plain step of the same round.",
        "",
        *steps,
        "",
        "## One change of one weight",
        "",
        "From an Adam step (learning rate 2e-4, a random direction) to the normalized weight. How far its norm is "
        "below one: of convolutions against the bound in float64 for the same images.",
        "",
        *weights,
        "",
    ]
    path = write_result("strict_cost", "\n".join(page))
    print(f"Written: {path.relative_to(RESULTS.parent.parent)}")


if __name__ == "__main__":
    main()
