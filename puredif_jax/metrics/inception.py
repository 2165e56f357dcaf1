"""The Inception network of the FID, without its last layer.

Inception v3 (Szegedy et al. 2016, arXiv 1512.00567) as the FID of Heusel et al. 2017
(arXiv 1706.08500) has it: it differs from the published network in its average
pooling, which leaves out the margin, and in the maximum that the last block takes in
place of an average. The features are the 2,048 means over positions.

Parameters have the names and the layout that pytorch-fid gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from puredif_jax.types import Array, Params

NAME = "inception"
SIDE, WIDTH = 299, 2048
EPSILON = 1e-3  # of the normalisation
PARTS = ("conv.weight", "bn.running_mean", "bn.running_var", "bn.weight", "bn.bias")

Size = tuple[int, int]
ONE: Size = (1, 1)

_Conv = Callable[..., Array]
"""(x, name, width, size=(1, 1), stride=1, padded=True) -> Array: see `_layer`."""


def features(params: Params, images: Array) -> Array:
    """Features `[B, 2048]` of images `[B, H, W, 3]` in [-1, 1].

    They are brought to 299x299 bilinearly, without smoothing.

    Args:
      params: as of `shapes`.
    """

    def conv(x: Array, name: str, width: int, size: Size = ONE, **how: Any) -> Array:
        own = {part: params[f"{name}.{part}"] for part in PARTS}
        return _layer(x, own, **how)

    count, *_, channels = images.shape
    return _network(
        conv,
        jax.image.resize(
            images, (count, SIDE, SIDE, channels), "linear", antialias=False
        ),
    )


def shapes() -> dict[str, jax.ShapeDtypeStruct]:
    """Names and shapes of the parameters, all float32: 21.8 million numbers."""
    found: dict[str, jax.ShapeDtypeStruct] = {}

    def conv(x: Array, name: str, width: int, size: Size = ONE, **how: Any) -> Array:
        own = {part: jnp.zeros((width,)) for part in PARTS}
        own[PARTS[0]] = jnp.zeros((width, x.shape[3], *size))
        for part, value in own.items():
            found[f"{name}.{part}"] = jax.ShapeDtypeStruct(value.shape, value.dtype)
        return _layer(x, own, **how)

    image = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
    jax.eval_shape(lambda x: _network(conv, x), image)
    return found


def _layer(
    x: Array, own: Mapping[str, Array], stride: int = 1, padded: bool = True
) -> Array:
    """A convolution without bias, normalised, with ReLU; padded only at stride 1."""
    x = lax.conv_general_dilated(
        x,
        own[PARTS[0]],
        (stride, stride),
        "SAME" if padded and stride == 1 else "VALID",
        dimension_numbers=("NHWC", "OIHW", "NHWC"),
    )
    mean, variance, scale, shift = (own[part][None, None, None] for part in PARTS[1:])
    scale = scale * lax.rsqrt(variance + EPSILON)
    found: Array = jax.nn.relu((x - mean) * scale + shift)
    return found


def _pooled(
    x: Array,
    start: float,
    by: Callable[[Array, Array], Array],
    stride: int,
    padding: str,
) -> Array:
    found: Array = lax.reduce_window(
        x, start, by, (1, 3, 3, 1), (1, stride, stride, 1), padding
    )
    return found


def _most(x: Array, stride: int = 2) -> Array:
    return _pooled(x, -jnp.inf, lax.max, stride, "VALID" if stride > 1 else "SAME")


def _mean(x: Array) -> Array:
    """Of 3x3 pixels, of those inside the image."""
    rows, columns = (np.convolve(np.ones(n), np.ones(3), "same") for n in x.shape[1:3])
    inside = np.outer(rows, columns).astype(np.float32)[None, :, :, None]
    return _pooled(x, 0.0, lax.add, 1, "SAME") / inside


def _network(conv: _Conv, x: Array) -> Array:
    x = conv(x, "Conv2d_1a_3x3", 32, (3, 3), stride=2)
    x = conv(x, "Conv2d_2a_3x3", 32, (3, 3), padded=False)
    x = conv(x, "Conv2d_2b_3x3", 64, (3, 3))
    x = conv(_most(x), "Conv2d_3b_1x1", 80)
    x = conv(x, "Conv2d_4a_3x3", 192, (3, 3), padded=False)
    x = _most(x)
    for name, pooled in (("5b", 32), ("5c", 64), ("5d", 64)):
        x = _block_a(conv, x, f"Mixed_{name}", pooled)
    x = _block_b(conv, x, "Mixed_6a")
    for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        x = _block_c(conv, x, f"Mixed_{name}", width)
    x = _block_d(conv, x, "Mixed_7a")
    x = _block_e(conv, x, "Mixed_7b", _mean)
    x = _block_e(conv, x, "Mixed_7c", lambda x: _most(x, stride=1))
    return jnp.mean(x, (1, 2))


def _chain(
    conv: _Conv, x: Array, name: str, *layers: tuple[int, Size], last: int = 1
) -> Array:
    """Convolutions one after another, numbered from 1; the last by a stride."""
    for number, (width, size) in enumerate(layers, 1):
        stride = last if number == len(layers) else 1
        x = conv(x, f"{name}_{number}", width, size, stride=stride)
    return x


def _block_a(conv: _Conv, x: Array, name: str, pooled: int) -> Array:
    parts = [
        conv(x, f"{name}.branch1x1", 64),
        _chain(conv, x, f"{name}.branch5x5", (48, ONE), (64, (5, 5))),
        _chain(conv, x, f"{name}.branch3x3dbl", (64, ONE), (96, (3, 3)), (96, (3, 3))),
        conv(_mean(x), f"{name}.branch_pool", pooled),
    ]
    return jnp.concatenate(parts, 3)


def _block_b(conv: _Conv, x: Array, name: str) -> Array:
    parts = [
        conv(x, f"{name}.branch3x3", 384, (3, 3), stride=2),
        _chain(
            conv,
            x,
            f"{name}.branch3x3dbl",
            (64, ONE),
            (96, (3, 3)),
            (96, (3, 3)),
            last=2,
        ),
        _most(x),
    ]
    return jnp.concatenate(parts, 3)


def _block_c(conv: _Conv, x: Array, name: str, width: int) -> Array:
    row, column = (1, 7), (7, 1)
    parts = [
        conv(x, f"{name}.branch1x1", 192),
        _chain(
            conv,
            x,
            f"{name}.branch7x7",
            (width, ONE),
            (width, row),
            (192, column),
        ),
        _chain(
            conv,
            x,
            f"{name}.branch7x7dbl",
            (width, ONE),
            (width, column),
            (width, row),
            (width, column),
            (192, row),
        ),
        conv(_mean(x), f"{name}.branch_pool", 192),
    ]
    return jnp.concatenate(parts, 3)


def _block_d(conv: _Conv, x: Array, name: str) -> Array:
    parts = [
        _chain(conv, x, f"{name}.branch3x3", (192, ONE), (320, (3, 3)), last=2),
        _chain(
            conv,
            x,
            f"{name}.branch7x7x3",
            (192, ONE),
            (192, (1, 7)),
            (192, (7, 1)),
            (192, (3, 3)),
            last=2,
        ),
        _most(x),
    ]
    return jnp.concatenate(parts, 3)


def _block_e(conv: _Conv, x: Array, name: str, pool: Callable[[Array], Array]) -> Array:
    def split(x: Array, name: str) -> list[Array]:
        return [
            conv(x, f"{name}{end}", 384, size)
            for end, size in (("a", (1, 3)), ("b", (3, 1)))
        ]

    single = conv(x, f"{name}.branch3x3_1", 384)
    double = _chain(conv, x, f"{name}.branch3x3dbl", (448, ONE), (384, (3, 3)))
    parts = [
        conv(x, f"{name}.branch1x1", 320),
        *split(single, f"{name}.branch3x3_2"),
        *split(double, f"{name}.branch3x3dbl_3"),
        conv(pool(x), f"{name}.branch_pool", 192),
    ]
    return jnp.concatenate(parts, 3)
