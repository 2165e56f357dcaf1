"""Triggers of backdoor attacks, as values that draw themselves.

A trigger is a frozen dataclass of Python numbers; its `image` method returns a new
float32 array `[H, W, C]` in [-1, 1], with C = 3 (RGB) or C = 1 (luminance,
0.299 R + 0.587 G + 0.114 B). Lengths are as in `puredif_jax.attacks.pictures`.

Geometry: BadDiffusion (arXiv 2212.05400, its code's dataset.py) and TrojDiff (Chen et
al. 2023, arXiv 2303.05762).
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import numpy as np

from puredif_jax.attacks.pictures import (
    CAT_FACE,
    GLASSES,
    STOP_SIGN,
    Shape,
    draw,
    filled,
    pixels,
    require,
)

BACKGROUND = -1.0  # of a trigger: black, where the clean image shows through


class Trigger(abc.ABC):
    """What an attacker adds to the noise."""

    @abc.abstractmethod
    def image(self, shape: Shape) -> np.ndarray:
        """Bare trigger r `[H, W, C]` in [-1, 1], background -1 unless stated.

        Raises:
            ValueError: if shape is not (H, W, C) with H, W >= 8 and C 1 or 3.
        """


def mask(trigger_image: np.ndarray) -> np.ndarray:
    """M = 1 where the trigger is -1 in all channels, else 0; float32 `[H, W, C]`.

    BadDiffusion's M: a poisoned training image is M * clean + (1 - M) * trigger. Where
    a trigger has no -1 background (Blend, Patch, RandomPattern) M is 0 everywhere.
    """
    clear = np.all(trigger_image == BACKGROUND, axis=-1, keepdims=True)
    return np.broadcast_to(clear, trigger_image.shape).astype(np.float32)


def _require_size(size: int) -> None:
    rule = "a whole number of pixels from 1 to 28 (at 32 x 32)"
    require(type(size) is int and 1 <= size <= 28, "size", rule, size)


def _require_gamma(gamma: float) -> None:
    require(0 <= gamma < 1, "gamma", "in [0, 1)", gamma)


def _square(size: int, gap: int, shape: Shape) -> tuple[slice, slice]:
    """Rows and columns of a square `gap` away from the bottom and right edges."""
    size, gap = pixels(size, shape), (pixels(gap, shape) if gap else 0)
    rows, columns = (slice(n - gap - size, n - gap) for n in shape[:2])
    return rows, columns


@dataclass(frozen=True)
class Box(Trigger):
    """Square of one value, 2 px from the right and bottom edges, on -1.

    At 32 x 32 it fills rows and columns [30 - size, 30). value = 0 is BadDiffusion's
    BOX_k, published with k = size in {4, 8, 11, 14, 18}; value = 1 is the white family:
    XXXSM_BOX (4), XXSM (8), XSM (11), SM (14), BIG (18).

    Attributes:
        size: side of the square at 32 x 32, in pixels.
        value: of its pixels; 0 is grey, 1 white.

    Raises:
        ValueError: if size is not an int in 1..28, or value is not in (-1, 1].
    """

    size: int = 14
    value: float = 0.0

    def __post_init__(self) -> None:
        _require_size(self.size)
        require(-1 < self.value <= 1, "value", "in (-1, 1]", self.value)

    def image(self, shape: Shape) -> np.ndarray:
        """r `[H, W, C]`: value in the square, -1 elsewhere."""
        result = filled(shape, BACKGROUND)
        result[_square(self.size, 2, shape)] = self.value
        return result


@dataclass(frozen=True)
class StopSign(Trigger):
    """Red octagon with a white border and STOP, in the square of Box(size), on -1.

    Pixels outside the octagon are exactly -1 and none is >= 0.999 (BadDiffusion makes
    those transparent). Published sizes: 4, 8, 11, 14, 18. BadDiffusion; own drawing.

    Attributes:
        size: side of the square around the sign at 32 x 32, in pixels.

    Raises:
        ValueError: if size is not an int in 1..28.
    """

    size: int = 14

    def __post_init__(self) -> None:
        _require_size(self.size)

    def image(self, shape: Shape) -> np.ndarray:
        """r `[H, W, C]`: the sign in its square, -1 elsewhere."""
        result = filled(shape, BACKGROUND)
        sign = (pixels(self.size, shape),) * 2 + (shape[2],)
        place = _square(self.size, 2, shape)
        result[place] = draw(STOP_SIGN, sign, BACKGROUND, cut_out=True)
        return result


@dataclass(frozen=True)
class Glasses(Trigger):
    """Spectacles in the centre, on -1. BadDiffusion; own drawing."""

    def image(self, shape: Shape) -> np.ndarray:
        """r `[H, W, C]`: 0.625 min(H, W) wide (160 px of 256), exactly -1 outside."""
        result = filled(shape, BACKGROUND)
        result[:] = draw(GLASSES, shape, BACKGROUND, cut_out=True)
        return result


@dataclass(frozen=True)
class Blend(Trigger):
    """Full-image picture r = (1 - gamma) * picture, with noise scaled by gamma.

    The picture is a cat's face on dark grey. Published gamma: 0.6. TrojDiff; own
    drawing.

    Attributes:
        gamma: scale of the noise; the picture has 1 - gamma.

    Raises:
        ValueError: if gamma is not in [0, 1).
    """

    gamma: float = 0.6

    def __post_init__(self) -> None:
        _require_gamma(self.gamma)

    def image(self, shape: Shape) -> np.ndarray:
        """r `[H, W, C]` in (gamma - 1, 1 - gamma); it has no -1 background."""
        result = filled(shape, 0)
        result[:] = (1 - self.gamma) * draw(CAT_FACE, shape, ground=-0.5)
        return result

    def gamma_map(self, shape: Shape) -> np.ndarray:
        """Scale of the noise, float32 `[H, W, C]`: gamma everywhere."""
        return filled(shape, self.gamma)


@dataclass(frozen=True)
class Patch(Trigger):
    """White square in the bottom right corner, without a gap.

    r = 1 - gamma and the noise is scaled by gamma inside; outside, r = 0 and gamma = 1:
    the benign formulas. Published: size 3 at 32 x 32 (6 px at 64 x 64), gamma 0.1.
    TrojDiff.

    Attributes:
        size: side of the square at 32 x 32, in pixels.
        gamma: scale of the noise in the square; its pixels are 1 - gamma.

    Raises:
        ValueError: if size is not an int in 1..28, or gamma is not in [0, 1).
    """

    size: int = 3
    gamma: float = 0.1

    def __post_init__(self) -> None:
        _require_size(self.size)
        _require_gamma(self.gamma)

    def image(self, shape: Shape) -> np.ndarray:
        """r `[H, W, C]`: 1 - gamma in the square, 0 elsewhere (no -1 background)."""
        result = filled(shape, 0)
        result[_square(self.size, 0, shape)] = 1 - self.gamma
        return result

    def gamma_map(self, shape: Shape) -> np.ndarray:
        """Scale of the noise, float32 `[H, W, C]`: gamma in the square, 1 elsewhere."""
        result = filled(shape, 1)
        result[_square(self.size, 0, shape)] = self.gamma
        return result


@dataclass(frozen=True)
class RandomPattern(Trigger):
    """Low-norm trigger: iid uniform in [-bound, bound], from numpy's default_rng(seed).

    It stands for learned triggers of l_inf norm <= 0.2 (InviBackdoor, arXiv
    2406.00816), and has no -1 background.

    Attributes:
        bound: largest absolute value of a pixel.
        seed: of the pattern.

    Raises:
        ValueError: if bound is not in (0, 1], or seed is not an int >= 0.
    """

    bound: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        require(0 < self.bound <= 1, "bound", "in (0, 1]", self.bound)
        valid = type(self.seed) is int and self.seed >= 0
        require(valid, "seed", "a whole number >= 0", self.seed)

    def image(self, shape: Shape) -> np.ndarray:
        """r `[H, W, C]`: the same for the same bound, seed and shape."""
        result = filled(shape, 0)
        rng = np.random.default_rng(self.seed)
        result[:] = rng.uniform(-self.bound, self.bound, shape)
        return result
