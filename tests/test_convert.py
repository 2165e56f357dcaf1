"""diffusers folders: there and back, old names, shards, and hostile input."""

import dataclasses
import fnmatch
import json
import os
import pathlib
import shutil
import struct
import sys
import types

import jax
import numpy as np
import pytest
import safetensors.numpy
from test_unet import TINY, apply, golden, golden_shapes, maker
from tiny_config import draw_params

from puredif_jax.diffusion.ddpm import DDPM
from puredif_jax.diffusion.sampling import sample
from puredif_jax.diffusion.schedules import CosineBetas, LinearBetas, ScaledLinearBetas
from puredif_jax.formats import diffusers as convert
from puredif_jax.formats import hub, opening, weight_sets
from puredif_jax.formats.base import Model, Spec
from puredif_jax.formats.diffusers_config import ConvertError, read_unet, write_unet
from puredif_jax.formats.diffusers_scheduler import read_scheduling, write_scheduling
from puredif_jax.formats.scheduling import Scheduling
from puredif_jax.formats.state_dict import from_torch, to_torch
from puredif_jax.networks.unet import UNet
from puredif_jax.stages.weights import ZOO

SCHEDULINGS = [
    Scheduling(),
    Scheduling(LinearBetas(100, 1e-3, 0.1), clip=None, steps_offset=1),
    Scheduling(ScaledLinearBetas(), "v_prediction", timestep_spacing="trailing"),
    Scheduling(CosineBetas(), variance_type="fixed_large", clip=2.0),
    Scheduling(to_clean=False),
]


MODEL = Model(Spec(TINY, Scheduling()), draw_params(TINY, scale=1.0))


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """A folder of `MODEL`, as we write it."""
    convert.write_folder(tmp_path / "model", MODEL)
    return tmp_path / "model"


def assert_same(params) -> None:
    jax.tree.map(np.testing.assert_array_equal, params, MODEL.params)


def weights_of(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "unet" / weight_sets.WEIGHTS)


def put_weights(folder: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    safetensors.numpy.save_file(tensors, folder / "unet" / weight_sets.WEIGHTS)


def change_json(path: pathlib.Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", maker.CONFIGS)
def test_names_and_shapes_are_those_of_diffusers(name) -> None:
    unet = UNet(**maker.CONFIGS[name])
    ours = {k: v.shape for k, v in to_torch(draw_params(unet)).items()}
    assert ours == golden_shapes(name)


@pytest.mark.parametrize("name", maker.FULL)
def test_public_architectures_give_the_outputs_of_diffusers(name) -> None:
    """In their full width, from weights that come back bit for bit."""
    config, shapes = maker.FULL[name], golden_shapes(name)
    unet = UNet(**config)
    assert read_unet(write_unet(unet)) == unet
    arrays, images, times = maker.draw(config, shapes, maker.SEED)
    params = from_torch(arrays, unet)
    back = to_torch(params)
    assert back.keys() == arrays.keys()
    assert all(np.array_equal(back[key], arrays[key]) for key in arrays)
    x = images[maker.FULL_IMAGES].transpose(0, 2, 3, 1)
    found = apply(unet, params, x, times[maker.FULL_IMAGES])
    wanted = golden()[f"{name}_output"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("scheduling", SCHEDULINGS)
def test_a_folder_comes_back_bit_for_bit(tmp_path, scheduling) -> None:
    spec = Spec(TINY, scheduling)
    convert.write_folder(tmp_path, MODEL._replace(spec=spec))
    found = convert.read_folder(tmp_path)
    assert found.spec == spec
    assert_same(found.params)


@pytest.mark.parametrize("name", maker.CONFIGS)
def test_a_configuration_comes_back(name) -> None:
    unet = UNet(**maker.CONFIGS[name])
    text = json.dumps(write_unet(unet))
    assert read_unet(json.loads(text)) == unet


def test_a_silent_configuration_means_the_defaults_of_diffusers() -> None:
    unet = read_unet({"_class_name": "UNet2DModel", "sample_size": 32})
    assert unet.block_out_channels == (224, 448, 672, 896)
    assert unet.attention_head_dim == 8 and unet.norm_eps == 1e-5
    assert read_scheduling({}) == Scheduling()


def test_old_names_of_attention_at_the_top_of_the_folder(tmp_path) -> None:
    """The layout and the names of diffusers before 0.12."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, value in to_torch(MODEL.params).items():
        for new, before in old.items():
            if f".{new}." in name:
                name = name.replace(new, before)
                value = value[..., None, None] if value.ndim == 2 else value
        tensors[name] = value
    assert any("proj_attn" in name for name in tensors)
    safetensors.numpy.save_file(tensors, tmp_path / weight_sets.WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps(write_unet(TINY)))
    scheduler = write_scheduling(Scheduling())
    (tmp_path / "scheduler_config.json").write_text(json.dumps(scheduler))
    found = convert.read_folder(tmp_path)
    assert found.spec.network == TINY
    assert_same(found.params)


def shard(folder: pathlib.Path) -> dict[str, str]:
    """Splits the weights over two files; returns the index's map."""
    tensors = weights_of(folder)
    names = sorted(tensors)
    (folder / "unet" / weight_sets.WEIGHTS).unlink()
    places = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"part-{i}.safetensors"
        chosen = {name: tensors[name] for name in part}
        safetensors.numpy.save_file(chosen, folder / "unet" / file)
        places |= dict.fromkeys(part, file)
    index = folder / "unet" / weight_sets.INDEX
    index.write_text(json.dumps({"weight_map": places}))
    return places


def test_shards_are_read_together(folder) -> None:
    shard(folder)
    assert_same(convert.read_folder(folder).params)


def test_missing_and_surplus_names_are_told_apart(folder) -> None:
    tensors = weights_of(folder)
    tensors["extra.weight"] = tensors.pop("conv_in.weight")
    put_weights(folder, tensors)
    with pytest.raises(ConvertError, match=r"-conv_in\.weight; \+extra\.weight"):
        convert.read_folder(folder)


@pytest.mark.parametrize(
    "option,value",
    [
        ("resnet_time_scale_shift", "scale_shift"),
        ("class_embed_type", "timestep"),
        ("time_embedding_type", "fourier"),
        ("act_fn", "gelu"),
        ("add_attention", False),
        ("center_input_sample", True),
        ("mid_block_scale_factor", 1.4),
        ("downsample_type", "resnet"),
        ("down_block_types", ["KDownBlock2D"]),
        ("out_channels", 5),
        ("sample_size", None),
        ("block_out_channels", [7]),
        ("norm_num_groups", 0),
        ("sample_size", 0),
        ("layers_per_block", 1.5),
        ("layers_per_block", 10**9),
        ("layers_per_block", 100),
        ("block_out_channels", []),
        ("block_out_channels", [2**31]),
        ("block_out_channels", [8.0]),
        ("block_out_channels", 8),
        ("sample_size", [8.9, 8]),
        ("sample_size", [8, 8, 8]),
        ("sample_size", 2**70),
        ("norm_eps", None),
        ("norm_eps", -1.0),
        ("norm_eps", float("nan")),
        ("norm_num_groups", True),
        ("freq_shift", 4),
        ("freq_shift", "a"),
        ("attention_head_dim", -8),
        ("attention_head_dim", 0),
        ("flip_sin_to_cos", "no"),
        ("surprise", 1),
        ("quantization_config", {"quant_method": "bitsandbytes"}),
        ("_use_default_values", "in_channels"),
        ("_use_default_values", [1]),
    ],
)
def test_unsupported_networks_are_refused_by_name(folder, option, value) -> None:
    """Before the weights are opened."""
    change_json(folder / "unet" / "config.json", **{option: value})
    (folder / "unet" / weight_sets.WEIGHTS).unlink()
    with pytest.raises(ConvertError, match=option):
        convert.read_folder(folder)


@pytest.mark.parametrize("kind", ["UNet2DConditionModel", "mine.UNet2DModel", None])
def test_a_network_of_another_class_is_refused(folder, kind) -> None:
    """By model_index.json where there is one, as diffusers does."""
    change_json(folder / "unet" / "config.json", _class_name="SomethingElse")
    assert_same(convert.read_folder(folder).params)
    index = folder / "model_index.json"
    change_json(index, unet=["diffusers", kind])
    with pytest.raises(ConvertError, match=str(kind)):
        convert.read_folder(folder)
    change_json(index, unet=["my_code", "UNet2DModel"])
    with pytest.raises(ConvertError, match="my_code"):
        convert.read_folder(folder)
    change_json(index, unet=["diffusers", "UNet2DModel"], _class_name="MyPipeline")
    with pytest.raises(ConvertError, match="MyPipeline"):
        convert.read_folder(folder)


@pytest.mark.parametrize(
    "option,value",
    [
        ("prediction_type", "flow_prediction"),
        ("variance_type", "learned_range"),
        ("timestep_spacing", "karras"),
        ("beta_schedule", "laplace"),
        ("trained_betas", [0.1, 0.2]),
        ("trained_betas", 3),
        ("thresholding", "yes"),
        ("rescale_betas_zero_snr", 1),
        ("_use_default_values", {"clip_sample": True}),
        ("beta_end", "much"),
        ("num_train_timesteps", 1),
        ("num_train_timesteps", float("inf")),
        ("num_train_timesteps", 1000.7),
        ("num_train_timesteps", 5 * 10**8),
        ("steps_offset", -5),
        ("steps_offset", 1.9),
        ("clip_sample", "no"),
        ("clip_sample_range", -1),
        ("clip_sample_range", float("nan")),
        ("clip_sample_range", 10**400),
        ("surprise", 1),
    ],
)
def test_unsupported_schedulers_are_refused_by_name(folder, option, value) -> None:
    change_json(folder / "scheduler" / "scheduler_config.json", **{option: value})
    named = {"variance_type": "learned variance"}.get(option, option)
    with pytest.raises(ConvertError, match=named):
        convert.read_folder(folder)


@pytest.mark.parametrize(
    "kind,option,value",
    [
        ("UniPCMultistepScheduler", "use_flow_sigmas", True),
        ("DEISMultistepScheduler", "use_dynamic_shifting", True),
        ("UniPCMultistepScheduler", "shift_terminal", 0.1),
        ("IPNDMScheduler", "trained_betas", [0.1, 0.2]),
        ("FlowMatchEulerDiscreteScheduler", "shift", 1.0),
        (["DDPMScheduler"], "beta_end", 0.02),
    ],
)
def test_another_process_is_refused_by_name(kind, option, value) -> None:
    said = {"_class_name": kind, option: value, "num_train_timesteps": 2}
    with pytest.raises(ConvertError, match=f"{option}|FlowMatch|is of class"):
        read_scheduling(said)


def test_what_a_class_does_not_take_has_no_effect_and_is_said() -> None:
    remarks: list[str] = []
    said = {"clip_sample": True, "set_alpha_to_one": False, "use_flow_sigmas": True}
    found = read_scheduling(said, "x.json", "EulerDiscreteScheduler", remarks)
    assert found.clip is None and found.to_clean
    assert any("does not take clip_sample, set_alpha_to_one" in x for x in remarks)
    assert any("EulerDiscreteScheduler draws" in x for x in remarks)


def test_a_pipeline_with_more_than_a_network_is_refused(folder) -> None:
    change_json(folder / "model_index.json", vqvae=["diffusers", "VQModel"])
    with pytest.raises(ConvertError, match="a pipeline with vqvae"):
        convert.read_folder(folder)


def test_a_head_is_as_wide_as_divides_what_attends(folder) -> None:
    """diffusers asks no more: other widths have no attention."""
    config = write_unet(TINY) | {
        "block_out_channels": [8, 24],
        "down_block_types": ["DownBlock2D"] * 2,
        "up_block_types": ["UpBlock2D"] * 2,
        "attention_head_dim": 12,
    }
    assert read_unet(config).attention_head_dim == 12
    config["up_block_types"] = ["UpBlock2D", "AttnUpBlock2D"]
    with pytest.raises(ConvertError, match="attention_head_dim=12, found 8"):
        read_unet(config)


# What these classes of diffusers save where nothing is asked of them: the options that
# are read, the rest by `diffusers_config._STEPPING` and "off".
SILENT = {
    "DDPMScheduler": (1.0, "leading", True),
    "DDIMScheduler": (1.0, "leading", True),
    "DEISMultistepScheduler": (None, "linspace", True),
    "DPMSolverMultistepScheduler": (None, "linspace", True),
    "DPMSolverSinglestepScheduler": (None, "linspace", True),
    "EulerAncestralDiscreteScheduler": (None, "linspace", True),
    "EulerDiscreteScheduler": (None, "linspace", True),
    "HeunDiscreteScheduler": (None, "linspace", True),
    "KDPM2AncestralDiscreteScheduler": (None, "linspace", True),
    "KDPM2DiscreteScheduler": (None, "linspace", True),
    "LMSDiscreteScheduler": (None, "linspace", True),
    "PNDMScheduler": (None, "leading", False),
    "UniPCMultistepScheduler": (None, "linspace", True),
}


@pytest.mark.parametrize("name", SILENT)
def test_a_scheduler_that_is_silent_means_what_diffusers_does(name) -> None:
    found = read_scheduling({"_class_name": name})
    assert (found.clip, found.timestep_spacing, found.to_clean) == SILENT[name]
    latent = name.startswith(("Heun", "KDPM2"))
    ends = (0.00085, 0.012) if latent else (1e-4, 0.02)
    assert (found.betas.start, found.betas.end) == ends


# Several of diffusers' schedulers hand a tensor to NumPy in the old way.
@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
@pytest.mark.parametrize("name", SILENT)
def test_schedulers_that_diffusers_saves_are_read(name) -> None:
    diffusers = pytest.importorskip("diffusers")
    saved = json.loads(getattr(diffusers, name)().to_json_string())
    silent = read_scheduling({"_class_name": name})
    assert read_scheduling(saved) == silent


def test_options_of_a_solver_are_read() -> None:
    found = read_scheduling(
        {
            "_class_name": "DPMSolverMultistepScheduler",
            "algorithm_type": "dpmsolver++",
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
            "use_karras_sigmas": True,
            "variance_type": None,
        }
    )
    assert found.prediction_type == "v_prediction" and found.clip is None
    assert found.timestep_spacing == "trailing"


@pytest.mark.parametrize(
    "scheduling,words",
    [
        (Scheduling(CosineBetas(cap=0.5)), "a cap of 0.999"),
        (Scheduling(CosineBetas(offset=0.1)), "offset of 0.008"),
        (Scheduling(to_clean=False, variance_type="fixed_large"), "to_clean=False"),
    ],
)
def test_what_diffusers_cannot_say_is_not_written(tmp_path, scheduling, words) -> None:
    with pytest.raises(ConvertError, match=words):
        spec = Spec(TINY, scheduling)
        convert.write_folder(tmp_path, MODEL._replace(spec=spec))
    assert not list(tmp_path.iterdir())


def test_weights_of_few_digits_are_written_in_full(tmp_path) -> None:
    unet = dataclasses.replace(TINY, param_dtype="bfloat16")
    params = jax.tree.map(lambda x: x.astype(jax.numpy.bfloat16), MODEL.params)
    convert.write_folder(tmp_path, Model(Spec(unet, Scheduling()), params))
    found = convert.read_folder(tmp_path).params
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), found, params)


class Bomb:
    """Touches a file when unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def pickled(folder: pathlib.Path) -> bytes:
    import pickle

    return pickle.dumps(Bomb(str(folder / "executed")))


def truncated(folder):
    path = folder / "unet" / weight_sets.WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def terabytes(folder):
    header = json.dumps(
        {"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    ).encode()
    path = folder / "unet" / weight_sets.WEIGHTS
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def endless_header(folder):
    path = folder / "unet" / weight_sets.WEIGHTS
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")


def wrong_dtype(folder):
    tensors = weights_of(folder)
    tensors["conv_in.bias"] = tensors["conv_in.bias"].astype(np.int32)
    put_weights(folder, tensors)


def wrong_shape(folder):
    tensors = weights_of(folder)
    tensors["conv_in.bias"] = np.zeros(3, np.float32)
    put_weights(folder, tensors)


def not_a_number(folder):
    tensors = weights_of(folder)
    tensors["conv_in.bias"][0] = np.nan
    put_weights(folder, tensors)


def pickle_as_safetensors(folder):
    (folder / "unet" / weight_sets.WEIGHTS).write_bytes(pickled(folder))


def pickle_as_bin(folder):
    (folder / "unet" / weight_sets.WEIGHTS).unlink()
    path = folder / "unet" / "diffusion_pytorch_model.bin"
    path.write_bytes(pickled(folder))


def path_outside(folder):
    places = shard(folder)
    places["conv_in.bias"] = "../../secret.safetensors"
    (folder / "unet" / weight_sets.INDEX).write_text(json.dumps({"weight_map": places}))


def pickle_in_an_index(folder):
    places = dict.fromkeys(weights_of(folder), weight_sets.PICKLE)
    (folder / "unet" / weight_sets.WEIGHTS).unlink()
    (folder / "unet" / weight_sets.INDEX).write_text(json.dumps({"weight_map": places}))


def long_name(folder):
    places = shard(folder)
    places["conv_in.bias"] = "x" * 5000 + ".safetensors"
    (folder / "unet" / weight_sets.INDEX).write_text(json.dumps({"weight_map": places}))


def twice_in_shards(folder):
    tensors = weights_of(folder)
    places = shard(folder)
    file = places["conv_in.bias"]
    other = ({*places.values()} - {file}).pop()
    more = {name: tensors[name] for name, place in places.items() if place == other}
    more["conv_in.bias"] = tensors["conv_in.bias"]
    safetensors.numpy.save_file(more, folder / "unet" / other)


def twice_by_another_name(folder):
    tensors = weights_of(folder)
    name = next(name for name in tensors if "to_q.weight" in name)
    tensors[name.replace("to_q", "query")] = tensors[name]
    put_weights(folder, tensors)


def symlink_loop(folder):
    path = folder / "unet" / weight_sets.WEIGHTS
    path.unlink()
    path.symlink_to(path)


def folder_loop(folder):
    (folder / "unet").rename(folder / "before")
    (folder / "unet").symlink_to(folder / "unet")


def deep_json(folder):
    (folder / "unet" / "config.json").write_text("[" * 100_000)


def json_list(folder):
    (folder / "unet" / "config.json").write_text("[]")


def large_json(folder):
    (folder / "unet" / "config.json").write_text(" " * (opening.LARGEST_JSON + 1))


HOSTILE = {
    truncated: "not a safetensors file",
    terabytes: "not a safetensors file",
    endless_header: "not a safetensors file",
    wrong_dtype: "F8_E4M3|int32|I32",
    wrong_shape: r"\[3\], expected one of F16, BF16, F32, F64 and \[8\]",
    not_a_number: "NaN",
    pickle_as_safetensors: "not a safetensors file",
    pickle_as_bin: "is a pickle: .* install|is not a pickle of arrays alone",
    path_outside: "outside its folder",
    pickle_in_an_index: "a shard is a safetensors file",
    long_name: "a shard is a safetensors file",
    twice_in_shards: "has conv_in.bias, which is also conv_in.bias in part-",
    twice_by_another_name: "which is also",
    symlink_loop: "there is no file|has none of",
    folder_loop: "has no unet/config.json",
    deep_json: "JSON",
    json_list: "no JSON object",
    large_json: "larger than",
}


@pytest.mark.parametrize("spoil,words", HOSTILE.items(), ids=lambda x: str(x)[:24])
def test_hostile_input_is_one_sentence_and_nothing_runs(folder, spoil, words) -> None:
    spoil(folder)
    with pytest.raises(ConvertError, match=words) as raised:
        convert.read_folder(folder)
    assert "\n" not in str(raised.value)
    assert not (folder / "executed").exists()


def test_a_folder_that_is_none() -> None:
    with pytest.raises(ConvertError, match="no/such is not a folder"):
        convert.read_folder("no/such")


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-this-name/a"])
def test_a_name_that_is_no_path(name) -> None:
    with pytest.raises(ConvertError, match="is no path"):
        hub.find_folder(name)


def as_bin(folder: pathlib.Path, found) -> None:
    import torch

    (folder / "unet" / weight_sets.WEIGHTS).unlink()
    torch.save(found, folder / "unet" / weight_sets.PICKLE)


def test_an_old_pickle_of_arrays_is_read_with_torch(folder) -> None:
    torch = pytest.importorskip("torch")
    tensors = to_torch(MODEL.params)
    as_bin(folder, {name: torch.tensor(value) for name, value in tensors.items()})
    assert_same(convert.read_folder(folder).params)


def test_an_old_pickle_may_be_of_parameters(folder) -> None:
    torch = pytest.importorskip("torch")
    tensors = to_torch(MODEL.params)
    as_bin(folder, {k: torch.nn.Parameter(torch.tensor(v)) for k, v in tensors.items()})
    assert_same(convert.read_folder(folder).params)


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda torch, name, x: {name: x.int()}, "as int32"),
        (lambda torch, name, x: {name: x[:-1]}, "expected one of F16"),
        (lambda torch, name, x: {name: x * torch.nan}, "NaN"),
        (lambda torch, name, x: {name: [1.0]}, "not a pickle of named, dense"),
        (lambda torch, name, x: {name: x.to_sparse()}, "_rebuild_sparse_tensor"),
        (
            lambda torch, name, x: {name: x.to("meta")},
            "_rebuild_meta_tensor_no_storage",
        ),
        (lambda torch, name, x: {"more": x}, r"\+more"),
    ],
)
def test_a_pickle_is_judged_as_any_other_file(folder, change, words) -> None:
    torch = pytest.importorskip("torch")
    tensors = to_torch(MODEL.params)
    found = {name: torch.tensor(value) for name, value in tensors.items()}
    found |= change(torch, "conv_in.bias", found["conv_in.bias"])
    as_bin(folder, found)
    with pytest.raises(ConvertError, match=words):
        convert.read_folder(folder)


def test_a_model_of_the_hub_that_cannot_be_had_is_said(monkeypatch) -> None:
    """Without huggingface_hub, or with it and no network: nothing is downloaded."""
    with pytest.raises(ConvertError, match="Hub") as raised:
        hub.find_folder("nobody/no-such-model-of-anyone", offline=True)
    assert "nobody/no-such-model-of-anyone" in str(raised.value)
    assert "\n" not in str(raised.value)


class Hub(types.ModuleType):
    """A Hub with one model, which gives the files of a pattern and notes them."""

    def __init__(self, model: pathlib.Path, cache: pathlib.Path) -> None:
        super().__init__("huggingface_hub")
        self.model, self.cache, self.given = model, cache, []

    def snapshot_download(self, name, allow_patterns, local_files_only, revision):
        self.revision = revision
        if name != "owner/model":
            raise ConnectionError  # and says nothing
        if isinstance(allow_patterns, str):
            allow_patterns = [allow_patterns]
        for path in sorted(p for p in self.model.rglob("*") if p.is_file()):
            file = path.relative_to(self.model).as_posix()
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                (self.cache / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, self.cache / file)
                self.given.append(file)
        return str(self.cache)


def test_the_hub_gives_weights_of_supported_models_only(
    folder, tmp_path, monkeypatch
) -> None:
    source = Hub(folder, tmp_path / "cache")
    monkeypatch.setitem(sys.modules, "huggingface_hub", source)
    (folder / "unet" / weight_sets.PICKLE).write_bytes(b"not needed")
    shutil.copytree(folder / "unet", folder / "checkpoint-9" / "unet")
    (folder / "tokens.json").write_text("{}")
    found = hub.find_folder("owner/model")
    assert_same(convert.read_folder(found).params)
    parts = ("model_index.json", "scheduler/scheduler_config.json", "unet/config.json")
    assert sorted(source.given) == sorted([*parts, f"unet/{weight_sets.WEIGHTS}"])
    (folder / "unet" / weight_sets.WEIGHTS).unlink()
    source = Hub(folder, tmp_path / "other")
    monkeypatch.setitem(sys.modules, "huggingface_hub", source)
    hub.find_folder("owner/model")
    assert source.given[-1] == f"unet/{weight_sets.PICKLE}" and source.revision is None
    address = "https://huggingface.co/owner/model/tree/v1.0"
    for name, revision in (("owner/model@v1.0", "v1.0"), (address, "v1.0")):
        hub.find_folder(name)
        assert source.revision == revision
    change_json(folder / "model_index.json", vqvae=["diffusers", "VQModel"])
    source = Hub(folder, tmp_path / "third")
    monkeypatch.setitem(sys.modules, "huggingface_hub", source)
    with pytest.raises(ConvertError, match="vqvae"):
        convert.read_folder(hub.find_folder("owner/model"))
    assert all(file.endswith(".json") for file in source.given)
    with pytest.raises(ConvertError, match="does not give it .ConnectionError"):
        hub.find_folder("owner/another")


def test_a_path_is_taken_before_the_hub(tmp_path, monkeypatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.find_folder("owner/name") == pathlib.Path("owner/name")
    assert not hub.find_folder("not/a/name/of/the/hub").exists()


def test_diffusers_loads_our_folder_and_predicts_the_same(folder) -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.DDPMPipeline.from_pretrained(folder)
    x = np.random.default_rng(1).normal(size=(2, *TINY.image_shape)).astype(np.float32)
    t = np.array([3, 700], np.int32)
    with torch.no_grad():
        wanted = pipeline.unet(torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(t))
    found = TINY(MODEL.params, x, t)
    wanted = wanted.sample.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(
        found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max()
    )


@pytest.mark.parametrize("name", ["clean", "baddiffusion"])
def test_diffusers_draws_the_same_images_from_our_folders(name, monkeypatch) -> None:
    """DDPMPipeline.from_pretrained as it is, given our start and our noise."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.ddpm import pipeline_ddpm
    from diffusers.schedulers import scheduling_ddpm

    model, steps = convert.read_folder(ZOO / name), 10
    schedule, key = model.spec.scheduling.betas.tables(), jax.random.key(4)
    sampler = DDPM(steps, clip=model.spec.scheduling.clip)
    shape = (3, *model.spec.network.image_shape)
    start = np.asarray(jax.random.normal(jax.random.key(3), shape))
    times, _ = sampler.path(schedule)
    keys = [jax.random.fold_in(key, t) for t in times]
    draws = iter([start, *(np.asarray(jax.random.normal(k, shape)) for k in keys)])

    def noise(*args, **kwargs):
        del args, kwargs
        return torch.tensor(next(draws).transpose(0, 3, 1, 2))

    monkeypatch.setattr(pipeline_ddpm, "randn_tensor", noise)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", noise)
    pipeline = diffusers.DDPMPipeline.from_pretrained(ZOO / name)
    wanted = pipeline(3, num_inference_steps=steps, output_type="np").images
    wanted = wanted.reshape(shape)  # a grey image comes without its channel
    found = sample(model.spec.network, model.params, schedule, sampler, start, key)
    found = np.clip(np.asarray(found) / 2 + 0.5, 0, 1)
    np.testing.assert_allclose(found, wanted, atol=1e-3)
