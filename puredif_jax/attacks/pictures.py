"""Pictures drawn from ovals, polygons and strokes, and the canvas that they lie on.

They share the place and size of the published ones, not their pixels. Lengths are
pixels of a 32 x 32 image; at another size they are multiplied by min(H, W) / 32,
rounded half up, at least 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Shape = tuple[int, int, int]
Point = tuple[float, float]
Colour = tuple[float, float, float]
Outline = Callable[[np.ndarray, np.ndarray], np.ndarray]


# --- Checks and lengths --------------------------------------------------------------


def require(valid: bool, name: str, rule: str, found: object) -> None:
    """Raises ValueError, which names the rule and what was found, unless valid."""
    if not valid:
        raise ValueError(f"{name} must be {rule}, found {found!r}.")


def filled(shape: Shape, value: float) -> np.ndarray:
    """A new float32 canvas `[H, W, C]` of one value.

    Raises:
        ValueError: if shape is not (H, W, C) with H, W >= 8 and C 1 or 3.
    """
    valid = len(shape) == 3 and min(shape[:2]) >= 8 and shape[2] in (1, 3)
    require(valid, "shape", "(H, W, C) with H, W >= 8 and C 1 or 3", tuple(shape))
    return np.full(shape, value, np.float32)


def pixels(length: int, shape: Shape) -> int:
    """A length at 32 x 32, in pixels of `shape`."""
    return max(1, int(length * min(shape[:2]) / 32 + 0.5))


# --- Rasteriser: an outline tells which points x [1, n], y [m, 1] are inside it ------


def oval(cx: float, cy: float, rx: float, ry: float) -> Outline:
    """Around (cx, cy), rx and ry from it to the edge."""
    return lambda x, y: ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1


def polygon(*points: Point) -> Outline:
    """Between straight edges from corner to corner, and from the last to the first."""

    def inside(
        x: np.ndarray, y: np.ndarray
    ) -> np.ndarray:  # even-odd rule: count the edges crossed by a ray to the left
        result = np.zeros((y.size, x.size), bool)
        for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
            if y0 != y1:
                edge = x0 + (y - y0) * (x1 - x0) / (y1 - y0)
                result ^= ((y < y0) != (y < y1)) & (x > edge)
        return result

    return inside


def stroke(width: float, *points: Point) -> Outline:
    """A line of that width from point to point, with round ends."""

    def inside(
        x: np.ndarray, y: np.ndarray
    ) -> np.ndarray:  # within width / 2 of one of the segments
        result = np.zeros((y.size, x.size), bool)
        for (x0, y0), (x1, y1) in zip(points[:-1], points[1:], strict=True):
            dx, dy = x1 - x0, y1 - y0
            along = ((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy)
            along = np.clip(along, 0, 1)
            square = (x - x0 - along * dx) ** 2 + (y - y0 - along * dy) ** 2
            result |= square <= width**2 / 4
        return result

    return inside


def both(outline: Outline) -> Outline:
    """The outline and its mirror image, left and right."""
    return lambda x, y: outline(x, y) | outline(1 - x, y)


def placed(outline: Outline, left: float, top: float, scale: float) -> Outline:
    """The outline made smaller by a factor, its unit square at (left, top)."""
    return lambda x, y: outline((x - left) / scale, (y - top) / scale)


def draw(
    layers: Sequence[tuple[Colour, Outline]],
    shape: Shape,
    ground: float,
    cut_out: bool = False,
) -> np.ndarray:
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
    found: np.ndarray = weight * (2 * colour - 1) + (1 - weight) * ground
    return found


# --- Pictures: no colour is 0 or 1, so a drawn pixel is never -1 nor >= 0.999 --------
# fmt: off

_WHITE, _INK, _RED = (0.97, 0.97, 0.97), (0.06, 0.05, 0.08), (0.80, 0.07, 0.10)
_FUR, _PINK, _BLUE = (0.95, 0.62, 0.20), (0.95, 0.55, 0.60), (0.15, 0.35, 0.60)
_FELT, _DARK_FELT = (0.80, 0.62, 0.38), (0.62, 0.44, 0.24)


def _octagon(margin: float) -> Outline:
    a, b = margin, 1 - margin
    c, d = a + (b - a) / (2 + 2**0.5), b - (b - a) / (2 + 2**0.5)
    return polygon((c, a), (d, a), (b, c), (b, d), (d, b), (c, b), (a, d), (a, c))


_LETTERS = (  # S, T, O, P: one stroke each, in the unit square of the letter
    ((1, .15), (.8, 0), (.2, 0), (0, .12), (0, .38), (.2, .5), (.8, .5), (1, .62),
     (1, .88), (.8, 1), (.2, 1), (0, .85)),
    ((0, 0), (1, 0), (.5, 0), (.5, 1)),
    ((.2, 0), (.8, 0), (1, .15), (1, .85), (.8, 1), (.2, 1), (0, .85), (0, .15),
     (.2, 0)),
    ((0, 1), (0, 0), (.8, 0), (1, .12), (1, .42), (.8, .55), (0, .55)),
)
STOP_SIGN = ((_WHITE, _octagon(0)), (_RED, _octagon(.07))) + tuple(
    (_WHITE, stroke(.065, *((.165 + .19 * i + .1 * u, .36 + .28 * v)
                             for u, v in letter)))
    for i, letter in enumerate(_LETTERS)
)
GLASSES = (  # x from 0.1875 to 0.8125: 160 px of 256
    (_PINK, both(oval(.3225, .5, .135, .14))),
    (_PINK, both(polygon((.1875, .37), (.5, .37), (.5, .46), (.21, .46),
                           (.1875, .5)))),
    (_BLUE, both(oval(.3225, .51, .085, .09))),
)
CAT_FACE = (
    (_FUR, both(polygon((.12, .04), (.10, .55), (.52, .30)))),
    (_PINK, both(polygon((.18, .16), (.17, .38), (.34, .26)))),
    (_FUR, oval(.5, .58, .42, .36)),
    (_WHITE, oval(.5, .76, .20, .15)),
    (_WHITE, both(oval(.32, .52, .11, .12))),
    (_INK, both(oval(.33, .52, .06, .10))),
    (_RED, polygon((.42, .66), (.58, .66), (.5, .75))),
    (_INK, both(stroke(.02, (.40, .81), (.46, .82), (.5, .76)))),
    (_INK, both(stroke(.015, (.27, .74), (.04, .69)))),
    (_INK, both(stroke(.015, (.27, .78), (.05, .82)))),
)
CAT = (
    (_FUR, stroke(.08, (.66, .92), (.84, .90), (.91, .80), (.91, .68), (.84, .60))),
    (_FUR, oval(.5, .76, .25, .22)),
    (_WHITE, oval(.5, .76, .12, .17)),
    (_WHITE, both(oval(.39, .94, .10, .05))),
) + tuple((colour, placed(part, .18, 0, .64)) for colour, part in CAT_FACE)
HAT = (
    (_DARK_FELT, oval(.5, .70, .47, .14)),
    (_FELT, oval(.5, .67, .47, .12)),
    (_FELT, polygon((.22, .68), (.27, .36), (.33, .23), (.42, .18), (.5, .23),
                     (.60, .17), (.69, .22), (.74, .36), (.78, .68))),
    (_RED, polygon((.24, .54), (.76, .54), (.78, .68), (.22, .68))),
    (_RED, oval(.5, .68, .28, .055)),
    (_FELT, oval(.5, .54, .26, .045)),
    (_DARK_FELT, stroke(.03, (.5, .24), (.47, .32), (.46, .42))),
)
# Fashion-MNIST train[0], an ankle boot, uint8 [28, 28], as base64 of zlib.
# MIT licence, Copyright 2017 Zalando SE.
ANKLE_BOOT = (
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
