"""From the bytes of an image file to the pixels that training sees."""

import io

import numpy as np
import pytest
from PIL import Image

from spectralnorm.gan.data.decode import UnreadableError, decode_file, fit


def encoded(image, format="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    stream.seek(0)
    return stream


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def decode(stream, image_size=8, channels=3):
    return decode_file(stream, image_size=image_size, channels=channels)


def test_the_size_and_mode_of_the_file_are_reported():
    decoded = decode(encoded(Image.new("P", (20, 10))))
    assert (decoded.size, decoded.mode) == ("20x10", "P")


def test_the_size_of_a_jpeg_is_that_of_the_file_though_it_is_decoded_smaller():
    assert decode(encoded(Image.new("RGB", (640, 480)), "JPEG")).size == "640x480"


@pytest.mark.parametrize(("side", "decoded"), [(256, 64), (128, 64), (100, 100), (600, 75)])
def test_a_jpeg_is_decoded_no_larger_than_its_scales_allow(side, decoded, monkeypatch):
    seen = []
    spy = lambda image, **options: seen.append(image.size) or fit(image, **options)  # noqa: E731
    monkeypatch.setattr("spectralnorm.gan.data.decode.fit", spy)
    decode(encoded(Image.new("RGB", (side, side)), "JPEG"), image_size=32)
    # A half, a quarter or an eighth, but at least twice the 32 that are wanted.
    assert seen == [(decoded, decoded)]


@pytest.mark.parametrize("subsampling", [0, 2])
def test_a_jpeg_decoded_smaller_shows_what_one_decoded_whole_does(subsampling):
    row, column = np.mgrid[0:256, 0:256] / 256
    # Waves of eight final pixels, in each colour at another place.
    waves = [60 * np.cos(8 * np.pi * row + c) + 60 * np.cos(8 * np.pi * column + 2 * c) for c in range(3)]
    picture = Image.fromarray(np.stack(waves, -1).__add__(127.5).astype(np.uint8))
    stream = encoded(picture, "JPEG", quality=95, subsampling=subsampling)
    smaller = decode(stream, image_size=32).pixels.astype(int)
    stream.seek(0)
    whole = fit(Image.open(stream), image_size=32, channels=3)
    # Three steps on each way round to whole numbers: the transform, the change to RGB and the filter.
    assert np.abs(smaller - whole).max() <= 3


def test_the_centred_square_is_cut_out():
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = noise(8, 8, 3)
    expected = wide[:, 8:16].transpose(2, 0, 1)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(wide))).pixels, expected)
    tall = Image.fromarray(np.ascontiguousarray(wide.transpose(1, 0, 2)))
    np.testing.assert_array_equal(decode(encoded(tall)).pixels, expected.transpose(0, 2, 1))


def test_shrinking_antialiases():
    # A checkerboard of single pixels must become its mean; picking pixels would leave black and white.
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    shrunk = fit(Image.fromarray(board), image_size=8, channels=1)
    assert np.abs(shrunk.astype(int) - 127.5).max() < 2


def test_a_smooth_picture_shrinks_to_the_means_of_its_parts():
    ramp = np.repeat(np.linspace(0, 255, 256)[None], 256, 0).round().astype(np.uint8)
    expected = ramp[:8].reshape(8, 8, 32).mean(-1)
    for stream in (encoded(Image.fromarray(ramp)), encoded(Image.fromarray(ramp), "JPEG", quality=95)):
        inner = decode(stream, channels=1).pixels[0, :, 1:-1]
        assert np.abs(inner - expected[:, 1:-1]).max() < 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_a_camera_notes_is_applied(orientation):
    upright = noise(8, 8)
    # What the sensor stored, so that the transposition named by EXIF brings back the upright picture.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    np.testing.assert_array_equal(decode(stream, channels=1).pixels[0], upright)


def test_transparency_shows_white():
    rgba = noise(8, 8, 4)
    alpha = rgba[..., 3:] / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    found = decode(encoded(Image.fromarray(rgba))).pixels.transpose(1, 2, 0)
    assert np.abs(found - expected).max() <= 1


def test_a_transparent_colour_of_a_palette_shows_white():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.paste(0, (0, 0, 8, 4))
    pixels = decode(encoded(image, transparency=0)).pixels
    assert (pixels[:, :4] == 255).all()
    assert (pixels[:, 4:] == np.array([255, 0, 0])[:, None, None]).all()


def test_gray_with_transparency_shows_white():
    image = Image.merge("LA", (Image.new("L", (8, 8), 0), Image.new("L", (8, 8), 0)))
    assert (decode(encoded(image), channels=1).pixels == 255).all()


def test_colour_becomes_gray_by_luma():
    rgb = noise(8, 8, 3)
    expected = rgb @ np.array([0.299, 0.587, 0.114])  # ITU-R 601
    assert np.abs(decode(encoded(Image.fromarray(rgb)), channels=1).pixels[0] - expected).max() <= 1


def test_gray_becomes_three_equal_channels():
    gray = noise(8, 8)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(gray))).pixels, np.stack([gray] * 3))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_to_eight(format):
    values = np.random.default_rng(0).integers(0, 65536, (8, 8)).astype(np.uint16)
    found = decode(encoded(Image.fromarray(values), format), channels=1).pixels[0]
    np.testing.assert_array_equal(found, np.rint(values / 257))


def test_floats_from_zero_to_one_are_scaled():
    values = np.random.default_rng(0).random((8, 8), dtype=np.float32)
    found = decode(encoded(Image.fromarray(values), "TIFF"), channels=1).pixels[0]
    np.testing.assert_array_equal(found, np.rint(values * 255))


@pytest.mark.parametrize("value", [-1.0, 2.0, np.nan])
def test_floats_of_another_range_are_unreadable(value):
    with pytest.raises(UnreadableError, match="where 0 to 1 is expected"):
        decode(encoded(Image.fromarray(np.full((8, 8), value, np.float32)), "TIFF"))


def test_black_and_white_is_read():
    bits = noise(8, 8) > 127
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(bits)), channels=1).pixels[0], bits * np.uint8(255))


def test_cmyk_jpegs_are_read():
    # Photoshop and Pillow both store the inks inverted; what comes back is near the colour that went in.
    image = Image.new("RGB", (16, 16), (200, 40, 90)).convert("CMYK")
    pixels = decode(encoded(image, "JPEG", quality=95)).pixels
    assert np.abs(pixels[:, 4, 4].astype(int) - [200, 40, 90]).max() < 12


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    stream = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(stream).pixels[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "TIFF"])
def test_a_truncated_file_is_unreadable(format):
    whole = encoded(Image.fromarray(noise(64, 64, 3)), format).getvalue()
    with pytest.raises(UnreadableError):
        decode(io.BytesIO(whole[: len(whole) // 2]))


@pytest.mark.parametrize("content", [b"", b"hello", bytes(1000), b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff\xe0"])
def test_what_is_no_image_is_unreadable(content):
    with pytest.raises(UnreadableError):
        decode(io.BytesIO(content))


def test_a_format_that_would_start_another_program_is_not_opened():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    with pytest.raises(UnreadableError, match="not an image in a format"):
        decode(io.BytesIO(postscript))


def test_a_decompression_bomb_is_refused_before_it_unpacks(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableError, match="decompression bomb"):
        decode(encoded(Image.new("L", (64, 64))))
