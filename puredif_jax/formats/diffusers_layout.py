"""Where the parts of a diffusers model lie: its network and its scheduler.

A folder holds `unet/config.json`, the weights beside it and
`scheduler/scheduler_config.json`; older ones hold the same files at their top.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from puredif_jax.files.whole import expanded, shortened
from puredif_jax.formats.diffusers_config import ConvertError
from puredif_jax.formats.diffusers_scheduler import PIPELINES
from puredif_jax.formats.opening import read_json
from puredif_jax.formats.weight_sets import of_file, weight_sets

SCHEDULER = "scheduler_config.json"
FIRST_STAGE = "vqvae"  # the part of a pipeline that makes images of latents
UP = 2  # folders above a network without a scheduler in which one is looked for


class Place(NamedTuple):
    """Where the parts of a model lie.

    network: the folder of the configuration and the weights.
    scheduler: the configuration, if there is one.
    classes: of the parts, as model_index.json says.
    pipeline: the class of the whole, as it says.
    own: whether the scheduler is the model's own.
    """

    network: pathlib.Path
    scheduler: pathlib.Path | None
    classes: Mapping[str, str]
    pipeline: str | None
    own: bool


def locate(path: str | os.PathLike[str], given: str | None) -> Place:
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
        return Place(network, own, classes, pipeline, above is None)
    if given is not None:
        return Place(network, _given(given), classes, None, False)
    # A pipeline without its scheduler is broken; a part of one looks for it above.
    for home in () if pipeline else list(top.absolute().parents)[:UP]:
        if found := _part(home, "scheduler", SCHEDULER, True):
            found_classes, pipeline = _read_index(home / "model_index.json")
            kinds = {k: v for k, v in found_classes.items() if k == "scheduler"}
            return Place(network, found, kinds, pipeline, False)
    return Place(network, None, classes, pipeline, False)


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


def is_latent(path: pathlib.Path) -> bool:
    """Whether a folder's index names a first stage, so that a model draws latents."""
    index = path / "model_index.json"
    try:
        return index.is_file() and FIRST_STAGE in parts_of(read_json(index))
    except ConvertError:
        return False


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
    parts = parts_of(found)
    if others := [k for k in parts if k not in ("unet", "scheduler")]:
        raise ConvertError(
            f"{path} is of a pipeline with {shortened(others)}: only pipelines of a "
            "unet and a scheduler are read"
        )
    pipeline = found.get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in PIPELINES:
        raise ConvertError(
            f"{path} is of class {pipeline!r}: read are {', '.join(PIPELINES)}"
        )
    return classes_of(parts, path), pipeline


def parts_of(index: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What the index of a pipeline says of each part that it has."""
    return {
        k: v
        for k, v in index.items()
        if isinstance(v, list) and any(v) and not k.startswith("_")
    }


def classes_of(parts: Mapping[str, list[Any]], where: pathlib.Path) -> dict[str, str]:
    """The class of each part of an index.

    Raises:
      ConvertError: a class that diffusers does not have.
    """
    for name, value in parts.items():
        if len(value) != 2 or value[0] != "diffusers" or not isinstance(value[1], str):
            raise ConvertError(
                f"{where} names {name}={value!r}: only classes of diffusers are read"
            )
    return {name: value[1] for name, value in parts.items()}
