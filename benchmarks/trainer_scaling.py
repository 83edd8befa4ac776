"""How images/s grow with batch, width and resolution: the part of `trainer.py` that ends in a drawing."""

import statistics

from trainer_contenders import CONTENDERS, Task

COLOURS = {"trainer": "#1a7f5a", "script": "#b3541e"}


def points(*, quick):
    """For each panel: the label of its axis, and the tasks by what is on it."""
    narrow = 16 if quick else 64
    width = {"generator_width": narrow, "discriminator_width": narrow}
    batches = (16, 64, 256) if quick else (16, 64, 256, 1024)
    widths = (8, 16, 32) if quick else (16, 32, 64, 128)
    sizes = (32, 64) if quick else (32, 64, 128, 256)
    small = {"generator_width": 16, "discriminator_width": 16, "penalty": None, "path_length_weight": 0.0}
    small |= {"normalization": "spectral", "batch_size": 8, "augmentation": "none", "latent_dim": 128}
    return {
        "batch (SN-CNN, 32 px)": {size: ("sncnn-cifar10", {**width, "batch_size": size}) for size in batches},
        "width (SN-CNN, 32 px, batch 64)": {
            each: ("sncnn-cifar10", {"generator_width": each, "discriminator_width": each}) for each in widths
        },
        "pixels (StyleGAN2 of width 16, batch 8)": {
            size: ("stylegan2-64", {**small, "image_size": size}) for size in sizes
        },
    }


def scaling(in_turns, rounds, device, *, quick):
    """Lines of a table, and the points of the drawing by panel and contender."""
    lines = ["| | | trainer, images/s | script, images/s | ratio (range) |", "|---|---|---|---|---|"]
    curves = {}
    for panel, tasks in points(quick=quick).items():
        curves[panel] = {name: [] for name in COLOURS}
        for value, (recipe, settings) in tasks.items():
            task = Task(recipe, tuple(settings.items()), device)
            contenders = {name: CONTENDERS[name](task) for name in COLOURS}
            times = in_turns(contenders, max(3, rounds // 2), device, seconds=0.5 if quick else 2.0)
            config = task.config()
            images = config.batch_size * config.num_discriminator_steps
            for name in COLOURS:
                curves[panel][name].append((value, images / statistics.median(wall for wall, _ in times[name])))
            ratios = [b[0] / a[0] for a, b in zip(times["trainer"], times["script"], strict=True)]
            paces = " | ".join(f"{curves[panel][name][-1][1]:.4g}" for name in COLOURS)
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            lines.append(f"| {panel} | {value} | {paces} | {spread} |")
            print(lines[-1], flush=True)
    return lines, curves
