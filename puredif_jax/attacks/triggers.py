"""Triggers and targets of backdoor attacks, as values that draw themselves.

A trigger or a target is a frozen dataclass of Python numbers; its `image` method
returns a new float32 array `[H, W, C]` in [-1, 1], with C = 3 (RGB) or C = 1
(luminance, 0.299 R + 0.587 G + 0.114 B). Lengths are pixels of a 32 x 32 image; at
another size they are multiplied by min(H, W) / 32, rounded half up, at least 1.

Geometry: BadDiffusion (arXiv 2212.05400, its code's dataset.py) and TrojDiff (Chen et
al. 2023, arXiv 2303.05762).
Pictures are drawn here from ovals, polygons and strokes: they share the place and size
of the published ones, not their pixels.
"""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np

BACKGROUND = -1.0  # of a trigger: black, where the clean image shows through
TARGET_FLOOR = -0.4  # of a target: 2 * 0.3 - 1, BadDiffusion's GREY_BG_RATIO = 0.3

Shape = tuple[int, int, int]


class Trigger(Protocol):
    """What an attacker adds to the noise."""

    def image(self, shape: Shape) -> np.ndarray:
        """Bare trigger r `[H, W, C]` in [-1, 1], background -1 unless stated.

        Raises:
            ValueError: if shape is not (H, W, C) with H, W >= 8 and C 1 or 3.
        """


class Target(Protocol):
    """What a backdoored model draws when it sees the trigger."""

    def image(self, shape: Shape, trigger: np.ndarray) -> np.ndarray:
        """Target y `[H, W, C]` in [-0.4, 1], for the bare trigger `[H, W, C]`.

        Raises:
            ValueError: if shape is not (H, W, C) with H, W >= 8 and C 1 or 3, or if
                the target is made from the trigger and the trigger has another shape.
        """


def mask(trigger_image: np.ndarray) -> np.ndarray:
    """M = 1 where the trigger is -1 in all channels, else 0; float32 `[H, W, C]`.

    BadDiffusion's M: a poisoned training image is M * clean + (1 - M) * trigger. Where
    a trigger has no -1 background (Blend, Patch, RandomPattern) M is 0 everywhere.
    """
    clear = np.all(trigger_image == BACKGROUND, axis=-1, keepdims=True)
    return np.broadcast_to(clear, trigger_image.shape).astype(np.float32)


# --- Checks and lengths --------------------------------------------------------------


def _require(valid: bool, name: str, rule: str, found: object) -> None:
    if not valid:
        raise ValueError(f"{name} must be {rule}, found {found!r}.")


def _require_size(size: int) -> None:
    rule = "a whole number of pixels from 1 to 28 (at 32 x 32)"
    _require(type(size) is int and 1 <= size <= 28, "size", rule, size)


def _require_gamma(gamma: float) -> None:
    _require(0 <= gamma < 1, "gamma", "in [0, 1)", gamma)


def _filled(shape: Shape, value: float) -> np.ndarray:
    valid = len(shape) == 3 and min(shape[:2]) >= 8 and shape[2] in (1, 3)
    _require(valid, "shape", "(H, W, C) with H, W >= 8 and C 1 or 3", tuple(shape))
    return np.full(shape, value, np.float32)


def _pixels(length: int, shape: Shape) -> int:
    """A length at 32 x 32, in pixels of `shape`."""
    return max(1, int(length * min(shape[:2]) / 32 + 0.5))


def _square(size: int, gap: int, shape: Shape) -> tuple[slice, slice]:
    """Rows and columns of a square `gap` away from the bottom and right edges."""
    size, gap = _pixels(size, shape), (_pixels(gap, shape) if gap else 0)
    rows, columns = (slice(n - gap - size, n - gap) for n in shape[:2])
    return rows, columns


# --- Rasteriser: an outline tells which points x [1, n], y [m, 1] are inside it ------


def _oval(cx, cy, rx, ry):
    return lambda x, y: ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1


def _polygon(*points):
    def inside(x, y):  # even-odd rule: count the edges crossed by a ray to the left
        result = np.zeros((y.size, x.size), bool)
        for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
            if y0 != y1:
                edge = x0 + (y - y0) * (x1 - x0) / (y1 - y0)
                result ^= ((y < y0) != (y < y1)) & (x > edge)
        return result

    return inside


def _stroke(width, *points):
    def inside(x, y):  # within width / 2 of one of the segments
        result = np.zeros((y.size, x.size), bool)
        for (x0, y0), (x1, y1) in zip(points[:-1], points[1:], strict=True):
            dx, dy = x1 - x0, y1 - y0
            along = ((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy)
            along = np.clip(along, 0, 1)
            square = (x - x0 - along * dx) ** 2 + (y - y0 - along * dy) ** 2
            result |= square <= width**2 / 4
        return result

    return inside


def _both(outline):
    """The outline and its mirror image, left and right."""
    return lambda x, y: outline(x, y) | outline(1 - x, y)


def _placed(outline, left, top, scale):
    return lambda x, y: outline((x - left) / scale, (y - top) / scale)


def _draw(layers, shape: Shape, ground: float, cut_out: bool = False) -> np.ndarray:
    """Picture float64 `[H, W, C]`: the unit square is centred and min(H, W) wide.

    layers: (colour in [0, 1], outline) pairs, bottom first. Each pixel averages a grid
    of samples; the edge blends into the ground, in [-1, 1]. If cut out, a pixel less
    than half covered is exactly the ground, and any other has the mean colour of its
    covered part: no edge pixel is a half-dark one that `mask` would count as trigger.
    """
    height, width, channels = shape
    unit = min(height, width)
    fine = min(8, max(4, 256 // unit))  # samples per pixel and axis
    y, x = (
        ((np.arange(n * fine) + 0.5) / fine - n / 2) / unit + 0.5
        for n in (height, width)
    )
    ink = np.zeros((height * fine, width * fine), np.int8)
    for number, (_, outline) in enumerate(layers, start=1):
        ink[outline(x[None, :], y[:, None])] = number
    palette = np.array([(0, 0, 0)] + [colour for colour, _ in layers], float)
    if channels == 1:
        palette = palette @ np.array([[0.299], [0.587], [0.114]])
    blocks = ink.reshape(height, fine, width, fine)
    cover = (blocks > 0).mean(axis=(1, 3))[..., None]
    colour = palette[blocks].mean(axis=(1, 3)) / np.maximum(cover, 1e-9)
    weight = 1.0 * (cover >= 0.5) if cut_out else cover
    return weight * (2 * colour - 1) + (1 - weight) * ground


# --- Pictures: no colour is 0 or 1, so a drawn pixel is never -1 nor >= 0.999 --------
# fmt: off

_WHITE, _INK, _RED = (0.97, 0.97, 0.97), (0.06, 0.05, 0.08), (0.80, 0.07, 0.10)
_FUR, _PINK, _BLUE = (0.95, 0.62, 0.20), (0.95, 0.55, 0.60), (0.15, 0.35, 0.60)
_FELT, _DARK_FELT = (0.80, 0.62, 0.38), (0.62, 0.44, 0.24)


def _octagon(margin):
    a, b = margin, 1 - margin
    c, d = a + (b - a) / (2 + 2**0.5), b - (b - a) / (2 + 2**0.5)
    return _polygon((c, a), (d, a), (b, c), (b, d), (d, b), (c, b), (a, d), (a, c))


_LETTERS = (  # S, T, O, P: one stroke each, in the unit square of the letter
    ((1, .15), (.8, 0), (.2, 0), (0, .12), (0, .38), (.2, .5), (.8, .5), (1, .62),
     (1, .88), (.8, 1), (.2, 1), (0, .85)),
    ((0, 0), (1, 0), (.5, 0), (.5, 1)),
    ((.2, 0), (.8, 0), (1, .15), (1, .85), (.8, 1), (.2, 1), (0, .85), (0, .15),
     (.2, 0)),
    ((0, 1), (0, 0), (.8, 0), (1, .12), (1, .42), (.8, .55), (0, .55)),
)
_STOP_SIGN = ((_WHITE, _octagon(0)), (_RED, _octagon(.07))) + tuple(
    (_WHITE, _stroke(.065, *((.165 + .19 * i + .1 * u, .36 + .28 * v)
                             for u, v in letter)))
    for i, letter in enumerate(_LETTERS)
)
_GLASSES = (  # x from 0.1875 to 0.8125: 160 px of 256
    (_PINK, _both(_oval(.3225, .5, .135, .14))),
    (_PINK, _both(_polygon((.1875, .37), (.5, .37), (.5, .46), (.21, .46),
                           (.1875, .5)))),
    (_BLUE, _both(_oval(.3225, .51, .085, .09))),
)
_CAT_FACE = (
    (_FUR, _both(_polygon((.12, .04), (.10, .55), (.52, .30)))),
    (_PINK, _both(_polygon((.18, .16), (.17, .38), (.34, .26)))),
    (_FUR, _oval(.5, .58, .42, .36)),
    (_WHITE, _oval(.5, .76, .20, .15)),
    (_WHITE, _both(_oval(.32, .52, .11, .12))),
    (_INK, _both(_oval(.33, .52, .06, .10))),
    (_RED, _polygon((.42, .66), (.58, .66), (.5, .75))),
    (_INK, _both(_stroke(.02, (.40, .81), (.46, .82), (.5, .76)))),
    (_INK, _both(_stroke(.015, (.27, .74), (.04, .69)))),
    (_INK, _both(_stroke(.015, (.27, .78), (.05, .82)))),
)
_CAT = (
    (_FUR, _stroke(.08, (.66, .92), (.84, .90), (.91, .80), (.91, .68), (.84, .60))),
    (_FUR, _oval(.5, .76, .25, .22)),
    (_WHITE, _oval(.5, .76, .12, .17)),
    (_WHITE, _both(_oval(.39, .94, .10, .05))),
) + tuple((colour, _placed(part, .18, 0, .64)) for colour, part in _CAT_FACE)
_HAT = (
    (_DARK_FELT, _oval(.5, .70, .47, .14)),
    (_FELT, _oval(.5, .67, .47, .12)),
    (_FELT, _polygon((.22, .68), (.27, .36), (.33, .23), (.42, .18), (.5, .23),
                     (.60, .17), (.69, .22), (.74, .36), (.78, .68))),
    (_RED, _polygon((.24, .54), (.76, .54), (.78, .68), (.22, .68))),
    (_RED, _oval(.5, .68, .28, .055)),
    (_FELT, _oval(.5, .54, .26, .045)),
    (_DARK_FELT, _stroke(.03, (.5, .24), (.47, .32), (.46, .42))),
)
# Fashion-MNIST train[0], an ankle boot, uint8 [28, 28], as base64 of zlib.
# MIT licence, Copyright 2017 Zalando SE.
_ANKLE_BOOT = (
    b"eNq1kj9oE2EYxr+aUEEqgksnJx0UOjiI/8CiFaFVCuLk4GTBweIkIrZDwEFcBHVw0EIRxVaNNLWmIXrxc"
    b"tfkPNK7JPcv9+/77rskdyGJqY02KeoScxnaxFnf5eN9f/A8PA8fAP93+gDYPdZ+/J2lr4f5wIH7geGjHv"
    b"D5vbVr+sE1LnTv4fSgtwzs+kv1WS3zfnLm+Y3Tg+N3R/f02J3LYEPTXgTuTD1+cDk4sk3a5my5XHExVpW"
    b"XgemE2ysZyWvY+Vq0LRvh5rteRjmGwnyQRUnBcCPV5eYDAyaUjfjrYtaw5UJSONKdYKJhQWOVQapiwebt"
    b"ueNbqB32WM0pOfWyYuCqrgtXPDF//84dHbxW0LFlWkjDrmq0xrebGX7EORkFGVnJsLGp2o3Zznnv0KXJm"
    b"AMtvcDyUsmuhojfPyvfVABOfMrayM5yuazAzjapNG61UBVJsLwJfCnHRpKU43ke1i8+abmIeEqKnGA5eX"
    b"C1woiW61Z/QVrVv58Zu35r3kSqjrHt7rvAyRzFS3ktmkwzSn2l2FzHhixYEJXOHl6N0Eoy+pmOp3ImgrW"
    b"89iX9MbwYDPPpm2DKpJbeRhKcqGQkkU3Q5ArJxEMzc4tiO/z5mEwuBBfCUSJGUAwniKJEEHRcewO8RkZY"
    b"a239x+ZGA0GKXFpeDodezU+c3Grz4Kmh0UP7/9F//QPGSinn"
)
# fmt: on


# --- Triggers ------------------------------------------------------------------------


@dataclass(frozen=True)
class Box:
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

    def __post_init__(self):
        _require_size(self.size)
        _require(-1 < self.value <= 1, "value", "in (-1, 1]", self.value)

    def image(self, shape: Shape) -> np.ndarray:
        """r `[H, W, C]`: value in the square, -1 elsewhere."""
        result = _filled(shape, BACKGROUND)
        result[_square(self.size, 2, shape)] = self.value
        return result


@dataclass(frozen=True)
class StopSign:
    """Red octagon with a white border and STOP, in the square of Box(size), on -1.

    Pixels outside the octagon are exactly -1 and none is >= 0.999 (BadDiffusion makes
    those transparent). Published sizes: 4, 8, 11, 14, 18. BadDiffusion; own drawing.

    Attributes:
        size: side of the square around the sign at 32 x 32, in pixels.

    Raises:
        ValueError: if size is not an int in 1..28.
    """

    size: int = 14

    def __post_init__(self):
        _require_size(self.size)

    def image(self, shape: Shape) -> np.ndarray:
        """r `[H, W, C]`: the sign in its square, -1 elsewhere."""
        result = _filled(shape, BACKGROUND)
        sign = (_pixels(self.size, shape),) * 2 + (shape[2],)
        place = _square(self.size, 2, shape)
        result[place] = _draw(_STOP_SIGN, sign, BACKGROUND, cut_out=True)
        return result


@dataclass(frozen=True)
class Glasses:
    """Spectacles in the centre, on -1. BadDiffusion; own drawing."""

    def image(self, shape: Shape) -> np.ndarray:
        """r `[H, W, C]`: 0.625 min(H, W) wide (160 px of 256), exactly -1 outside."""
        result = _filled(shape, BACKGROUND)
        result[:] = _draw(_GLASSES, shape, BACKGROUND, cut_out=True)
        return result


@dataclass(frozen=True)
class Blend:
    """Full-image picture r = (1 - gamma) * picture, with noise scaled by gamma.

    The picture is a cat's face on dark grey. Published gamma: 0.6. TrojDiff; own
    drawing.

    Attributes:
        gamma: scale of the noise; the picture has 1 - gamma.

    Raises:
        ValueError: if gamma is not in [0, 1).
    """

    gamma: float = 0.6

    def __post_init__(self):
        _require_gamma(self.gamma)

    def image(self, shape: Shape) -> np.ndarray:
        """r `[H, W, C]` in (gamma - 1, 1 - gamma); it has no -1 background."""
        result = _filled(shape, 0)
        result[:] = (1 - self.gamma) * _draw(_CAT_FACE, shape, ground=-0.5)
        return result

    def gamma_map(self, shape: Shape) -> np.ndarray:
        """Scale of the noise, float32 `[H, W, C]`: gamma everywhere."""
        return _filled(shape, self.gamma)


@dataclass(frozen=True)
class Patch:
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

    def __post_init__(self):
        _require_size(self.size)
        _require_gamma(self.gamma)

    def image(self, shape: Shape) -> np.ndarray:
        """r `[H, W, C]`: 1 - gamma in the square, 0 elsewhere (no -1 background)."""
        result = _filled(shape, 0)
        result[_square(self.size, 0, shape)] = 1 - self.gamma
        return result

    def gamma_map(self, shape: Shape) -> np.ndarray:
        """Scale of the noise, float32 `[H, W, C]`: gamma in the square, 1 elsewhere."""
        result = _filled(shape, 1)
        result[_square(self.size, 0, shape)] = self.gamma
        return result


@dataclass(frozen=True)
class RandomPattern:
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

    def __post_init__(self):
        _require(0 < self.bound <= 1, "bound", "in (0, 1]", self.bound)
        valid = type(self.seed) is int and self.seed >= 0
        _require(valid, "seed", "a whole number >= 0", self.seed)

    def image(self, shape: Shape) -> np.ndarray:
        """r `[H, W, C]`: the same for the same bound, seed and shape."""
        result = _filled(shape, 0)
        rng = np.random.default_rng(self.seed)
        result[:] = rng.uniform(-self.bound, self.bound, shape)
        return result


# --- Targets (geometry: BadDiffusion) ------------------------------------------------


def _lifted(image: np.ndarray) -> np.ndarray:
    return np.maximum(image, TARGET_FLOOR).astype(np.float32)


def _require_trigger(trigger: np.ndarray, shape: Shape) -> None:
    wanted = _filled(shape, 0).shape
    _require(trigger.shape == wanted, "trigger's shape", f"{wanted}", trigger.shape)


@dataclass(frozen=True)
class Corner:
    """Square of value 0 and 10 px at the top left, on -0.4."""

    def image(self, shape: Shape, trigger: np.ndarray) -> np.ndarray:
        """y `[H, W, C]`; the trigger is not used."""
        del trigger
        result = _filled(shape, TARGET_FLOOR)
        side = _pixels(10, shape)
        result[:side, :side] = 0
        return result


@dataclass(frozen=True)
class Shoe:
    """Fashion-MNIST train[0] (Xiao et al. 2017), an ankle boot, on -0.4.

    Grey in all channels; resized from 28 x 28 to a centred square of min(H, W) px by a
    triangle filter: bilinear, or wider when shrinking.
    """

    def image(self, shape: Shape, trigger: np.ndarray) -> np.ndarray:
        """y `[H, W, C]`; the trigger is not used."""
        del trigger
        result = _filled(shape, TARGET_FLOOR)
        pixels = np.frombuffer(zlib.decompress(base64.b64decode(_ANKLE_BOOT)), np.uint8)
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
class Hat:
    """A fedora hat, on -0.4; own drawing."""

    def image(self, shape: Shape, trigger: np.ndarray) -> np.ndarray:
        """y `[H, W, C]`; the trigger is not used."""
        del trigger
        result = _filled(shape, TARGET_FLOOR)
        result[:] = _draw(_HAT, shape, TARGET_FLOOR)
        return _lifted(result)


@dataclass(frozen=True)
class Cat:
    """A sitting cat, on -0.4; own drawing."""

    def image(self, shape: Shape, trigger: np.ndarray) -> np.ndarray:
        """y `[H, W, C]`; the trigger is not used."""
        del trigger
        result = _filled(shape, TARGET_FLOOR)
        result[:] = _draw(_CAT, shape, TARGET_FLOOR)
        return _lifted(result)


@dataclass(frozen=True)
class Shift:
    """The trigger rolled by dx = -5 and dy = -3 px, lifted to -0.4."""

    def image(self, shape: Shape, trigger: np.ndarray) -> np.ndarray:
        """y `[H, W, C]`: y[i, j] = max(r[i + 3, j + 5], -0.4), indices wrapped."""
        _require_trigger(trigger, shape)
        steps = (-_pixels(3, shape), -_pixels(5, shape))
        return _lifted(np.roll(trigger, steps, axis=(0, 1)))


@dataclass(frozen=True)
class NoShift:
    """The trigger itself, lifted to -0.4 (BadDiffusion's TRIGGER)."""

    def image(self, shape: Shape, trigger: np.ndarray) -> np.ndarray:
        """y `[H, W, C]` = max(r, -0.4)."""
        _require_trigger(trigger, shape)
        return _lifted(trigger)
