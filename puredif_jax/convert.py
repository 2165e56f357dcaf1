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
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy
from absl import logging

from puredif_jax.diffusers_config import (
    ConvertError,
    Scheduling,
    read_scheduling,
    read_unet,
    write_scheduling,
    write_unet,
)
from puredif_jax.files import shortened, write_whole
from puredif_jax.types import Params
from puredif_jax.unet import UNet

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
SHARDS = "diffusion_pytorch_model-*.safetensors"
PICKLE = "diffusion_pytorch_model.bin"
LARGEST_JSON = 10_000_000  # bytes
LONGEST_NAME = 200  # characters of a shard's

# Modules that PyTorch keeps in lists.
_NUMBERED = (
    "down_blocks up_blocks resnets attentions downsamplers upsamplers to_out".split()
)
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
# Names of attention layers before diffusers 0.12.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


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
    try:
        path = pathlib.Path(name).expanduser()
        if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            return path
    except (OSError, RuntimeError, ValueError) as error:
        raise ConvertError(
            f"{name[:80]!r} is no path ({type(error).__name__})"
        ) from error
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ConvertError(
            f"there is no {name}; to get it from the Hub, install the extra 'hub'"
        ) from error
    logging.info("asking the Hub for %s", name)
    configs = ["model_index.json"]
    for part, file in (("unet", "config"), ("scheduler", "scheduler_config")):
        configs += [f"{part}/{file}.json", f"{file}.json"]
    try:
        get = functools.partial(snapshot_download, name, local_files_only=offline)
        folder = pathlib.Path(get(allow_patterns=configs))
        with contextlib.suppress(ConvertError):  # who reads the folder is told
            read_configs(folder)
            home = _part(folder, "unet", "config.json")
            at = "unet/" if home != folder else ""
            get(allow_patterns=[f"{at}{WEIGHTS}", f"{at}{INDEX}", f"{at}{SHARDS}"])
            if not any((home / found).is_file() for found in (WEIGHTS, INDEX)):
                get(allow_patterns=[f"{at}{PICKLE}"])
    except Exception as error:  # of many kinds, by what is wrong with the network
        raise ConvertError(
            f"there is no {name} here, and the Hub does not give it ({_line(error)})"
        ) from error
    return folder


def write_folder(folder: str | os.PathLike[str], model: Model) -> None:
    """Writes a folder that diffusers' `DDPMPipeline.from_pretrained` loads.

    That of DDIMPipeline where the scheduling asks for DDIMScheduler. Weights are stored
    as float32.

    Raises:
      ConvertError: diffusers has no scheduler that says the same as `scheduling`.
    """
    top, scheduler = pathlib.Path(folder), write_scheduling(model.scheduling)
    (top / "unet").mkdir(parents=True, exist_ok=True)
    (top / "scheduler").mkdir(exist_ok=True)
    tensors = {k: v.astype(np.float32) for k, v in to_torch(model.params).items()}
    stored = safetensors.numpy.save(tensors, {"format": "pt"})
    write_whole(top / "unet" / WEIGHTS, stored)
    _write_json(top / "unet" / "config.json", write_unet(model.unet))
    _write_json(top / "scheduler" / "scheduler_config.json", scheduler)
    index = {
        "_class_name": scheduler["_class_name"].replace("Scheduler", "Pipeline"),
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "unet": ["diffusers", "UNet2DModel"],
    }
    _write_json(top / "model_index.json", index)


def weight_files(folder: str | os.PathLike[str]) -> list[pathlib.Path]:
    """The files from which `read_weights` would read; raises as it does."""
    home = _part(pathlib.Path(folder), "unet", "config.json")
    if any((home / name).is_file() for name in (WEIGHTS, INDEX)):
        return _shards(home)
    return [_pickle(home)]


def check_weights(folder: str | os.PathLike[str], unet: UNet) -> None:
    """Compares the headers of the weights with a network; raises as `read_weights`."""
    with _entries(folder, unet):
        pass


def read_weights(folder: str | os.PathLike[str], unet: UNet) -> Params:
    """The parameters of `unet` in `folder`, one safetensors file or indexed shards.

    Headers are compared before any array is read. A folder that has nothing but a
    pickle is read by PyTorch's weights-only loading, which executes nothing and takes
    arrays only; this needs the extra "torch".

    Raises:
      ConvertError: a file is missing or damaged, or names, shapes, dtypes or values are
        not those of the network: "-" names what is missing, "+" what is too many.
    """
    tensors: dict[str, np.ndarray] = {}
    with _entries(folder, unet) as entries:
        for name, leaf in _named_leaves(unet).items():
            entry = entries[name]
            value = entry.read().reshape(_torch_shape(leaf.shape))
            if not np.isfinite(value).all():
                raise ConvertError(f"{entry.file} has NaN or infinity in {entry.name}")
            tensors[name] = value
    return from_torch(tensors, unet)


@contextlib.contextmanager
def _entries(folder: str | os.PathLike[str], unet: UNet) -> Iterator[dict[str, _Entry]]:
    """The arrays of a network, compared with it by name, shape and dtype, open."""
    home = _part(pathlib.Path(folder), "unet", "config.json")
    wanted = _named_leaves(unet)
    entries: dict[str, _Entry] = {}
    with contextlib.ExitStack() as files:
        for path in weight_files(folder):
            if path.suffix == ".bin":
                found = _pickled(path)
            else:
                found = _stored(files.enter_context(_open(path)), path)
            for entry in found:
                name = _new_name(entry.name)
                if name in entries:
                    first = entries[name]
                    raise ConvertError(
                        f"{entry.file} has {entry.name}, which is also "
                        f"{first.name} in {first.file.name}"
                    )
                entries[name] = entry
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
        yield entries


class _Entry(NamedTuple):
    """An array in a file, not read yet; `name` is that in the file."""

    file: pathlib.Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def _stored(file: Any, path: pathlib.Path) -> Iterable[_Entry]:
    """The arrays of an open safetensors file."""
    for name in file.keys():  # noqa: SIM118
        head = file.get_slice(name)
        read = functools.partial(file.get_tensor, name)
        yield _Entry(path, name, head.get_dtype(), tuple(head.get_shape()), read)


def _pickle(folder: pathlib.Path) -> pathlib.Path:
    path = folder / PICKLE
    if not path.is_file():
        others = sorted(p.name for p in folder.glob("*.bin"))
        raise ConvertError(
            f"{folder} has none of {WEIGHTS}, {INDEX} and {PICKLE}"
            + (f"; {others[0]} is a pickle of another name" if others else "")
        )
    return path


def _pickled(path: pathlib.Path) -> Iterable[_Entry]:
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
        isinstance(name, str)
        and isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        for name, value in found.items()
    ):
        raise ConvertError(f"{path} is not a pickle of named, dense arrays")
    for name, value in found.items():
        kind = "F32" if value.dtype == torch.float32 else str(value.dtype)
        read = value.detach().numpy
        yield _Entry(path, name, kind, tuple(value.shape), read)


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


@functools.lru_cache(maxsize=4)
def _abstract(unet: UNet) -> Any:
    return jax.eval_shape(unet.init, jax.random.key(0))


def _named_leaves(unet: UNet) -> dict[str, Any]:
    """The shapes of the parameters, by their names in PyTorch."""
    leaves = jax.tree.leaves_with_path(_abstract(unet))
    return {torch_name(path): leaf for path, leaf in leaves}


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
        if not name.endswith(".safetensors") or len(name) > LONGEST_NAME:
            raise ConvertError(
                f"{folder / INDEX} names {name[:80]!r}: a shard is a safetensors file"
            )
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
