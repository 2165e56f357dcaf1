"""data: the shipped sets, resizing, files that are not as they should be, batches."""

from __future__ import annotations

import itertools
import pathlib

import numpy as np
import pytest

from puredif_jax.data import (
    DataError,
    FashionMNIST,
    NpzImages,
    order,
    resize,
    to_float,
)


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


# --- Image sets ----------------------------------------------------------------------


@pytest.fixture
def npz(tmp_path):
    """Writes an .npz file and returns the image set that reads it."""

    def write(**arrays) -> NpzImages:
        np.savez(tmp_path / "images.npz", **arrays)
        return NpzImages(str(tmp_path / "images.npz"))

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


@pytest.mark.parametrize("source", ["shipped", "file"])
@pytest.mark.parametrize("side", [8, 16, 32])
def test_a_set_gives_the_shape_asked_for(npz, source, side):
    sets = {
        "shipped": FashionMNIST("test"),
        "file": npz(images=random_images(5, 28, 28)),
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


def test_a_file_of_far_smaller_images_is_refused(npz):
    with pytest.raises(DataError, match="8 pixels cannot be resized to 64"):
        npz(images=random_images(2, 8, 8, 1)).load((64, 64, 1))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="no image set at .*nowhere.npz"):
        NpzImages(str(tmp_path / "nowhere.npz")).load((8, 8, 1))
    with pytest.raises(DataError, match="no image set"):
        NpzImages(str(tmp_path)).load((8, 8, 1))


def test_a_file_without_images_is_refused(npz):
    with pytest.raises(DataError, match="array `images`"):
        npz(pictures=random_images(2, 8, 8)).load((8, 8, 1))


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
