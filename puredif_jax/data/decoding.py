"""Many pictures decoded side by side, into one array of a model's images."""

from __future__ import annotations

import collections
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from absl import logging
from PIL import Image

from puredif_jax.data.pictures import Fit, Fitted, Unfit
from puredif_jax.runs.report import progress
from puredif_jax.types import InputError

WORKERS = min(8, os.cpu_count() or 1)  # Pillow lets threads decode side by side
NAMED = 5  # pictures that are refused before the others are left unread


class DataError(InputError):
    """An image set that is missing or not as it should be."""


def decode(
    place: str,
    names: Sequence[str],
    picture: Callable[[int], Image.Image],
    fit: Fit,
    image_shape: tuple[int, int, int],
) -> np.ndarray:
    """Pictures as uint8 `[N, H, W, C]`; the log counts what was done to them.

    Args:
      place: where they are, for messages.
      names: of the pictures, for messages.
      picture: decodes the picture of an index; raises Unfit.
      fit: converts a picture.
      image_shape: (H, W, C).

    Raises:
      DataError: some are refused; it names up to `NAMED` of them.
    """
    if image_shape[-1] not in (1, 3):
        raise DataError(
            f"{place}: pictures are fitted to 1 or 3 channels, but the model wants "
            f"{image_shape}: give an .npz file of such images"
        )

    def fitted(index: int) -> Fitted | Unfit:
        try:
            return fit(picture(index), image_shape)
        except Unfit as error:
            return error

    pixels = np.empty((len(names), *image_shape), np.uint8)
    changes: collections.Counter[str] = collections.Counter()
    refused: list[tuple[str, Unfit]] = []
    pool = ThreadPoolExecutor(WORKERS)
    bar = progress(len(names), 0, "images", jax.process_index() == 0)
    try:
        with warnings.catch_warnings(), bar:
            # So that Pillow refuses what it would decode with a warning.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            for i, found in enumerate(pool.map(fitted, range(len(names)))):
                bar.update()
                if isinstance(found, Fitted):
                    pixels[i] = found.pixels
                    changes.update(found.changes)
                else:
                    refused.append((names[i], found))
                    if len(refused) == NAMED:
                        break
    finally:
        pool.shutdown(cancel_futures=True)
    if refused:
        (name, why), *others = refused
        also = f"; also refused: {', '.join(name for name, _ in others)}"
        rest = "; the rest is not read" if len(refused) == NAMED else ""
        raise DataError(f"{place}: {name} {why}{also if others else ''}{rest}") from why
    done = "".join(f", {count:,} {change}" for change, count in changes.most_common())
    logging.info("%s: %s pictures read%s", place, f"{len(names):,}", done)
    return pixels
