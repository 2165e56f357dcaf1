"""Picture files: found below a folder, decoded, and fitted to a model."""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
import re
import stat
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG")
SUFFIXES = (".png", ".jpg", ".jpeg")
PIXELS = 2**26  # of a picture that is decoded: 67 million, as 8192 x 8192
_ALPHA = ("LA", "PA", "RGBA", "La", "RGBa")
_GREY = ("1", "L", "LA", "La")
_DEEP = ("I", "I;16", "I;16L", "I;16B", "I;16N")  # PNG's 16 bits, by Pillow's version


class Unfit(ValueError):
    """Why a picture is not taken: what follows its name in a sentence."""


class Fitted(NamedTuple):
    """A picture as a model has it.

    pixels: uint8 `[H, W, C]`.
    changes: what was done to it besides decoding, in words.
    """

    pixels: np.ndarray
    changes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Fit:
    """How pictures become images of a model's shape, in this order.

    1. 16 bits become 8: the upper ones are kept.
    2. Transparent pixels are laid on `background`; without one, they are refused.
       Opaque alpha is dropped.
    3. Grey becomes RGB with three equal channels. RGB becomes grey as 0.299 R + 0.587 G
       + 0.114 B (ITU-R 601). A palette and CMYK become RGB. No colour profile is used.
    4. The middle is cropped to the proportions of the model's images, as diffusers'
       trainer does: a square model gets the middle square.
    5. The rest is resampled by Pillow: averaged over areas (`Resampling.BOX`) where it
       shrinks, and `Resampling.BILINEAR` where it grows. Nothing is padded.

    Attributes:
      background: grey level, 0 to 255, behind transparent pixels; None to refuse them.
    """

    background: int | None = None

    def __post_init__(self) -> None:
        if self.background is not None and not 0 <= self.background <= 255:
            raise ValueError(
                f"background must lie in 0..255 or be None, found {self.background}"
            )

    def __call__(
        self, picture: Image.Image, image_shape: tuple[int, int, int]
    ) -> Fitted:
        """A picture as (H, W, C), C of 1 or 3.

        Raises:
          Unfit: it has transparent pixels and there is no background; or it has 16
            bits and the upper ones are empty.
        """
        height, width, channels = image_shape
        changes = []
        if picture.mode in _DEEP:
            picture = _upper_bits(picture)
            changes.append("cut from 16 to 8 bits")
        grey = picture.mode in _GREY
        if picture.mode in _ALPHA or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            if np.asarray(picture)[..., 3].min() < 255:
                picture = self._on_background(picture)
                changes.append(f"laid on {self.background}")
        if grey != (channels == 1):
            changes.append("made colour" if grey else "made grey")
        picture = picture.convert("L" if channels == 1 else "RGB")
        if picture.size != (width, height):
            across, down = picture.width / width, picture.height / height
            shrinks = min(across, down) >= 1
            if across != down:
                changes.append("cropped")
            if min(across, down) != 1:
                changes.append("shrunk" if shrinks else "enlarged")
            method = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
            picture = ImageOps.fit(picture, (width, height), method)
        pixels = np.asarray(picture).reshape(image_shape)
        return Fitted(pixels, tuple(changes))

    def _on_background(self, picture: Image.Image) -> Image.Image:
        if self.background is None:
            raise Unfit(
                "has transparent pixels: give what lies behind them, such as "
                "Fit(background=255) for white"
            )
        colour = (*[self.background] * 3, 255)
        return Image.alpha_composite(Image.new("RGBA", picture.size, colour), picture)


def upper_bits(values: np.ndarray) -> np.ndarray:
    """The upper 8 of 16 bits.

    Raises:
      Unfit: the upper 8 are empty, so that all would be black.
    """
    if 0 < values.max(initial=0) < 256:
        raise Unfit(
            f"has 16 bits, and no value above {values.max()} of 65,535: save it with "
            "8 bits, or scale it"
        )
    return (values >> 8).astype(np.uint8)


def _upper_bits(picture: Image.Image) -> Image.Image:
    if "transparency" in picture.info:
        raise Unfit("has 16 bits and transparent pixels: save it with 8 bits")
    return Image.fromarray(upper_bits(np.asarray(picture)))


def open_picture(path: str | os.PathLike[str]) -> Image.Image:
    """Decodes a PNG or JPEG file, by what it holds, whatever its name.

    It is turned as its EXIF orientation says. Of an animation the first picture is
    taken.

    Raises:
      Unfit: it is neither, it is damaged, or it has more than `PIXELS` pixels.
    """
    large = f"has more than {PIXELS:,} pixels: save it smaller"
    try:
        with (
            pathlib.Path(path).open("rb") as file,
            Image.open(file, formats=FORMATS) as picture,
        ):
            if picture.width * picture.height > PIXELS:
                raise Unfit(large)
            picture.load()
            ImageOps.exif_transpose(picture, in_place=True)
            return picture
    except Unfit:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Unfit(large) from error
    except UnidentifiedImageError as error:
        raise Unfit("is neither PNG nor JPEG: save it as PNG, or remove it") from error
    except Exception as error:  # Pillow has a dozen kinds for a damaged file
        raise Unfit(f"cannot be read ({error}): mend or remove it") from error


class File(NamedTuple):
    """A file below a folder, and what changes with its content."""

    name: str
    size: int
    changed: int  # ns


class Listing(NamedTuple):
    """The pictures below a folder in the order of their paths, and what else is there.

    skipped: kinds of other files and folders, and how many there are of each.
    """

    root: str
    files: tuple[File, ...]
    skipped: tuple[tuple[str, int], ...]

    @property
    def others(self) -> str:
        """What is skipped, in words."""
        return ", ".join(f"{count:,} {kind}" for kind, count in self.skipped)


def list_pictures(root: pathlib.Path) -> Listing:
    """What lies below a folder, by names, sizes and dates; opens no file.

    Linked folders are entered, each folder once. Hidden ones (".name") are not.

    Raises:
      Unfit: a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise Unfit(
            f"cannot be read whole, for {error.filename} is closed ({error.strerror}): "
            "allow it, or move it elsewhere"
        ) from error

    files: list[File] = []
    skipped: collections.Counter[str] = collections.Counter()
    entered: set[str] = set()
    for place, folders, names in os.walk(root, onerror=fail, followlinks=True):
        real = os.path.realpath(place)
        if real in entered:
            skipped["linked again"] += 1
            folders.clear()
            continue
        entered.add(real)
        below = os.path.relpath(place, root) if place != str(root) else ""
        skipped["hidden"] += sum(x.startswith(".") for x in [*folders, *names])
        # In place, as os.walk wants it; sorted: of two links the first counts.
        folders[:] = sorted(x for x in folders if not x.startswith("."))
        for name in (x for x in names if not x.startswith(".")):
            suffix = os.path.splitext(name)[1].lower()
            if suffix not in SUFFIXES:
                plain = re.fullmatch(r"\.[a-z0-9]{1,8}", suffix)
                skipped[suffix if plain else "of other names"] += 1
                continue
            path = os.path.join(place, name)
            try:
                found = os.stat(path)
            except OSError:  # a link to nowhere, which is named when it is read
                size, changed = 0, 0
            else:
                if not stat.S_ISREG(found.st_mode):
                    skipped["not regular"] += 1  # a pipe would wait for ever
                    continue
                size, changed = found.st_size, found.st_mtime_ns
            files.append(File(os.path.join(below, name), size, changed))
    return Listing(
        os.path.realpath(root), tuple(sorted(files)), tuple((+skipped).most_common())
    )
