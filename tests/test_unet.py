"""UNet: equal to diffusers' `UNet2DModel`, and its own configuration and dtypes.

The golden outputs are made by tests/golden/make_unet.py, which also tells how.
"""

import dataclasses
import functools
import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_config import shapes

from puredif_jax.networks.layers import normalise
from puredif_jax.networks.unet import UNet

GOLDEN = Path(__file__).parent / "golden"
TORCH_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def load_maker():
    spec = importlib.util.spec_from_file_location("make_unet", GOLDEN / "make_unet.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


maker = load_maker()
each_config = pytest.mark.parametrize("name", maker.CONFIGS)
CHEAP = {"xla_backend_optimization_level": 0}  # compiles in a quarter of the time
SMALL = UNet(
    sample_size=(8, 8),
    in_channels=2,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
)
TINY = dataclasses.replace(
    SMALL,
    block_out_channels=(8,),
    down_block_types=("DownBlock2D",),
    up_block_types=("AttnUpBlock2D",),
)


def torch_name(path):
    """PyTorch's name, with "_" for ".", of the parameter at a path of ours."""
    *modules, leaf = (entry.key for entry in path)
    return "_".join([*modules, TORCH_LEAVES[leaf]])


def torch_shape(shape):
    """OIHW of HWIO, (out, in) of (in, out)."""
    return (*shape[:-3:-1], *shape[:-2])


def from_torch(config, weights):
    """The weights of a PyTorch state dict as parameters of ours."""
    flat = {name.replace(".", "_"): value for name, value in weights.items()}

    def leaf(path, like):
        value = flat.pop(torch_name(path))
        assert torch_shape(like.shape) == value.shape
        if value.ndim > 1:
            value = np.moveaxis(value, (0, 1), (-1, -2))
        return jnp.asarray(value)

    params = jax.tree.map_with_path(leaf, shapes(config))
    assert not flat
    return params


@functools.cache
def golden():
    with np.load(GOLDEN / "unet.npz") as arrays:
        return dict(arrays)


def golden_shapes(name):
    lines = (line.split() for line in golden()[f"{name}_parameters"].tolist())
    return {key: tuple(map(int, shape.split(","))) for key, shape in lines}


def golden_case(name, seed=maker.SEED):
    """(UNet, params, x, t) of a configuration, in our layout."""
    config = maker.CONFIGS[name]
    weights, images, times = maker.draw(config, golden_shapes(name), seed)
    unet = UNet(**config)
    x = jnp.asarray(images.transpose(0, 2, 3, 1))
    return unet, from_torch(unet, weights), x, jnp.asarray(times)


@functools.partial(jax.jit, static_argnums=0, compiler_options=CHEAP)
def apply(unet, *args):
    return unet(*args)


@functools.partial(jax.jit, static_argnums=0, compiler_options=CHEAP)
def gradient(unet, params, x, t):
    """The gradient in (params, x) of the sum of squares of the output, and this."""

    def loss(params, x):
        out = unet(params, x, t)
        return jnp.square(out).sum(), out

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)


def assert_close(found, expected, tolerance):
    """Largest error, relative to the largest value."""
    assert found.shape == expected.shape
    error = np.abs(np.asarray(found) - expected).max()
    assert error <= tolerance * np.abs(expected).max()


# --- Against diffusers ---------------------------------------------------------------


@each_config
def test_parameters_are_those_of_diffusers(name):
    flat, _ = jax.tree.flatten_with_path(shapes(UNet(**maker.CONFIGS[name])))
    found = {torch_name(path): torch_shape(leaf.shape) for path, leaf in flat}
    wanted = golden_shapes(name)
    assert len(found) == len(flat) == len(wanted)
    assert found == {key.replace(".", "_"): shape for key, shape in wanted.items()}


@each_config
def test_output_is_that_of_diffusers(name):
    found = apply(*golden_case(name))
    assert found.dtype == jnp.float32
    assert_close(found, golden()[f"{name}_output"].transpose(0, 2, 3, 1), 1e-4)


@each_config
def test_output_and_gradients_are_those_of_diffusers_live(name):
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    config, seed = maker.CONFIGS[name], 7
    net = maker.model(config)
    wanted = golden_shapes(name)
    assert maker.shapes_of(net) == wanted
    weights, images, times = maker.draw(config, wanted, seed)
    net.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
    images = torch.from_numpy(images).requires_grad_()
    output = net(images, torch.from_numpy(times)).sample
    output.square().sum().backward()
    expected = output.detach().numpy().transpose(0, 2, 3, 1)
    slopes = {k: v.grad.numpy() for k, v in net.named_parameters()}

    unet, *case = golden_case(name, seed)
    (by_params, by_x), found = gradient(unet, *case)
    assert_close(found, expected, 1e-4)
    assert_close(by_x, images.grad.numpy().transpose(0, 2, 3, 1), 1e-3)
    # Some are zero but for rounding: those of key biases, of queries at one position.
    exact = from_torch(unet, slopes)
    floor = 1e-5 * max(np.abs(value).max() for value in slopes.values())
    found, expected = (
        jax.tree.map(lambda v: np.where(np.abs(v).max() < floor, 0, v), tree)
        for tree in (by_params, exact)
    )
    jax.tree.map(functools.partial(assert_close, tolerance=1e-3), found, expected)


# --- Calls ---------------------------------------------------------------------------


def make_case(unet):
    """(params, x, t), with no weight at zero."""
    rng = np.random.default_rng(0)

    def leaf(like):
        scale = max(1, np.prod(like.shape[:-1])) ** -0.5
        return jnp.asarray(scale * rng.standard_normal(like.shape), jnp.float32)

    x = jnp.asarray(rng.standard_normal((3, *unet.image_shape)), jnp.float32)
    return jax.tree.map(leaf, shapes(unet)), x, jnp.array([0, 7, 999])


@pytest.fixture(scope="module")
def case():
    return make_case(SMALL)


def test_fresh_network_predicts_zero():
    params = jax.jit(TINY.init, compiler_options=CHEAP)(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    _, x, t = make_case(TINY)
    assert TINY.image_shape == (8, 8, 2) == x.shape[1:]
    np.testing.assert_array_equal(apply(TINY, params, x, t), np.zeros(x.shape))


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_bfloat16_computes_close_to_float32(param_dtype):
    params, x, t = make_case(TINY)
    half = dataclasses.replace(TINY, dtype="bfloat16", param_dtype=param_dtype)
    assert {v.dtype for v in jax.tree.leaves(shapes(half))} == {jnp.dtype(param_dtype)}
    cast = jax.tree.map(lambda v: v.astype(param_dtype), params)
    exact = np.asarray(apply(TINY, params, x, t))
    found = apply(half, cast, x, t)
    assert found.dtype == jnp.float32
    assert_close(found, exact, 0.05)
    assert np.abs(found - exact).max() > 1e-4


@pytest.mark.parametrize("dtype,name", [("float32", "f32"), ("bfloat16", "bf16")])
def test_every_product_is_in_the_dtype(dtype, name):
    config = dataclasses.replace(TINY, dtype=dtype)
    text = gradient.lower(config, *make_case(TINY)).as_text()
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


def test_bfloat16_has_float32_gradients():
    half = dataclasses.replace(TINY, dtype="bfloat16")
    slopes, _ = gradient(half, *make_case(TINY))
    for leaf in jax.tree.leaves(slopes):
        assert leaf.dtype == jnp.float32 and np.isfinite(leaf).all()


def test_dropout_needs_a_key_and_a_rate():
    case = make_case(TINY)
    dropping = dataclasses.replace(TINY, dropout=0.5)
    one, two = jax.random.split(jax.random.key(0))
    plain = apply(TINY, *case)
    np.testing.assert_array_equal(apply(TINY, *case), plain)
    np.testing.assert_array_equal(apply(dropping, *case), plain)
    np.testing.assert_array_equal(apply(TINY, *case, one), plain)
    dropped = apply(dropping, *case, one)
    np.testing.assert_array_equal(apply(dropping, *case, one), dropped)
    assert np.abs(dropped - plain).max() > 1e-2
    assert np.abs(dropped - apply(dropping, *case, two)).max() > 1e-2


def test_gradient_in_the_image_is_finite_and_right(case):
    params, x, t = case

    @functools.partial(jax.jit, compiler_options=CHEAP)
    @jax.value_and_grad
    def loss(x):
        return jnp.square(SMALL(params, x, t)).sum()

    _, slope = loss(x)
    assert slope.shape == x.shape and np.isfinite(slope).all()
    norm = jnp.linalg.norm(slope)
    step = 1e-2 * slope / norm
    rise = float(loss(x + step)[0]) - float(loss(x - step)[0])
    np.testing.assert_allclose(rise / 2e-2, norm, rtol=1e-2)


def test_rows_are_independent(case):
    params, x, t = case
    others = apply(SMALL, params, x.at[1:].add(1), t.at[1:].set(3))
    expected = np.asarray(apply(SMALL, *case))
    assert_close(others[0], expected[0], 1e-5)
    assert np.abs(others[1:] - expected[1:]).max() > 0.1


def test_one_trace_for_each_shape_and_configuration():
    traces = []

    @functools.partial(jax.jit, static_argnums=0, compiler_options=CHEAP)
    def traced(unet, params, x, t):
        traces.append(x.shape)
        return unet(params, x, t)

    params, x, t = make_case(TINY)
    for _ in range(2):
        traced(dataclasses.replace(TINY), params, x, t)
    traced(TINY, params, x[:2], t[:2])
    traced(TINY, params, x[1:], t[1:])
    assert traces == [(3, 8, 8, 2), (2, 8, 8, 2)]


def test_ranks_are_checked(case):
    params, x, t = case
    for bad in ((x[0], t), (x, t[0])):
        with pytest.raises(AssertionError, match="rank"):
            SMALL(params, *bad)


# --- Configuration -------------------------------------------------------------------


def test_configuration_is_a_hashable_value():
    twin = dataclasses.replace(SMALL)
    assert twin == SMALL and twin is not SMALL and hash(twin) == hash(SMALL)
    assert dataclasses.replace(SMALL, dropout=0.1) != SMALL
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMALL.dropout = 0.1


def test_default_is_google_ddpm_cifar10_32():
    sizes = [leaf.size for leaf in jax.tree.leaves(shapes(UNet()))]
    assert sum(sizes) == 35_746_307


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down_block_types": ("DownBlock2D",)}, "down_block_types needs 2 names"),
        ({"up_block_types": ("UpBlock2D",) * 3}, "up_block_types needs 2 names"),
        (
            {"down_block_types": ("DownBlock2D", "UpBlock2D")},
            "out of DownBlock2D, AttnDownBlock2D, found",
        ),
        (
            {"up_block_types": ("UpBlock2D", "AttnDownBlock2D")},
            "out of UpBlock2D, AttnUpBlock2D, found",
        ),
        ({"norm_num_groups": 5}, "multiple of norm_num_groups=5, found 8"),
        ({"attention_head_dim": 5}, "multiple of attention_head_dim=5, found"),
        ({"sample_size": (8, 7)}, r"multiples of 2, found \(8, 7\)"),
        ({"downsample_padding": 2}, "must be 0 or 1, found 2"),
        ({"dtype": "float16"}, "dtype must be float32 or bfloat16, found float16"),
        ({"param_dtype": "int32"}, "param_dtype must be float32 or bfloat16, found"),
    ],
    ids=str,
)
def test_bad_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)
