"""Moving pictures: GIF and WebP through Pillow, MP4 where ffmpeg is installed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, features
from torch import Tensor

from spectralnorm.errors import UserError
from spectralnorm.gan.pictures import to_pillow

__all__ = ["VIDEO_SUFFIXES", "check_video", "save_video"]


def check_video(path: Path, *, fps: float) -> None:
    """Say what is wrong before hours of rendering, not after.

    Raises:
        UserError: the suffix is not one of `VIDEO_SUFFIXES`, what writes it is missing, or it cannot hold so many
            frames a second.
    """
    suffix = path.suffix.lower()
    if suffix not in VIDEO_SUFFIXES:
        raise UserError(f"A video's file must end in {' or '.join(VIDEO_SUFFIXES)}, got '{path}'.")
    if not 0 < fps <= 1000:
        raise UserError(f"fps must be a number above 0 and at most 1000, got {fps}.")
    if suffix == ".gif" and fps > 50:
        raise UserError(f"A GIF shows at most 50 frames a second, got {fps:g}; choose a smaller --fps, or .webp.")
    if suffix == ".webp" and not features.check("webp"):
        raise UserError("This Pillow was built without WebP; install another build, or choose .gif.")
    if suffix == ".mp4" and shutil.which("ffmpeg") is None:
        raise UserError("MP4 needs the program ffmpeg, and there is none on the PATH; install it, or choose .webp.")


def save_video(path: Path, frames: Sequence[Tensor], *, fps: float) -> None:
    """Write frames so that the final name never stands on half a file; GIF and WebP repeat for ever.

    Args:
        path: its suffix says what is written. WebP is lossless; GIF has 256 colours a frame, enough for gray.
        frames: uint8 ``(1 or 3, height, width)`` each.
        fps: frames a second.

    Raises:
        UserError: as `check_video`, or ffmpeg failed.
        OSError: the file cannot be written.
    """
    check_video(path, fps=fps)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        _WRITERS[path.suffix.lower()](temporary, frames, fps)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _save_gif(path: Path, frames: Sequence[Tensor], fps: float) -> None:
    _save_with_pillow(path, frames, _durations(len(frames), fps, unit=10), format="GIF", disposal=1)


def _save_webp(path: Path, frames: Sequence[Tensor], fps: float) -> None:
    _save_with_pillow(path, frames, _durations(len(frames), fps, unit=1), format="WEBP", lossless=True, method=4)


def _save_with_pillow(path: Path, frames: Sequence[Tensor], durations: list[int], **options: Any) -> None:
    images: list[Image.Image] = [to_pillow(frame) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0, **options)


def _durations(num: int, fps: float, *, unit: int) -> list[int]:
    """Milliseconds that each frame stands, in multiples of the unit, so that the whole is as long as it should be."""
    ends = [round(1000 * (index + 1) / fps / unit) for index in range(num)]
    return [unit * (end - start) for start, end in zip([0, *ends], ends, strict=False)]


def _save_mp4(path: Path, frames: Sequence[Tensor], fps: float) -> None:
    channels, height, width = frames[0].shape
    pixels = "gray" if channels == 1 else "rgb24"
    source = ["-f", "rawvideo", "-pix_fmt", pixels, "-s", f"{width}x{height}", "-r", f"{fps:g}", "-i", "-"]
    # What plays everywhere has its colours at half the resolution, and so even sides.
    picture = ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2", "-pix_fmt", "yuv420p", "-movflags", "+faststart"]
    command = ["ffmpeg", "-loglevel", "error", "-y", *source, *picture, "-f", "mp4", str(path)]
    raw = b"".join(frame.permute(1, 2, 0).contiguous().numpy().tobytes() for frame in frames)
    ended = subprocess.run(command, input=raw, capture_output=True, check=False)
    if ended.returncode:
        lines = ended.stderr.decode(errors="replace").strip().splitlines() or [f"status {ended.returncode}"]
        raise UserError(f"ffmpeg could not write the video ({lines[-1]}); choose .webp or .gif.")


_WRITERS: dict[str, Callable[[Path, Sequence[Tensor], float], None]] = {
    ".gif": _save_gif,
    ".webp": _save_webp,
    ".mp4": _save_mp4,
}

VIDEO_SUFFIXES = tuple(_WRITERS)
"""The files that `save_video` writes."""
