import base64
import io
from pathlib import Path

import pytest
from PIL import Image, features

from spectralnorm.records import Picture
from spectralnorm.report.images import Grid, InlineImage, UnusablePicture, inline, open_grid


def picture(**changes: object) -> Picture:
    fields = {"step": 1, "role": "samples", "file": "samples/a.png", "rows": 2, "columns": 3}
    return Picture(**{**fields, "tile_height": 4, "tile_width": 5, **changes})  # type: ignore[arg-type]


def numbered_grid(rows: int, columns: int, *, width: int = 5, height: int = 4) -> Image.Image:
    """Tile number n, counted row by row, has the gray level n."""
    image = Image.new("L", (columns * width, rows * height))
    for index in range(rows * columns):
        row, column = divmod(index, columns)
        image.paste(index, (column * width, row * height, (column + 1) * width, (row + 1) * height))
    return image


def tiles(grid: Grid) -> list[list[int]]:
    width, height = grid.tile_size
    return [
        [grid.image.getpixel((column * width, row * height)) for column in range(grid.columns)]  # type: ignore[misc]
        for row in range(grid.rows)
    ]


def decoded(image: InlineImage) -> Image.Image:
    head, _, body = image.uri.partition(";base64,")
    assert head.startswith("data:image/")
    return Image.open(io.BytesIO(base64.b64decode(body)))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "samples").mkdir()
    numbered_grid(2, 3).save(tmp_path / "samples/a.png")
    return tmp_path


def test_a_grid_is_read_with_its_tiles(run: Path) -> None:
    grid = open_grid(run, picture())
    assert tiles(grid) == [[0, 1, 2], [3, 4, 5]]
    assert grid.tile_size == (5, 4)


def test_panels_together_hold_every_tile_once(run: Path) -> None:
    left, right = open_grid(run, picture()).panels(columns=2)
    assert tiles(left) == [[0, 1], [3, 4]]
    assert tiles(right) == [[2], [5]]


def test_a_grid_too_large_is_cropped_to_whole_tiles() -> None:
    grid = Grid(numbered_grid(6, 6), 6, 6)
    assert tiles(grid.within(width=14, height=9)) == [[0, 1], [6, 7]]
    assert tiles(grid.within(width=1, height=1)) == [[0]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file": "samples/none.png"}, "samples/none.png is missing."),
        ({"file": "samples/broken.png"}, "samples/broken.png is not a readable image."),
        ({"file": "../secret.png"}, "../secret.png lies outside of the run folder."),
        ({"rows": 7}, "samples/a.png is 15 x 8 pixels, but its record tells of 15 x 28."),
        ({"rows": 0}, "samples/a.png has no tiles."),
    ],
)
def test_a_picture_that_cannot_be_shown_is_told_in_a_sentence(
    run: Path, changes: dict[str, object], message: str
) -> None:
    (run / "samples/broken.png").write_bytes((run / "samples/a.png").read_bytes()[:60])
    numbered_grid(2, 3).save(run.parent / "secret.png")
    with pytest.raises(UnusablePicture) as error:
        open_grid(run, picture(**changes))
    assert str(error.value) == message


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_images_that_fit_the_budget_keep_every_pixel(mode: str) -> None:
    image = Image.effect_noise((64, 64), 80).convert(mode)
    (embedded,) = inline([image], budget=100_000)
    assert (embedded.width, embedded.height) == (64, 64)
    assert decoded(embedded).convert(mode).tobytes() == image.tobytes()


@pytest.mark.parametrize("webp", [True, False])
def test_images_that_do_not_fit_lose_detail_until_they_do(monkeypatch: pytest.MonkeyPatch, webp: bool) -> None:
    if webp and not features.check("webp"):
        pytest.skip("this Pillow cannot write WebP")
    monkeypatch.setattr(features, "check", lambda feature: webp)
    images = [Image.effect_noise((128, 128), 60).convert("RGB") for _ in range(6)]
    lossless = sum(len(image.uri) for image in inline(images, budget=10**9))
    small = inline(images, budget=60_000)
    assert sum(len(image.uri) for image in small) < 60_000 * 4 / 3 * 1.1 < lossless
    assert decoded(small[0]).size == (128, 128)


def test_no_images_need_no_bytes() -> None:
    assert inline([], budget=0) == []
