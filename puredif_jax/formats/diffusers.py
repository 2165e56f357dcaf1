"""diffusers model folders to ours and back: weights, network and noise schedule.

A folder holds `unet/config.json`, the weights beside it
(`puredif_jax.formats.weight_sets`) and `scheduler/scheduler_config.json`; older ones
hold the same files at their top. Nothing in a folder is executed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from puredif_jax.files.whole import shortened, write_whole
from puredif_jax.formats.diffusers_config import ConvertError as ConvertError
from puredif_jax.formats.diffusers_config import Remarks
from puredif_jax.formats.diffusers_config import read_unet as read_unet
from puredif_jax.formats.diffusers_config import write_unet as write_unet
from puredif_jax.formats.diffusers_layout import (
    SCHEDULER,
    Place,
    is_network,
    locate,
    network_folder,
)
from puredif_jax.formats.diffusers_scheduler import PIPELINES
from puredif_jax.formats.diffusers_scheduler import Scheduling as Scheduling
from puredif_jax.formats.diffusers_scheduler import read_scheduling as read_scheduling
from puredif_jax.formats.diffusers_scheduler import write_scheduling as write_scheduling
from puredif_jax.formats.entries import FLOATS, Entry, entries
from puredif_jax.formats.opening import read_json
from puredif_jax.formats.state_dict import from_torch as from_torch
from puredif_jax.formats.state_dict import named_leaves, new_name, torch_shape
from puredif_jax.formats.state_dict import to_torch as to_torch
from puredif_jax.formats.weight_sets import WEIGHTS, WeightSet, choose, of_file
from puredif_jax.networks.unet import UNet
from puredif_jax.types import Params

FOLDER = "diffusers"  # in a run, the model that it has trained


@dataclasses.dataclass(frozen=True)
class Model:
    """A converted folder: network, parameters (nested dict of NumPy), scheduling."""

    unet: UNet
    params: Params
    scheduling: Scheduling


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a folder says, before its weights are read.

    Attributes:
      unet: the network.
      scheduling: the noise schedule and how to sample; None where there is none.
      own: the scheduler is the model's own, not one that was found above it or given.
      remarks: sentences on what has no effect, or another one than it seems.
    """

    unet: UNet
    scheduling: Scheduling | None
    own: bool
    remarks: tuple[str, ...]


def read_folder(folder: str | os.PathLike[str]) -> Model:
    """Reads a diffusers folder of an unconditional pixel-space model.

    Raises:
      ConvertError: something is missing, damaged, of another kind or unsupported; one
        sentence that names it. Configurations are judged before weights are opened.
    """
    spec = read_spec(folder)
    if spec.scheduling is None:
        raise no_scheduler(folder)
    return Model(spec.unet, read_weights(folder, spec.unet), spec.scheduling)


def no_scheduler(path: str | os.PathLike[str]) -> ConvertError:
    """The error for a network without a scheduler."""
    return ConvertError(
        f"{path} has no scheduler/{SCHEDULER}, nor has a folder above it: give "
        "--config.scheduler=FOLDER"
    )


def is_model(path: str | os.PathLike[str]) -> bool:
    """Whether this is a folder, or a file of weights, of a network in this format."""
    top = pathlib.Path(path)
    if top.is_file():
        return of_file(top) is not None and is_network(top.parent)
    return is_network(top / "unet") or is_network(top)


def read_spec(path: str | os.PathLike[str], scheduler: str | None = None) -> Spec:
    """What diffusers would run: the network, and its scheduler.

    Args:
      path: a folder of a model or of a network, or the principal file of weights.
      scheduler: a folder or file, for a network that has no scheduler of its own.

    Raises:
      ConvertError: something is missing, damaged, of another kind or unsupported. No
        weights are opened.
    """
    place = locate(path, scheduler)
    remarks: Remarks = []
    unet, scheduling = _read_configs(place, remarks)
    if pathlib.Path(path).is_dir():
        variant = choose(place.network).variant
        if variant is not None:
            remarks.append(
                f"{place.network} has the variant {variant!r} only, which diffusers "
                "loads where it is asked for"
            )
    return Spec(unet, scheduling, place.own, tuple(remarks))


def check_configs(folder: pathlib.Path) -> pathlib.Path:
    """The folder of a model's network, if its configurations are supported.

    Raises:
      ConvertError: as `read_spec`; weights are not asked for.
    """
    place = locate(folder, None)
    _read_configs(place, [])
    return place.network


def _read_configs(place: Place, remarks: Remarks) -> tuple[UNet, Scheduling | None]:
    config = place.network / "config.json"
    kind = place.classes.get("unet")
    unet = read_unet(read_json(config), str(config), kind, remarks)
    if place.scheduler is None:
        return unet, None
    kind = place.classes.get("scheduler")
    if place.pipeline is not None and (into := PIPELINES[place.pipeline]):
        kind = into
    where = str(place.scheduler)
    scheduling = read_scheduling(read_json(place.scheduler), where, kind, remarks)
    if not place.own:
        remarks.append(f"the scheduler is of {where}")
    _agree(unet, scheduling, config)
    return unet, scheduling


def _agree(unet: UNet, scheduling: Scheduling, config: pathlib.Path) -> None:
    """Raises ConvertError where the scheduler cannot take what the network gives."""
    asked = scheduling.learned and scheduling.kind.startswith("DDPM")
    if unet.learned_variance and not scheduling.learned:
        raise ConvertError(
            f"{config} has out_channels twice its in_channels, but the scheduler asks "
            "for no learned variance: diffusers cannot draw from it"
        )
    if asked and not unet.learned_variance:
        raise ConvertError(
            f"{config} has as many out_channels as in_channels, but the scheduler asks "
            "for a learned variance: diffusers cannot draw from it"
        )


def write_folder(folder: str | os.PathLike[str], model: Model) -> None:
    """Writes a folder that diffusers' `DDPMPipeline.from_pretrained` loads.

    It is one of DDIMPipeline where the scheduling asks for DDIMScheduler. Weights are
    stored as float32.

    Raises:
      ConvertError: diffusers has no scheduler that says the same as `scheduling`.
      WriteError: the folder cannot be written.
    """
    top, scheduler = pathlib.Path(folder), write_scheduling(model.scheduling)
    (top / "unet").mkdir(parents=True, exist_ok=True)
    (top / "scheduler").mkdir(exist_ok=True)
    tensors = {k: v.astype(np.float32) for k, v in to_torch(model.params).items()}
    stored = safetensors.numpy.save(tensors, {"format": "pt"})
    write_whole(top / "unet" / WEIGHTS, stored)
    _write_json(top / "unet" / "config.json", write_unet(model.unet))
    _write_json(top / "scheduler" / SCHEDULER, scheduler)
    index = {
        "_class_name": scheduler["_class_name"].replace("Scheduler", "Pipeline"),
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "unet": ["diffusers", "UNet2DModel"],
    }
    _write_json(top / "model_index.json", index)


def weight_files(path: str | os.PathLike[str]) -> list[pathlib.Path]:
    """The files from which `read_weights` would read; raises as it does."""
    return _chosen(path).files()


def _chosen(path: str | os.PathLike[str]) -> WeightSet:
    top = pathlib.Path(path)
    if top.is_file():
        if (found := of_file(top)) is None:
            raise ConvertError(f"{path} is no file of weights beside a config.json")
        return found
    return choose(network_folder(top))


def check_weights(path: str | os.PathLike[str], unet: UNet) -> tuple[str, ...]:
    """Compares the headers of the weights with a network; raises as `read_weights`.

    Returns:
      Remarks: which dtypes are cast.
    """
    with _fitting(path, unet) as found:
        kinds = sorted({entry.dtype for entry in found.values()} - {"F32"})
    if not kinds:
        return ()
    return (f"weights of {' and '.join(kinds)} are cast to float32",)


def read_weights(path: str | os.PathLike[str], unet: UNet) -> Params:
    """The parameters of `unet` in a folder, or in a file of weights.

    Headers are compared before any array is read. Half and double precision become
    float32. A pickle is read by PyTorch's weights-only loading, which executes nothing
    and takes arrays only; this needs the extra "torch".

    Raises:
      ConvertError: a file is missing or damaged, or names, shapes, dtypes or values are
        not those of the network: "-" names what is missing, "+" what is too many.
    """
    tensors: dict[str, np.ndarray] = {}
    with _fitting(path, unet) as found:
        for name, leaf in named_leaves(unet).items():
            entry = found[name]
            value = entry.read().reshape(torch_shape(leaf.shape))
            if not np.isfinite(value).all():
                raise ConvertError(f"{entry.file} has NaN or infinity in {entry.name}")
            tensors[name] = value
    return from_torch(tensors, unet)


@contextlib.contextmanager
def _fitting(path: str | os.PathLike[str], unet: UNet) -> Iterator[dict[str, Entry]]:
    """The arrays of a network, compared with it by name, shape and dtype, open."""
    chosen = _chosen(path)
    home, wanted = chosen.principal.parent, named_leaves(unet)
    with entries(chosen) as stored:
        found: dict[str, Entry] = {}
        for entry in stored:
            name = new_name(entry.name)
            if name in found:
                first = found[name]
                raise ConvertError(
                    f"{entry.file} has {entry.name}, which is also "
                    f"{first.name} in {first.file.name}"
                )
            found[name] = entry
        missing = [f"-{name}" for name in wanted if name not in found]
        surplus = [f"+{name}" for name in found if name not in wanted]
        if missing or surplus:
            both = "; ".join(shortened(names) for names in (missing, surplus) if names)
            raise ConvertError(f"{home} does not have the weights expected: {both}")
        for name, leaf in wanted.items():
            entry, need = found[name], torch_shape(leaf.shape)
            # Old attention layers were 1x1 convolutions.
            if entry.dtype not in FLOATS or entry.shape not in (need, (*need, 1, 1)):
                raise ConvertError(
                    f"{entry.file} has {entry.name} as {entry.dtype}"
                    f"{list(entry.shape)}, expected one of {', '.join(FLOATS)} and "
                    f"{list(need)}"
                )
        yield found


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    write_whole(path, f"{json.dumps(value, indent=2)}\n".encode())
