"""data: the shipped sets, resizing, files that are not as they should be, batches."""

from __future__ import annotations

import gzip
import itertools
import logging
import os
import pathlib
import pickle
import re
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from puredif_jax.data import images as data
from puredif_jax.data.batches import order
from puredif_jax.data.decoding import DataError
from puredif_jax.data.images import (
    FashionMNIST,
    ImageFolder,
    NpzImages,
    resize,
    to_float,
)
from puredif_jax.data.pictures import Fit
from puredif_jax.networks.unet import UNet
from puredif_jax.runs import config
from puredif_jax.stages.experiment import Experiment


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


# --- Image sets ----------------------------------------------------------------------


@pytest.fixture
def npz(tmp_path):
    """Writes an .npz file and returns the image set that reads it."""

    def write(key="images", fit=None, **arrays) -> NpzImages:
        np.savez(tmp_path / "images.npz", **arrays)
        return NpzImages(str(tmp_path / "images.npz"), key, fit)

    return write


@pytest.mark.parametrize("split, size", [("train", 10_000), ("test", 2_000)])
def test_the_shipped_sets_have_their_sizes(split, size):
    found = FashionMNIST(split).load((32, 32, 1))
    assert found.shape == (size, 32, 32, 1) and found.dtype == np.uint8
    assert not found[:, [0, 1, -2, -1]].any() and not found[:, :, [0, 1, -2, -1]].any()
    assert found.max() == 255
    assert 0.28 * 255 < found[:, 2:30, 2:30].mean() < 0.30 * 255  # the published 0.286
    assert len(np.unique(found.reshape(size, -1), axis=0)) > 0.99 * size


def test_the_shipped_sets_do_not_overlap():
    train, test = (
        {image.tobytes() for image in FashionMNIST(split).load((32, 32, 1))}
        for split in ("train", "test")
    )
    assert len(train & test) < 5  # Fashion-MNIST itself has a few doubles


@pytest.fixture
def folder(tmp_path):
    """Writes pictures by their names and returns the image set that reads them."""

    def write(fit=Fit(), **pictures) -> ImageFolder:  # noqa: B008
        for name, picture in pictures.items():
            save(tmp_path / "pictures" / name.replace("_", "."), picture)
        return ImageFolder(str(tmp_path / "pictures"), fit)

    return write


def save(path: pathlib.Path, pixels: np.ndarray) -> pathlib.Path:
    """Writes `[H, W]` or `[H, W, C]` as a picture file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def log(caplog):
    """The lines of the log so far."""
    with caplog.at_level(logging.INFO, "absl"):
        yield lambda: caplog.messages


@pytest.mark.parametrize("source", ["shipped", "file", "folder"])
@pytest.mark.parametrize("side", [8, 16, 32])
def test_a_set_gives_the_shape_asked_for(npz, folder, source, side):
    images = random_images(5, 28, 28)
    sets = {
        "shipped": FashionMNIST("test"),
        "file": npz(images=images, fit=Fit()),
        "folder": folder(a_png=images[0], b_png=images[1]),
    }
    found = sets[source].load((side, side, 1))
    assert found.dtype == np.uint8 and found.shape[1:] == (side, side, 1)


@pytest.mark.parametrize("shape", [(5, 6, 6), (5, 6, 6, 3), (5, 4, 6, 1)])
def test_a_file_is_returned_as_it_is(npz, shape):
    images = random_images(*shape)
    wanted = (*shape[1:3], 1) if len(shape) == 3 else shape[1:]
    found = npz(images=images, labels=np.arange(5)).load(wanted)
    np.testing.assert_array_equal(found, images.reshape(5, *wanted))


@pytest.mark.parametrize("shape", [(28, 28, 1), (32, 32, 3), (16, 32, 1), (64, 64, 1)])
def test_shipped_sets_refuse_other_shapes(shape):
    with pytest.raises(DataError, match="model wants"):
        FashionMNIST().load(shape)


def test_a_part_of_the_shipped_set():
    whole = FashionMNIST("test").load((8, 8, 1))
    part = FashionMNIST("test", first=1_990, count=5).load((8, 8, 1))
    np.testing.assert_array_equal(part, whole[1_990:1_995])
    rest = FashionMNIST("test", first=1_990).load((8, 8, 1))
    np.testing.assert_array_equal(rest, whole[1_990:])


@pytest.mark.parametrize(
    "bad", [{"first": -1}, {"first": 10_000}, {"first": 9_990, "count": 11}]
)
def test_a_part_outside_the_shipped_set_is_refused(bad):
    with pytest.raises(DataError, match="10000 images"):
        FashionMNIST(**bad)


def test_only_two_splits_ship():
    with pytest.raises(DataError, match="'valid'"):
        FashionMNIST("valid")


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((3, 8, 8), np.float32),
        np.zeros((3, 8, 8), np.int64),
        np.zeros((3, 64), np.uint8),
        np.zeros((3, 8, 8, 1, 1), np.uint8),
    ],
)
def test_a_file_of_another_kind_is_refused(npz, images):
    with pytest.raises(DataError, match=f"uint8 .*found {images.dtype}"):
        npz(images=images).load((8, 8, 1))


@pytest.mark.parametrize("wanted", [(8, 8, 3), (8, 16, 1), (4, 8, 1), (3, 4, 4)])
def test_a_file_of_another_shape_is_refused(npz, wanted):
    with pytest.raises(DataError, match="model wants"):
        npz(images=random_images(2, 8, 8, 1)).load(wanted)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="no image set at .*nowhere.npz"):
        NpzImages(str(tmp_path / "nowhere.npz")).load((8, 8, 1))
    with pytest.raises(DataError, match="is a folder.*ImageFolder"):
        NpzImages(str(tmp_path)).load((8, 8, 1))


def test_an_array_of_any_name_is_taken_if_it_is_named(npz):
    images = random_images(2, 8, 8)
    sets = npz(pictures=images, labels=np.arange(2))
    with pytest.raises(
        DataError, match=r"`pictures` uint8 \(2, 8, 8\).*`labels` int64"
    ):
        sets.load((8, 8, 1))
    found = npz("pictures", pictures=images).load((8, 8, 1))
    np.testing.assert_array_equal(found[..., 0], images)


def test_many_arrays_are_listed_in_part(npz):
    arrays = {f"a{i}": np.zeros(1) for i in range(9)}
    with pytest.raises(DataError, match="`a4` .* and 4 more: name one"):
        npz(**arrays).load((8, 8, 1))


@pytest.mark.parametrize(
    "images, words",
    [
        (random_images(2, 3, 8, 8), r"channels first.*transpose\(0, 2, 3, 1\)"),
        (random_images(2, 1, 8, 8), "channels first"),
        (random_images(2, 8, 8, 7), "7 channels"),
        (random_images(8, 8, 3), r"one image.*images\[None\]"),
        (random_images(8, 192), "reshape it"),
        (np.zeros((2, 8, 8), np.float16), "0..1.*-1..1"),
        (np.zeros((2, 8, 8), np.int32), r"astype\('uint8'\)"),
        (np.zeros((2, 8, 8), bool), r"astype\('uint8'\)"),
        (np.zeros((2, 8, 8), np.uint16), r"fit=Fit\(\)"),
        (np.array([random_images(8, 8), None], object), "several sizes.*never opened"),
    ],
)
def test_a_refusal_tells_what_to_do(npz, images, words):
    with pytest.raises(DataError, match=words) as error:
        npz(images=images).load((8, 8, 3))
    assert "images.npz" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "shape",
    [(2, 16, 16, 3), (2, 7, 9, 3), (2, 8, 8), (2, 8, 8, 2), (2, 8, 8, 4), (2, 3, 3, 1)],
)
def test_what_does_not_fit_is_converted_if_that_is_asked_for(npz, shape):
    images = np.full(shape, 255, np.uint8)
    with pytest.raises(DataError, match=r"model wants \(8, 8, 3\).*fit=Fit\(\)"):
        npz(images=images).load((8, 8, 3))
    found = npz(fit=Fit(), images=images).load((8, 8, 3))
    assert found.shape == (2, 8, 8, 3) and found.dtype == np.uint8
    assert found.min() == 255, "white stays white"


@pytest.mark.parametrize("order", "<>")
def test_of_16_bits_the_upper_are_kept(npz, order, log):
    images = np.arange(0, 65536, 256, dtype=f"{order}u2").reshape(4, 8, 8) + 255
    found = npz(fit=Fit(), images=images).load((8, 8, 1))
    np.testing.assert_array_equal(found.ravel(), np.arange(256))
    assert any("images.npz: cut from 16 to 8 bits" in line for line in log())


def test_8_bits_stored_in_16_do_not_become_black(npz):
    images = random_images(2, 8, 8).astype(np.uint16)
    with pytest.raises(DataError, match="no value above 2.. of 65,535"):
        npz(fit=Fit(), images=images).load((8, 8, 1))


def test_images_with_holes_want_a_background(npz):
    images = np.zeros((3, 8, 8, 4), np.uint8)
    images[1:, ..., 3] = 255
    with pytest.raises(DataError, match="image 0 has transparent pixels.*background="):
        npz(fit=Fit(), images=images).load((8, 8, 1))
    found = npz(fit=Fit(background=200), images=images).load((8, 8, 1))
    assert [image.max() for image in found] == [200, 0, 0]


def test_a_model_of_other_channels_takes_images_of_its_own_alone(npz):
    images = random_images(2, 8, 8, 4)
    np.testing.assert_array_equal(npz(images=images).load((8, 8, 4)), images)
    with pytest.raises(DataError, match="1 or 3 channels"):
        npz(fit=Fit(), images=images).load((4, 4, 4))


def test_an_archive_that_would_unpack_to_too_much_is_left_packed(tmp_path):
    path = tmp_path / "zeros.npz"
    np.savez_compressed(path, images=np.zeros((25_000, 64, 64), np.uint8))
    assert path.stat().st_size < 2e5
    tracemalloc.start()
    with pytest.raises(DataError, match="zeros.npz .* 0.0954 GiB, .*max_gib=0.05:"):
        NpzImages(str(path), max_gib=0.05).load((64, 64, 1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6
    assert len(NpzImages(str(path), max_gib=0.1).load((64, 64, 1))) == 25_000


@pytest.mark.parametrize(
    "content, words",
    [
        (gzip.compress(b"data_batch_1", mtime=0), "gzip.*CIFAR-10.*binary"),
        (pickle.dumps({b"data": 1}, 2), "pickle.*never opened"),
        (b"\x89PNG\r\n\x1a\n", "a picture.*ImageFolder"),
    ],
)
def test_files_of_another_kind_are_told_apart(tmp_path, content, words):
    path = tmp_path / "cifar"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        NpzImages(str(path)).load((8, 8, 1))


def test_an_empty_file_is_refused(npz):
    with pytest.raises(DataError, match="holds no images"):
        npz(images=random_images(0, 8, 8)).load((8, 8, 1))


def test_a_damaged_archive_is_refused(tmp_path):
    path = tmp_path / "images.npz"
    np.savez_compressed(path, images=random_images(9, 8, 8))
    content = bytearray(path.read_bytes())
    content[len(content) // 2 - 40 : len(content) // 2] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(DataError, match="not an .npz file"):
        NpzImages(str(path)).load((8, 8, 1))


@pytest.mark.parametrize("content", [b"", b"some text", b"PK\x03\x04 and no more"])
def test_a_file_that_is_no_archive_is_refused(tmp_path, content):
    path = tmp_path / "images.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match="not an .npz file"):
        NpzImages(str(path)).load((8, 8, 1))


def test_a_bare_npy_file_is_refused(tmp_path):
    np.save(tmp_path / "images.npy", random_images(2, 8, 8))
    with pytest.raises(DataError, match="not an .npz file"):
        NpzImages(str(tmp_path / "images.npy")).load((8, 8, 1))


class Payload:
    """A pickle that touches a file when it is loaded."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_a_pickled_object_is_refused_and_not_run(npz, tmp_path):
    images = np.array([Payload(tmp_path / "touched")], dtype=object)
    with pytest.raises(DataError):
        npz(images=images).load((8, 8, 1))
    assert not (tmp_path / "touched").exists()


# --- Folders -------------------------------------------------------------------------


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    """At any depth, by any case of a suffix; PNG keeps every bit."""
    images = random_images(5, 8, 8, 3)
    names = ["B.PNG", "a.png", "b/c/z.png", "b/d.png", "ab.png"]
    for name, image in zip(names, images, strict=True):
        save(tmp_path / name, image)
    found = ImageFolder(str(tmp_path)).load((8, 8, 3))
    np.testing.assert_array_equal(found, images[[0, 1, 4, 2, 3]])


def test_jpeg_files_are_read(tmp_path):
    save(tmp_path / "x.jpg", np.full((20, 30), 100, np.uint8))
    save(tmp_path / "y.JPEG", np.full((8, 8, 3), 200, np.uint8))
    found = ImageFolder(str(tmp_path)).load((8, 8, 3))
    np.testing.assert_allclose(found.mean((1, 2, 3)), [100, 200], atol=1)


def test_the_log_tells_what_was_done_and_what_was_skipped(tmp_path, log):
    save(tmp_path / "wide.png", random_images(8, 16, 3))
    save(tmp_path / "deep.png", random_images(8, 8).astype(np.uint16) * 256)
    save(tmp_path / "small.png", random_images(4, 4))
    for name in ("labels.txt", "b.txt", ".hidden.png", "x.\x1b[2J"):
        (tmp_path / name).touch()
    (tmp_path / "again").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    ImageFolder(str(tmp_path)).load((8, 8, 3))
    skipped, read = log()
    for words in (
        "2 .txt",
        "1 hidden",
        "1 of other names",
        "1 linked again",
        "1 not regular",
    ):
        assert words in skipped
    assert "3 pictures read" in read and "\x1b" not in skipped
    for words in ("2 made colour", "1 cropped", "1 enlarged", "1 cut from 16 to 8"):
        assert words in read


def test_linked_folders_are_entered_once(tmp_path):
    save(tmp_path / "elsewhere" / "x.png", random_images(8, 8))
    for place in ("a", "b"):
        (tmp_path / "pictures" / place).mkdir(parents=True)
        (tmp_path / "pictures" / place / "link").symlink_to(tmp_path / "elsewhere")
    assert len(ImageFolder(str(tmp_path / "pictures")).load((8, 8, 1))) == 1


def test_pictures_that_cannot_be_read_are_named(tmp_path):
    """All of them, up to five; a name alone makes no picture."""
    whole = save(tmp_path / "a.png", random_images(64, 64)).read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.jpg").write_bytes(b"GIF89a and more")
    (tmp_path / "d.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="b.png cannot be read.*also refused: c.jpg, d"):
        ImageFolder(str(tmp_path)).load((8, 8, 1))
    for i in range(20):
        (tmp_path / f"e{i:02}.png").touch()
    with pytest.raises(DataError, match="e00.png, e01.png; the rest is not read"):
        ImageFolder(str(tmp_path)).load((8, 8, 1))


@pytest.mark.parametrize(
    "names, words",
    [
        ([], "nothing found"),
        (["a.npz", "b.npz", "c.webp"], "2 .npz, 1 .webp found.*NpzImages"),
    ],
)
def test_a_folder_without_pictures_is_refused(tmp_path, names, words):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=words):
        ImageFolder(str(tmp_path)).load((8, 8, 1))


def test_a_path_that_is_no_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="no image set at .*nowhere"):
        ImageFolder(str(tmp_path / "nowhere")).load((8, 8, 1))
    (tmp_path / "x.zip").touch()
    with pytest.raises(DataError, match="x.zip is a file.*NpzImages"):
        ImageFolder(str(tmp_path / "x.zip")).load((8, 8, 1))


def test_a_folder_that_is_closed_is_named(folder, monkeypatch):
    def closed(*arguments, onerror, **options):
        onerror(PermissionError(13, "Permission denied", "pictures/closed"))
        return iter(())

    pictures = folder(a_png=random_images(8, 8))
    monkeypatch.setattr(os, "walk", closed)
    with pytest.raises(DataError, match="pictures/closed is closed .Permission"):
        pictures.load((8, 8, 1))


def test_more_pictures_than_are_allowed_are_refused_unread(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").touch()
    with pytest.raises(DataError, match=r"3 pictures.*0.75 GiB.*max_gib=0.5"):
        ImageFolder(str(tmp_path), max_gib=0.5).load((8192, 32768, 1))


def test_a_folder_is_decoded_again_only_if_it_has_changed(folder, monkeypatch):
    decoded = []
    real = data.open_picture
    monkeypatch.setattr(data, "open_picture", lambda p: decoded.append(p) or real(p))
    pictures = folder(a_png=np.zeros((8, 8), np.uint8))
    first = pictures.load((8, 8, 1))
    assert pictures.load((8, 8, 1)) is first and len(decoded) == 1
    assert not first.flags.writeable, "nobody can change it for the others"
    folder(a_png=random_images(8, 8))
    assert pictures.load((8, 8, 1)).any() and len(decoded) == 2


# --- In a config ---------------------------------------------------------------------


def test_a_set_can_be_changed_from_the_command_line():
    wanted = Experiment("run", UNet(), data=ImageFolder("a"))
    for path, text in (("data.path", "b"), ("data.fit.background", "255")):
        wanted = config.override(wanted, path, text)
    assert wanted.data == ImageFolder("b", Fit(background=255))
    with pytest.raises(config.ConfigError, match="0..255 or be None, found 300"):
        config.override(wanted, "data.fit.background", "300")
    config.check(wanted)


def test_the_recipe_for_cifar10_gives_its_images(tmp_path, monkeypatch):
    """Each row is a label and an image, the red plane first."""
    monkeypatch.chdir(tmp_path)
    images = random_images(6, 32, 32, 3)
    pathlib.Path("cifar-10-batches-bin").mkdir()
    for i in (2, 1):
        rows = [b"\7" + x.transpose(2, 0, 1).tobytes() for x in images[3 * i - 3 :][:3]]
        path = pathlib.Path(f"cifar-10-batches-bin/data_batch_{i}.bin")
        path.write_bytes(b"".join(rows))
    page = pathlib.Path(__file__).parents[1] / "docs" / "images.md"
    usage, recipe, *_ = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    exec(recipe, {})
    exec(usage, {})
    found = NpzImages("cifar10.npz").load((32, 32, 3))
    np.testing.assert_array_equal(found, images)


# --- Resizing ------------------------------------------------------------------------


def naive_resize(image: np.ndarray, size: int) -> np.ndarray:
    """One image `[H, H, C]` by four loops over the padded image's pixels."""
    side, _, channels = image.shape
    factor = (side + size - 1) // size
    before = (factor * size - side) // 2
    result = np.zeros((size, size, channels), np.uint8)
    for row, column, channel in itertools.product(
        range(size), range(size), range(channels)
    ):
        total = 0
        for i in range(row * factor - before, (row + 1) * factor - before):
            for j in range(column * factor - before, (column + 1) * factor - before):
                if 0 <= i < side and 0 <= j < side:
                    total += int(image[i, j, channel])
        result[row, column, channel] = round(total / factor**2)  # half to even
    return result


@pytest.mark.parametrize(
    "side, size, channels",
    [(28, 8, 1), (28, 16, 1), (28, 32, 1), (6, 3, 3), (9, 3, 1), (5, 3, 1), (4, 4, 1)],
)
def test_resize_averages_blocks_of_the_padded_image(side, size, channels):
    images = random_images(2, side, side, channels)
    found = resize(images, size)
    assert found.dtype == np.uint8
    for before, after in zip(images, found, strict=True):
        np.testing.assert_array_equal(after, naive_resize(before, size))


def test_resize_keeps_the_extremes():
    images = np.stack(
        [np.zeros((4, 4, 1), np.uint8), np.full((4, 4, 1), 255, np.uint8)]
    )
    np.testing.assert_array_equal(resize(images, 2), images[:, :2, :2])


def test_to_float_maps_bytes_to_minus_one_to_one():
    found = to_float(np.arange(256, dtype=np.uint8))
    assert found.dtype == np.float32
    expected = [(i - 127.5) / 127.5 for i in range(256)]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found[0] == -1 and found[-1] == 1


# --- Batches -------------------------------------------------------------------------


@pytest.mark.parametrize("size, batch", [(10, 4), (10, 5), (7, 10), (1, 3)])
@pytest.mark.parametrize("cut", [0, 1, 5, 9, 12])
def test_the_order_does_not_depend_on_the_chunks(size, batch, cut):
    whole = order(size, seed=3, start=0, stop=12, batch=batch)
    assert whole.shape == (12, batch)
    parts = order(size, 3, 0, cut, batch), order(size, 3, cut, 12, batch)
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("size, batch", [(10, 4), (9, 3), (7, 10), (200, 16)])
def test_each_image_comes_once_an_epoch(size, batch):
    drawn = order(size, 1, 0, 4 * size, batch).reshape(-1, size)
    assert len(drawn) == 4 * batch  # whole epochs
    for epoch in drawn:
        assert sorted(epoch) == list(range(size))
    assert len({tuple(epoch) for epoch in drawn}) > 0.9 * len(drawn)


def test_seeds_differ_and_repeat():
    first, second, again = (order(50, seed, 0, 1, 50)[0] for seed in (0, 1, 0))
    np.testing.assert_array_equal(first, again)
    assert np.mean(first == second) < 0.2
    # Nor is the next seed's first epoch this seed's second one.
    later = order(50, 0, 1, 2, 50)[0]
    assert np.mean(later == second) < 0.2 and np.mean(later == first) < 0.2
