"""Whether the certified lower bound of W1 keeps its promise, and how near it comes.

    python benchmarks/wasserstein.py                     # 200 repeats of everything, and the result page
    python benchmarks/wasserstein.py --trainings 5       # fewer repeats of what trains a critic

Two questions. Coverage of the statistics, with a critic that is fixed and optimal, so that the truth is as near to the
bound as it can be: of 200 independent draws, how often is the bound above the distance? (At most 5 % promised.) And
the whole way, with a critic trained on half of the samples: how far are estimate and bound from the distance?
"""

import argparse
import math
import statistics

import scipy.stats
import torch
from hardware import hardware, write_result

from spectralnorm.metrics import MEAN_BOUNDS, CriticOptions, critic_lower_bound, wasserstein_lower_bound


def shifted(num, dimension, generator):
    """Gaussians 2 apart along the diagonal."""
    real = torch.randn(num, dimension, generator=generator)
    return real, torch.randn(num, dimension, generator=generator) - 2 / math.sqrt(dimension)


def spheres(num, dimension, generator):
    """Spheres of radius 1 and 2 around one center: their means agree, no linear critic sees them."""
    points = torch.randn(2 * num, dimension, generator=generator)
    points = points / points.norm(dim=1, keepdim=True)
    return points[:num], 2 * points[num:]


def two_points(num, dimension, generator):
    """One or zero: one in 50 of the fake ones, all of the real ones zero but one in 10."""
    real = (torch.rand(num, dimension, generator=generator) < 0.1).float()
    return real, (torch.rand(num, dimension, generator=generator) < 0.02).float()


def log_normal(num, dimension, generator):
    """A heavy tail against a uniform distribution on [0, 3]."""
    return torch.randn(num, dimension, generator=generator).exp(), 3 * torch.rand(num, dimension, generator=generator)


def log_normal_distance():
    """Integral of the difference of both distribution functions."""
    nodes = torch.linspace(0, 400, 4_000_001, dtype=torch.float64)
    difference = torch.from_numpy(scipy.stats.lognorm(1).cdf(nodes.numpy())) - (nodes / 3).clamp(max=1)
    return float(torch.trapezoid(difference.abs(), nodes))


def diagonal(x):
    return x.sum(1) / math.sqrt(x.shape[1])


def negative_length(x):
    return -x.norm(dim=1)


# Name, draw, dimension, distance, the best critic (None: not written out), the interval of its values.
CASES = [
    ("Gaussians, shift 2, 1 dimension", shifted, 1, 2.0, diagonal, (-6, 4)),
    ("Gaussians, shift 2, 8 dimensions", shifted, 8, 2.0, diagonal, (-6, 4)),
    ("Gaussians, shift 2, 64 dimensions", shifted, 64, 2.0, diagonal, (-6, 4)),
    ("spheres of radius 1 and 2, 4 dimensions", spheres, 4, 1.0, negative_length, (-2.5, 0)),
    ("zeros and ones, 10 % against 2 %", two_points, 1, 0.08, diagonal, (0, 1)),
    ("log-normal against uniform", log_normal, 1, log_normal_distance(), None, (0, 0)),
]


def coverage_table(repeats, nums):
    lines = ["| distributions | samples a side | method | above the distance | mean bound / distance |"]
    lines.append("|---|---|---|---|---|")
    for name, draw, dimension, truth, critic, interval in CASES:
        if critic is None:
            continue
        for num in nums:
            for method in MEAN_BOUNDS:
                generator = torch.Generator().manual_seed(0)
                bounds = []
                for _ in range(repeats):
                    found = critic_lower_bound(
                        critic, *draw(num, dimension, generator), lipschitz=1 + 1e-6, interval=interval, method=method
                    )
                    bounds.append(found.lower_confidence_bound)
                above = sum(bound > truth for bound in bounds)
                row = f"| {name} | {num} | {method} | {above} of {repeats} | {statistics.mean(bounds) / truth:.3f} |"
                print(row, flush=True)
                lines.append(row)
    return lines


def training_table(trainings, num, options):
    lines = [
        "| distributions | estimate / distance, mean (smallest to largest) | bound / distance, mean | bound above "
        "| constant - 1, largest |",
        "|---|---|---|---|---|",
    ]
    for name, draw, dimension, truth, _, _ in CASES:
        found = [
            wasserstein_lower_bound(
                *draw(num, dimension, torch.Generator().manual_seed(1000 + seed)), options=options, seed=seed
            )
            for seed in range(trainings)
        ]
        ratios = [one.estimate / truth for one in found]
        bounds = [one.lower_confidence_bound / truth for one in found]
        row = (
            f"| {name} | {statistics.mean(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) "
            f"| {statistics.mean(bounds):.3f} | {sum(bound > 1 for bound in bounds)} of {trainings} "
            f"| {max(one.lipschitz for one in found) - 1:.0e} |"
        )
        print(row, flush=True)
        lines.append(row)
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--nums", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--trainings", type=int, default=200)
    parser.add_argument("--num", type=int, default=8000, help="samples a side; half train the critic")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    training = CriticOptions(num_steps=options.steps)
    coverage = coverage_table(options.repeats, options.nums)
    trained = training_table(options.trainings, options.num, training)
    text = [
        "# How often and how far the lower bound of W1 is below it",
        "",
        hardware(),
        "",
        f"`python benchmarks/wasserstein.py --repeats {options.repeats} --nums {' '.join(map(str, options.nums))} "
        f"--trainings {options.trainings} --num {options.num} --steps {options.steps}`",
        "",
        "## Coverage of the statistics",
        "",
        "With the best critic of each pair of distributions, known beforehand; confidence 95 %, so at most 5 % of the "
        "bounds may be above the distance. A method that is never above is valid and wasteful.",
        "",
        *coverage,
        "",
        "## The whole way",
        "",
        f"{options.num} samples a side: half train the critic ({training.num_hidden} hidden layers of "
        f"{training.width}, {training.num_steps} steps), half bound its means (betting). Seeds 0 to "
        f"{options.trainings - 1}; each draws new samples.",
        "",
        *trained,
        "",
    ]
    print("written to", write_result("wasserstein", "\n".join(text)))


if __name__ == "__main__":
    main()
