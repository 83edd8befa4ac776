"""A run folder as training leaves it, made on the fly: pictures drawn with Pillow, curves that look like real ones."""

import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image, ImageDraw, ImageFilter

from spectralnorm.records import (
    Ending,
    Evaluation,
    Metric,
    Picture,
    Provenance,
    Record,
    RecordFile,
    Scalars,
    Session,
    Spectra,
)

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
LAYERS = [f"features.{index}" for index in range(0, 20, 2)] + ["head.project", "head.score"]
LAST_STEP = 2400

CONFIG = {
    "recipe": "fashion",
    "data": None,
    "image_size": 32,
    "channels": 1,
    "augmentation": "none",
    "architecture": "dcgan",
    "generator_width": 64,
    "discriminator_width": 64,
    "latent_dim": 128,
    "normalization": "spectral",
    "loss": "hinge",
    "batch_size": 64,
    "num_discriminator_steps": 1,
    "class_names": [],
    "generator_lr": 0.0002,
    "discriminator_lr": 0.0004,
    "beta1": 0.5,
    "beta2": 0.999,
    "lr_decay_from": 0.7,
    "ema_half_life_kimg": 1.0,
    "steps": None,
    "minutes": 2.5,
    "seed": 0,
    "device": "auto",
    "log_every": 10,
    "num_sample_grids": 24,
    "num_evaluations": 6,
    "num_evaluation_samples": 5000,
    "checkpoint_minutes": 1.0,
}
DATA = {
    "name": "fashion-mnist",
    "source": "Zalando Research, https://github.com/zalandoresearch/fashion-mnist",
    "licence": "MIT",
    "num_images": 20000,
    "num_training": 10000,
    "num_held_out": 10000,
    "channels": 1,
    "image_size": 32,
    "original_sizes": {"28x28": 20000},
    "modes": {"L": 20000},
    "classes": dict.fromkeys(CLASSES, 2000),
    "num_duplicates": 3,
    "unreadable": [{"file": "bags/IMG_0421.png", "reason": "the file ends early"}],
    "ignored": {".txt": 2},
    "resize": "zero-padded 28 -> 32",
    "fingerprint": "9f3c1ab27de04411" * 4,
}


def session(step: int = 0) -> Session:
    return Session(
        step=step,
        started_at="2025-03-01T12:00:00+01:00",
        command="spectralnorm train --out runs/fashion",
        versions={"spectralnorm": "0.1.0", "torch": "2.13.0", "python": "3.11.2", "platform": "Linux-6.1"},
        hardware={"cpu": "AMD EPYC 7543 32-Core Processor", "cores": "2", "device": "cpu", "threads": "2"},
    )


def scalars(step: int, *, layers: int = len(LAYERS), rng: random.Random | None = None) -> Scalars:
    rng = rng or random.Random(step)
    t = step / LAST_STEP
    settle = math.exp(-6 * t)
    values = {
        "loss/discriminator": 1.35 + 0.65 * settle + rng.gauss(0, 0.09),
        "loss/generator": 0.35 + 0.5 * math.sin(9 * t) * settle + rng.gauss(0, 0.16),
        "logits/real": 0.42 - 0.4 * settle + rng.gauss(0, 0.08),
        "logits/fake": -0.45 + 0.4 * settle + rng.gauss(0, 0.09),
        "gradient_norm/discriminator": 0.8 * math.exp(rng.gauss(0, 0.25)) + 6 * settle,
        "gradient_norm/generator": 0.3 * math.exp(rng.gauss(0, 0.3)) + 2 * settle,
        "images_per_second": 1030 + rng.gauss(0, 25) - (380 if 0.55 < t < 0.58 else 0),
    }
    for index in range(layers):
        growth = 1 - math.exp(-(2 + index / 3) * t)
        values[f"sigma/{LAYERS[index]}"] = 0.6 + 0.12 * index + (0.4 + 0.23 * index) * growth + rng.gauss(0, 0.004)
    return Scalars(step=step, images_seen=64 * step, training_seconds=0.0625 * step, values=values)


def evaluation(step: int, *, final: bool = False) -> Evaluation:
    t = step / LAST_STEP
    num_fake = 5000 if final else 2000
    quick = Provenance(
        extractor="classifier", weights_sha256="c0ffee12" * 8, num_real=10000, num_fake=num_fake, split="held-out",
        resize="none, 32",
    )  # fmt: skip
    deep = Provenance(
        extractor="squeezenet", weights_sha256="5eed5a17" * 8, num_real=10000, num_fake=num_fake, split="held-out",
        resize="bilinear, antialiased, 32 -> 128",
    )  # fmt: skip
    shares = {name: 0.1 + 0.045 * math.sin(5 * index + 1) for index, name in enumerate(CLASSES)}
    fade = math.exp(-5 * t)
    metrics = [
        Metric(name="FD-Classifier", value=9 + 160 * fade - 1.2 * final, floor=0.71, provenance=quick),
        Metric(name="KID-Classifier", value=0.011 + 0.4 * fade, spread=0.0015, floor=0.0001, provenance=quick),
        Metric(
            name="Class coverage", value=min(10, 3 + round(9 * t)), floor=10, better="higher", details=shares,
            provenance=quick,
        ),
        Metric(name="Class entropy", value=2.27 - 1.3 * fade, floor=2.3026, better="higher", provenance=quick),
        Metric(name="Confident share", value=0.78 - 0.6 * fade, floor=0.91, better="higher", provenance=quick),
    ]  # fmt: skip
    if final:
        metrics += [
            Metric(name="FD-SqueezeNet", value=21.4, floor=1.33, provenance=deep),
            Metric(name="KID-SqueezeNet", value=0.0271, spread=0.0031, floor=0.0002, provenance=deep),
        ]
    return Evaluation(
        step=step, images_seen=64 * step, training_seconds=0.0625 * step, final=final, metrics=metrics
    )  # fmt: skip


def spectra(step: int = LAST_STEP) -> Spectra:
    layers = {}
    for index, name in enumerate(LAYERS):
        count = 1 if index == len(LAYERS) - 1 else min(512, 16 * 2 ** (index // 2))
        rate, bend = 0.6 + 0.35 * index, 0.7 + 0.05 * index
        layers[name] = [math.exp(-rate * (rank / count) ** bend) for rank in range(count)]
    return Spectra(step=step, layers=layers)


def draw_tile(kind: int, detail: float, size: int = 32, mode: str = "L", seed: int = 0) -> Image.Image:
    """One garment: clearer, the larger ``detail`` is (0 to 1)."""
    rng = random.Random(1000 * kind + seed)
    tile = Image.new("L", (64, 64))
    draw = ImageDraw.Draw(tile)
    tone, w = rng.randrange(120, 250), rng.randrange(-4, 5)
    shapes = (
        [(20, 12, 44, 56), (8, 14, 56, 28)],
        [(20, 8, 31, 58), (33, 8, 44, 58)],
        [(19, 12, 45, 54), (8, 14, 18, 54), (46, 14, 56, 54)],
        [(25, 6, 39, 28), (20, 28, 44, 60)],
        [(6, 36, 58, 50), (34, 20, 58, 40)],
        [(12, 24, 52, 52), (24, 14, 40, 24)],
    )
    for box in shapes[kind % len(shapes)]:
        left, top, right, bottom = box
        draw.rounded_rectangle((left - w, top, right + w, bottom), radius=4, fill=tone)
        for y in range(top + 4, bottom - 2, rng.randrange(5, 12)):
            draw.line((left - w + 2, y, right + w - 2, y), fill=max(20, tone - rng.randrange(20, 90)), width=2)
    noise = Image.effect_noise((64, 64), 90 * (1 - detail) + 8)
    tile = tile.filter(ImageFilter.GaussianBlur(7 * (1 - detail) + 0.4))
    tile = Image.blend(tile, noise, 0.9 * (1 - detail) ** 2 + 0.02).resize((size, size))
    return tile if mode == "L" else Image.merge("RGB", (tile, tile.transpose(Image.Transpose.ROTATE_180), tile))


def save_grid(run: Path, role: str, step: int, rows: int, columns: int, *, detail: float = 0.95, size: int = 32,
              mode: str = "L", seed: int = 0, caption: str = "") -> Picture:  # fmt: skip
    file = f"samples/step-{step:09d}.png" if role == "samples" else f"samples/{role}.png"
    grid = Image.new(mode, (columns * size, rows * size))
    for index in range(rows * columns):
        row, column = divmod(index, columns)
        kind, variant = index * 7 + index // 5, seed + index
        if role == "neighbours":
            kind, variant = column * 7, 17 * column + row
        if role == "interpolation":
            kind, variant = row * 5, row
        look = detail if role != "interpolation" else 0.95 - 0.5 * math.sin(math.pi * column / (columns - 1))
        grid.paste(draw_tile(kind, look, size, mode, variant), (column * size, row * size))
    (run / "samples").mkdir(parents=True, exist_ok=True)
    grid.save(run / file)
    return Picture(step=step, role=role, file=file, rows=rows, columns=columns, tile_height=size, tile_width=size,
                   caption=caption)  # fmt: skip


def write_run(
    run: Path, records: Iterator[Record] | list[Record], config: dict | None = None, data: dict | None = None
) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(json.dumps(config or CONFIG))
    (run / "data.json").write_text(json.dumps(data or DATA))
    file = RecordFile(run / "metrics.jsonl")
    for record in records:
        file.append(record)
    file.close()
    return run


def full_records(run: Path) -> Iterator[Record]:
    yield session()
    grids = [round(LAST_STEP * (index / 16) ** 1.5) for index in range(17)]
    quick = [round(LAST_STEP * (index / 6) ** 1.5) for index in range(1, 6)]
    for step in range(0, LAST_STEP + 1):
        if step and step % 10 == 0:
            yield scalars(step)
        if step in grids:
            yield save_grid(run, "samples", step, 8, 8, detail=0.95 * (step / LAST_STEP) ** 0.4)
        if step in quick:
            yield evaluation(step)
        if step == 1500:
            yield Ending(step=1500, reason="interrupted", images_seen=96000, training_seconds=93.75, total_seconds=110,
                         peak_memory_bytes=900 * 2**20)  # fmt: skip
            yield session(1500)
    yield save_grid(run, "final", LAST_STEP, 8, 16, seed=3)
    yield save_grid(run, "real", LAST_STEP, 8, 16, detail=1, seed=500)
    yield save_grid(run, "neighbours", LAST_STEP, 2, 16, caption="mean distance 1532.6 (levels 0-255)")
    yield save_grid(run, "interpolation", LAST_STEP, 6, 12)
    yield spectra()
    yield evaluation(LAST_STEP, final=True)
    yield Ending(step=LAST_STEP, reason="minutes", images_seen=153600, training_seconds=150.0, total_seconds=98.4,
                 peak_memory_bytes=953_000_000)  # fmt: skip


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted once, resumed and finished, with everything in its folder."""
    run = tmp_path_factory.mktemp("runs") / "fashion"
    return write_run(run, full_records(run))


@pytest.fixture
def synthetic() -> SimpleNamespace:
    """What makes single records and pictures, and the config and data they belong to."""
    return SimpleNamespace(
        config=CONFIG, data=DATA, layers=LAYERS, session=session, scalars=scalars, evaluation=evaluation,
        spectra=spectra, save_grid=save_grid,
    )  # fmt: skip


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Make a run folder of given records: ``make_run(records, config=..., data=...)``."""

    def make(records: Iterator[Record] | list[Record], config: dict | None = None, data: dict | None = None) -> Path:
        return write_run(tmp_path / "run", records, config, data)

    return make
