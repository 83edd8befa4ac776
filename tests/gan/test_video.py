import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from spectralnorm.errors import UserError
from spectralnorm.gan.video import save_video

FAKE_FFMPEG = """#!{python}
import pathlib, sys
target = pathlib.Path(sys.argv[-1])
target.write_bytes(sys.stdin.buffer.read())
target.with_name("arguments").write_text(" ".join(sys.argv[1:]))
if target.name.startswith(".broken"):
    sys.exit("codec missing")
"""


def _frames(num: int = 7, channels: int = 3) -> torch.Tensor:
    return torch.randint(256, (num, channels, 10, 14), dtype=torch.uint8)


def _read(path: Path, mode: str) -> tuple[list[bytes], list[int]]:
    picture = Image.open(path)
    pixels, durations = [], []
    for index in range(picture.n_frames):  # pyright: ignore[reportAttributeAccessIssue]
        picture.seek(index)
        pixels.append(picture.convert(mode).tobytes())
        durations.append(picture.info["duration"])
    return pixels, durations


def test_gray_frames_of_a_gif_read_back_exactly(tmp_path: Path):
    frames = _frames(channels=1)
    save_video(tmp_path / "new" / "walk.gif", frames, fps=30)
    pixels, durations = _read(tmp_path / "new" / "walk.gif", "L")
    assert pixels == [frame.numpy().tobytes() for frame in frames]
    assert set(durations) <= {30, 40}
    assert sum(durations) == 230  # 7 frames at 30 a second, in hundredths
    assert Image.open(tmp_path / "new" / "walk.gif").info["loop"] == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_frames_of_a_webp_read_back_exactly(channels: int, tmp_path: Path):
    frames = _frames(channels=channels)
    save_video(tmp_path / "walk.webp", frames, fps=24)
    pixels, _ = _read(tmp_path / "walk.webp", "RGB")
    assert pixels == [frame.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy().tobytes() for frame in frames]


def test_colours_of_a_gif_are_near(tmp_path: Path):
    smooth = torch.linspace(0, 255, 3 * 10 * 14).view(1, 3, 10, 14).expand(2, -1, -1, -1).to(torch.uint8)
    save_video(tmp_path / "walk.gif", smooth, fps=10)
    pixels, _ = _read(tmp_path / "walk.gif", "RGB")
    shown = torch.frombuffer(bytearray(pixels[0]), dtype=torch.uint8).view(10, 14, 3).permute(2, 0, 1)
    assert (shown.float() - smooth[0].float()).abs().mean() < 8


@pytest.fixture
def ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "bin" / "ffmpeg"
    program.parent.mkdir()
    program.write_text(FAKE_FFMPEG.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    return program


@pytest.mark.parametrize(("channels", "pixels"), [(1, "gray"), (3, "rgb24")])
def test_ffmpeg_is_given_every_frame(channels: int, pixels: str, tmp_path: Path, ffmpeg: Path):
    frames = _frames(channels=channels)
    save_video(tmp_path / "walk.mp4", frames, fps=12.5)
    raw = (tmp_path / "walk.mp4").read_bytes()
    assert raw == frames.permute(0, 2, 3, 1).contiguous().numpy().tobytes()
    assert f"-pix_fmt {pixels} -s 14x10 -r 12.5 -i -" in (tmp_path / "arguments").read_text()


def test_what_ffmpeg_says_is_told_and_nothing_is_left(tmp_path: Path, ffmpeg: Path):
    with pytest.raises(UserError, match="codec missing"):
        save_video(tmp_path / "broken.mp4", _frames(), fps=12)
    assert not list(tmp_path.glob("*broken*"))


@pytest.mark.parametrize(
    ("name", "fps", "says"),
    [
        ("walk.avi", 30, "must end in .gif or .webp or .mp4"),
        ("walk.gif", 60, "at most 50 frames a second"),
        ("walk.webp", 0, "fps must be a number above 0"),
        ("walk.webp", float("nan"), "fps must be a number above 0"),
        ("walk.mp4", 30, "MP4 needs the program ffmpeg"),
    ],
)
def test_a_video_that_cannot_be_written_is_told(
    name: str, fps: float, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=says):
        save_video(tmp_path / name, _frames(), fps=fps)
