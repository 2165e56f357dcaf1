"""convolution: values and both gradients equal those of XLA's own convolution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from puredif_jax.networks.convolution import (
    LAYOUT,
    conv_general_dilated,
    conv_of_upsampled,
)

OPTIONS = {
    "lhs_dilation": (1, 1),
    "rhs_dilation": (1, 1),
    "dimension_numbers": lax.ConvDimensionNumbers(*((0, 3, 1, 2),) * 3),
    "feature_group_count": 1,
    "precision": None,
}
NONE, ONE, AFTER = (0, 0), (1, 1), (0, 1)


def ours(x, kernel, stride, padding):
    """As `flax.linen.Conv` calls it."""
    return conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        **OPTIONS,
    )


def xla(x, kernel, stride, padding):
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=LAYOUT
    )


def arrays(size=(8, 8), kernel=(3, 3), batch=2, channels=(3, 4)):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, *size, channels[0]), np.float32)
    weights = rng.standard_normal((*kernel, *channels), np.float32)
    return jnp.asarray(x), jnp.asarray(weights)


def value_and_gradients(conv, stride, padding):
    """(y, dx, dkernel) of <g, conv(x)> for a g that is not constant."""

    def function(x, kernel):
        y, pull = jax.vjp(lambda a, b: conv(a, b, stride, padding), x, kernel)
        g = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return y, *pull(g)

    return function


def assert_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        scale = np.abs(b).max()
        assert scale > 0.1
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * scale)


CASES = [  # kernel, padding of rows and columns, image
    ((3, 3), (ONE, ONE), (8, 8)),
    ((3, 3), (ONE, ONE), (7, 5)),
    ((3, 3), (AFTER, AFTER), (8, 8)),
    ((3, 3), (AFTER, AFTER), (7, 5)),
    ((3, 3), (NONE, NONE), (6, 7)),
    ((1, 1), (NONE, NONE), (8, 7)),
    ((1, 1), (AFTER, AFTER), (7, 5)),
    ((1, 1), (ONE, ONE), (4, 5)),
    ((3, 1), (ONE, AFTER), (5, 6)),
]


@pytest.mark.parametrize("kernel, padding, size", CASES)
def test_equals_xla_under_jit(kernel, padding, size):
    def both(x, weights):
        for stride in (1, 2):
            for conv in (ours, xla):
                yield value_and_gradients(conv, stride, padding)(x, weights)

    found = jax.jit(lambda *a: list(both(*a)))(*arrays(size, kernel))
    assert_close(found[0], found[1])
    assert_close(found[2], found[3])


@pytest.mark.parametrize("kernel, padding, size", CASES[2:7:3])
def test_equals_xla_outside_jit(kernel, padding, size):
    found, expected = (
        value_and_gradients(conv, 2, padding)(*arrays(size, kernel))
        for conv in (ours, xla)
    )
    assert_close(found, expected)


@pytest.mark.parametrize("size", [(2, 2), (4, 6), (5, 4)])
@pytest.mark.parametrize("channels", [(128, 128), (136, 128)])
def test_wide_kernels_equal_xla(size, channels):
    """Alone, under vmap over images, in a scan, and differentiated twice.

    An odd side has no tiles of two by two.
    """
    x, weights = arrays(size, channels=channels)
    weights /= np.sqrt(9 * channels[0])
    xs = jnp.stack([x, 2 * x, -x])

    def curvature(conv):
        def energy(x, weights):
            return jnp.sum(jnp.sin(conv(x, weights, 1, (ONE, ONE))))

        def norm(x, weights):
            return jnp.sum(jax.grad(energy)(x, weights) ** 2)

        return jax.grad(norm, argnums=(0, 1))

    def everything(conv):
        each = value_and_gradients(conv, 1, (ONE, ONE))

        def program(x, xs, weights):
            many = jax.vmap(each, (0, None))(xs, weights)
            _, looped = lax.scan(lambda _, x: (None, each(x, weights)), None, xs)
            return [*each(x, weights), *many, *looped, *curvature(conv)(x, weights)]

        return jax.jit(program)(x, xs, weights)

    assert_close(everything(ours), everything(xla))


def test_wide_kernels_are_applied_by_products_of_tiles():
    """Sixteen and no convolution, forwards and in both gradients; on CPU alone."""
    x, weights = arrays((4, 4), channels=(128, 128))
    made = jax.jit(value_and_gradients(ours, 1, (ONE, ONE))).trace(x, weights)
    for platform, products in (("cpu", 3 * 16), ("tpu", 0)):
        text = made.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.dot_general") == products
        assert text.count("stablehlo.convolution") == (3 if platform == "tpu" else 0)


STRIDES = [(1, (ONE, ONE)), (2, (AFTER, AFTER))]
over_strides = pytest.mark.parametrize("stride, padding", STRIDES)


@over_strides
def test_equals_a_naive_loop(stride, padding):
    x, weights = arrays((5, 6))
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), *padding, (0, 0)))
    found = ours(x, weights, stride, padding)
    for row, column in np.ndindex(*found.shape[1:3]):
        window = padded[:, row * stride :, column * stride :][:, :3, :3]
        expected = np.einsum("bijc,ijcd->bd", window, np.asarray(weights, np.float64))
        np.testing.assert_allclose(
            found[:, row, column], expected, rtol=1e-4, atol=1e-5
        )


@over_strides
def test_equals_xla_under_vmap_over_images(stride, padding):
    x, weights = arrays((7, 6), batch=6)
    x = x.reshape(3, 2, 7, 6, 3)
    found, expected = (
        jax.jit(jax.vmap(value_and_gradients(conv, stride, padding), (0, None)))(
            x, weights
        )
        for conv in (ours, xla)
    )
    assert found[2].shape == (3, 3, 3, 3, 4)  # a kernel gradient for each
    assert_close(found, expected)


@over_strides
def test_equals_xla_inside_a_scan(stride, padding):
    """Gradients taken in the body, and through the whole scan."""
    x, weights = arrays((6, 6), batch=1, channels=(3, 3))
    xs = jnp.stack([x, 2 * x, -x])

    def run(conv):
        inside = value_and_gradients(conv, stride, padding)

        def body(carry, x):
            del x
            y = conv(carry, weights, 1, (ONE, ONE))
            return 0.1 * jnp.tanh(y), jnp.mean(conv(y, weights, stride, padding) ** 2)

        def through(x, weights):
            def step(carry, _):
                y = jnp.tanh(conv(carry, weights, 1, (ONE, ONE)))
                return y, jnp.sum(conv(y, weights, stride, padding) ** 2)

            return jnp.sum(lax.scan(step, x, None, length=3)[1])

        @jax.jit
        def program(xs, weights):
            _, each = lax.scan(lambda _, x: (None, inside(x, weights)), None, xs)
            return *each, *jax.grad(through, argnums=(0, 1))(xs[0], weights)

        return program(xs, weights)

    assert_close(run(ours), run(xla))


def test_gradient_can_be_differentiated_again():
    x, weights = arrays((4, 4), channels=(2, 2))

    def second(conv):
        def energy(x, weights):
            return jnp.sum(conv(x, weights, 1, (ONE, ONE)) ** 2)

        def norm(x, weights):
            return jnp.sum(jax.grad(energy)(x, weights) ** 2)

        return jax.jit(jax.grad(norm, argnums=(0, 1)))(x, weights)

    assert_close(second(ours), second(xla))


@pytest.mark.parametrize(
    "changes",
    [
        {"strides": (1, 2)},
        {"feature_group_count": 3},
        {"rhs_dilation": (2, 2)},
        {"lhs_dilation": (2, 2)},
    ],
)
def test_what_it_does_not_do_is_refused(changes):
    arguments = OPTIONS | {"strides": (1, 1), "padding": (ONE, ONE)} | changes
    with pytest.raises(AssertionError):
        conv_general_dilated(*arrays(), **arguments)


def test_half_precision_keeps_its_dtype():
    x, weights = (a.astype(jnp.bfloat16) for a in arrays())

    def gradients(conv):
        def loss(x, weights):
            return jnp.sum(conv(x, weights, 2, (ONE, ONE)).astype(jnp.float32) ** 2)

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(x, weights)

    for a, b in zip(gradients(ours), gradients(xla), strict=True):
        assert a.dtype == jnp.bfloat16
        scale = float(jnp.abs(b).max())
        a, b = (np.asarray(c, np.float32) for c in (a, b))
        np.testing.assert_allclose(a, b, atol=0.03 * scale)


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 2)])
def test_of_upsampled_equals_upsampling_and_xla(size):
    """Also under vmap over images."""

    def whole(x, kernel, stride, padding):
        return xla(x.repeat(2, axis=1).repeat(2, axis=2), kernel, stride, padding)

    def parts(x, kernel, stride, padding):
        return conv_of_upsampled(x, kernel, (stride, stride), padding, **OPTIONS)

    x, weights = arrays(size)
    found, expected = (
        value_and_gradients(conv, 1, (ONE, ONE)) for conv in (parts, whole)
    )
    assert_close(jax.jit(found)(x, weights), jax.jit(expected)(x, weights))
    xs = jnp.stack([x, 2 * x])
    many, wanted = (
        jax.jit(jax.vmap(each, (0, None)))(xs, weights) for each in (found, expected)
    )
    assert_close(many, wanted)


@pytest.mark.parametrize("kernel,stride", [((2, 2), 1), ((3, 3), 2)])
def test_of_upsampled_is_for_one_kind_of_layer(kernel, stride):
    x, weights = arrays(kernel=kernel)
    with pytest.raises(AssertionError):
        conv_of_upsampled(x, weights, (stride, stride), (ONE, ONE), **OPTIONS)
