"""Up- and down-sampling by two with the FIR kernel (1, 3, 3, 1).

A smooth kernel in place of a mean of four pixels: Karras et al., "Analyzing and
improving the image quality of StyleGAN" (arXiv 1912.04958), as in NCSN++. Both are
written per axis, as sums of shifted images: XLA fuses these, and has no fast
convolution of each channel alone on CPU.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from puredif_jax.types import Array

_AXES = (1, 2)  # of `[B, H, W, C]`


def _padded(x: Array, axis: int) -> Array:
    """x with a zero before and after along an axis."""
    return jnp.pad(x, [(int(i == axis),) * 2 for i in range(x.ndim)])


def fir_downsample(x: Array) -> Array:
    """`[B, H/2, W/2, C]` of x `[B, H, W, C]`, whose sides are even.

    Along each axis y_i = (x_{2i-1} + 3 x_{2i} + 3 x_{2i+1} + x_{2i+2}) / 8, with zeros
    outside of the image.
    """
    for axis in _AXES:
        size, padded = x.shape[axis], _padded(x, axis)
        a, b, c, d = (
            lax.slice_in_dim(padded, i, i + size - 1, 2, axis=axis) for i in range(4)
        )
        x = (a + d + 3 * (b + c)) / 8
    return x


def fir_upsample(x: Array) -> Array:
    """`[B, 2H, 2W, C]` of x `[B, H, W, C]`.

    Along each axis y_{2i} = (x_{i-1} + 3 x_i) / 4 and y_{2i+1} = (3 x_i + x_{i+1}) / 4,
    with zeros outside of the image: four times the transpose of `fir_downsample`.
    """
    for axis in _AXES:
        size, padded = x.shape[axis], _padded(x, axis)
        before, after = (
            lax.slice_in_dim(padded, i, i + size, axis=axis) for i in (0, 2)
        )
        pairs = jnp.stack([before + 3 * x, 3 * x + after], axis=axis + 1) / 4
        x = pairs.reshape(*x.shape[:axis], 2 * size, *x.shape[axis + 1 :])
    return x
