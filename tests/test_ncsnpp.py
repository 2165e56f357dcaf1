"""NCSN++: equal to diffusers' `UNet2DModel` of skip blocks, and its configuration.

The golden outputs are made by tests/golden/make_ncsnpp.py, which also tells how. What
it shares with other networks is in test_networks.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import make_ncsnpp as maker
from test_unet import CHEAP, apply, assert_close, gradient
from tiny_config import shapes

from puredif_jax.formats import state_dict
from puredif_jax.networks.ncsnpp import SMALL, NCSNpp
from puredif_jax.networks.resampling import fir_downsample, fir_upsample

each_config = pytest.mark.parametrize("name", maker.CONFIGS)


@functools.cache
def golden():
    with np.load(maker.OUTPUT) as arrays:
        return dict(arrays)


def golden_shapes(name):
    lines = (line.split() for line in golden()[f"{name}_parameters"].tolist())
    return {key: tuple(map(int, shape.split(","))) for key, shape in lines}


def case(config, wanted, seed):
    """(NCSNpp, weights by PyTorch name, params, x, t), in our layout."""
    weights, images, times = maker.draw(config, wanted, seed)
    net = NCSNpp(**config)
    params = jax.tree.map(jnp.asarray, state_dict.from_torch(weights, net))
    return net, weights, params, jnp.asarray(images.transpose(0, 2, 3, 1)), times


def assert_rows_close(found, expected, tolerance):
    """Each image by itself: outputs are of the size of 1 / sigma."""
    for row, wanted in zip(found, expected, strict=True):
        assert_close(row, wanted, tolerance)


# --- Against diffusers ---------------------------------------------------------------


@pytest.mark.parametrize("name", [*maker.CONFIGS, *maker.FULL])
def test_parameters_are_those_of_diffusers(name):
    """Each has one name there, and each name there is of one."""
    net = NCSNpp(**(maker.CONFIGS | maker.FULL)[name])
    leaves = jax.tree.leaves_with_path(shapes(net))
    names = [state_dict.torch_name(path) for path, _ in leaves]
    assert len({*names}) == len(names)
    found = {
        name: state_dict.torch_shape(leaf.shape)
        for name, (_, leaf) in zip(names, leaves, strict=True)
    }
    assert found == golden_shapes(name)
    for path, _ in leaves:
        ours = "_".join(entry.key for entry in path[:-1])
        theirs = state_dict.torch_name(path).rpartition(".")[0]
        assert theirs.replace(".", "_") == ours


@each_config
def test_output_is_that_of_diffusers(name):
    config = maker.CONFIGS[name]
    net, weights, params, x, t = case(config, golden_shapes(name), maker.SEED)
    found = apply(net, params, x, t)
    assert found.dtype == jnp.float32
    expected = golden()[f"{name}_output"].transpose(0, 2, 3, 1)
    assert_rows_close(found, expected, 1e-4)
    back = state_dict.to_torch(params)
    assert back.keys() == weights.keys()
    assert all(np.array_equal(back[key], weights[key]) for key in back)


def live(config, seed=7):
    """(diffusers' model, its images and times, the case of ours)."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    model = maker.model(config)
    net, weights, params, x, t = case(config, maker.shapes_of(model), seed)
    model.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
    images = torch.from_numpy(np.asarray(x).transpose(0, 3, 1, 2).copy())
    return model, images, torch.from_numpy(t), (net, params, x, t)


@pytest.mark.parametrize("name", maker.LIVE)
def test_output_is_that_of_diffusers_live(name):
    model, images, times, ours = live(maker.LIVE[name])
    expected = model(images, times).sample.detach().numpy()
    assert_rows_close(apply(*ours), expected.transpose(0, 2, 3, 1), 1e-4)


@each_config
def test_gradients_are_those_of_diffusers_live(name):
    model, images, times, ours = live(maker.CONFIGS[name])
    output = model(images.requires_grad_(), times).sample
    output.square().sum().backward()
    (by_params, by_x), found = gradient(*ours)
    assert_rows_close(found, output.detach().numpy().transpose(0, 2, 3, 1), 1e-4)
    assert_rows_close(by_x, images.grad.numpy().transpose(0, 2, 3, 1), 1e-3)
    wanted = {k: v.grad for k, v in model.named_parameters()}
    assert [k for k, v in wanted.items() if v is None] == [
        name for name in ("time_proj.weight",) if name in wanted
    ]
    found = state_dict.to_torch(by_params)
    assert not np.any(found.pop("time_proj.weight", 0.0))
    # Some are zero but for rounding: those of key biases.
    floor = 1e-5 * max(np.abs(value).max() for value in found.values())
    for key, value in found.items():
        slope = wanted[key].numpy()
        if max(np.abs(slope).max(), np.abs(value).max()) > floor:
            assert_close(value, slope, 1e-3)


# --- Formulas ------------------------------------------------------------------------


def direct(x, up):
    """The FIR kernel (1, 3, 3, 1) applied by sums over taps, in float64."""
    taps = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64
    if up:  # between the pixels zeros, after which a kernel of sum 4 keeps the mean
        wide = np.zeros((x.shape[0], 2 * x.shape[1], 2 * x.shape[2], x.shape[3]))
        wide[:, ::2, ::2] = x
        x, taps = wide, 4 * taps
    edges = (2, 1) if up else (1, 1)
    padded = np.pad(x, ((0, 0), edges, edges, (0, 0)))
    rows, columns = (n - 3 for n in padded.shape[1:3])
    out = sum(
        taps[i, j] * padded[:, i : i + rows, j : j + columns]
        for i, j in itertools.product(range(4), repeat=2)
    )
    return out if up else out[:, ::2, ::2]


@pytest.mark.parametrize("shape", [(2, 8, 6, 3), (1, 2, 2, 1), (3, 4, 10, 5)])
@pytest.mark.parametrize("up", [False, True])
def test_resampling_is_the_convolution_with_the_kernel(shape, up):
    x = np.random.default_rng(0).standard_normal(shape)
    with jax.enable_x64(True):
        found = np.asarray((fir_upsample if up else fir_downsample)(jnp.asarray(x)))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, direct(x, up), rtol=0, atol=1e-14)


def test_upsampling_is_four_times_the_transpose_of_downsampling():
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((2, 6, 8, 3)), jnp.float32)
    y = jnp.asarray(rng.standard_normal((2, 3, 4, 3)), jnp.float32)
    (transposed,) = jax.vjp(fir_downsample, x)[1](y)
    np.testing.assert_allclose(fir_upsample(y), 4 * transposed, atol=1e-6)


def test_resampling_keeps_what_is_constant_but_at_the_edge():
    flat = jnp.ones((1, 8, 8, 2))
    np.testing.assert_array_equal(fir_downsample(flat)[:, 1:-1, 1:-1], 1)
    np.testing.assert_array_equal(fir_upsample(flat)[:, 1:-1, 1:-1], 1)


def test_only_a_fourier_embedding_divides_by_the_time():
    """Without it, nothing of the output but its features depends on t."""
    config = maker.CONFIGS["single"]
    net, _, params, x, _ = case(config, golden_shapes("single"), 3)
    silent = params | {
        "time_embedding_linear_1": jax.tree.map(
            jnp.zeros_like, params["time_embedding_linear_1"]
        )
    }
    ones = jnp.ones(4)
    once, half = (apply(net, silent, x, scale * ones) for scale in (1, 2))
    assert_close(half, np.asarray(once) / 2, 1e-6)
    plain = dataclasses.replace(net, time_embedding_type="positional")
    width = config["block_out_channels"][0]
    kernel = jnp.zeros((width, 4 * width))
    del silent["time_proj"]
    silent["time_embedding_linear_1"]["kernel"] = kernel
    for t in (ones, 2 * ones):
        assert_close(apply(plain, silent, x, t), np.asarray(once), 1e-6)


def test_fresh_frequencies_have_the_standard_deviation_of_diffusers():
    wide = dataclasses.replace(
        NCSNpp(**maker.CONFIGS["single"]), block_out_channels=(1024,)
    )
    init = jax.jit(lambda key: wide.init(key)["time_proj"]["weight"])
    drawn = jax.jit(init, compiler_options=CHEAP)(jax.random.key(0))
    assert drawn.shape == (1024,)
    np.testing.assert_allclose(drawn.std(), 16, rtol=0.1)
    np.testing.assert_allclose(drawn.mean(), 0, atol=2)


# --- Configuration -------------------------------------------------------------------


def test_default_is_the_network_for_cifar10():
    assert NCSNpp() == NCSNpp(**maker.CIFAR10)
    sizes = [math.prod(shape) for shape in golden_shapes("cifar10").values()]
    assert sum(sizes) == sum(leaf.size for leaf in jax.tree.leaves(shapes(NCSNpp())))


def test_small_network_has_the_size_that_it_says():
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes(SMALL))) == 712_883


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down_block_types": ("SkipDownBlock2D",)}, "down_block_types needs 3 names"),
        (
            {"up_block_types": ("UpBlock2D",) * 3},
            "out of SkipUpBlock2D, AttnSkipUpBlock2D, found",
        ),
        ({"block_out_channels": (16, 3, 64)}, "3 channels in 0 groups"),
        ({"block_out_channels": (16, 130, 64)}, "130 channels in 32 groups"),
        (
            {"down_block_types": ("AttnSkipDownBlock2D",) + ("SkipDownBlock2D",) * 2},
            "16 channels in 32 groups",
        ),
        (
            {"up_block_types": ("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D")},
            "48 channels in 32 groups",
        ),
        ({"norm_num_groups": 5}, "16 channels in 5 groups"),
        ({"norm_num_groups": 0}, "norm_num_groups must be a whole number"),
        ({"in_channels": 2.0}, "in_channels must be a whole number"),
        ({"attention_head_dim": 5}, "multiple of attention_head_dim=5, found 64"),
        ({"sample_size": (16, 6)}, r"multiples of 4, found \(16, 6\)"),
        ({"layers_per_block": 11}, "1 to 32 blocks"),
        ({"mid_block_scale_factor": 0.0}, "mid_block_scale_factor must be a number"),
        ({"mid_block_scale_factor": math.nan}, "mid_block_scale_factor must be"),
        ({"time_embedding_type": "learned"}, "must be fourier or positional, found"),
        ({"center_input_sample": 1}, "center_input_sample must be False or True"),
        ({"dtype": "float16"}, "dtype must be float32 or bfloat16, found float16"),
    ],
    ids=str,
)
def test_bad_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)
