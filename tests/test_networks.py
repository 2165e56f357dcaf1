"""Every network, called: dtypes, gradients, dropout, rows, slices, traces."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_unet
from test_unet import CHEAP, apply, assert_close, gradient
from tiny_config import shapes

from puredif_jax.networks.layers import normalise
from puredif_jax.networks.memory import activations, sliced
from puredif_jax.networks.ncsnpp import NCSNpp

SKIPS = NCSNpp(
    sample_size=(8, 8),
    in_channels=2,
    block_out_channels=(8, 8),
    down_block_types=("SkipDownBlock2D",) * 2,
    up_block_types=("SkipUpBlock2D",) * 2,
    layers_per_block=1,
)
each_tiny = pytest.mark.parametrize(
    "net", [test_unet.TINY, SKIPS], ids=lambda net: type(net).__name__
)
each_small = pytest.mark.parametrize(
    "net", [test_unet.SMALL, SKIPS], ids=lambda net: type(net).__name__
)


@functools.cache
def make_case(net):
    """(params, x, t), with no weight at zero."""
    rng = np.random.default_rng(0)

    def leaf(like):
        scale = max(1, np.prod(like.shape[:-1])) ** -0.5
        return jnp.asarray(scale * rng.standard_normal(like.shape), jnp.float32)

    x = jnp.asarray(rng.standard_normal((3, *net.image_shape)), jnp.float32)
    return jax.tree.map(leaf, shapes(net)), x, jnp.array([1, 7, 999])


def is_frequency(path) -> bool:
    return path[0].key == "time_proj"


@each_tiny
def test_fresh_network_predicts_zero(net):
    params = jax.jit(net.init, compiler_options=CHEAP)(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    _, x, t = make_case(net)
    assert net.image_shape == (8, 8, 2) == x.shape[1:]
    np.testing.assert_array_equal(apply(net, params, x, t), np.zeros(x.shape))


@each_tiny
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_bfloat16_computes_close_to_float32(net, param_dtype):
    params, x, t = make_case(net)
    half = dataclasses.replace(net, dtype="bfloat16", param_dtype=param_dtype)
    for path, leaf in jax.tree.leaves_with_path(shapes(half)):
        kept = "float32" if is_frequency(path) else param_dtype
        assert leaf.dtype == jnp.dtype(kept)
    cast = jax.tree.map(lambda v, like: v.astype(like.dtype), params, shapes(half))
    exact = np.asarray(apply(net, params, x, t))
    found = apply(half, cast, x, t)
    assert found.dtype == jnp.float32
    assert_close(found, exact, 0.05)
    assert np.abs(found - exact).max() > 1e-4


@each_tiny
@pytest.mark.parametrize("dtype,name", [("float32", "f32"), ("bfloat16", "bf16")])
def test_every_product_is_in_the_dtype(net, dtype, name):
    config = dataclasses.replace(net, dtype=dtype)
    text = gradient.lower(config, *make_case(net)).as_text()
    pattern = r"stablehlo\.(?:dot_general|convolution).* : \((\S+), (\S+)\) ->"
    kinds = [kind for pair in re.findall(pattern, text) for kind in pair]
    assert len(kinds) > 40 and all(kind.endswith(f"x{name}>") for kind in kinds)


def test_a_norm_sums_no_gradient_over_pixels_and_images_at_once():
    """XLA would make that of the bias so, besides the sums over pixels alone."""

    def loss(x, scale, bias):
        return jnp.sin(normalise(x, scale, bias, 2, 1e-5, "float32")).sum()

    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((3, 4, 4, 8), (8,), (8,))
    ]
    made = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes).compile()
    summed = set(re.findall(r" reduce\(.*dimensions=\{([\d,]+)\}", made.as_text()))
    assert "1,2" in summed and "0,1,2" not in summed


@each_tiny
def test_bfloat16_has_float32_gradients(net):
    half = dataclasses.replace(net, dtype="bfloat16")
    slopes, _ = gradient(half, *make_case(net))
    for leaf in jax.tree.leaves(slopes):
        assert leaf.dtype == jnp.float32 and np.isfinite(leaf).all()


@each_tiny
def test_every_parameter_but_the_frequencies_has_a_gradient(net):
    (by_params, by_x), _ = gradient(net, *make_case(net))
    assert np.abs(by_x).min() > 0
    for path, leaf in jax.tree.leaves_with_path(by_params):
        assert np.isfinite(leaf).all()
        assert np.any(leaf) != is_frequency(path), jax.tree_util.keystr(path)


@each_tiny
def test_dropout_needs_a_key_and_a_rate(net):
    case = make_case(net)
    dropping = dataclasses.replace(net, dropout=0.5)
    one, two = jax.random.split(jax.random.key(0))
    plain = apply(net, *case)
    np.testing.assert_array_equal(apply(net, *case), plain)
    np.testing.assert_array_equal(apply(dropping, *case), plain)
    np.testing.assert_array_equal(apply(net, *case, one), plain)
    dropped = apply(dropping, *case, one)
    np.testing.assert_array_equal(apply(dropping, *case, one), dropped)
    assert np.abs(dropped - plain).max() > 1e-2
    assert np.abs(dropped - apply(dropping, *case, two)).max() > 1e-2


@each_small
def test_gradient_in_the_image_is_finite_and_right(net):
    params, x, t = make_case(net)

    @functools.partial(jax.jit, compiler_options=CHEAP)
    @jax.value_and_grad
    def loss(x):
        return jnp.square(net(params, x, t)).sum()

    _, slope = loss(x)
    assert slope.shape == x.shape and np.isfinite(slope).all()
    norm = jnp.linalg.norm(slope)
    step = 1e-2 * slope / norm
    rise = float(loss(x + step)[0]) - float(loss(x - step)[0])
    np.testing.assert_allclose(rise / 2e-2, norm, rtol=1e-2)


@each_small
def test_rows_are_independent(net):
    params, x, t = make_case(net)
    others = apply(net, params, x.at[1:].add(1), t.at[1:].set(3))
    expected = np.asarray(apply(net, params, x, t))
    assert_close(others[0], expected[0], 1e-5)
    assert np.abs(others[1:] - expected[1:]).max() > 0.1


@each_tiny
def test_slices_give_the_numbers_of_the_whole(net):
    params, x, t = make_case(net)

    def both(model):
        def loss(x):
            out = model(params, x, t)
            return jnp.square(out).sum(), out

        grad = jax.grad(loss, has_aux=True)
        return jax.jit(grad, compiler_options=CHEAP)(x)

    whole, parts = both(net), both(sliced(net, 2))
    for found, expected in zip(parts, whole, strict=True):
        assert_close(found, np.asarray(expected), 1e-5)


@each_tiny
def test_less_is_kept_where_blocks_are_made_anew(net):
    light = dataclasses.replace(net, remat=True)
    kept = activations(net, shapes(net), net.image_shape)
    assert 0 < activations(light, shapes(net), net.image_shape) < kept
    case = make_case(net)
    (_, by_x), out = gradient(light, *case)
    (_, wanted), exact = gradient(net, *case)
    assert_close(out, np.asarray(exact), 1e-5)
    assert_close(by_x, np.asarray(wanted), 1e-5)


@each_tiny
def test_one_trace_for_each_shape_and_configuration(net):
    traces = []

    @functools.partial(jax.jit, static_argnums=0, compiler_options=CHEAP)
    def traced(net, params, x, t):
        traces.append(x.shape)
        return net(params, x, t)

    params, x, t = make_case(net)
    for _ in range(2):
        traced(dataclasses.replace(net), params, x, t)
    traced(net, params, x[:2], t[:2])
    traced(net, params, x[1:], t[1:])
    assert traces == [(3, 8, 8, 2), (2, 8, 8, 2)]


@each_small
def test_ranks_are_checked(net):
    params, x, t = make_case(net)
    for bad in ((x[0], t), (x, t[0])):
        with pytest.raises(AssertionError, match="rank"):
            net(params, *bad)


@each_small
def test_configuration_is_a_hashable_value(net):
    twin = dataclasses.replace(net)
    assert twin == net and twin is not net and hash(twin) == hash(net)
    assert dataclasses.replace(net, dropout=0.1) != net
    with pytest.raises(dataclasses.FrozenInstanceError):
        net.dropout = 0.1
