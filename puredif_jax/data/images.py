"""Image sets, as uint8 arrays of a model's shape."""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import importlib.resources
import math
import pathlib

import numpy as np
from absl import logging
from PIL import Image

from puredif_jax.data.decoding import DataError, decode
from puredif_jax.data.pictures import (
    Fit,
    Listing,
    Unfit,
    list_pictures,
    open_picture,
    upper_bits,
)
from puredif_jax.files import npz

_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
# What is given in place of an .npz file: how it begins, what it is, what to do.
_OTHERS: tuple[tuple[tuple[bytes, ...], str, str], ...] = (
    (
        (b"\x93NUMPY",),
        "an .npy file",
        "save its array by numpy.savez(path, images=...)",
    ),
    (
        (b"\x1f\x8b",),
        "compressed by gzip",
        "unpack it, and save its images by numpy.savez(path, images=...); of CIFAR-10 "
        "take the binary version, for the one for Python is a pickle",
    ),
    (
        _PICKLES,
        "a pickle, which could run any code and is never opened",
        "save the images by numpy.savez(path, images=...); CIFAR-10 also comes in a "
        "binary version",
    ),
    ((b"\x89PNG", b"\xff\xd8"), "a picture", "give its folder, as ImageFolder(path)"),
)


class ImageSet(abc.ABC):
    """Where images come from."""

    @abc.abstractmethod
    def load(self, image_shape: tuple[int, int, int]) -> np.ndarray:
        """All images, uint8 `[N, H, W, C]`.

        Raises:
          DataError: missing, or of another shape than (H, W, C).
        """
        ...


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """Area-averages uint8 `[N, H, H, C]` by a whole factor to `[N, size, size, C]`.

    Sides that are no multiple of `size` are first padded with 0, evenly, to the
    next multiple (28 becomes 32 for 16 and 32). That is for images on a black ground.
    """
    n, side, _, channels = images.shape
    factor = -(-side // size)
    pad = factor * size - side
    before, after = pad // 2, pad - pad // 2
    images = np.pad(images, ((0, 0), (before, after), (before, after), (0, 0)))
    blocks = images.reshape(n, size, factor, size, factor, channels)
    found: np.ndarray = np.round(blocks.mean((2, 4), dtype=np.float32))
    return found.astype(np.uint8)


def fingerprint(images: np.ndarray) -> str:
    """The SHA-256 of images with their shape and type, in hexadecimal digits."""
    found = hashlib.sha256(f"{images.shape} {images.dtype}".encode())
    found.update(np.ascontiguousarray(images).data)
    return found.hexdigest()


def to_float(images: np.ndarray) -> np.ndarray:
    """uint8 0..255 to float32 -1..1."""
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


@dataclasses.dataclass(frozen=True)
class FashionMNIST(ImageSet):
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
                f"but the model wants {image_shape}: give images of that shape as "
                "`data` (docs/images.md)"
            )
        files = importlib.resources.files("puredif_jax") / "assets"
        with (files / f"fashion_mnist_{self.split}.npz").open("rb") as file:
            images = np.load(file, allow_pickle=False)["images"][..., None]
        last = None if self.count is None else self.first + self.count
        return resize(images[self.first : last], height)


@dataclasses.dataclass(frozen=True)
class NpzImages(ImageSet):
    """The images in a file made by `numpy.savez(path, images=...)`.

    They are taken as they are: uint8 `[N, H, W]` or `[N, H, W, C]` of the model's
    shape. With `fit`, images of another size, with 1 to 4 channels (grey, grey and
    alpha, RGB, RGBA) or of uint16 are converted. Floats are refused, for their range
    would be a guess. So are Python objects, which numpy stores as a pickle.

    Attributes:
      path: the file.
      key: name of the array; "arr_0" after `numpy.savez(path, images)`.
      fit: converts images that are not as the model's; None to refuse them.
      max_gib: most GiB that the array may take; a larger one is not unpacked.
    """

    path: str
    key: str = "images"
    fit: Fit | None = None
    max_gib: float = 8.0

    def load(self, image_shape: tuple[int, int, int]) -> np.ndarray:
        path = pathlib.Path(self.path).expanduser()
        _refuse_others(path)
        try:
            found = npz.headers(path)
            if why := self._misfit(found, image_shape):
                raise DataError(f"{path} {why}")
            images = npz.read(path, [self.key], self.max_gib * 2**30)[self.key]
        except npz.NpzError as error:
            raise DataError(
                f"{path} {error}: save images by numpy.savez(path, images=...), as "
                "uint8 [N, H, W, C], or give a folder of pictures, as ImageFolder(path)"
            ) from error
        if images.dtype != np.uint8:
            try:
                images = upper_bits(images)
            except Unfit as error:
                raise DataError(f"{path} {error}") from error
            logging.info("%s: cut from 16 to 8 bits", path)
        images = images if images.ndim == 4 else images[..., None]
        if self.fit is None or images.shape[1:] == image_shape:
            return images
        names = [f"image {i}" for i in range(len(images))]
        rows = images[..., 0] if images.shape[-1] == 1 else images
        return decode(
            str(path), names, lambda i: Image.fromarray(rows[i]), self.fit, image_shape
        )

    def _misfit(
        self, found: dict[str, npz.Header], image_shape: tuple[int, int, int]
    ) -> str:
        """Why the array is not taken, by its header alone; "" if it is."""
        if not found:
            return "holds no arrays: save images by numpy.savez(path, images=...)"
        if self.key not in found:
            arrays = [f"`{name}` {header}" for name, header in found.items()]
            more = f" and {len(arrays) - 5} more" if len(arrays) > 5 else ""
            return (
                f"has no array `{self.key}`, but {', '.join(arrays[:5])}{more}: name "
                "one, as NpzImages(path, key=...)"
            )
        header = found[self.key]
        shape, dtype = header
        if dtype.hasobject:
            return (
                f"has Python objects in `{self.key}`, as numpy makes of pictures of "
                "several sizes: they are a pickle, which could run any code and is "
                "never opened; give the pictures as files, to ImageFolder(path)"
            )
        if 0 in shape:
            return f"holds no images, found {header} in `{self.key}`"
        deep = dtype.kind == "u" and dtype.itemsize == 2
        taken = dtype == np.uint8 or (deep and self.fit is not None)
        if not taken or len(shape) not in (3, 4):
            return (
                f"must have uint8 [N, H, W] or [N, H, W, C] in `{self.key}`, found "
                f"{header}: {'reshape it' if taken else _to_bytes(dtype)}"
            )
        if len(shape) == 3 and shape[2] in (3, 4):
            return f"has one image, {header} in `{self.key}`: save images[None]"
        if header.size > self.max_gib * 2**30:
            return (
                f"would unpack to {header.size / 2**30:.3g} GiB, more than "
                f"max_gib={self.max_gib:g}: save fewer or smaller images, or raise it"
            )
        size = (*shape[1:], 1)[:3]
        if size == image_shape:
            return ""
        known = size[2] in (1, 2, 3, 4)
        if not known and size[0] in (1, 2, 3, 4):
            return (
                f"has its channels first, {header} in `{self.key}`: save "
                "images.transpose(0, 2, 3, 1)"
            )
        if not known:
            return (
                f"has images of {size[2]} channels, {header} in `{self.key}`, but the "
                f"model wants {image_shape}: save 1 to 4 channels, as the last axis"
            )
        if self.fit is None:
            return (
                f"has {header} in `{self.key}`, but the model wants {image_shape}: "
                "convert them, as NpzImages(path, fit=Fit())"
            )
        return ""


def _to_bytes(dtype: np.dtype) -> str:
    """What to do with an array of values that are not taken."""
    if dtype.kind == "u" and dtype.itemsize == 2:
        return "convert it, as NpzImages(path, fit=Fit())"
    if dtype.kind == "f":
        return (
            "save (images * 255).round().astype('uint8') of values in 0..1, or "
            "((images + 1) * 127.5).round().astype('uint8') of those in -1..1"
        )
    return "save images.astype('uint8') of values in 0..255"


@dataclasses.dataclass(frozen=True)
class ImageFolder(ImageSet):
    """All PNG and JPEG files (.png, .jpg, .jpeg) in a folder and the folders below it.

    They come in the order of their paths. A file that cannot be read ends the run and
    is named. Other files, and hidden ones (their names begin with "."), are skipped.
    The log counts them by kind, and counts what was done to the pictures.
    Linked folders are entered, each folder once.

    Attributes:
      path: the folder.
      fit: how pictures of any size and kind become images of the model's shape.
      max_gib: most GiB that the images may take, as the model has them.
    """

    path: str
    fit: Fit = Fit()
    max_gib: float = 8.0

    def load(self, image_shape: tuple[int, int, int]) -> np.ndarray:
        """All images, uint8 `[N, H, W, C]`, read-only.

        The last set is kept, and decoded again only if a file has changed.

        Raises:
          DataError: no folder, no pictures in it, too many, or one that is refused.
        """
        root = pathlib.Path(self.path).expanduser()
        if root.is_file():
            raise DataError(
                f"{root} is a file: give a folder of PNG or JPEG files, or "
                "NpzImages(path) for an .npz file"
            )
        if not root.is_dir():
            raise DataError(f"no image set at {root}: give a folder of PNG files")
        try:
            listing = list_pictures(root)
        except Unfit as error:
            raise DataError(f"{root} {error}") from error
        if not listing.files:
            raise DataError(
                f"{root} holds no PNG or JPEG files ({listing.others or 'nothing'} "
                "found): give a folder that does, or NpzImages(path) for an .npz file"
            )
        size = len(listing.files) * math.prod(image_shape) / 2**30
        if size > self.max_gib:
            raise DataError(
                f"{root} holds {len(listing.files):,} pictures, which take {size:.3g} "
                f"GiB as {image_shape}, more than max_gib={self.max_gib:g}: give "
                "fewer, or raise it"
            )
        return _decoded(root, listing, self.fit, image_shape)


@functools.lru_cache(maxsize=1)  # a run loads its set to check it, and again to train
def _decoded(
    root: pathlib.Path,
    listing: Listing,
    fit: Fit,
    image_shape: tuple[int, int, int],
) -> np.ndarray:
    if listing.skipped:
        logging.warning("%s: skipped %s", root, listing.others)
    names = [file.name for file in listing.files]
    pixels = decode(
        str(root), names, lambda i: open_picture(root / names[i]), fit, image_shape
    )
    pixels.setflags(write=False)
    return pixels


def _refuse_others(path: pathlib.Path) -> None:
    """Says what is given in place of an .npz file, and what to do.

    Raises:
      DataError: it is a folder, nothing, or a file known to be of another kind.
    """
    if path.is_dir():
        raise DataError(
            f"{path} is a folder, no .npz file: give its PNG and JPEG files, as "
            "ImageFolder(path)"
        )
    if not path.is_file():
        raise DataError(f"no image set at {path}: give an .npz file of images")
    try:
        with path.open("rb") as file:
            begin = file.read(8)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error
    for beginnings, what, remedy in _OTHERS:
        if begin.startswith(beginnings):
            raise DataError(f"{path} is {what}, not an .npz file: {remedy}")
