"""One image from whatever a file or an array holds to uint8 pixels of the size and channels that training uses.

The rules, in order: EXIF orientation is applied; transparency is composited on white; 16-bit gray is scaled to 8 bits;
everything else goes through Pillow's conversion (colour to gray by ITU-R 601 luma, CMYK, palettes); the largest centred
square is cut out and resized with Pillow's Lanczos filter, whose support grows when it shrinks, so it antialiases.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = ["Decoded", "UnreadableError", "decode_array", "decode_file", "fit", "quiet_pillow"]

# What users' folders hold. EPS and other formats that start an outside program when read are left out on purpose.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA", "ICO")


class UnreadableError(Exception):
    """A file that should be an image is not; the message is the reason, for the list shown to the user."""


class Decoded(NamedTuple):
    """An image ready for training, and what it was."""

    pixels: np.ndarray
    """uint8 (channels, image_size, image_size)."""
    size: str
    """Width x height before, for example ``640x480``."""
    mode: str
    """Pillow's name of the pixel format before, for example ``RGB``."""


def decode_file(file: str | Path | IO[bytes], *, image_size: int, channels: int) -> Decoded:
    """Decode an image file.

    Raises:
        UnreadableError: the file is damaged, not an image, or so large that it could be a decompression bomb
            (over twice ``PIL.Image.MAX_IMAGE_PIXELS``, about 179 megapixels).
    """
    try:
        with Image.open(file, formats=_readable_formats()) as image:
            # Multi-picture JPEGs of phones and animations: the first picture is the one that viewers show.
            size, mode = f"{image.width}x{image.height}", image.mode
            # A JPEG decoder can shrink while it decodes, which spares it all but the unpacking of bits. Twice the final
            # size leaves the quality to the Lanczos filter below.
            image.draft(None, (2 * image_size, 2 * image_size))
            upright = ImageOps.exif_transpose(image)
            return Decoded(fit(upright, image_size=image_size, channels=channels), size, mode)
    except UnreadableError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableError("not an image in a format that can be read") from error
    except Image.DecompressionBombError as error:
        raise UnreadableError("too many pixels: it could be a decompression bomb") from error
    except MemoryError as error:
        raise UnreadableError("needs more memory than there is") from error
    # Decoders meet arbitrary bytes here and raise almost anything: OSError, SyntaxError, struct.error, IndexError...
    except Exception as error:
        lines = str(error).splitlines()
        raise UnreadableError(lines[0][:200] if lines else type(error).__name__) from error


def decode_array(pixels: np.ndarray, *, image_size: int, channels: int) -> Decoded:
    """Bring one image that is kept as numbers to the training size.

    Args:
        pixels: whole numbers from 0 to 255, or bool: (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels.
        image_size: pixels.
        channels: 1 or 3.

    Raises:
        UnreadableError: another shape, type or range. The range of floats cannot be told from one image.
    """
    if pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4):
        pixels = pixels.transpose(1, 2, 0)
    if not pixels.size or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4)):
        raise UnreadableError(f"an array of shape {pixels.shape} where an image is expected")
    if pixels.dtype.kind == "b":
        pixels = pixels.astype(np.uint8) * 255
    if pixels.dtype.kind not in "ui" or pixels.min() < 0 or pixels.max() > 255:
        raise UnreadableError(f"{pixels.dtype} values where whole numbers from 0 to 255 are expected")
    pixels = pixels[:, :, 0] if pixels.shape[2:] == (1,) else pixels
    image = Image.fromarray(np.ascontiguousarray(pixels, np.uint8))
    return Decoded(fit(image, image_size=image_size, channels=channels), f"{image.width}x{image.height}", image.mode)


def fit(image: Image.Image, *, image_size: int, channels: int) -> np.ndarray:
    """Convert, cut out the centred square and resize.

    Returns:
        uint8 (channels, image_size, image_size).
    """
    image = _flatten(image, "L" if channels == 1 else "RGB")
    side = min(image.size)
    if image.size != (image_size, image_size):
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        # A gap of 3 lets Pillow average whole pixels first, far faster for large pictures and not told apart by eye.
        image = image.resize((image_size, image_size), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    pixels = np.asarray(image)
    return np.ascontiguousarray(pixels[None] if channels == 1 else pixels.transpose(2, 0, 1))


def _flatten(image: Image.Image, mode: str) -> Image.Image:
    """To 8-bit gray (``L``) or ``RGB`` without transparency."""
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    """Gray of 16 bits (0 to 65535) or of floats in [0, 1] to uint8."""
    low, high = float(pixels.min()), float(pixels.max())
    top = 1.0 if pixels.dtype.kind == "f" else 65535.0
    if not (low >= 0 and high <= top):
        raise UnreadableError(f"pixel values from {low:g} to {high:g} where 0 to {top:g} is expected")
    return np.rint(pixels * (255.0 / top)).astype(np.uint8)


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Keep Pillow's warnings about odd metadata off the terminal: what matters is reported as unreadable."""
    with warnings.catch_warnings():
        # Between Pillow's warning and its error lie real photographs of 90 to 179 megapixels.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


@functools.cache
def _readable_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)
