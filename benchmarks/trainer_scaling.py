"""How images/s grow with batch, width and resolution: the part of `trainer.py` that ends in a drawing."""

import math
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
                curves[panel][name].append((value, images / statistics.median(times[name])))
            ratios = [b / a for a, b in zip(times["trainer"], times["script"], strict=True)]
            paces = " | ".join(f"{curves[panel][name][-1][1]:.4g}" for name in COLOURS)
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            lines.append(f"| {panel} | {value} | {paces} | {spread} |")
            print(lines[-1], flush=True)
    return lines, curves


def drawing(curves):
    """One panel for each series, both axes logarithmic, as SVG."""
    width, height, top = 230, 200, 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {330 * len(curves)} 300" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{330 * len(curves)}" height="300" fill="white"/>',
    ]
    for panel, (title, lines) in enumerate(curves.items()):
        left = 60 + 330 * panel
        values = [(math.log2(x), math.log10(y)) for line in lines.values() for x, y in line]
        (x0, x1), (y0, y1) = ((min(each), max(each)) for each in zip(*values, strict=True))
        y0, y1 = math.floor(2 * y0) / 2, math.ceil(2 * y1) / 2

        def place(x, y, left=left, x0=x0, x1=x1, y0=y0, y1=y1):
            across = (math.log2(x) - x0) / max(x1 - x0, 1e-9)
            return left + width * across, top + height * (1 - (math.log10(y) - y0) / max(y1 - y0, 1e-9))

        for half in range(round(2 * y0), round(2 * y1) + 1):
            y = place(2**x0, 10 ** (half / 2))[1]
            parts.append(f'<path d="M{left} {y:.0f}h{width}" stroke="#ddd"/>')
            parts.append(f'<text x="{left - 6}" y="{y + 4:.0f}" text-anchor="end">{10 ** (half / 2):.2g}</text>')
        for name, line in lines.items():
            places = [place(*point) for point in line]
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
            parts.append(f'<path d="M{path}" fill="none" stroke="{COLOURS[name]}" stroke-width="2"/>')
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{COLOURS[name]}"/>' for x, y in places]
        for row, (name, colour) in enumerate(COLOURS.items()):
            parts.append(f'<text x="{left + width - 50}" y="{top + 14 + 15 * row}" fill="{colour}">{name}</text>')
        for x, _ in next(iter(lines.values())):
            parts.append(f'<text x="{place(x, 10**y0)[0]:.0f}" y="248" text-anchor="middle">{x}</text>')
        parts.append(f'<text x="{left + width / 2}" y="275" text-anchor="middle">images/s against {title}</text>')
    return "\n".join([*parts, "</svg>", ""])
