"""A 2-D convolution that is fast on CPU, also its gradient and inside a loop.

Inside a `while` or `scan`, XLA's CPU backend runs the two convolutions of the
backward pass on a slow path. It is 10 to 100 times slower than outside a loop
(jax-ml/jax#12868). Here both gradients are written as forward convolutions, which are
fast in both places; the one in the kernel has the batch as channels. Wide 3x3 kernels
are applied by F(2x2, 3x3) of Lavin and Gray, "Fast algorithms for convolutional neural
networks" (arXiv 1509.09308): 16 products of matrices for the 36 of four pixels. Other
platforms keep XLA's own. docs/speed.md has the figures.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
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


def _suits_winograd(
    x: Array, size: tuple[int, ...], stride: int, padding: Padding
) -> bool:
    """With few channels the sums before and after take as long as they save."""
    return (
        size[:2] == (3, 3)
        and min(size[2:]) >= 128
        and stride == 1
        and padding == ((1, 1), (1, 1))
        and not any(n % 2 for n in x.shape[1:3])
        and x.dtype == jnp.float32
    )


def _tiles(x: Array) -> list[list[Array]]:
    """B' d B of each 4x4 tile d, two pixels apart, of x padded by one.

    4 x 4 of `[B, H/2, W/2, C]`.
    """

    def along(x: Array, axis: int) -> list[Array]:
        end = x.shape[axis] - 3
        a, b, c, d = (lax.slice_in_dim(x, i, i + end, 2, axis=axis) for i in range(4))
        return [a - c, b + c, c - b, b - d]

    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return [along(row, 2) for row in along(padded, 1)]


def _products(tiles: list[list[Array]], taps: list[list[Array]]) -> list[list[Array]]:
    """Each tile `[B, h, w, C]` times its tap `[C, D]`.

    As matrices, for the gradient in a tap sums over rows, which XLA does without
    copies; over three axes it would transpose them first.
    """

    def product(tile: Array, tap: Array) -> Array:
        rows = tile.reshape(-1, tile.shape[-1]) @ tap
        return rows.reshape(*tile.shape[:-1], tap.shape[-1])

    return [
        [product(tile, tap) for tile, tap in zip(*row, strict=True)]
        for row in zip(tiles, taps, strict=True)
    ]


def _taps(kernel: Array) -> list[list[Array]]:
    """G kernel G': 4 x 4 of `[C, D]`."""

    def along(kernel: Array) -> list[Array]:
        a, b, c = kernel
        return [a, (a + b + c) / 2, (a - b + c) / 2, c]

    return [along(row) for row in along(kernel)]


def _turned(taps: list[list[Array]]) -> list[list[Array]]:
    """The taps of the kernel turned by half, from D channels to C."""
    order = (3, 1, 2, 0)
    return [[taps[i][j].T for j in order] for i in order]


def _pair(a: Array, b: Array, c: Array, d: Array) -> tuple[Array, Array]:
    """A' m along one axis."""
    return a + b + c, b - c - d


def _of_products(
    products: list[list[Array]], pair: Callable[..., tuple[Array, Array]] = _pair
) -> Array:
    """A' m A of each square of products m, two by two pixels: `[B, H, W, D]`."""
    rows = [pair(*column) for column in zip(*products, strict=True)]
    return _interleave([pair(*row) for row in zip(*rows, strict=True)])


def _interleave(parts: Sequence[Sequence[Array]]) -> Array:
    """One image of s x s parts: its pixel (s y + i, s x + j) is (y, x) of part i, j."""
    joined = jnp.stack([jnp.stack(row, axis=3) for row in parts], axis=2)
    batch, height, rows, width, columns, channels = joined.shape
    return joined.reshape(batch, height * rows, width * columns, channels)


def _input_gradient(
    g: Array, kernel: Array, x: Array, stride: int, padding: Padding
) -> Array:
    """d/dx <g, conv(x)>: g convolved with the turned kernel.

    With a stride s, the pixels of each of s x s phases meet some taps only.
    """
    if _suits_winograd(x, kernel.shape, stride, padding):
        return _of_products(_products(_tiles(g), _turned(_taps(kernel))))

    def phase(axis: int, first: int) -> tuple[slice, tuple[int, int]]:
        """The taps of the pixels first, first + s, ..., and the edges g needs."""
        before, taps = padding[axis][0], kernel.shape[axis]
        chosen = range(taps)[(first + before) % stride :: stride]
        if not chosen:
            return slice(0, 0), (0, 0)
        low, high = ((first + before - i) // stride for i in (chosen[-1], chosen[0]))
        pixels = -(-x.shape[1 + axis] // stride)
        return slice(chosen[0], None, stride), (-low, pixels + high - g.shape[1 + axis])

    def part(rows: Any, columns: Any) -> Array:
        taps = kernel[rows[0], columns[0]][::-1, ::-1].transpose(0, 1, 3, 2)
        if not taps.size:
            pixels = (-(-n // stride) for n in x.shape[1:3])
            return jnp.zeros((x.shape[0], *pixels, x.shape[3]), x.dtype)
        return _convolve(g, taps, 1, (rows[1], columns[1]))

    rows, columns = ([phase(axis, i) for i in range(stride)] for axis in (0, 1))
    parts = [[part(row, column) for column in columns] for row in rows]
    return _interleave(parts)[:, : x.shape[1], : x.shape[2]]


def _kernel_gradient(
    g: Array, x: Array, size: tuple[int, ...], stride: int, padding: Padding
) -> Array:
    """d/dkernel <g, conv(x)>: over the batch, g convolved with x or x with g.

    The one with more channels is the kernel. With strides, or with a single tap, the
    window of x at each offset times g is one matrix product. A wide 3x3 kernel has the
    gradient of its products.
    """
    if _suits_winograd(x, size, stride, padding):
        tiles = _tiles(x)

        def conv(kernel: Array) -> Array:
            return _of_products(_products(tiles, _taps(kernel)))

        found: Array = jax.vjp(conv, jnp.zeros(size, x.dtype))[1](g)[0]
        return found
    if stride > 1 or size[:2] == (1, 1):
        return _kernel_gradient_by_offset(g, x, size, stride, padding)
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


def _kernel_gradient_by_offset(
    g: Array, x: Array, size: tuple[int, ...], stride: int, padding: Padding
) -> Array:
    """The same gradient by products; XLA is slow at convolving a g with a stride."""
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
    def xla(x: Array, kernel: Array) -> Array:
        return _convolve(x, kernel, stride, padding)

    def cpu(x: Array, kernel: Array) -> Array:
        return _of_products(_products(_tiles(x), _taps(kernel)))

    if not _suits_winograd(x, kernel.shape, stride, padding):
        return xla(x, kernel)
    found: Array = lax.platform_dependent(x, kernel, cpu=cpu, default=xla)
    return found


Pair = tuple[Array, Array]


def _conv_fwd(
    x: Array, kernel: Array, stride: int, padding: Padding
) -> tuple[Array, Pair]:
    return _conv(x, kernel, stride, padding), (x, kernel)


def _conv_bwd(stride: int, padding: Padding, residuals: Pair, g: Array) -> Pair:
    x, kernel = residuals

    def xla(g: Array, x: Array, kernel: Array) -> Pair:
        pullback = jax.vjp(lambda a, b: _convolve(a, b, stride, padding), x, kernel)[1]
        dx, dkernel = pullback(g)
        return dx, dkernel

    def cpu(g: Array, x: Array, kernel: Array) -> Pair:
        return (
            _input_gradient(g, kernel, x, stride, padding),
            _kernel_gradient(g, x, kernel.shape, stride, padding),
        )

    gradients: Pair = lax.platform_dependent(g, x, kernel, cpu=cpu, default=xla)
    return gradients


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

    Each pixel is repeated twice along both axes; `[B, 2H, 2W, D]`. With taps a, b, c
    the two pixels made of p, whose neighbours are q and r, are on CPU

      a (q - p) + (a + b + c) p   and   (a + b + c) p - c (p - r),

    3 products for the 6 of an axis, so 9 for the 36 of both.
    """
    assert kernel.shape[:2] == (3, 3) and tuple(strides) == (1, 1)
    assert all(tuple(edge) == (1, 1) for edge in padding)

    def whole(x: Array, kernel: Array) -> Array:
        doubled = x.repeat(2, axis=1).repeat(2, axis=2)
        return conv_general_dilated(doubled, kernel, strides, padding, **options)

    def parts(x: Array, kernel: Array) -> Array:
        def along(x: Array, axis: int) -> list[Array]:
            end = x.shape[axis] - 2
            q, p, r = (lax.slice_in_dim(x, i, i + end, axis=axis) for i in range(3))
            return [q - p, p, p - r]

        def taps(kernel: Array) -> list[Array]:
            a, b, c = kernel
            return [a, a + b + c, c]

        def pair(a: Array, b: Array, c: Array) -> tuple[Array, Array]:
            return a + b, b - c

        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        tiles = [along(row, 2) for row in along(padded, 1)]
        products = _products(tiles, [taps(row) for row in taps(kernel)])
        return _of_products(products, pair)

    found: Array = lax.platform_dependent(x, kernel, cpu=parts, default=whole)
    return found
