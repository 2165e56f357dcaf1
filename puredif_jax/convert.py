"""diffusers model folders to ours and back: weights, network and noise schedule.

A folder holds `unet/config.json` and `unet/diffusion_pytorch_model.safetensors`, in one
file or in shards with an index, and `scheduler/scheduler_config.json`; older ones hold
the same files at their top. Nothing in a folder is executed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy
from absl import logging

from puredif_jax.diffusion import (
    CosineBetas,
    LinearBetas,
    Prediction,
    ScaledLinearBetas,
    Spacing,
    Variance,
)
from puredif_jax.files import shortened, write_whole
from puredif_jax.types import InputError, Params
from puredif_jax.unet import UNet

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
PICKLE = "diffusion_pytorch_model.bin"
LARGEST_JSON = 10_000_000  # bytes

# Fields of UNet2DModel's configuration that ours has too; "sample_size" is apart.
_SHARED = (
    "in_channels block_out_channels down_block_types up_block_types layers_per_block "
    "attention_head_dim norm_num_groups norm_eps downsample_padding flip_sin_to_cos "
    "freq_shift dropout"
).split()
# What diffusers takes where a configuration is silent.
_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "block_out_channels": [224, 448, 672, 896],
    "down_block_types": ["DownBlock2D"] + ["AttnDownBlock2D"] * 3,
    "up_block_types": ["AttnUpBlock2D"] * 3 + ["UpBlock2D"],
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "dropout": 0.0,
}
# Options that the network does not have, and the values that leave them off.
_OFF: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "attn_norm_num_groups": (None,),
    "resnet_time_scale_shift": ("default",),
    "add_attention": (True,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
}
# Fields without meaning for a forward pass.
_IGNORED = {"out_channels", "sample_size", "num_train_timesteps"}

_SCHEDULES: dict[str, type[LinearBetas] | type[ScaledLinearBetas]] = {
    "linear": LinearBetas,
    "scaled_linear": ScaledLinearBetas,
}
# Schedulers of the variance-preserving process that betas define. They differ in how
# they sample, which is not read, and in whether they clip unless told otherwise.
_CLIPPING = ("DDPMScheduler", "DDIMScheduler")
_SCHEDULERS = (
    *_CLIPPING,
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
# Modules that PyTorch keeps in lists.
_NUMBERED = (
    "down_blocks up_blocks resnets attentions downsamplers upsamplers to_out".split()
)
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
# Names of attention layers before diffusers 0.12.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class ConvertError(InputError):
    """A folder that is not a model we can read; says what was found."""


@dataclasses.dataclass(frozen=True)
class Scheduling:
    """What a folder says of the forward process and of sampling.

    Attributes:
      betas: the noise schedule.
      prediction_type: "epsilon" or "v_prediction", what the network predicts.
      variance_type: of ancestral sampling, "fixed_small" (that of the posterior) or
        "fixed_large" (beta_t).
      clip: bound on x0hat while sampling, None without `clip_sample`.
      timestep_spacing: "leading", "linspace" or "trailing".
      steps_offset: added to leading timesteps.
      to_clean: the last step of DDIM leads to the clean image, not to t = 0
        ("set_alpha_to_one").
    """

    betas: LinearBetas | ScaledLinearBetas | CosineBetas = LinearBetas()
    prediction_type: Prediction = "epsilon"
    variance_type: Variance = "fixed_small"
    clip: float | None = 1.0
    timestep_spacing: Spacing = "leading"
    steps_offset: int = 0
    to_clean: bool = True


@dataclasses.dataclass(frozen=True)
class Model:
    """A converted folder: network, parameters (nested dict of NumPy), scheduling."""

    unet: UNet
    params: Params
    scheduling: Scheduling


def read_folder(folder: str | os.PathLike[str]) -> Model:
    """Reads a diffusers folder of an unconditional pixel-space model.

    Raises:
      ConvertError: something is missing, damaged, of another kind or unsupported; one
        sentence that names it. Configurations are judged before weights are opened.
    """
    unet, scheduling = read_configs(folder)
    return Model(unet, read_weights(folder, unet), scheduling)


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether this is a folder with the configuration of a network in it."""
    top = pathlib.Path(path)
    return any((home / "config.json").is_file() for home in (top / "unet", top))


def read_configs(folder: str | os.PathLike[str]) -> tuple[UNet, Scheduling]:
    """What a folder says of its network and its schedule; raises as `read_folder`."""
    top = pathlib.Path(folder)
    if not top.is_dir():
        raise ConvertError(f"{folder} is not a folder of a diffusers model")
    _refuse_other_parts(top / "model_index.json")
    path = _part(top, "unet", "config.json") / "config.json"
    unet = read_unet(_read_json(path), str(path))
    name = "scheduler_config.json"
    path = _part(top, "scheduler", name) / name
    return unet, read_scheduling(_read_json(path), str(path))


def _refuse_other_parts(path: pathlib.Path) -> None:
    """A pipeline with an autoencoder or a text encoder is no pixel-space model."""
    if not path.is_file():
        return
    found = {k: v for k, v in _read_json(path).items() if not k.startswith("_")}
    parts = [k for k, v in found.items() if isinstance(v, list) and any(v)]
    if others := [k for k in parts if k not in ("unet", "scheduler")]:
        raise ConvertError(
            f"{path} is of a pipeline with {shortened(others)}: only those of a unet "
            "and a scheduler are read"
        )


def find_folder(name: str, offline: bool = False) -> pathlib.Path:
    """A local path, or the folder of a model of the Hub, downloaded if need be.

    Of a model that `read_configs` refuses, nothing but the configurations is fetched.

    Args:
      name: a path, or "owner/name" where there is no such path.
      offline: take what has been downloaded before.

    Raises:
      ConvertError: there is neither, huggingface_hub is not installed, or the Hub
        cannot be reached.
    """
    path = pathlib.Path(name).expanduser()
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return path
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ConvertError(
            f"there is no {name}; to get it from the Hub, install the extra 'hub'"
        ) from error
    logging.info("asking the Hub for %s", name)
    tensors = [f"*{WEIGHTS}", "*diffusion_pytorch_model-*.safetensors"]
    try:
        get = functools.partial(snapshot_download, name, local_files_only=offline)
        folder = pathlib.Path(get(allow_patterns="*.json"))
        with contextlib.suppress(ConvertError):  # who reads the folder is told
            read_configs(folder)
            get(allow_patterns=tensors)
            home = _part(folder, "unet", "config.json")
            if not any((home / found).is_file() for found in (WEIGHTS, INDEX)):
                get(allow_patterns=f"*{PICKLE}")
    except Exception as error:  # of many kinds, by what is wrong with the network
        raise ConvertError(
            f"there is no {name} here, and the Hub does not give it ({_line(error)})"
        ) from error
    return folder


def write_folder(folder: str | os.PathLike[str], model: Model) -> None:
    """Writes a folder that diffusers' `DDPMPipeline.from_pretrained` loads."""
    top = pathlib.Path(folder)
    (top / "unet").mkdir(parents=True, exist_ok=True)
    (top / "scheduler").mkdir(exist_ok=True)
    tensors = to_torch(model.params)
    stored = safetensors.numpy.save(tensors, {"format": "pt"})
    write_whole(top / "unet" / WEIGHTS, stored)
    _write_json(top / "unet" / "config.json", write_unet(model.unet))
    scheduler = write_scheduling(model.scheduling)
    _write_json(top / "scheduler" / "scheduler_config.json", scheduler)
    index = {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    _write_json(top / "model_index.json", index)


def read_unet(config: Mapping[str, Any], where: str = "config.json") -> UNet:
    """The network of a UNet2DModel configuration.

    Raises:
      ConvertError: another class, an option that is not supported, or a value that is
        none; each is named.
    """
    kind = config.get("_class_name")
    if kind != "UNet2DModel":
        raise ConvertError(f"{where} is of class {kind!r}: only UNet2DModel is read")
    for name, valid in _OFF.items():
        if name in config and config[name] not in valid:
            raise ConvertError(
                f"{where} sets {name}={config[name]!r}, which is not supported: only "
                f"{' or '.join(map(repr, valid))} is"
            )
    unknown = [
        name
        for name in config
        if name not in {*_SHARED, *_OFF, *_IGNORED} and not name.startswith("_")
    ]
    if unknown:
        raise ConvertError(f"{where} sets {', '.join(unknown)}, which we do not know")
    fields = {name: config.get(name, _DEFAULTS[name]) for name in _SHARED}
    channels = config.get("out_channels", fields["in_channels"])
    if channels != fields["in_channels"]:
        raise ConvertError(
            f"{where} has in_channels={fields['in_channels']} and out_channels="
            f"{channels}: only equal ones are read"
        )
    size = config.get("sample_size")
    sides = (size, size) if isinstance(size, int) else size
    if not (isinstance(sides, (list, tuple)) and len(sides) == 2):
        raise ConvertError(f"{where} has sample_size={size!r}: give one or two sides")
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    try:
        return UNet(sample_size=(int(sides[0]), int(sides[1])), **fields)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConvertError(f"{where} is not a network: {error}") from error


def write_unet(unet: UNet) -> dict[str, Any]:
    """The configuration of UNet2DModel for a network of ours."""
    shared = {name: getattr(unet, name) for name in _SHARED}
    height, width = unet.sample_size
    return {
        "_class_name": "UNet2DModel",
        "sample_size": height if height == width else [height, width],
        "out_channels": unet.in_channels,
        **{name: values[0] for name, values in _OFF.items()},
        **shared,
    }


def read_scheduling(
    config: Mapping[str, Any], where: str = "scheduler_config.json"
) -> Scheduling:
    """The noise schedule and the sampling options of a scheduler configuration.

    Raises:
      ConvertError: an option that is not supported; it is named.
    """
    kind = str(config.get("_class_name", "DDPMScheduler"))
    if kind not in _SCHEDULERS:
        raise ConvertError(
            f"{where} is of class {kind}: read are {', '.join(_SCHEDULERS)}"
        )
    for option in ("trained_betas", "thresholding", "rescale_betas_zero_snr"):
        if config.get(option):
            raise ConvertError(f"{where} sets {option}, which is not supported")
    choices = {
        "prediction_type": typing.get_args(Prediction),
        "variance_type": typing.get_args(Variance),
        "timestep_spacing": typing.get_args(Spacing),
        "beta_schedule": (*_SCHEDULES, "squaredcos_cap_v2"),
    }
    found = {k: config.get(k, valid[0]) for k, valid in choices.items()}
    for name, valid in choices.items():
        if found[name] not in valid:
            raise ConvertError(
                f"{where} sets {name}={found[name]!r}: supported are {', '.join(valid)}"
            )
    try:
        steps = int(config.get("num_train_timesteps", 1000))
        betas: LinearBetas | ScaledLinearBetas | CosineBetas
        if found["beta_schedule"] == "squaredcos_cap_v2":
            betas = CosineBetas(steps)
        else:
            ends = (config.get("beta_start", 1e-4), config.get("beta_end", 0.02))
            rule = _SCHEDULES[found["beta_schedule"]]
            betas = rule(steps, float(ends[0]), float(ends[1]))
        clip = float(config.get("clip_sample_range", 1.0))
        offset = int(config.get("steps_offset", 0))
    except (TypeError, ValueError, OverflowError) as error:
        raise ConvertError(f"{where} is not a schedule: {error}") from error
    return Scheduling(
        betas=betas,
        prediction_type=found["prediction_type"],
        variance_type=found["variance_type"],
        clip=clip if config.get("clip_sample", kind in _CLIPPING) else None,
        timestep_spacing=found["timestep_spacing"],
        steps_offset=offset,
        to_clean=bool(config.get("set_alpha_to_one", True)),
    )


def write_scheduling(scheduling: Scheduling) -> dict[str, Any]:
    """The configuration of diffusers' DDPMScheduler."""
    betas = scheduling.betas
    written: dict[str, Any] = {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": betas.steps,
        "prediction_type": scheduling.prediction_type,
        "variance_type": scheduling.variance_type,
        "clip_sample": scheduling.clip is not None,
        "clip_sample_range": 1.0 if scheduling.clip is None else scheduling.clip,
        "timestep_spacing": scheduling.timestep_spacing,
        "steps_offset": scheduling.steps_offset,
    }
    if isinstance(betas, CosineBetas):
        return written | {"beta_schedule": "squaredcos_cap_v2"}
    rule = next(name for name, kind in _SCHEDULES.items() if kind is type(betas))
    ends = {"beta_start": betas.start, "beta_end": betas.end}
    return written | ends | {"beta_schedule": rule}


def weight_files(folder: str | os.PathLike[str]) -> list[pathlib.Path]:
    """The files from which `read_weights` would read; raises as it does."""
    home = _part(pathlib.Path(folder), "unet", "config.json")
    if any((home / name).is_file() for name in (WEIGHTS, INDEX)):
        return _shards(home)
    return [_pickle(home)]


def read_weights(folder: str | os.PathLike[str], unet: UNet) -> Params:
    """The parameters of `unet` in `folder`, one safetensors file or indexed shards.

    Headers are compared before any array is read. A folder that has nothing but a
    pickle is read by PyTorch's weights-only loading, which executes nothing and takes
    arrays only; this needs the extra "torch".

    Raises:
      ConvertError: a file is missing or damaged, or names, shapes, dtypes or values are
        not those of the network: "-" names what is missing, "+" what is too many.
    """
    home = _part(pathlib.Path(folder), "unet", "config.json")
    wanted = {torch_name(path): leaf for path, leaf in _leaves(unet)}
    entries: dict[str, _Entry] = {}
    with contextlib.ExitStack() as files:
        for path in weight_files(folder):
            if path.suffix == ".bin":
                entries = _pickled(path)
            else:
                entries |= _stored(files.enter_context(_open(path)), path)
        missing = [f"-{name}" for name in wanted if name not in entries]
        surplus = [f"+{name}" for name in entries if name not in wanted]
        if missing or surplus:
            both = "; ".join(shortened(names) for names in (missing, surplus) if names)
            raise ConvertError(f"{home} does not have the weights expected: {both}")
        for name, leaf in wanted.items():
            entry, need = entries[name], _torch_shape(leaf.shape)
            # Old attention layers were 1x1 convolutions.
            if entry.dtype != "F32" or entry.shape not in (need, (*need, 1, 1)):
                raise ConvertError(
                    f"{entry.file} has {entry.name} as {entry.dtype}"
                    f"{list(entry.shape)}, expected F32{list(need)}"
                )
        tensors: dict[str, np.ndarray] = {}
        for name, leaf in wanted.items():
            entry = entries[name]
            value = entry.read().reshape(_torch_shape(leaf.shape))
            if not np.isfinite(value).all():
                raise ConvertError(f"{entry.file} has NaN or infinity in {entry.name}")
            tensors[name] = value
    return from_torch(tensors, unet)


class _Entry(NamedTuple):
    """An array in a file, not read yet; `name` is that in the file."""

    file: pathlib.Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def _stored(file: Any, path: pathlib.Path) -> dict[str, _Entry]:
    """The arrays of an open safetensors file, by the names of today."""
    entries = {}
    for name in file.keys():  # noqa: SIM118
        head = file.get_slice(name)
        read = functools.partial(file.get_tensor, name)
        shape = tuple(head.get_shape())
        entries[_new_name(name)] = _Entry(path, name, head.get_dtype(), shape, read)
    return entries


def _pickle(folder: pathlib.Path) -> pathlib.Path:
    path = folder / PICKLE
    if not path.is_file():
        others = sorted(p.name for p in folder.glob("*.bin"))
        raise ConvertError(
            f"{folder} has none of {WEIGHTS}, {INDEX} and {PICKLE}"
            + (f"; {others[0]} is a pickle of another name" if others else "")
        )
    return path


def _pickled(path: pathlib.Path) -> dict[str, _Entry]:
    """The arrays of a pickle, if PyTorch finds nothing else in it."""
    try:
        import torch
    except ImportError as error:
        raise ConvertError(
            f"{path} is a pickle: to read its arrays and nothing else, install the "
            f"extra 'torch', or store it as {WEIGHTS}"
        ) from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, by what the pickle tries
        raise ConvertError(
            f"{path} is not a pickle of arrays alone, and is not read ({_line(error)})"
        ) from error
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor)
        for name, value in found.items()
    ):
        raise ConvertError(f"{path} is not a pickle of named arrays")
    kinds = {torch.float32: "F32"}
    return {
        _new_name(name): _Entry(
            path,
            name,
            kinds.get(value.dtype, str(value.dtype)),
            tuple(value.shape),
            value.numpy,
        )
        for name, value in found.items()
    }


def from_torch(tensors: Mapping[str, np.ndarray], unet: UNet) -> Params:
    """Parameters of ours from the arrays of a PyTorch state dict, by its names."""

    def leaf(path: Any, like: Any) -> np.ndarray:
        value = tensors[torch_name(path)]
        if value.ndim > 1:  # OIHW to HWIO, (out, in) to (in, out)
            value = np.moveaxis(value, (0, 1), (-1, -2))
        return np.ascontiguousarray(value, like.dtype)

    return jax.tree.map_with_path(leaf, _abstract(unet))


def to_torch(params: Params) -> dict[str, np.ndarray]:
    """The PyTorch state dict of parameters, as NumPy arrays."""
    tensors = {}
    for path, value in jax.tree.leaves_with_path(params):
        value = np.asarray(value)
        if value.ndim > 1:
            value = np.moveaxis(value, (-1, -2), (0, 1))
        tensors[torch_name(path)] = np.ascontiguousarray(value)
    return tensors


def torch_name(path: Any) -> str:
    """PyTorch's name of the parameter at a path of ours."""
    *modules, leaf = (entry.key for entry in path)
    name = "_".join(modules)
    for numbered in _NUMBERED:
        name = re.sub(rf"{numbered}_(\d+)_?", rf"{numbered}.\1.", name)
    for single in ("mid_block", "time_embedding"):
        name = re.sub(rf"^{single}_", f"{single}.", name)
    return f"{name.strip('.')}.{_LEAVES[leaf]}"


def _abstract(unet: UNet) -> Any:
    return jax.eval_shape(unet.init, jax.random.key(0))


def _leaves(unet: UNet) -> list[tuple[Any, Any]]:
    return jax.tree.leaves_with_path(_abstract(unet))


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-3:-1], *shape[:-2])


def _new_name(name: str) -> str:
    return re.sub(
        r"(?<=\.)(query|key|value|proj_attn)(?=\.(weight|bias)$)",
        lambda found: _OLD_NAMES[found[1]],
        name,
    )


def _shards(folder: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files of a network; an index may name files of its folder."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    names = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ConvertError(f"{folder / INDEX} has no weight_map")
    files = sorted({str(name) for name in names.values()})
    for name in files:
        if pathlib.PurePath(name).name != name or "\\" in name:
            raise ConvertError(f"{folder / INDEX} names {name!r}, outside its folder")
    return [folder / name for name in files]


def _open(path: pathlib.Path) -> Any:
    if not path.is_file():
        raise ConvertError(f"there is no file {path}")
    try:
        return safetensors.safe_open(path, "numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise ConvertError(f"{path} is not a safetensors file: {error}") from error


def _line(error: Exception) -> str:
    """The kind of an error, and the first line of what it says."""
    first = str(error).strip().partition("\n")[0]
    return ": ".join(filter(None, (type(error).__name__, first)))


def _part(top: pathlib.Path, name: str, file: str) -> pathlib.Path:
    """The folder of a part of a model: below the top, or in old models the top."""
    for folder in (top / name, top):
        if (folder / file).is_file():
            return folder
    raise ConvertError(f"{top} has no {name}/{file}")


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ConvertError(f"{path} is larger than {LARGEST_JSON} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ConvertError):
            raise
        raise ConvertError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConvertError(f"{path} holds no JSON object")
    return found


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    write_whole(path, f"{json.dumps(value, indent=2)}\n".encode())
