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
        edges.append((reach, after, stride - 1))
    spread_g = lax.pad(g, jnp.zeros((), g.dtype), ((0, 0, 0), *edges, (0, 0, 0)))
    turned = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
    return _convolve(spread_g, turned, 1, ((0, 0), (0, 0)))


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
