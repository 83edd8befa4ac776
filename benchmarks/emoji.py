"""Pictures of a small set of emoji: the recipe `emoji-64` with its SN-ResNet, and with StyleGAN2 in its place.

Both train at once, for ``--minutes`` by the clock: on a CPU each in a process and on half of the cores of its own. The
page shows what came out: samples that nobody has chosen, the distance to held-out pictures over time, and how many
samples are nearer to a training picture than held-out ones are.

    python benchmarks/emoji.py --data noto-emoji-64.zip --minutes 60
    python benchmarks/emoji.py --data noto-emoji-64.zip --page-only FOLDER     # from runs that are there
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from drawing import drawing
from hardware import hardware, write_result

from spectralnorm import gan
from spectralnorm.gan.evaluation import measure
from spectralnorm.gan.inputs import prepare_data
from spectralnorm.gan.pictures import image_grid, to_pillow
from spectralnorm.metrics import load_extractor
from spectralnorm.records import Ending, Evaluation, read_records

NETWORKS = {
    "SN-ResNet-64": {},
    # As the recipe stylegan2-64, made small; the page tells how.
    "StyleGAN2-64": {
        "architecture": "stylegan2",
        "normalization": "none",
        "loss": "nonsaturating",
        "penalty": "r1",
        "penalty_weight": 0.05,
        "penalty_interval": 16,
        "path_length_weight": 0.0,
        "generator_width": 16,
        "discriminator_width": 16,
        "latent_dim": 128,
        "batch_size": 16,
        "generator_lr": 0.0025,
        "discriminator_lr": 0.0025,
        "lr_decay_from": 0.7,
    },
}
MADE_SMALL = (
    "It is smaller than the recipe `stylegan2-64`: narrower networks, fewer latents and images a batch, no path "
    "lengths, and step sizes that fall in the end."
)
COLOURS = {"SN-ResNet-64": "#1a7f5a", "StyleGAN2-64": "#b3541e"}
SIDE = 8


def child(name, data, minutes, folder, device):
    """Train one network, or go on with it."""
    settings = {"num_sample_grids": 8, "num_evaluations": 12, "num_evaluation_samples": 2000, "checkpoint_minutes": 5.0}
    config = gan.make_config("emoji-64", data=str(data), minutes=minutes, device=device, **settings, **NETWORKS[name])
    gan.train(config, out=folder / name)


def train_together(data, minutes, folder, device):
    words = [sys.executable, __file__, "--data", str(data), "--minutes", str(minutes), "--device", device]
    threads = str(max(1, (os.cpu_count() or 2) // len(NETWORKS)))
    alone = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    running = [
        (name, subprocess.Popen([*words, "--child", name, str(folder)], env=alone, stdout=subprocess.DEVNULL))
        for name in NETWORKS
    ]
    for name, process in running:
        if process.wait():
            raise SystemExit(f"{name} ended with status {process.returncode}; its records are in {folder / name}.")


def judged(name, folder):
    """What one run says of itself: settings, cost, distances over time; and the last metrics."""
    config = json.loads((folder / name / "config.json").read_text())
    records = list(read_records(folder / name / "metrics.jsonl"))
    ending = [record for record in records if isinstance(record, Ending)][-1]
    evaluations = [record for record in records if isinstance(record, Evaluation)]
    curve = [
        (record.training_seconds / 60, metric.value)
        for record in evaluations
        for metric in record.metrics
        if metric.name == "FD-SqueezeNet"
    ]
    generator = gan.load(folder / name)
    metrics = measure(
        generator,
        prepare_data(generator.config),
        extractors=[load_extractor("squeezenet")],
        num=2000,
        metrics=("fd", "kid", "pr", "copying"),
        with_intervals=True,
    )
    return config, ending, curve, metrics


def grid(images, path):
    to_pillow(image_grid(images, columns=SIDE)).save(path, quality=88)


def page(folder, data, minutes):
    found = {name: judged(name, folder) for name in NETWORKS}
    settings = json.loads((folder / next(iter(NETWORKS)) / "config.json").read_text())
    images = prepare_data(gan.make_config("emoji-64", data=settings["data"], minutes=1.0))
    path = write_result("emoji", "")
    lines = ["# Emoji at 64 px", "", hardware(), ""]
    lines += [f"`python benchmarks/emoji.py --data {data.name} --minutes {minutes:g}`.", ""]
    lines += [(__doc__ or "").split("\n\n")[1], ""]
    changed = ", ".join(f"`{setting}={value}`" for setting, value in NETWORKS["StyleGAN2-64"].items())
    lines += [f"StyleGAN2-64 is the recipe `emoji-64` with {changed}. {MADE_SMALL}", ""]
    lines += [
        f"{images.num_training:,} pictures to train on, {len(images.held_out):,} held out.",
        "",
        "| | updates of G | real images seen | training, minutes | "
        + " | ".join(metric.name for metric in found["SN-ResNet-64"][3])
        + " |",
        "|---|---|---|---|" + "---|" * len(found["SN-ResNet-64"][3]),
    ]
    for name, (_, ending, _, metrics) in found.items():
        cells = [f"{ending.step:,}", f"{ending.images_seen:,}", f"{ending.training_seconds / 60:.1f}"]
        lines.append("| " + " | ".join([name, *cells, *map(_told, metrics)]) + " |")
    floors = ["" if metric.floor is None else f"{metric.floor:.4g}" for metric in found["SN-ResNet-64"][3]]
    lines += ["| real pictures | | | | " + " | ".join(floors) + " |", ""]
    curves = {"minutes of training": {name: each[2] for name, each in found.items()}}
    figure = path.with_suffix(".svg")
    figure.write_text(drawing(curves, COLOURS, of="FD-SqueezeNet"), encoding="utf-8")
    lines += [f"![Fréchet distance over the time of training]({figure.name})", ""]
    for name in NETWORKS:
        picture = path.with_name(f"{path.stem}_{name.lower()}.jpg")
        grid(gan.load(folder / name).sample(SIDE**2, seed=0), picture)
        lines += [f"{name}, the first {SIDE**2} samples of seed 0:", "", f"![Samples of {name}]({picture.name})", ""]
    picture = path.with_name(f"{path.stem}_real.jpg")
    grid(images.examples(SIDE**2)[0], picture)
    lines += ["Real pictures:", "", f"![Real emoji]({picture.name})", ""]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _told(metric):
    if metric.interval is None:
        return f"{metric.value:.4g}"
    return f"{metric.value:.4g} ({metric.interval[0]:.4g} to {metric.interval[1]:.4g})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="ZIP or folder of the pictures")
    parser.add_argument("--minutes", type=float, default=60, help="training time of each network")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--page-only", type=Path, metavar="FOLDER", help="write the page of runs that are there")
    parser.add_argument("--out", type=Path, help="folder for the runs; none: a temporary one")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    data = arguments.data.resolve()
    if arguments.child:
        name, folder = arguments.child
        child(name, data, arguments.minutes, Path(folder), arguments.device)
        return
    folder = arguments.page_only or arguments.out or Path(tempfile.mkdtemp(prefix="emoji-"))
    if not arguments.page_only:
        train_together(data, arguments.minutes, folder, arguments.device)
    print(f"written to {page(folder, data, arguments.minutes)}; runs in {folder}")


if __name__ == "__main__":
    main()
