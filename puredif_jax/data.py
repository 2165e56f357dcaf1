"""Image sets as uint8 arrays, and batches that depend on (seed, step) alone."""

from __future__ import annotations

import dataclasses
import importlib.resources
import pathlib
import zlib
from typing import Protocol
from zipfile import BadZipFile

import numpy as np

from puredif_jax.types import InputError

DAMAGED = (BadZipFile, zlib.error)  # what a broken .npz raises


class DataError(InputError):
    """An image set that is missing or not as it should be."""


class ImageSet(Protocol):
    """Where images come from."""

    def load(self, image_shape: tuple[int, int, int]) -> np.ndarray:
        """All images, uint8 `[N, H, W, C]`.

        Raises:
          DataError: missing, or of another shape than (H, W, C).
        """
        ...


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """Area-averages uint8 `[N, H, H, C]` by a whole factor to `[N, size, size, C]`.

    Sides that are no multiple of `size` are first padded with 0, evenly, to the
    next multiple (28 becomes 32 for 16 and 32).

    Raises:
      DataError: the padding would be more than a quarter of the image.
    """
    n, side, _, channels = images.shape
    factor = -(-side // size)
    pad = factor * size - side
    before, after = pad // 2, pad - pad // 2
    if pad > side // 4:
        raise DataError(f"images of {side} pixels cannot be resized to {size}")
    images = np.pad(images, ((0, 0), (before, after), (before, after), (0, 0)))
    blocks = images.reshape(n, size, factor, size, factor, channels)
    return np.round(blocks.mean((2, 4), dtype=np.float32)).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class FashionMNIST:
    """The subset of Fashion-MNIST (Xiao et al. 2017, MIT) that ships in the package.

    10,000 training images (1,000 a class) or 2,000 test images, 28x28 grey, padded
    to 32x32 and averaged down to 32, 16 or 8 pixels. Their order is mixed.

    Attributes:
      split: "train" or "test".
      first, count: which of the images; None for all from the first on.
    """

    split: str = "train"
    first: int = 0
    count: int | None = None

    def __post_init__(self) -> None:
        if self.split not in ("train", "test"):
            raise DataError(f"split must be 'train' or 'test', found {self.split!r}")
        whole = 10_000 if self.split == "train" else 2_000
        count = whole - self.first if self.count is None else self.count
        if not 0 <= self.first < self.first + count <= whole:
            raise DataError(
                f"first and count must lie within the {whole} images of the split, "
                f"found first={self.first}, count={self.count}"
            )

    def load(self, image_shape: tuple[int, int, int]) -> np.ndarray:
        height, width, channels = image_shape
        if height != width or height not in (8, 16, 32) or channels != 1:
            raise DataError(
                "Fashion-MNIST comes as (8, 8, 1), (16, 16, 1) or (32, 32, 1), "
                f"but the model wants {image_shape}"
            )
        files = importlib.resources.files("puredif_jax") / "assets"
        with (files / f"fashion_mnist_{self.split}.npz").open("rb") as file:
            images = np.load(file, allow_pickle=False)["images"][..., None]
        last = None if self.count is None else self.first + self.count
        return resize(images[self.first : last], height)


@dataclasses.dataclass(frozen=True)
class NpzImages:
    """A file made by `numpy.savez(path, images=...)`: uint8 `[N, H, W]` or with C.

    Attributes:
      path: the file.
    """

    path: str

    def load(self, image_shape: tuple[int, int, int]) -> np.ndarray:
        path = pathlib.Path(self.path)
        if not path.is_file():
            raise DataError(f"no image set at {path}: give an .npz file with `images`")
        try:
            with path.open("rb") as file:
                images = np.load(file, allow_pickle=False)["images"]
        except (LookupError, ValueError, OSError, EOFError, *DAMAGED) as error:
            raise DataError(
                f"{path} is not an .npz file with an array `images`"
            ) from error
        if images.dtype != np.uint8 or images.ndim not in (3, 4):
            raise DataError(
                f"{path}: images must be uint8 [N, H, W] or [N, H, W, C], found "
                f"{images.dtype} {images.shape}"
            )
        if not len(images):
            raise DataError(f"{path} holds no images")
        if images.ndim == 3:
            images = images[..., None]
        if images.shape[1] == images.shape[2] and images.shape[1] != image_shape[0]:
            images = resize(images, image_shape[0])
        if images.shape[1:] != image_shape:
            raise DataError(
                f"{path} holds images of {images.shape[1:]}, but the model wants "
                f"{image_shape}"
            )
        return images


def to_float(images: np.ndarray) -> np.ndarray:
    """uint8 0..255 to float32 -1..1."""
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


def order(size: int, seed: int, start: int, stop: int, batch: int) -> np.ndarray:
    """Which of `size` images the steps start..stop-1 take: `[stop - start, batch]`.

    The set is walked in a new order each epoch; the order depends on (seed, epoch)
    alone, so any step can be made again on any number of devices.
    """
    position = np.arange(start * batch, stop * batch)
    epochs = position // size
    index = np.empty_like(position)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        walk = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(
            size
        )
        index[chosen] = walk[position[chosen] % size]
    return index.reshape(stop - start, batch)
