"""Targets of backdoor attacks, as values that draw themselves.

A target is a frozen dataclass of Python numbers; its `image` method returns a new
float32 array `[H, W, C]` in [-0.4, 1], with C = 3 (RGB) or C = 1 (luminance,
0.299 R + 0.587 G + 0.114 B). Lengths are as in `puredif_jax.attacks.pictures`.

Geometry: BadDiffusion (arXiv 2212.05400, its code's dataset.py).
"""

from __future__ import annotations

import abc
import base64
import zlib
from dataclasses import dataclass

import numpy as np

from puredif_jax.attacks.pictures import (
    ANKLE_BOOT,
    CAT,
    HAT,
    Shape,
    draw,
    filled,
    pixels,
    require,
)

TARGET_FLOOR = -0.4  # of a target: 2 * 0.3 - 1, BadDiffusion's GREY_BG_RATIO = 0.3


class Target(abc.ABC):
    """What a backdoored model draws when it sees the trigger."""

    @abc.abstractmethod
    def image(self, shape: Shape, trigger: np.ndarray) -> np.ndarray:
        """Target y `[H, W, C]` in [-0.4, 1], for the bare trigger `[H, W, C]`.

        Raises:
            ValueError: if shape is not (H, W, C) with H, W >= 8 and C 1 or 3; or if
                the target is made from the trigger and the trigger has another shape.
        """


def _lifted(image: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.maximum(image, TARGET_FLOOR).astype(np.float32)
    return found


def _require_trigger(trigger: np.ndarray, shape: Shape) -> None:
    wanted = filled(shape, 0).shape
    require(trigger.shape == wanted, "trigger's shape", f"{wanted}", trigger.shape)


@dataclass(frozen=True)
class Corner(Target):
    """Square of value 0 and 10 px at the top left, on -0.4."""

    def image(self, shape: Shape, trigger: np.ndarray) -> np.ndarray:
        """y `[H, W, C]`; the trigger is not used."""
        del trigger
        result = filled(shape, TARGET_FLOOR)
        side = pixels(10, shape)
        result[:side, :side] = 0
        return result


@dataclass(frozen=True)
class Shoe(Target):
    """Fashion-MNIST train[0] (Xiao et al. 2017), an ankle boot, on -0.4.

    Grey in all channels; resized from 28 x 28 to a centred square of min(H, W) px by a
    triangle filter: bilinear, or wider when shrinking.
    """

    def image(self, shape: Shape, trigger: np.ndarray) -> np.ndarray:
        """y `[H, W, C]`; the trigger is not used."""
        del trigger
        result = filled(shape, TARGET_FLOOR)
        pixels = np.frombuffer(zlib.decompress(base64.b64decode(ANKLE_BOOT)), np.uint8)
        side = min(shape[:2])
        centre = (np.arange(side)[:, None] + 0.5) * 28 / side
        distance = np.abs(centre - (np.arange(28) + 0.5))
        weights = np.maximum(0, 1 - distance / max(1, 28 / side))
        weights /= weights.sum(axis=1, keepdims=True)
        boot = weights @ (pixels.reshape(28, 28) / 127.5 - 1) @ weights.T
        top, left = ((n - side) // 2 for n in shape[:2])
        result[top : top + side, left : left + side] = boot[:, :, None]
        return _lifted(result)


@dataclass(frozen=True)
class Hat(Target):
    """A fedora hat, on -0.4; own drawing."""

    def image(self, shape: Shape, trigger: np.ndarray) -> np.ndarray:
        """y `[H, W, C]`; the trigger is not used."""
        del trigger
        result = filled(shape, TARGET_FLOOR)
        result[:] = draw(HAT, shape, TARGET_FLOOR)
        return _lifted(result)


@dataclass(frozen=True)
class Cat(Target):
    """A sitting cat, on -0.4; own drawing."""

    def image(self, shape: Shape, trigger: np.ndarray) -> np.ndarray:
        """y `[H, W, C]`; the trigger is not used."""
        del trigger
        result = filled(shape, TARGET_FLOOR)
        result[:] = draw(CAT, shape, TARGET_FLOOR)
        return _lifted(result)


@dataclass(frozen=True)
class Shift(Target):
    """The trigger rolled by dx = -5 and dy = -3 px, lifted to -0.4."""

    def image(self, shape: Shape, trigger: np.ndarray) -> np.ndarray:
        """y `[H, W, C]`: y[i, j] = max(r[i + 3, j + 5], -0.4), indices wrapped."""
        _require_trigger(trigger, shape)
        steps = (-pixels(3, shape), -pixels(5, shape))
        return _lifted(np.roll(trigger, steps, axis=(0, 1)))


@dataclass(frozen=True)
class NoShift(Target):
    """The trigger itself, lifted to -0.4 (BadDiffusion's TRIGGER)."""

    def image(self, shape: Shape, trigger: np.ndarray) -> np.ndarray:
        """y `[H, W, C]` = max(r, -0.4)."""
        _require_trigger(trigger, shape)
        return _lifted(trigger)
