"""pictures: each kind of file against what its pixels are by definition."""

import io
import os
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from puredif_jax.data import pictures
from puredif_jax.data.pictures import Fit, Unfit, open_picture

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (12, 10, 3), np.uint8)
GREY = RNG.integers(0, 256, (12, 10), np.uint8)


@pytest.fixture
def fitted(tmp_path):
    """A picture written as a file, read, and fitted."""

    def read(picture: Image.Image, image_shape, fit=Fit(), suffix="png", **options):  # noqa: B008
        path = tmp_path / f"x.{suffix}"
        picture.save(path, **options)
        return fit(open_picture(path), image_shape)

    return read


def test_a_picture_that_fits_is_as_it_is(fitted) -> None:
    for pixels, channels in ((COLOURS, 3), (GREY, 1)):
        found = fitted(Image.fromarray(pixels), (12, 10, channels))
        np.testing.assert_array_equal(found.pixels, pixels.reshape(12, 10, channels))
        assert found.pixels.dtype == np.uint8 and found.changes == ()


def test_grey_and_colour(fitted) -> None:
    """Three equal channels; and the luma of ITU-R 601."""
    found = fitted(Image.fromarray(GREY), (12, 10, 3))
    np.testing.assert_array_equal(found.pixels, GREY[..., None].repeat(3, -1))
    assert found.changes == ("made colour",)
    found = fitted(Image.fromarray(COLOURS), (12, 10, 1))
    luma = COLOURS @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(found.pixels[..., 0], luma, atol=0.51)
    assert found.changes == ("made grey",)


def test_palettes_and_single_bits(fitted) -> None:
    palette = Image.fromarray(GREY % 4)
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 255, 0, 5])
    assert palette.mode == "P"
    found = fitted(palette, (12, 10, 3)).pixels
    table = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90], [255, 0, 5]], np.uint8)
    np.testing.assert_array_equal(found, table[GREY % 4])
    found = fitted(Image.fromarray(GREY > 127), (12, 10, 1)).pixels
    np.testing.assert_array_equal(found[..., 0], np.where(GREY > 127, 255, 0))


def test_cmyk_becomes_colour(fitted) -> None:
    """Without a profile: R = (255 - C) (255 - K) / 255."""
    ink = Image.new("CMYK", (10, 12), (40, 80, 120, 50))
    found = fitted(ink, (12, 10, 3), suffix="jpg", quality=95).pixels
    expected = [(255 - c) * (255 - 50) / 255 for c in (40, 80, 120)]
    np.testing.assert_allclose(found, np.broadcast_to(expected, (12, 10, 3)), atol=3)


def test_of_16_bits_the_upper_are_kept(fitted) -> None:
    deep = RNG.integers(0, 65536, (12, 10), np.uint16)
    found = fitted(Image.fromarray(deep), (12, 10, 1))
    np.testing.assert_array_equal(found.pixels[..., 0], deep // 256)
    assert found.changes == ("cut from 16 to 8 bits",)
    with pytest.raises(Unfit, match="no value above 200 of 65,535"):
        fitted(Image.fromarray(deep * 0 + 200), (12, 10, 1))
    found = fitted(Image.fromarray(deep * 0), (12, 10, 1))
    assert not found.pixels.any()


def chunk(kind: bytes, data: bytes) -> bytes:
    check = zlib.crc32(kind + data).to_bytes(4, "big")
    return len(data).to_bytes(4, "big") + kind + data + check


def png(
    width: int, height: int, depth: int, kind: int, rows: bytes, more: bytes = b""
) -> bytes:
    """A PNG file by its specification; each row begins with its filter, 0."""
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + more
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def test_16_bit_colour_is_cut_likewise(tmp_path) -> None:
    """Pillow cannot write it: made by hand."""
    deep = RNG.integers(0, 65536, (3, 2, 3), np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    (tmp_path / "x.png").write_bytes(png(2, 3, 16, 2, rows))
    found = Fit()(open_picture(tmp_path / "x.png"), (3, 2, 3)).pixels
    np.testing.assert_array_equal(found, deep // 256)


ALPHA = RNG.integers(0, 256, (12, 10, 1), np.uint8)
HOLES = {
    "RGBA": Image.fromarray(np.concatenate([COLOURS, ALPHA], -1)),
    "LA": Image.fromarray(np.concatenate([GREY[..., None], ALPHA], -1)),
}


@pytest.mark.parametrize("mode", HOLES)
@pytest.mark.parametrize("background", [0, 100, 255])
def test_holes_show_the_background(fitted, mode, background) -> None:
    found = fitted(HOLES[mode], (12, 10, 3), Fit(background))
    front = COLOURS if mode == "RGBA" else GREY[..., None]
    mixed = (front * 1.0 * ALPHA + background * (255.0 - ALPHA)) / 255
    expected = np.broadcast_to(mixed, (12, 10, 3))
    np.testing.assert_allclose(found.pixels, expected, rtol=0, atol=1)
    assert f"laid on {background}" in found.changes


def test_holes_without_a_background_are_refused(fitted) -> None:
    for picture in HOLES.values():
        with pytest.raises(Unfit, match="transparent pixels.*background"):
            fitted(picture, (12, 10, 3))
    for mode, hole in (("RGB", tuple(map(int, COLOURS[0, 0]))), ("L", 7)):
        picture = Image.fromarray(COLOURS).convert(mode)
        picture.putpixel((0, 0), hole)
        with pytest.raises(Unfit, match="transparent pixels"):
            fitted(picture, (12, 10, 3), transparency=hole)
        found = fitted(picture, (12, 10, 3), Fit(250), transparency=hole).pixels
        assert (found[0, 0] == 250).all()
    palette = Image.fromarray(COLOURS).quantize(4)
    with pytest.raises(Unfit, match="transparent pixels"):
        fitted(palette, (12, 10, 3), transparency=bytes([255, 0, 255, 255]))


def test_16_bit_grey_with_holes_is_refused(tmp_path) -> None:
    rows = b"\0" + np.array([7, 5000], ">u2").tobytes()
    path = tmp_path / "x.png"
    path.write_bytes(png(2, 1, 16, 0, rows, chunk(b"tRNS", b"\0\7")))
    with pytest.raises(Unfit, match="16 bits and transparent"):
        Fit(0)(open_picture(path), (1, 2, 3))


def test_opaque_alpha_changes_nothing(fitted) -> None:
    opaque = Image.fromarray(COLOURS).convert("RGBA")
    found = fitted(opaque, (12, 10, 3))
    np.testing.assert_array_equal(found.pixels, COLOURS)
    assert found.changes == ()


@pytest.mark.parametrize("background", [-1, 256])
def test_a_background_is_a_grey_level(background) -> None:
    with pytest.raises(ValueError, match=f"0..255 or be None, found {background}"):
        Fit(background)


TURNS = {  # EXIF 2.3, tag 274: where the first row and the first column are seen
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x.swapaxes(0, 1)[:, ::-1],
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("pixels", [COLOURS, GREY.astype(np.uint16) * 256])
def test_pictures_are_turned_as_they_say(fitted, orientation, pixels) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    turned = TURNS[orientation](pixels)
    height, width, *_ = turned.shape
    shape = (height, width, 3 if pixels.ndim == 3 else 1)
    found = fitted(Image.fromarray(pixels), shape, exif=exif).pixels
    expected = turned if pixels.ndim == 3 else turned[..., None] // 256
    np.testing.assert_array_equal(found, expected)


def areas(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Means of the blocks of the middle part that has the proportions asked for."""
    factor = min(image.shape[0] // height, image.shape[1] // width)
    top = (image.shape[0] - factor * height) // 2
    left = (image.shape[1] - factor * width) // 2
    middle = image[top : top + factor * height, left : left + factor * width]
    blocks = middle.reshape(height, factor, width, factor, -1)
    return blocks.mean((1, 3))


@pytest.mark.parametrize(
    "size, shape",
    [((16, 16), (8, 8)), ((24, 40), (8, 8)), ((36, 20), (4, 4)), ((12, 30), (4, 6))],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_areas_of_the_middle_are_averaged(fitted, size, shape, channels) -> None:
    pixels = RNG.integers(0, 256, (*size, channels), np.uint8)
    picture = Image.fromarray(pixels if channels == 3 else pixels[..., 0])
    found = fitted(picture, (*shape, channels))
    expected = areas(pixels, *shape)
    np.testing.assert_allclose(found.pixels, expected, rtol=0, atol=1)
    proportional = size[0] * shape[1] == size[1] * shape[0]
    cut = () if proportional else ("cropped",)
    assert found.changes == (*cut, "shrunk")


@pytest.mark.parametrize("height", [1, 3, 28, 33, 56, 100, 178])
@pytest.mark.parametrize("width", [1, 7, 32, 45, 218])
def test_white_stays_white_at_any_size(fitted, height, width) -> None:
    for shape in ((32, 32, 3), (16, 24, 1)):
        found = fitted(Image.new("RGB", (width, height), "white"), shape).pixels
        assert found.shape == shape and found.min() == 255


def test_a_thin_picture_takes_no_memory(fitted) -> None:
    """Cropped before it grows: 1 x 60,000 pixels would be 32 x 1,920,000."""
    found = fitted(Image.new("L", (60_000, 1), 9), (32, 32, 1))
    assert (found.pixels == 9).all() and found.changes == ("cropped", "enlarged")


def test_diffusers_trainer_crops_the_same(fitted) -> None:
    """Its torchvision transforms: the shorter side to the size, then the middle.

    A pixel aside would be 5 levels; areas and BILINEAR differ by half a pixel of the
    file, 1.5 levels, and by rounding.
    """
    ramp = np.add.outer(np.arange(40), 2 * np.arange(60)).astype(np.uint8)
    picture = Image.fromarray(ramp)
    smaller = picture.resize((24, 16), Image.Resampling.BILINEAR)
    expected = np.asarray(smaller.crop((4, 0, 20, 16)), np.float64)
    found = fitted(picture, (16, 16, 1)).pixels[..., 0]
    np.testing.assert_allclose(found[1:-1, 1:-1], expected[1:-1, 1:-1], rtol=0, atol=2)


def test_too_many_pixels_are_refused_undecoded(tmp_path, monkeypatch) -> None:
    path = tmp_path / "x.png"
    decoded = []
    monkeypatch.setattr(Image.Image, "load", lambda self: decoded.append(self))
    for width, height in ((8192, 8193), (9_000, 10_000), (2**31 - 1, 2**31 - 1)):
        path.write_bytes(png(width, height, 8, 0, b""))
        with pytest.raises(Unfit, match="more than 67,108,864 pixels"):
            open_picture(path)
    assert not decoded


def test_the_formats_are_told_by_content(tmp_path) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "x.jpg", format="PNG")
    np.testing.assert_array_equal(np.asarray(open_picture(tmp_path / "x.jpg")), COLOURS)
    for kind in ("GIF", "BMP", "TIFF"):
        Image.fromarray(COLOURS).save(tmp_path / "x.png", format=kind)
        with pytest.raises(Unfit, match="neither PNG nor JPEG"):
            open_picture(tmp_path / "x.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_raise_one_kind_of_error(tmp_path, kind) -> None:
    file, chance = io.BytesIO(), random.Random(0)
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(COLOURS).save(file, kind, exif=exif)
    path, refused = tmp_path / "x", 0
    for _ in range(150):
        content = bytearray(file.getvalue())
        for _ in range(chance.choice([1, 2, 8])):
            content[chance.randrange(len(content))] = chance.randrange(256)
        if chance.random() < 0.2:
            del content[chance.randrange(len(content)) :]
        path.write_bytes(content)
        try:
            found = Fit(0)(open_picture(path), (8, 8, 3))
        except Unfit:
            refused += 1
        else:
            assert found.pixels.shape == (8, 8, 3)
    assert refused > 20


def test_pipes_are_not_opened(tmp_path) -> None:
    """A folder of pictures with one in it would wait for ever."""
    os.mkfifo(tmp_path / "x.png")
    found = pictures.list_pictures(tmp_path)
    assert found.files == () and found.others == "1 not regular"
