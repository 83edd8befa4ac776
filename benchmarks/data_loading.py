"""What share of the training time loading the images takes: in memory, mapped from disk, streamed from tars.

The real trainer trains a small and a larger network. Sources of batches take turns with one batch that already lies on
the device, which costs nothing: a source's share is 1 - (time of a turn with that batch) / (time of the source's turn),
the median over the turns and their middle half, by wall clock and by process CPU time. Streamed sources have a buffer
of one batch only, so that what a turn takes out is also read within it; the last one is read beside the first steps of
the next turn, so two steps of each turn are not counted. Images are JPEGs of 256 x 256 with the frequencies of
photographs.

Of a streamed set the epochs differ, so each kind is a source of its own, for all turns:

- the first epoch decodes every image and keeps it on disk;
- in the first epoch of a later run, what was kept is read, and the hash of every image compared;
- later epochs read what is kept. (The files are in the operating system's cache of the disk, which reads 3 KB an image
  of 32 pixels and 12 KB of 64.)

    python benchmarks/data_loading.py                     # on a GPU where there is one
    python benchmarks/data_loading.py --turns 3 --print   # quick, and no result page
"""

import argparse
import dataclasses
import io
import os
import statistics
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hardware import hardware, write_result
from PIL import Image

from spectralnorm import gan
from spectralnorm.gan.data import Batches, ImageStream, StreamedBatches, cache, load_images, open_images
from spectralnorm.gan.data.stream_cache import StreamCache
from spectralnorm.gan.discriminators import build_discriminator
from spectralnorm.gan.inputs import resolve_device
from spectralnorm.gan.sampling import build_generator
from spectralnorm.gan.trainer import Trainer

TARGET = 0.03
NETWORKS: dict[str, dict[str, Any]] = {
    "small": {"recipe": "fashion", "channels": 3},
    "larger": {"recipe": "dcgan-64"},
}
SIZE = 256
LEAD_IN = 2


def write_shards(folder, num):
    """Tars of 500 JPEGs each: noise whose amplitude falls with the frequency, as that of photographs does."""
    random = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(SIZE)[:, None], np.fft.rfftfreq(SIZE)[None])
    frequency[0, 0] = 1.0
    for first in range(0, num, 500):
        with tarfile.open(folder / f"{first:06d}.tar", "w") as archive:
            for index in range(first, min(first + 500, num)):
                spectrum = np.fft.rfft2(random.standard_normal((3, SIZE, SIZE))) / frequency
                waves = np.fft.irfft2(spectrum, s=(SIZE, SIZE))
                pixels = np.clip(128 + 50 * waves / waves.std(), 0, 255).astype(np.uint8).transpose(1, 2, 0)
                stream = io.BytesIO()
                Image.fromarray(pixels).save(stream, "JPEG", quality=90)
                member = tarfile.TarInfo(f"{index:06d}.jpg")
                member.size = len(stream.getvalue())
                archive.addfile(member, io.BytesIO(stream.getvalue()))


class OneBatch:
    """Hands out the same batch again and again."""

    def __init__(self, batch):
        self.batch = batch

    def __next__(self):
        return self.batch


class OfFirstEpoch(StreamCache):
    """Keeps images and finds none."""

    def read(self, indices):
        return [None] * len(indices)

    def read_at_once(self, indices):
        return None


class OfLaterRun(StreamCache):
    """Finds what is kept as a process does that has not seen it before."""

    def read(self, indices):
        self._sound = bytearray(self.num_images)
        return super().read(indices)

    def read_at_once(self, indices):
        return None


def streams(images, num_bytes, **options):
    """Batches of the three kinds of epochs; the images are read once, to keep them."""
    size = {"num_images": images.num_training, "shape": images.held_out.shape[1:], "num_bytes": num_bytes}
    path = images.kept.path
    kept = {
        "streamed, first epoch": OfFirstEpoch(path.with_suffix(".first"), **size),
        "streamed, first epoch of a later run": OfLaterRun(path, **size),
        "streamed, later epochs": images.kept,
    }
    options["buffer"] = options["batch_size"]
    found = {name: StreamedBatches(dataclasses.replace(images, kept=cache), **options) for name, cache in kept.items()}
    for _ in range(images.num_training // options["batch_size"] + 1):
        next(found["streamed, later epochs"])
    return found


class TakeTurns:
    """An observer: after a block of steps the next source is read from."""

    def __init__(self, sources, *, steps):
        self.sources, self.steps = sources, steps
        self.times = {name: [] for name in sources}
        self.names = list(sources)
        self.turn = 0
        self.began = self.now()

    def __call__(self, trainer):
        done = trainer.step % (self.steps + LEAD_IN)
        if done not in (0, LEAD_IN):
            return
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        if done:
            self.began = self.now()
            return
        ended = self.now()
        # The first turn of each warms it up.
        if self.turn >= len(self.names):
            self.times[self.names[self.turn % len(self.names)]].append(
                [b - a for a, b in zip(self.began, ended, strict=True)]
            )
        self.turn += 1
        # What the trainer reads from has this one face.
        trainer.batches = self.sources[self.names[self.turn % len(self.names)]]

    @staticmethod
    def now():
        return time.perf_counter(), time.process_time()


def measure(settings, shards, arguments, device):
    """Shares of wall clock and CPU time by source, the time of a step, and what streaming alone manages."""
    config = gan.make_config(
        **settings, steps=6 * (arguments.steps + LEAD_IN) * (arguments.turns + 1), device=str(device), data=str(shards)
    )
    size: dict[str, Any] = {"image_size": config.image_size, "channels": config.channels}
    in_memory = load_images(shards, **size)
    # The same entry of the cache again, mapped as one over 512 MB would be.
    cache.MEMORY_MAP_BYTES, before = 0, cache.MEMORY_MAP_BYTES
    mapped = load_images(shards, **size)
    cache.MEMORY_MAP_BYTES = before
    streamed = open_images(shards, **size, loading="stream")
    assert isinstance(streamed, ImageStream)
    options: dict[str, Any] = {"batch_size": config.batch_size, "seed": 0, "device": device}
    by_epoch = streams(streamed, 10**9, **options)
    # A set that the device has room for is moved to it; this one is taken as one that it has no room for.
    from_disk = Batches(mapped.images, **options)
    from_disk._images = mapped.images
    sources = {
        "the same batch": OneBatch(next(by_epoch["streamed, later epochs"])),
        "in memory": Batches(in_memory.images, **options),
        "mapped from disk": from_disk,
        **by_epoch,
    }
    trainer = Trainer(
        config,
        generator=build_generator(config),
        discriminator=build_discriminator(config),
        images=in_memory.images,
        device=device,
    )
    turns = TakeTurns(sources, steps=arguments.steps)
    trainer.batches = sources["the same batch"]  # pyright: ignore[reportAttributeAccessIssue]
    trainer.run([turns])

    alone = {}
    for name, batches in by_epoch.items():
        began = time.perf_counter()
        for _ in range(10):
            next(batches)
        alone[name] = 10 * config.batch_size / (time.perf_counter() - began)
    free = turns.times["the same batch"]
    step_seconds = statistics.median(wall for wall, _ in free) / arguments.steps
    shares = {
        name: [
            statistics.quantiles((1 - base[clock] / own[clock] for base, own in zip(free, times, strict=True)), n=4)
            for clock in (0, 1)
        ]
        for name, times in turns.times.items()
        if name != "the same batch"
    }
    return shares, step_seconds, alone, config


def _middle(quartiles):
    low, median, high = quartiles
    return f"{median:.1%} ({low:.1%} to {high:.1%})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--turns", type=int, default=15, help="of each source")
    parser.add_argument("--steps", type=int, default=30, help="in a turn")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--print", action="store_true", help="write no result page")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    lines = [
        "| network | step, ms | source | share of wall clock | share of CPU time | reading alone, images/s |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SPECTRALNORM_CACHE"] = str(Path(folder) / "cache")
        shards = Path(folder) / "shards"
        shards.mkdir()
        write_shards(shards, arguments.images)
        for name in arguments.networks:
            shares, step_seconds, alone, config = measure(NETWORKS[name], shards, arguments, device)
            what = f"{name}: {config.architecture}, {config.image_size} pixels, batch {config.batch_size}"
            for source, (wall, processor) in shares.items():
                verdict = "" if wall[1] < TARGET else f", over {TARGET:.0%}"
                speed = f"{alone[source]:.0f}" if source in alone else ""
                shown = f"{_middle(wall)}{verdict} | {_middle(processor)}"
                lines.append(f"| {what} | {1000 * step_seconds:.1f} | {source} | {shown} | {speed} |")
            print("\n".join(lines[-len(shares) :]), flush=True)
    if not arguments.print:
        text = (
            "# What share of the training time loading takes\n\n"
            f"{hardware()}\n\n"
            f"`python benchmarks/data_loading.py --images {arguments.images} --turns {arguments.turns} "
            f"--steps {arguments.steps} --networks {' '.join(arguments.networks)} --device {device.type}`\n\n"
            + "\n".join(lines)
            + "\n"
        )
        print(f"written to {write_result('data_loading', text, device=device.type)}")


if __name__ == "__main__":
    main()
