"""Tars of tiny images that show their number, and streams of them."""

import io
import tarfile

import numpy as np
from PIL import Image

from spectralnorm.gan.data import ImageStream, StreamedBatches, open_images

SIZE = 4


def numbered(number):
    """An image that shows its number."""
    return np.full((SIZE, SIZE, 3), [number % 256, number // 256, 7], dtype=np.uint8)


def encoded(array):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def write_shards(folder, images, *, per_shard=25, labels=True):
    """Tars of these images (bytes or arrays), the class of each its number modulo 3."""
    folder.mkdir(exist_ok=True)
    for first in range(0, len(images), per_shard):
        with tarfile.open(folder / f"{first:06d}.tar", "w") as archive:
            for number in range(first, min(first + per_shard, len(images))):
                image = images[number]
                files = {f"{number:06d}.png": image if isinstance(image, bytes) else encoded(image)}
                if labels:
                    files[f"{number:06d}.cls"] = str(number % 3).encode()
                for name, data in files.items():
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return folder


def stream_of(path, **options):
    images = open_images(path, image_size=SIZE, channels=3, loading="stream", **options)
    assert isinstance(images, ImageStream)
    return images


def batches_of(stream, *, batch_size=8, seed=0, **options):
    return StreamedBatches(stream, batch_size=batch_size, seed=seed, device="cpu", **options)


def numbers(images):
    levels = ((images.float() + 1) * 127.5).round().long() if images.is_floating_point() else images.long()
    assert (levels[:, 2] == 7).all()
    return (levels[:, 0, 0, 0] + 256 * levels[:, 1, 0, 0]).tolist()


def take(batches, num_batches):
    return [number for _ in range(num_batches) for number in numbers(next(batches).images)]
