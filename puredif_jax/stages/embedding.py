"""Features of images, over which the Frechet distance of two sets is taken."""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from puredif_jax.attacks.pictures import Shape
from puredif_jax.metrics import garment_net
from puredif_jax.metrics import measures as metrics
from puredif_jax.runs import weight_file
from puredif_jax.stages.weights import ASSETS

CELLS = 8


@dataclasses.dataclass(frozen=True)
class Embedding(abc.ABC):
    """Named features of images, over which distances of two sets are taken.

    name: goes beside each number.
    """

    name: ClassVar[str]

    def check(self) -> None:
        """Checks that it can be used, before any long work.

        Raises:
          RunError: what it needs is not there.
        """
        return None

    @abc.abstractmethod
    def fits(self, shape: Shape) -> bool:
        """Whether it takes images of (H, W, C)."""

    @abc.abstractmethod
    def width(self, shape: Shape) -> int:
        """How many features it has of images of (H, W, C)."""

    @property
    def identity(self) -> str:
        """The name, and what else its features depend on."""
        return self.name

    @abc.abstractmethod
    def features(self, images: np.ndarray) -> np.ndarray:
        """`[N, F]` of images `[N, H, W, C]`, clipped to [-1, 1] first."""

    def moments(self, images: np.ndarray) -> metrics.Moments:
        """The moments of the features of images `[N, H, W, C]`.

        They are NaN where an image has NaN, since maxima in a network may drop it.

        Raises:
          ValueError: as `metrics.moments`.
        """
        found = metrics.moments(self.features(images))
        if np.isfinite(images).all():
            return found
        return metrics.Moments(*(np.full_like(each, np.nan) for each in found))

    def distance(self, first: np.ndarray, second: np.ndarray) -> float:
        """The Frechet distance of two sets of images `[N, H, W, C]`.

        Raises:
          ValueError: as `metrics.moments`.
        """
        return metrics.frechet_distance(self.moments(first), self.moments(second))


class GarmentNet(Embedding):
    """The 64 features of the shipped garment-net, of grey images of 16x16."""

    name = garment_net.NAME

    def fits(self, shape: Shape) -> bool:
        return tuple(shape) == (16, 16, 1)

    def width(self, shape: Shape) -> int:
        return garment_net.WIDTHS[-1]

    def features(self, images: np.ndarray) -> np.ndarray:
        shapes = jax.eval_shape(garment_net.init, jax.random.key(0))
        path = ASSETS / f"{garment_net.NAME}.safetensors"
        params = weight_file.load_weights(path, shapes)
        embed = functools.partial(jax.jit(garment_net.embed), params)
        return np.asarray(embed(images))


class Pixels(Embedding):
    """Mean pixels of a grid of 8x8 cells, or fewer, of any images."""

    name = "pixels"

    def fits(self, shape: Shape) -> bool:
        return True

    def width(self, shape: Shape) -> int:
        return min(CELLS, shape[0]) * min(CELLS, shape[1]) * shape[2]

    def features(self, images: np.ndarray) -> np.ndarray:
        count, height, width, channels = images.shape
        cells = min(CELLS, height), min(CELLS, width)
        clipped = jnp.clip(jnp.asarray(images, jnp.float32), -1, 1)
        small = jax.image.resize(
            clipped, (count, *cells, channels), "linear", antialias=True
        )
        return np.asarray(small).reshape(count, -1)


def embedding_for(shape: Shape) -> Embedding:
    """The best that there is for images of a shape: garment-net, or pixels."""
    return next(each for each in (GarmentNet(), Pixels()) if each.fits(shape))
