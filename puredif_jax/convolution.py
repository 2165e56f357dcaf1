"""A 2-D convolution whose gradient is fast inside a loop on CPU.

Inside a `while` or `scan`, XLA's CPU backend runs the two convolutions of the
backward pass on a path that is 10 to 100 times slower than outside one
(jax-ml/jax#12868). Here both gradients are written as forward convolutions, that in
the kernel with the batch as channels, which are fast in both places. Other platforms
keep XLA's own gradient. docs/speed.md has the figures.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from puredif_jax.types import Array

Padding = tuple[tuple[int, int], ...]
LAYOUT = ("NHWC", "HWIO", "NHWC")


def _convolve(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=LAYOUT
    )


def _input_gradient(
    g: Array, kernel: Array, x: Array, stride: int, padding: Padding
) -> Array:
    """d/dx <g, conv(x)>: g, spread by the stride, convolved with the turned kernel."""
    edges = []
    for axis, (before, _) in enumerate(padding, start=1):
        reach = kernel.shape[axis - 1] - 1 - before
        spread = (g.shape[axis] - 1) * stride + 1
        after = x.shape[axis] + kernel.shape[axis - 1] - 1 - spread - reach
        edges.append((reach, after))
    turned = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
    if stride > 1:
        gaps = [(*edge, stride - 1) for edge in edges]
        g = lax.pad(g, jnp.zeros((), g.dtype), ((0, 0, 0), *gaps, (0, 0, 0)))
        edges = [(0, 0), (0, 0)]
    return _convolve(g, turned, 1, tuple(edges))


def _kernel_gradient(
    g: Array, x: Array, size: tuple[int, ...], stride: int, padding: Padding
) -> Array:
    """d/dkernel <g, conv(x)>: over the batch, g convolved with x or x with g.

    The one with more channels is the kernel. With strides, at each offset the window of
    x times g is one matrix product.
    """
    if stride > 1:
        return _strided_kernel_gradient(g, x, size, stride, padding)
    edges = tuple(
        (before, g.shape[axis] + size[axis - 1] - 1 - x.shape[axis] - before)
        for axis, (before, _) in enumerate(padding, start=1)
    )
    if x.shape[-1] < g.shape[-1]:
        image, kernel = x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)
        return _convolve(image, kernel, 1, edges).transpose(1, 2, 0, 3)
    turned_edges = tuple(
        (n - 1 - before, n - 1 - after)
        for n, (before, after) in zip(size[:2], edges, strict=True)
    )
    image, kernel = g.transpose(3, 1, 2, 0), x.transpose(1, 2, 0, 3)
    turned = _convolve(image, kernel, 1, turned_edges)
    return turned[:, ::-1, ::-1].transpose(1, 2, 3, 0)


def _strided_kernel_gradient(
    g: Array, x: Array, size: tuple[int, ...], stride: int, padding: Padding
) -> Array:
    """The same by products, for XLA makes a slow convolution of the spread g."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    rows, columns = ((n - 1) * stride + 1 for n in g.shape[1:3])
    flat = g.reshape(-1, g.shape[-1])

    def at(i: int, j: int) -> Array:
        window = x[:, i : i + rows : stride, j : j + columns : stride]
        return window.reshape(-1, x.shape[-1]).T @ flat

    return jnp.stack(
        [jnp.stack([at(i, j) for j in range(size[1])]) for i in range(size[0])]
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    return _convolve(x, kernel, stride, padding)


def _conv_fwd(x: Array, kernel: Array, stride: int, padding: Padding):
    return _convolve(x, kernel, stride, padding), (x, kernel)


def _conv_bwd(stride: int, padding: Padding, residuals, g: Array):
    x, kernel = residuals

    def xla(g: Array, x: Array, kernel: Array):
        return jax.vjp(lambda a, b: _convolve(a, b, stride, padding), x, kernel)[1](g)

    def cpu(g: Array, x: Array, kernel: Array):
        return (
            _input_gradient(g, kernel, x, stride, padding),
            _kernel_gradient(g, x, kernel.shape, stride, padding),
        )

    return lax.platform_dependent(g, x, kernel, cpu=cpu, default=xla)


_conv.defvjp(_conv_fwd, _conv_bwd)


def conv_general_dilated(
    x: Array,
    kernel: Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    *,
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
    dimension_numbers: lax.ConvDimensionNumbers,
    feature_group_count: int,
    precision: lax.PrecisionLike,
) -> Array:
    """`lax.conv_general_dilated` for `flax.linen.Conv`, undilated and ungrouped.

    x `[B, H, W, C]`, kernel `[h, w, C, D]`, one stride for both axes. Not
    differentiable in forward mode.
    """
    del dimension_numbers, precision
    assert feature_group_count == 1 and strides[0] == strides[1]
    assert all(n == 1 for n in (*lhs_dilation, *rhs_dilation))
    rows, columns = padding
    return _conv(x, kernel, strides[0], (tuple(rows), tuple(columns)))


def conv_of_upsampled(
    x: Array,
    kernel: Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **options: Any,
) -> Array:
    """`conv_general_dilated` of x `[B, H, W, C]` doubled, for a 3x3 kernel at stride 1.

    Each pixel is repeated twice along both axes; `[B, 2H, 2W, D]`. Of three taps on
    doubled pixels two fall on the same one, so on CPU every second row and column is
    a 2x2 convolution of x itself, with summed taps: 4 products instead of 9.
    """
    assert kernel.shape[:2] == (3, 3) and tuple(strides) == (1, 1)
    assert all(tuple(edge) == (1, 1) for edge in padding)

    def whole(x: Array, kernel: Array) -> Array:
        doubled = x.repeat(2, axis=1).repeat(2, axis=2)
        return conv_general_dilated(doubled, kernel, strides, padding, **options)

    def parts(x: Array, kernel: Array) -> Array:
        pairs = [_summed(taps, 1) for taps in _summed(kernel, 0)]
        rows = [
            [_conv(x, pairs[i][j], 1, ((1 - i, i), (1 - j, j))) for j in (0, 1)]
            for i in (0, 1)
        ]
        joined = jnp.stack([jnp.stack(row, axis=3) for row in rows], axis=2)
        batch, height, _, width, _, channels = joined.shape
        return joined.reshape(batch, 2 * height, 2 * width, channels)

    return lax.platform_dependent(x, kernel, cpu=parts, default=whole)


def _summed(kernel: Array, axis: int) -> tuple[Array, Array]:
    """The two taps of even and of odd places of a doubled axis, from its three."""
    first, second, third = jnp.split(kernel, 3, axis)
    even = jnp.concatenate([first, second + third], axis)
    return even, jnp.concatenate([first + second, third], axis)
