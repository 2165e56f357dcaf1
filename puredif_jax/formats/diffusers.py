"""diffusers model folders to ours and back: weights, network and noise schedule.

A folder holds `unet/config.json`, the weights beside it
(`puredif_jax.formats.weight_sets`) and `scheduler/scheduler_config.json`; older ones
hold the same files at their top. Nothing in a folder is executed.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from puredif_jax.files.whole import write_whole
from puredif_jax.formats.base import Format, Model, Spec
from puredif_jax.formats.diffusers_config import ConvertError, Remarks
from puredif_jax.formats.diffusers_layout import (
    SCHEDULER,
    Place,
    is_latent,
    is_network,
    locate,
    network_folder,
)
from puredif_jax.formats.diffusers_scheduler import (
    PIPELINES,
    read_scheduling,
    write_scheduling,
)
from puredif_jax.formats.entries import entries
from puredif_jax.formats.fitting import cast, fitting, parameters
from puredif_jax.formats.network_config import read_network, write_network
from puredif_jax.formats.opening import read_json
from puredif_jax.formats.scheduling import Scheduling
from puredif_jax.formats.score_scheduler import SCORE
from puredif_jax.formats.state_dict import new_name, to_torch
from puredif_jax.formats.weight_sets import WEIGHTS, WeightSet, choose, of_file
from puredif_jax.networks.base import ImageNetwork
from puredif_jax.networks.ncsnpp import NCSNpp
from puredif_jax.networks.unet import UNet
from puredif_jax.types import Params

FOLDER = "diffusers"  # in a run, the model that it has trained


class DiffusersFolder(Format):
    """A folder, or a file of weights in one, of an unconditional pixel-space model.

    The scheduler may also lie up to two folders above a network. Half and double
    precision become float32. A pickle is read by PyTorch's weights-only loading, which
    executes nothing and takes arrays only; this needs the extra "torch".
    """

    name = "a folder of diffusers"

    def knows(self, path: pathlib.Path) -> bool:
        return is_model(path) and not is_latent(path)

    def spec(self, path: pathlib.Path, scheduler: str | None = None) -> Spec:
        """What diffusers would run: the network, and its scheduler."""
        place = locate(path, scheduler)
        remarks: Remarks = []
        network, scheduling = _read_configs(place, remarks)
        if path.is_dir():
            remarks += variants(choose(place.network))
        return Spec(network, scheduling, place.own, tuple(remarks))

    def check(self, path: pathlib.Path, spec: Spec) -> tuple[str, ...]:
        chosen = _chosen(path)
        with entries(chosen) as stored:
            home = chosen.principal.parent
            return cast(fitting(stored, spec.network, home, new_name))

    def read(self, path: pathlib.Path, spec: Spec) -> Params:
        chosen = _chosen(path)
        with entries(chosen) as stored:
            home = chosen.principal.parent
            found = fitting(stored, spec.network, home, new_name)
            return parameters(found, spec.network)

    def files(self, path: pathlib.Path) -> list[pathlib.Path]:
        return _chosen(path).files()

    def homes(self, path: pathlib.Path) -> list[pathlib.Path]:
        place = locate(path, None)
        _read_configs(place, [])
        return [place.network]


def read_folder(folder: str | os.PathLike[str]) -> Model:
    """Reads a diffusers folder of an unconditional pixel-space model.

    Raises:
      ConvertError: something is missing, damaged, of another kind or unsupported; one
        sentence that names it. Configurations are judged before weights are opened.
    """
    path, kind = pathlib.Path(folder), DiffusersFolder()
    spec = kind.spec(path)
    if spec.scheduling is None:
        raise no_scheduler(folder)
    return Model(spec, kind.read(path, spec))


def no_scheduler(path: str | os.PathLike[str]) -> ConvertError:
    """The error for a network without a scheduler."""
    return ConvertError(
        f"{path} has no scheduler/{SCHEDULER}, nor has a folder above it: give "
        "--config.scheduler=FOLDER"
    )


def is_model(path: str | os.PathLike[str]) -> bool:
    """Whether this is a folder, or a file of weights, of a network of diffusers."""
    top = pathlib.Path(path)
    if top.is_file():
        return of_file(top) is not None and is_network(top.parent)
    return is_network(top / "unet") or is_network(top)


def variants(chosen: WeightSet) -> Remarks:
    """A remark on weights that diffusers loads only where they are asked for."""
    if chosen.variant is None:
        return []
    return [
        f"{chosen.principal.parent} has the variant {chosen.variant!r} only, which "
        "diffusers loads where it is asked for"
    ]


def _read_configs(
    place: Place, remarks: Remarks
) -> tuple[ImageNetwork, Scheduling | None]:
    config = place.network / "config.json"
    kind = place.classes.get("unet")
    unet = read_network(read_json(config), str(config), kind, remarks)
    if place.scheduler is None:
        return unet, None
    kind = place.classes.get("scheduler")
    if place.pipeline is not None and (into := PIPELINES[place.pipeline]):
        kind = into
    elif place.pipeline is not None and kind == SCORE:
        raise ConvertError(
            f"{place.pipeline} with {place.network} does not draw by {SCORE}"
        )
    where = str(place.scheduler)
    scheduling = read_scheduling(read_json(place.scheduler), where, kind, remarks)
    if not place.own:
        remarks.append(f"the scheduler is of {where}")
    agree(unet, scheduling, config)
    return unet, scheduling


def agree(network: ImageNetwork, scheduling: Scheduling, config: pathlib.Path) -> None:
    """Raises ConvertError where the scheduler cannot take what the network gives."""
    asked = scheduling.learned and scheduling.kind.startswith("DDPM")
    learned = isinstance(network, UNet) and network.learned_variance
    if learned and not scheduling.learned:
        raise ConvertError(
            f"{config} has out_channels twice its in_channels, but the scheduler asks "
            "for no learned variance: diffusers cannot draw from it"
        )
    if asked and not learned:
        raise ConvertError(
            f"{config} has as many out_channels as in_channels, but the scheduler asks "
            "for a learned variance: diffusers cannot draw from it"
        )


def configurations(spec: Spec) -> tuple[dict[str, Any], dict[str, Any]]:
    """What diffusers calls the scheduler and the network of a model.

    Raises:
      ConvertError: it has none that say the same.
    """
    if spec.scheduling is None:
        raise ConvertError("a model without a scheduling is not written")
    if not isinstance(spec.network, UNet | NCSNpp):
        kind = type(spec.network).__name__
        raise ConvertError(f"the network of diffusers for {kind} is not written")
    return write_scheduling(spec.scheduling), write_network(spec.network)


def write_folder(folder: str | os.PathLike[str], model: Model) -> None:
    """Writes a folder that diffusers' `DDPMPipeline.from_pretrained` loads.

    It is one of DDIMPipeline where the scheduling asks for DDIMScheduler, and of
    ScoreSdeVePipeline for a variance-exploding process. Weights are stored as float32.

    Raises:
      ConvertError: diffusers has no network or scheduler that says the same.
      WriteError: the folder cannot be written.
    """
    top = pathlib.Path(folder)
    scheduler, network = configurations(model.spec)
    (top / "unet").mkdir(parents=True, exist_ok=True)
    (top / "scheduler").mkdir(exist_ok=True)
    tensors = {k: v.astype(np.float32) for k, v in to_torch(model.params).items()}
    stored = safetensors.numpy.save(tensors, {"format": "pt"})
    write_whole(top / "unet" / WEIGHTS, stored)
    _write_json(top / "unet" / "config.json", network)
    _write_json(top / "scheduler" / SCHEDULER, scheduler)
    index = {
        "_class_name": scheduler["_class_name"].replace("Scheduler", "Pipeline"),
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "unet": ["diffusers", "UNet2DModel"],
    }
    _write_json(top / "model_index.json", index)


def _chosen(path: pathlib.Path) -> WeightSet:
    if path.is_file():
        if (found := of_file(path)) is None:
            raise ConvertError(f"{path} is no file of weights beside a config.json")
        return found
    return choose(network_folder(path))


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    write_whole(path, f"{json.dumps(value, indent=2)}\n".encode())
