"""Folders of latent diffusion: a first stage, a network of its latents, a scheduler.

The folder is of diffusers' `LDMPipeline`. What is scanned is the model of latents; the
first stage, `puredif_jax.networks.vq`, makes images of what it draws.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from puredif_jax.diffusion.sampling import Threshold
from puredif_jax.diffusion.widened import Widened
from puredif_jax.files.whole import shortened
from puredif_jax.formats.base import Format, Shown, Spec
from puredif_jax.formats.diffusers import agree, variants
from puredif_jax.formats.diffusers_config import ConvertError, Remarks
from puredif_jax.formats.diffusers_layout import (
    FIRST_STAGE,
    SCHEDULER,
    classes_of,
    is_latent,
    parts_of,
)
from puredif_jax.formats.diffusers_scheduler import read_scheduling
from puredif_jax.formats.entries import entries
from puredif_jax.formats.fitting import cast, fitting, parameters
from puredif_jax.formats.network_config import read_network
from puredif_jax.formats.opening import read_json
from puredif_jax.formats.scheduling import Scheduling
from puredif_jax.formats.state_dict import new_name
from puredif_jax.formats.vq_config import read_vq
from puredif_jax.formats.weight_sets import choose
from puredif_jax.networks.base import ImageNetwork, Network
from puredif_jax.networks.vq import VQModel
from puredif_jax.types import Params

T = TypeVar("T")

BOUND = 4.0
"""The range of latents that counts as [-1, 1]: their standard deviation is near 1."""

PIPELINE = "LDMPipeline"
_PARTS = {FIRST_STAGE: "VQModel", "unet": "UNet2DModel"}  # and a scheduler of any class
_SLICE = 4  # images that are decoded together


class LatentFolder(Format):
    """A folder of `LDMPipeline`, whose network and process are for latents.

    A latent of `BOUND` counts as 1. A bound on x0hat is in that unit, too.
    """

    name = "a folder of latent diffusion"

    def knows(self, path: pathlib.Path) -> bool:
        return path.is_dir() and is_latent(path)

    def spec(self, path: pathlib.Path, scheduler: str | None = None) -> Spec:
        """The model of latents; the pipeline has its own scheduler."""
        remarks: Remarks = []
        first, network, scheduling = _read_configs(path, remarks)
        for part in _PARTS:
            remarks += variants(choose(path / part))
        height, width, channels = network.image_shape
        remarks.append(
            f"{path} draws latents of {height}x{width} in {channels} channels: the "
            f"search is among latents from -{BOUND:g} to {BOUND:g}, four deviations of "
            "such of unit scale, and pictures are what the first stage makes of them"
        )
        widened = dataclasses.replace(
            scheduling,
            betas=Widened(scheduling.betas, BOUND),
            clip=_narrowed(scheduling, path),
        )
        return Spec(network, widened, remarks=tuple(remarks))

    def check(self, path: pathlib.Path, spec: Spec) -> tuple[str, ...]:
        remarks: dict[str, None] = {}
        for part, network in self._networks(path, spec).items():
            home = path / part
            with entries(choose(home)) as stored:
                fit = fitting(stored, network, home, new_name)
                remarks |= dict.fromkeys(cast(fit))
        return tuple(remarks)

    def read(self, path: pathlib.Path, spec: Spec) -> Params:
        """The parameters of the model of latents."""
        return _read(path / "unet", spec.network)

    def files(self, path: pathlib.Path) -> list[pathlib.Path]:
        return [file for part in _PARTS for file in choose(path / part).files()]

    def homes(self, path: pathlib.Path) -> list[pathlib.Path]:
        _read_configs(path, [])
        return [path / part for part in _PARTS]

    def shown(self, path: pathlib.Path, spec: Spec) -> Shown:
        """D(quantised x BOUND / scaling_factor), cut to [-1, 1]; a few at a time."""
        first, _, _ = _read_configs(path, [])
        params = _read(path / FIRST_STAGE, first)
        decode = jax.jit(first.decode)
        unit = np.float32(BOUND / first.scaling_factor)

        def images(drawn: np.ndarray) -> np.ndarray:
            latents = unit * np.asarray(drawn, np.float32)
            rest = -len(latents) % _SLICE  # one program for any number
            padded = np.pad(latents, ((0, rest), (0, 0), (0, 0), (0, 0)))
            parts = [
                np.asarray(decode(params, padded[i : i + _SLICE]))
                for i in range(0, len(padded), _SLICE)
            ]
            shape = (0, *first.image_shape(latents.shape[1:]))
            whole = np.concatenate([np.zeros(shape, np.float32), *parts])
            found: np.ndarray = np.clip(whole[: len(latents)], -1, 1)
            return found

        return images

    def _networks(self, path: pathlib.Path, spec: Spec) -> dict[str, Network]:
        first, _, _ = _read_configs(path, [])
        return {FIRST_STAGE: first, "unet": spec.network}


def _read(home: pathlib.Path, network: Network) -> Params:
    with entries(choose(home)) as stored:
        return parameters(fitting(stored, network, home, new_name), network)


def _read_configs(
    path: pathlib.Path, remarks: Remarks
) -> tuple[VQModel, ImageNetwork, Scheduling]:
    """The first stage, the network, and its schedule in the unit of latents."""
    index = path / "model_index.json"
    classes = _classes(index, read_json(index))
    places = {part: path / part / "config.json" for part in _PARTS}
    place = path / "scheduler" / SCHEDULER

    def read(read_one: Callable[..., T], part: str, at: pathlib.Path) -> T:
        return read_one(read_json(at), str(at), classes[part], remarks)

    first = read(read_vq, FIRST_STAGE, places[FIRST_STAGE])
    network = read(read_network, "unet", places["unet"])
    scheduling = read(read_scheduling, "scheduler", place)
    agree(network, scheduling, places["unet"])
    channels = network.image_shape[-1]
    if channels != first.embed_dim:
        raise ConvertError(
            f"{places['unet']} has in_channels={channels}, but the first stage has "
            f"latents of {first.embed_dim} channels"
        )
    return first, network, scheduling


def _classes(where: pathlib.Path, index: Mapping[str, Any]) -> dict[str, str]:
    """The class of each part; raises ConvertError for a pipeline of another kind."""
    kind = index.get("_class_name")
    if kind != PIPELINE:
        raise ConvertError(
            f"{where} is of class {kind!r}: of pipelines with a first stage "
            f"{PIPELINE} is read"
        )
    parts = parts_of(index)
    wanted = {*_PARTS, "scheduler"}
    if others := sorted({*parts} ^ wanted):
        raise ConvertError(
            f"{where} must name the parts {', '.join(sorted(wanted))}; it differs in "
            f"{shortened(others)}"
        )
    return classes_of(parts, where)


def _narrowed(scheduling: Scheduling, path: pathlib.Path) -> float | None:
    """A bound on x0hat of latents, in the unit of the widened process."""
    if isinstance(scheduling.clip, Threshold):
        raise ConvertError(
            f"{path} sets thresholding, which is not supported for latents"
        )
    return None if scheduling.clip is None else scheduling.clip / BOUND
