"""The settings under which the numbers of a run are made: a part of its record."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
from typing import Any

import jax
from absl import logging

from puredif_jax.files.sealed import DamagedError, read_json, seal
from puredif_jax.files.whole import write_whole
from puredif_jax.types import InputError

RECORD = "numerics.json"


class NumericsError(InputError):
    """A run was begun under settings that make other numbers."""


@dataclasses.dataclass(frozen=True)
class Numerics:
    """What changes the numbers of a run besides its configuration and its inputs.

    A run never goes on under other values of `x64`, `platform`, `matmul_precision` or
    `threefry_partitionable`: these make other results by intent. Under other versions,
    devices or flags it goes on with a warning, since those differ in rounding.

    Attributes:
      x64: whether arrays are of 64 bits where nothing else is asked for.
      platform: cpu, gpu or tpu.
      matmul_precision: of products of matrices, by default.
      threefry_partitionable: which random numbers come from a key.
      device: kind of the devices.
      devices: how many a run uses.
      xla_flags: what XLA_FLAGS says.
      versions: of the packages that compile and compute.
    """

    x64: bool
    platform: str
    matmul_precision: str
    threefry_partitionable: bool
    device: str
    devices: int
    xla_flags: str
    versions: dict[str, str | None]

    @classmethod
    def here(cls, devices: int) -> Numerics:
        """The settings of this process, on so many devices."""
        installed = {d.name: d.version for d in importlib.metadata.distributions()}
        first = jax.devices()[0]
        option = functools.partial(getattr, jax.config)
        return cls(
            x64=bool(option("jax_enable_x64")),
            platform=first.platform,
            matmul_precision=str(option("jax_default_matmul_precision")),
            threefry_partitionable=bool(option("jax_threefry_partitionable")),
            device=first.device_kind,
            devices=devices,
            xla_flags=os.environ.get("XLA_FLAGS", ""),
            versions={k: installed.get(k) for k in ("jax", "jaxlib", "puredif_jax")},
        )


BINDING = {  # what a run keeps to, by the variable that sets it
    "x64": "JAX_ENABLE_X64",
    "platform": "JAX_PLATFORMS",
    "matmul_precision": "JAX_DEFAULT_MATMUL_PRECISION",
    "threefry_partitionable": "JAX_THREEFRY_PARTITIONABLE",
}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs from the record of a run, as "x64 False, now True"."""
    return [
        f"{name} {old.get(name)}, now {value}"
        for name, value in new.items()
        if old.get(name) != value
    ]


def record(folder: pathlib.Path, here: Numerics, begun: bool, writes: bool) -> None:
    """Notes under what a run is made, or compares with what was noted.

    The file lists every setting under which the run went on, the first one first.

    Args:
      folder: of the run.
      here: what to note.
      begun: whether the run holds anything that was computed.
      writes: whether this process is the one that writes.

    Raises:
      NumericsError: the run was begun under settings that make other results, or the
        record is damaged.
    """
    path, now = folder / RECORD, json.loads(json.dumps(dataclasses.asdict(here)))
    listed: list[dict[str, Any]] = []
    if begun and path.exists():
        try:
            listed = list(read_json(path)["made under"])
        except DamagedError as error:
            raise NumericsError(
                f"{error}, so it is not known what the numbers of the run depend on: "
                "give another --config.workdir, or remove the folder to start again"
            ) from error
    elif begun:
        logging.warning(
            "%s is missing: it is not known under which versions the run was begun",
            path,
        )
    if listed:
        for name in BINDING:
            if listed[0].get(name) != now[name]:
                raise NumericsError(
                    f"{folder} holds a run made under {name}={listed[0].get(name)}, "
                    f"this is {now[name]}: set {BINDING[name]} as it was, or give "
                    "another --config.workdir"
                )
    if now in listed:
        return
    if listed:
        logging.warning(
            "%s goes on under other settings, so its numbers may differ in rounding: "
            "%s",
            folder,
            "; ".join(differences(listed[0], now)),
        )
    if writes:
        document = seal({"made under": [*listed, now]})
        write_whole(path, json.dumps(document, indent=2).encode())


def changes(folder: pathlib.Path) -> list[str]:
    """How the settings changed under which a run was made, for its report.

    Raises:
      DamagedError: the record is damaged.
    """
    first, *others = read_json(folder / RECORD)["made under"]
    return [text for other in others for text in differences(first, other)]
