"""VQModel: equal to diffusers' `VQModel` and `LDMPipeline`; its names and its refusals.

The golden outputs are made by tests/golden/make_vq.py, which also tells how.
"""

import dataclasses
import functools
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from ldm_folder import FIRST_STAGE, LATENTS, write_ldm
from tiny_config import draw_params

from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.diffusion.sampling import sample
from puredif_jax.diffusion.schedules import ScaledLinearBetas
from puredif_jax.formats.diffusers_config import ConvertError
from puredif_jax.formats.state_dict import (
    from_torch,
    new_name,
    to_torch,
    torch_shapes,
)
from puredif_jax.formats.vq_config import read_vq, write_vq
from puredif_jax.formats.weight_sets import WEIGHTS
from puredif_jax.networks.vq import VQModel, nearest

GOLDEN = Path(__file__).parent / "golden"
CHEAP = {"xla_backend_optimization_level": 0}  # compiles in a quarter of the time


def load_maker():
    spec = importlib.util.spec_from_file_location("make_vq", GOLDEN / "make_vq.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


maker = load_maker()
ALL = maker.CONFIGS | maker.FULL
SMALL = FIRST_STAGE


@functools.cache
def golden():
    with np.load(GOLDEN / "vq.npz") as arrays:
        return dict(arrays)


def golden_shapes(name):
    lines = (line.split() for line in golden()[f"{name}_parameters"].tolist())
    return {key: tuple(map(int, shape.split(","))) for key, shape in lines}


@functools.partial(jax.jit, static_argnums=0, compiler_options=CHEAP)
def encode(network, params, images):
    return network.encode(params, images)


@functools.partial(jax.jit, static_argnums=0, compiler_options=CHEAP)
def decode(network, params, latents):
    return network.decode(params, latents)


@functools.partial(jax.jit, static_argnums=0, compiler_options=CHEAP)
def slopes(network, params, latents):
    """The gradient in (params, latents) of the sum of squares of the images."""

    def loss(params, latents):
        return jnp.square(network.decode(params, latents)).sum()

    return jax.grad(loss, argnums=(0, 1))(params, latents)


def last(array):
    """NHWC of NCHW."""
    return jnp.asarray(np.moveaxis(np.asarray(array), 1, -1))


def assert_close(found, expected, tolerance=1e-4):
    """Largest error, relative to the largest value."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape and found.dtype == np.float32
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def drawn(network, seed=0):
    return jax.tree.map(jnp.asarray, draw_params(network, seed, 0.3))


def normal(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --- Against the golden file ---------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_names_and_shapes_are_those_of_diffusers(name):
    assert torch_shapes(VQModel(**ALL[name])) == golden_shapes(name)


@pytest.mark.parametrize("name", ALL)
def test_outputs_are_those_of_diffusers(name):
    """Also in the full width of the published network."""
    network = VQModel(**ALL[name])
    weights, images, latents = maker.draw(name, golden_shapes(name))
    params = from_torch(weights, network)
    found = encode(network, params, last(images))
    assert found.shape[1:] == network.latent_shape(last(images).shape[1:])
    assert_close(found, last(golden()[f"{name}_latents"]))
    codes = nearest(params["quantize_embedding"]["embedding"], last(latents))
    np.testing.assert_array_equal(codes, golden()[f"{name}_indices"])
    found = decode(network, params, last(latents))
    assert found.shape[1:] == network.image_shape(last(latents).shape[1:])
    assert_close(found, last(golden()[f"{name}_images"]))


@pytest.mark.parametrize("name", maker.CONFIGS)
def test_weights_come_back_bit_for_bit(name):
    weights, _, _ = maker.draw(name, golden_shapes(name))
    back = to_torch(from_torch(weights, VQModel(**maker.CONFIGS[name])))
    assert back.keys() == weights.keys()
    assert all(np.array_equal(back[key], weights[key]) for key in weights)


@pytest.mark.parametrize("part", ["latents", "images"])
def test_another_weight_gives_another_output(part):
    """So that the test above can fail: every weight is felt by its half."""
    name = "attention"
    network = VQModel(**maker.CONFIGS[name])
    weights, images, latents = maker.draw(name, golden_shapes(name))
    encoding = part == "latents"
    run, x = (encode, last(images)) if encoding else (decode, last(latents))
    wanted = last(golden()[f"{name}_{part}"])
    names = [
        key
        for key in weights
        if key.startswith(("encoder", "quant_conv")) == encoding
        and not key.endswith("to_k.bias")  # the softmax passes it over
    ]
    assert len(names) > 60
    for key in names:
        other = weights[key] + 0.5 * normal(*weights[key].shape)
        found = run(network, from_torch(weights | {key: other}, network), x)
        with pytest.raises(AssertionError):
            assert_close(found, wanted)


def test_default_is_the_first_stage_of_ldm_celebahq_256():
    assert VQModel() == VQModel(**maker.FULL["ldm-celebahq-256"])
    sizes = [int(np.prod(shape)) for shape in torch_shapes(VQModel()).values()]
    assert sum(sizes) == 55_322_782
    assert VQModel().factor == 4
    assert VQModel().latent_shape((256, 256, 3)) == (64, 64, 3)
    assert VQModel().image_shape((64, 64, 3)) == (256, 256, 3)


def test_fresh_parameters_have_the_names_and_are_finite():
    params = SMALL.init(jax.random.key(0))
    tensors = to_torch(params)
    found = {key: value.shape for key, value in tensors.items()}
    assert found == torch_shapes(SMALL)
    codebook = tensors["quantize.embedding.weight"]
    assert 0.9 / 32 < np.abs(codebook).max() <= 1 / 32
    image = decode(SMALL, params, jnp.asarray(normal(1, 2, 2, 3)))
    assert image.shape == (1, 8, 8, 3) and np.isfinite(image).all()


def test_bfloat16_is_near():
    half = dataclasses.replace(SMALL, dtype="bfloat16")
    params = drawn(SMALL)
    images, latents = jnp.asarray(normal(2, 8, 8, 3)), jnp.asarray(normal(2, 2, 2, 3))
    for run, x in ((encode, images), (decode, latents)):
        found, exact = run(half, params, x), run(SMALL, params, x)
        assert_close(found, exact, 0.05)
        assert np.abs(found - exact).max() > 1e-4


# --- Quantisation --------------------------------------------------------------------


def nearest_of_float64(codebook, latents):
    """By the norm of each difference, in float64, one pixel after the other."""
    codebook = codebook.astype(np.float64)
    flat = latents.reshape(-1, latents.shape[-1]).astype(np.float64)
    found = [np.linalg.norm(codebook - z, axis=1).argmin() for z in flat]
    return np.reshape(found, latents.shape[:-1])


@pytest.mark.parametrize("count,channels", [(500, 3), (37, 4), (9, 1), (300, 64)])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_the_nearest_code_is_taken(count, channels, offset):
    """Also far from zero, where z^2 + e^2 - 2 z e would lose the difference."""
    codebook = normal(count, channels) + np.float32(offset)
    latents = normal(2, 9, 7, channels, seed=2) + np.float32(offset)
    found = nearest(jnp.asarray(codebook), jnp.asarray(latents))
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, nearest_of_float64(codebook, latents))


def test_of_codes_equally_near_the_first_is_taken():
    codebook = np.array([[9, 9], [1, 0], [-1, 0], [0, 1], [1, 0]], np.float32)
    latents = np.array([[0, 0], [1, 0], [-0.5, 0.5], [0, 5], [5, 5]], np.float32)
    latents = latents[None, None]
    found = nearest(jnp.asarray(codebook), jnp.asarray(latents))
    np.testing.assert_array_equal(found, [[[1, 1, 2, 3, 0]]])
    np.testing.assert_array_equal(found, nearest_of_float64(codebook, latents))


def test_the_distances_are_not_kept():
    """8192 codes for 64 x 64 pixels are 134 MB of distances."""
    codebook = jax.ShapeDtypeStruct((8192, 3), jnp.float32)
    latents = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    made = jax.jit(nearest).lower(codebook, latents).compile()
    assert made.memory_analysis().temp_size_in_bytes < 1e6


def test_decoding_quantises_first():
    params, latents = drawn(SMALL), normal(2, 3, 4, 3)
    codebook = np.asarray(params["quantize_embedding"]["embedding"])
    codes = codebook[nearest_of_float64(codebook, latents)]
    assert np.abs(codes - latents).max() > 0.1
    found = decode(SMALL, params, jnp.asarray(latents))
    assert_close(found, decode(SMALL, params, jnp.asarray(codes)), 1e-5)


def test_the_gradient_is_that_of_the_decoder_at_the_codes():
    params, latents = drawn(SMALL), normal(2, 3, 4, 3)
    found, slope = slopes(SMALL, params, jnp.asarray(latents))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((found, slope)))
    assert np.abs(slope).min(axis=(0, 1, 2)).all()
    codebook = np.asarray(params["quantize_embedding"]["embedding"])
    codes = codebook[nearest_of_float64(codebook, latents)]
    assert_close(slope, slopes(SMALL, params, jnp.asarray(codes))[1], 1e-4)
    assert not np.any(found["quantize_embedding"]["embedding"])
    assert not any(np.any(x) for x in jax.tree.leaves(found["encoder"]))
    assert all(np.any(x) for x in jax.tree.leaves(found["decoder"]["conv_in"]))


def test_the_gradient_is_right():
    """Against differences, with a codebook that moves along with the latents."""
    params, latents = drawn(SMALL), jnp.asarray(normal(1, 2, 2, 3))

    @functools.partial(jax.jit, compiler_options=CHEAP)
    @jax.value_and_grad
    def loss(codes):  # each pixel is a code, and so itself
        book = {"embedding": codes.reshape(-1, 3)}
        moved = params | {"quantize_embedding": book}
        return jnp.square(SMALL.decode(moved, codes)).sum()

    _, slope = loss(latents)
    step = 1e-2 * slope / jnp.linalg.norm(slope)
    rise = float(loss(latents + step)[0]) - float(loss(latents - step)[0])
    np.testing.assert_allclose(rise / 2e-2, jnp.linalg.norm(slope), rtol=1e-2)


# --- Refusals ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"in_channels": 0}, "in_channels must be a whole number from 1 to 16384"),
        ({"num_vq_embeddings": True}, "num_vq_embeddings must be a whole number"),
        ({"vq_embed_dim": 0}, "vq_embed_dim must be a whole number"),
        ({"vq_embed_dim": 257}, "may have 1 to 256 channels, found 257"),
        ({"latent_channels": 999}, "may have 1 to 256 channels, found 999"),
        ({"block_out_channels": (8, 8, 18)}, "multiple of norm_num_groups=4, found 18"),
        ({"block_out_channels": ()}, "may have 1 to 32 blocks on its way down"),
        ({"layers_per_block": 11}, "with layers_per_block=11"),
        ({"down_block_types": ("DownBlock2D",) * 3}, "needs 3 names out of DownEncod"),
        ({"up_block_types": ("UpDecoderBlock2D",)}, "up_block_types needs 3 names"),
        ({"scaling_factor": 0.0}, "scaling_factor must be a number from 1e-6 to 1e6"),
        ({"scaling_factor": float("nan")}, "scaling_factor must be a number"),
        ({"scaling_factor": True}, "scaling_factor must be a number"),
        ({"mid_block_add_attention": 1}, "must be True or False, found 1"),
        ({"dtype": "float16"}, "dtype must be float32 or bfloat16, found float16"),
        ({"param_dtype": "int8"}, "param_dtype must be float32 or bfloat16"),
    ],
    ids=str,
)
def test_bad_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_bad_shapes_are_refused():
    params = drawn(SMALL)
    for shape, words in (
        ((1, 8, 6, 3), r"multiples of 4, found \(8, 6, 3\)"),
        ((1, 8, 8, 1), "images of 3 channels"),
    ):
        with pytest.raises(ValueError, match=words):
            SMALL.encode(params, jnp.zeros(shape))
    with pytest.raises(ValueError, match=r"latents of 3 channels, found \(2, 2, 4\)"):
        SMALL.decode(params, jnp.zeros((1, 2, 2, 4)))
    for run in (SMALL.encode, SMALL.decode):
        with pytest.raises(AssertionError, match="rank"):
            run(params, jnp.zeros((8, 8, 3)))


# --- Configurations in diffusers' format ---------------------------------------------

PUBLISHED = {  # CompVis/ldm-celebahq-256, vqvae/config.json
    "_class_name": "VQModel",
    "_diffusers_version": "0.1.2",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "in_channels": 3,
    "latent_channels": 3,
    "layers_per_block": 2,
    "num_vq_embeddings": 8192,
    "out_channels": 3,
    "sample_size": 256,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}


@pytest.mark.parametrize("name", ALL)
def test_a_configuration_comes_back(name):
    network = VQModel(**ALL[name], scaling_factor=0.7)
    remarks = []
    text = json.dumps(write_vq(network))
    assert read_vq(json.loads(text), remarks=remarks) == network and not remarks


def test_the_published_configuration_is_read_with_a_word_on_its_scale():
    remarks = []
    assert read_vq(PUBLISHED, "vqvae/config.json", None, remarks) == VQModel()
    (remark,) = remarks
    assert remark.startswith("vqvae/config.json has no scaling_factor: it is 0.18215")
    assert read_vq(PUBLISHED | {"scaling_factor": 1.0}).scaling_factor == 1.0
    named = PUBLISHED | {"scaling_factor": 1, "_use_default_values": ["scaling_factor"]}
    assert read_vq(named).scaling_factor == 0.18215


@pytest.mark.parametrize(
    "change, message",
    [
        ({"_class_name": "AutoencoderKL"}, "is of class 'AutoencoderKL': a fir"),
        ({"_class_name": None}, "is of class None"),
        ({"act_fn": "relu"}, "sets act_fn='relu', which is not supported: only 'silu'"),
        ({"act_fn": ["silu"]}, "sets act_fn="),
        ({"norm_type": "spatial"}, "sets norm_type='spatial', which is not supported"),
        ({"quantization_config": {}}, "sets quantization_config={}"),
        ({"latents_mean": 0.0}, "sets latents_mean, which we do not know"),
        ({"block_out_channels": 128}, "sets block_out_channels=128, which is of anoth"),
        ({"in_channels": [3]}, r"sets in_channels=\[3\], which is of another kind"),
        ({"in_channels": "3"}, "is not a first stage: in_channels must be a whole"),
        ({"layers_per_block": 99}, "is not a first stage: an encoder may have"),
        ({"down_block_types": [[]] * 3}, "is not a first stage"),
        ({"up_block_types": ["UpBlock2D"] * 3}, "is not a first stage: up_block_types"),
        ({"scaling_factor": None}, "is not a first stage: scaling_factor must be"),
        ({"block_out_channels": [128, 256, None]}, "is not a first stage: each of"),
        ({"_use_default_values": 3}, "it must be a list of names"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_named(change, message):
    with pytest.raises(ConvertError, match=message) as found:
        read_vq(PUBLISHED | change, "here/config.json")
    assert str(found.value).startswith("here/config.json ")


def test_the_class_of_the_index_counts():
    assert read_vq(PUBLISHED | {"_class_name": None}, kind="VQModel") == VQModel()
    with pytest.raises(ConvertError, match="is of class 'AutoencoderKL'"):
        read_vq(PUBLISHED, kind="AutoencoderKL")


# --- Live against diffusers ----------------------------------------------------------


@pytest.fixture(scope="module")
def diffusers():
    pytest.importorskip("torch")
    return pytest.importorskip("diffusers")


LIVE = {
    "published, narrower": PUBLISHED
    | {
        "block_out_channels": [8, 16, 32],
        "norm_num_groups": 8,
        "num_vq_embeddings": 96,
    },
    "one level, many codes": {"block_out_channels": [32], "num_vq_embeddings": 999},
    "attention, without effect": {
        "block_out_channels": [16, 8],
        "down_block_types": ["AttnDownEncoderBlock2D", "DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"],
        "norm_num_groups": 8,
        "vq_embed_dim": 5,
        "mid_block_add_attention": False,
        "act_fn": "Swish",
        "sample_size": 7,
        "lookup_from_codebook": True,
        "force_upcast": True,
        "scaling_factor": 3.0,
    },
}


def theirs(diffusers, config, seed):
    """Their network, with weights that are all felt."""
    import torch

    torch.manual_seed(seed)
    made = diffusers.VQModel.from_config(config)
    for name, parameter in made.named_parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
        if name == "quantize.embedding.weight":
            parameter.data = torch.randn_like(parameter)
    return made.eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LIVE)
@pytest.mark.parametrize("seed", [0, 1])
def test_live_networks_agree(diffusers, name, seed):
    import torch

    made = theirs(diffusers, LIVE[name], seed)
    config = json.loads(made.to_json_string())
    network = read_vq(config)
    assert {k: v.shape for k, v in made.state_dict().items()} == torch_shapes(network)
    params = from_torch({k: v.numpy() for k, v in made.state_dict().items()}, network)
    images = torch.from_numpy(normal(2, 3, 16, 8, seed=seed))
    encoded = made.encode(images).latents
    found = encode(network, params, last(images))
    assert_close(found, last(encoded.detach()))
    for latents in (encoded.detach(), torch.randn_like(encoded)):
        latents.requires_grad_()
        decoded = made.decode(latents).sample
        assert_close(
            decode(network, params, last(latents.detach())), last(decoded.detach())
        )
        decoded.square().sum().backward()
        found = slopes(network, params, last(latents.detach()))[1]
        assert_close(found, last(latents.grad))


@pytest.mark.filterwarnings("ignore")
def test_every_field_of_diffusers_is_known(diffusers):
    config = json.loads(diffusers.VQModel().to_json_string())
    assert len(config) > 15
    network = read_vq(config)
    assert network == read_vq({"_class_name": "VQModel"})
    made = diffusers.VQModel.from_config(write_vq(network))
    assert json.loads(made.to_json_string()).keys() >= config.keys()
    assert read_vq(json.loads(made.to_json_string())) == network


@pytest.mark.filterwarnings("ignore")
def test_old_names_of_attention_are_those_that_diffusers_takes(diffusers, tmp_path):
    """Folders of before diffusers 0.12, as CompVis/ldm-celebahq-256."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    params, _ = write_ldm(tmp_path)
    tensors = {}
    for name, value in to_torch(params).items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        tensors[name] = value
    assert sum("proj_attn" in name for name in tensors) == 4
    safetensors.numpy.save_file(tensors, tmp_path / "vqvae" / WEIGHTS)
    loaded = diffusers.VQModel.from_pretrained(tmp_path / "vqvae").state_dict()
    assert {new_name(name) for name in tensors} == loaded.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(loaded[new_name(name)], value)


@pytest.mark.filterwarnings("ignore")
def test_a_folder_of_latent_diffusion_draws_as_in_diffusers(diffusers, tmp_path):
    """From the same noise to the same images, by all that the pipeline does."""
    import torch

    vq_params, unet_params = write_ldm(tmp_path)
    pipeline = diffusers.LDMPipeline.from_pretrained(tmp_path)
    assert type(pipeline.scheduler).__name__ == "DDIMScheduler"
    pipeline.set_progress_bar_config(disable=True)
    start = torch.randn((2, 3, 8, 8), generator=torch.manual_seed(5))
    images = pipeline(
        2, torch.manual_seed(5), num_inference_steps=10, output_type="np"
    ).images

    schedule = ScaledLinearBetas(1000, 0.0015, 0.0195).tables()

    @functools.partial(jax.jit, compiler_options=CHEAP)
    def draw(start):
        latents = sample(
            LATENTS, unet_params, schedule, DDIM(10), start, jax.random.key(0)
        )
        latents = latents / FIRST_STAGE.scaling_factor
        return FIRST_STAGE.decode(vq_params, latents)

    found = np.clip(draw(last(start)) / 2 + 0.5, 0, 1)
    assert images.shape == (2, 32, 32, 3) and images.std() > 0.05
    assert_close(found, images)

    latents = normal(1, 3, 4, 4)
    with torch.no_grad():
        wanted = pipeline.vqvae.decode(torch.from_numpy(latents)).sample
    assert_close(decode(FIRST_STAGE, vq_params, last(latents)), last(wanted))
