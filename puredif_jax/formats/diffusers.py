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
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from puredif_jax.files.whole import expanded, shortened, write_whole
from puredif_jax.formats.diffusers_config import ConvertError as ConvertError
from puredif_jax.formats.diffusers_config import Remarks
from puredif_jax.formats.diffusers_config import read_unet as read_unet
from puredif_jax.formats.diffusers_config import write_unet as write_unet
from puredif_jax.formats.diffusers_scheduler import PIPELINES
from puredif_jax.formats.diffusers_scheduler import Scheduling as Scheduling
from puredif_jax.formats.diffusers_scheduler import read_scheduling as read_scheduling
from puredif_jax.formats.diffusers_scheduler import write_scheduling as write_scheduling
from puredif_jax.formats.state_dict import from_torch as from_torch
from puredif_jax.formats.state_dict import named_leaves, new_name, torch_shape
from puredif_jax.formats.state_dict import to_torch as to_torch
from puredif_jax.formats.weight_sets import (
    FLOATS,
    WEIGHTS,
    Entry,
    WeightSet,
    choose,
    entries,
    of_file,
    read_json,
    weight_sets,
)
from puredif_jax.networks.unet import UNet
from puredif_jax.types import Params

FOLDER = "diffusers"  # in a run, the model that it has trained
SCHEDULER = "scheduler_config.json"
UP = 2  # folders above a network without a scheduler in which one is looked for


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


class _Place(NamedTuple):
    """Where the parts of a model lie.

    network: the folder of the configuration and the weights.
    scheduler: the configuration, if there is one.
    classes: of the parts, as model_index.json says.
    pipeline: the class of the whole, as it says.
    own: the scheduler is the model's own.
    """

    network: pathlib.Path
    scheduler: pathlib.Path | None
    classes: Mapping[str, str]
    pipeline: str | None
    own: bool


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


def is_network(folder: pathlib.Path) -> bool:
    """Whether a folder has the configuration of a network of diffusers.

    One that cannot be read counts where weights lie beside it.
    """
    path = folder / "config.json"
    if not path.is_file():
        return False
    try:
        kind = read_json(path).get("_class_name")
    except ConvertError:
        return bool(weight_sets(folder))
    if kind is None:
        return bool(weight_sets(folder))
    return not str(kind).endswith(("Scheduler", "Pipeline"))


def _locate(path: str | os.PathLike[str], given: str | None) -> _Place:
    """Finds the parts as diffusers does.

    Args:
      path: a folder of a model or of a network, or the principal file of weights.
      given: a scheduler for a network that has none of its own.

    Raises:
      ConvertError: there is no network, the pipeline has other parts, or the network of
        a pipeline has a scheduler beside it, too.
    """
    top, network = pathlib.Path(path), None
    if not top.is_dir() and of_file(top) is not None:
        if not top.is_file():
            raise ConvertError(f"there is no file {top}")
        top = network = top.parent
    if not top.is_dir():
        raise ConvertError(f"{path} is not a folder of a diffusers model")
    above = _pipeline_above(top.absolute())
    if above is not None and network is None:
        if extra := own_process(top):
            raise ConvertError(
                f"{extra} and {above} say how to draw from {top}: remove one of them"
            )
    if above is not None:
        network, top = top, above
    elif network is None:
        network = network_folder(top)
    classes, pipeline = _read_index(top / "model_index.json")
    own = _part(top, "scheduler", SCHEDULER, "scheduler" in classes)
    if own is not None:
        return _Place(network, own, classes, pipeline, above is None)
    if given is not None:
        return _Place(network, _given(given), classes, None, False)
    # A pipeline without its scheduler is broken; a part of one looks for it above.
    for home in () if pipeline else list(top.absolute().parents)[:UP]:
        if found := _part(home, "scheduler", SCHEDULER, True):
            found_classes, pipeline = _read_index(home / "model_index.json")
            kinds = {k: v for k, v in found_classes.items() if k == "scheduler"}
            return _Place(network, found, kinds, pipeline, False)
    return _Place(network, None, classes, pipeline, False)


def _pipeline_above(network: pathlib.Path) -> pathlib.Path | None:
    """The pipeline whose network this folder is, by the folder's name."""
    top = network.parent
    if network.name != "unet":
        return None
    parts = (top / "model_index.json", top / "scheduler" / SCHEDULER)
    return top if any(part.is_file() for part in parts) else None


def own_process(network: pathlib.Path) -> pathlib.Path | None:
    """The file by which a network's folder would be drawn as a pipeline of its own."""
    found = (network / "model_index.json", network / SCHEDULER)
    return next((path for path in found if path.is_file()), None)


def network_folder(top: pathlib.Path) -> pathlib.Path:
    """The folder of a model's network: itself, or `unet` below a pipeline.

    Raises:
      ConvertError: there is no configuration.
    """
    below = top / "unet"
    indexed = (top / "model_index.json").is_file()
    if not (indexed and below.is_dir()) and is_network(top):
        return top
    if (below / "config.json").is_file():
        return below
    if not below.is_dir() and (top / "config.json").is_file():
        return top
    raise ConvertError(f"{top} has no unet/config.json")


def _part(
    top: pathlib.Path, name: str, file: str, indexed: bool
) -> pathlib.Path | None:
    """A configuration, below the top or, in old models, at it.

    diffusers looks at the top only where there is no folder of the part's name.
    """
    if (top / name).is_dir() and indexed:
        return top / name / file if (top / name / file).is_file() else None
    for path in (top / name / file, top / file):
        if path.is_file():
            return path
    return None


def _given(name: str) -> pathlib.Path:
    """The configuration of a scheduler that was named: a file, or its folder.

    Raises:
      ConvertError: there is none.
    """
    path = expanded(name)
    if path.is_file():
        return path
    if found := _part(path, "scheduler", SCHEDULER, False):
        return found
    raise ConvertError(
        f"the scheduler {name} is no folder with a {SCHEDULER}, and none"
    )


def _read_index(path: pathlib.Path) -> tuple[dict[str, str], str | None]:
    """The classes of the parts, and of the pipeline, where there is an index.

    Raises:
      ConvertError: parts that an unconditional pixel-space model does not have, or a
        class that diffusers does not have.
    """
    if not path.is_file():
        return {}, None
    found = read_json(path)
    parts = {
        k: v
        for k, v in found.items()
        if isinstance(v, list) and any(v) and not k.startswith("_")
    }
    if others := [k for k in parts if k not in ("unet", "scheduler")]:
        raise ConvertError(
            f"{path} is of a pipeline with {shortened(others)}: only those of a unet "
            "and a scheduler are read"
        )
    pipeline = found.get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in PIPELINES:
        raise ConvertError(
            f"{path} is of class {pipeline!r}: read are {', '.join(PIPELINES)}"
        )
    for name, value in parts.items():
        if len(value) != 2 or value[0] != "diffusers" or not isinstance(value[1], str):
            raise ConvertError(
                f"{path} names {name}={value!r}: only classes of diffusers are read"
            )
    return {name: value[1] for name, value in parts.items()}, pipeline


def read_spec(path: str | os.PathLike[str], scheduler: str | None = None) -> Spec:
    """What diffusers would run: the network, and its scheduler.

    Args:
      path: a folder of a model or of a network, or the principal file of weights.
      scheduler: a folder or file, for a network that has no scheduler of its own.

    Raises:
      ConvertError: something is missing, damaged, of another kind or unsupported. No
        weights are opened.
    """
    place = _locate(path, scheduler)
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
    place = _locate(folder, None)
    _read_configs(place, [])
    return place.network


def _read_configs(place: _Place, remarks: Remarks) -> tuple[UNet, Scheduling | None]:
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
