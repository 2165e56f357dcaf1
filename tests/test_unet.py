"""UNet: equal to diffusers' `UNet2DModel`, and its own configuration.

The golden outputs are made by tests/golden/make_unet.py, which also tells how.
"""

import dataclasses
import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_config import shapes

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


# --- Configuration -------------------------------------------------------------------


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
