"""The default recipe against a plain script, at equal training time, over several seeds.

For every seed the script in ``reference_dcgan.py`` and the recipe ``fashion`` train for ``--seconds`` on the same
images, one after the other. Both are judged by the same held-out images: kernel distance (KID) on two feature
extractors, and the classes that they cover. Prints a table and writes it to ``results/``. Run it on a quiet machine.

    python benchmarks/default_recipe.py --seconds 90 --seeds 3
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import reference_dcgan
from hardware import hardware, write_result

from spectralnorm import gan
from spectralnorm.metrics import evaluate, load_extractor

COLUMNS = ("KID-Classifier", "KID-SqueezeNet", "FD-Classifier", "FD-SqueezeNet", "Class coverage")


def train_reference(seconds, seed, num):
    generator, steps = reference_dcgan.train(seconds, seed)
    return reference_dcgan.sample(generator, num, seed=1_000_003 + seed), steps


def train_recipe(seconds, seed, num, **settings):
    # Grids, evaluations and checkpoints do not count as training time; leaving them out only saves waiting.
    config = gan.make_config(
        minutes=seconds / 60, seed=seed, num_evaluations=1, num_sample_grids=1, num_evaluation_samples=100, **settings
    )
    with tempfile.TemporaryDirectory() as folder:
        run = gan.train(config, out=Path(folder) / "run")
        return gan.load(run.folder).sample(num, seed=1_000_003 + seed), run.step


def measure(samples, images, extractors):
    metrics = evaluate(samples, images.held_out, extractors=extractors, class_names=images.class_names)
    return {metric.name: metric for metric in metrics if metric.name in COLUMNS}


def provenance(metrics):
    """What the numbers depend on, one line an extractor."""
    return "".join(
        f"- {source.extractor}: weights {source.weights_sha256[:12]}, {source.num_fake} generated against "
        f"{source.num_real} {source.split} images, resized: {source.resize}\n"
        for source in dict.fromkeys(metric.provenance for metric in metrics.values())
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=90, help="training time of each run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each")
    parser.add_argument("--num", type=int, default=5000, help="generated images that are measured")
    arguments = parser.parse_args()

    images = gan.load_images(None, image_size=32, channels=1)
    extractors = [load_extractor(name) for name in ("classifier", "squeezenet")]
    contenders = {"plain script": train_reference, "default recipe": train_recipe}
    results = {name: [] for name in contenders}
    lines = [f"| seed | | steps | {' | '.join(COLUMNS)} |", f"|---|---|---|{'---|' * len(COLUMNS)}"]
    print("\n".join(lines))
    for seed in range(arguments.seeds):
        for name, train in contenders.items():
            samples, steps = train(arguments.seconds, seed, arguments.num)
            values = measure(samples, images, extractors)
            results[name].append(values)
            lines.append(f"| {seed} | {name} | {steps} | {' | '.join(f'{values[c].value:.4g}' for c in COLUMNS)} |")
            print(lines[-1], flush=True)

    def mean(name, column):
        return statistics.mean(values[column].value for values in results[name])

    for name in contenders:
        lines.append(f"| mean | {name} | | {' | '.join(f'{mean(name, column):.4g}' for column in COLUMNS)} |")
    ratios = [mean("default recipe", column) / mean("plain script", column) for column in COLUMNS]
    lines.append(f"| recipe / script | | | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    floors = [results["default recipe"][0][column].floor for column in COLUMNS]
    lines.append(f"| real images | | | {' | '.join('' if floor is None else f'{floor:.4g}' for floor in floors)} |")
    print("\n".join(lines[-4:]))

    text = (
        f"# The default recipe against a plain script\n\n"
        f"{hardware()}\n\n"
        f"`python benchmarks/default_recipe.py --seconds {arguments.seconds:g} --seeds {arguments.seeds} "
        f"--num {arguments.num}`: {arguments.seconds:g} s of training each, {arguments.num} generated images against "
        f"held-out ones. Lower is better but for class coverage (classes with at least 2% of the images).\n\n"
        + "\n".join(lines)
        + "\n\n"
        + provenance(results["default recipe"][0])
    )
    print(f"written to {write_result('default_recipe', text)}")


if __name__ == "__main__":
    main()
