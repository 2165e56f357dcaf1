"""The config.yml of the DDIM and TrojDiff code bases; nothing in it is executed.

The code writes its own objects into the file as tags; their fields are read as
mappings, and no object is made.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from typing import Any, NamedTuple

import yaml

from puredif_jax.diffusion.schedules import LinearBetas, ScaledLinearBetas
from puredif_jax.formats.diffusers_config import ConvertError
from puredif_jax.formats.opening import refuse_broken, unreadable
from puredif_jax.networks.fields import WIDEST

CONFIG = "config.yml"
LARGEST = 100_000  # bytes
LONGEST_SCHEDULE = 100_000
_RULES: dict[str, type[LinearBetas]] = {
    "linear": LinearBetas,
    "quad": ScaledLinearBetas,
}


class Config(NamedTuple):
    """What is taken from the file; None for what it does not say.

    image_size: the side of an image.
    betas: the noise schedule.
    ema: whether the code draws from the moving average of the weights; it does if the
      file says nothing.
    """

    image_size: int | None
    betas: LinearBetas | None
    ema: bool


def read_config(path: pathlib.Path) -> Config:
    """What the file says, or nothing where there is none.

    Raises:
      ConvertError: it cannot be read, or sets what is not supported.
    """
    if not os.path.isfile(path):
        return Config(None, None, True)
    fields = _fields(path)

    def number(name: str, default: float, least: float, most: float) -> float:
        value = fields.get(name, default)
        whole = type(default) is int
        if isinstance(value, str):  # YAML 1.1 takes 1e-4 for text
            with contextlib.suppress(ValueError):
                value = int(value) if whole else float(value)
        if type(value) not in ((int,) if whole else (int, float)) or not (
            least <= value <= most
        ):
            kind = "a whole number" if whole else "a number"
            raise ConvertError(
                f"{path} sets {name}={str(value)[:80]!r}: it must be {kind} from "
                f"{least:g} to {most:g}"
            )
        return float(value)

    for name, on in (("data.rescaled", True), ("data.logit_transform", False)):
        if (value := fields.get(name, on)) is not on:
            raise ConvertError(
                f"{path} sets {name}={str(value)[:80]!r}, which is not supported: only "
                f"{str(on).lower()} is"
            )
    ema = fields.get("model.ema", True)
    if type(ema) is not bool:
        raise ConvertError(f"{path} sets model.ema={str(ema)[:80]!r}: true or false")
    size = None
    if "data.image_size" in fields:
        size = int(number("data.image_size", 0, 1, WIDEST))
    if not any(name.startswith("diffusion.") for name in fields):
        return Config(size, None, ema)
    rule = fields.get("diffusion.beta_schedule", "linear")
    if rule not in list(_RULES):  # it may be anything
        raise ConvertError(
            f"{path} sets diffusion.beta_schedule={str(rule)[:80]!r}: read are "
            f"{', '.join(_RULES)}"
        )
    steps = int(number("diffusion.num_diffusion_timesteps", 1000, 2, LONGEST_SCHEDULE))
    start = number("diffusion.beta_start", 1e-4, 0, 1)
    end = number("diffusion.beta_end", 0.02, 0, 1)
    try:
        return Config(size, _RULES[rule](steps, start, end), ema)
    except ValueError as error:
        raise ConvertError(f"{path} is not a schedule: {error}") from error


class _Loader(yaml.SafeLoader):
    """YAML without objects: the code's own, which are tags, are taken as mappings.

    A key that stands twice is an error, where PyYAML would take the last. So is an
    alias, by which few bytes may stand for many.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [getattr(key, "value", None) for key, _ in node.value]
        if twice := sorted({f"{key}" for key in keys if keys.count(key) > 1}):
            raise yaml.YAMLError(f"{', '.join(twice)[:80]} is set twice")
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


def _mapping(loader: _Loader, suffix: str, node: Any) -> Any:
    """What an object of Python has as its fields; nothing is made of it."""
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    return None


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", _mapping)


def _fields(path: pathlib.Path) -> dict[str, Any]:
    """Values by "section.field"."""
    refuse_broken(path)
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST + 1)
    except OSError as error:
        raise unreadable(path, error) from error
    if len(text) > LARGEST:
        raise ConvertError(f"{path} is larger than {LARGEST} bytes")
    try:
        found = yaml.load(text, _Loader)  # a loader of no objects
    except Exception as error:  # of many kinds, by what a tag asks for
        first = str(error).partition("\n")[0] or type(error).__name__
        raise ConvertError(f"{path} cannot be read as YAML: {first[:200]}") from error
    if not isinstance(found, dict):
        raise ConvertError(f"{path} has no sections such as data: and diffusion:")
    fields: dict[str, Any] = {}
    for section in ("data", "model", "diffusion"):
        inside = found.get(section) or {}
        if not isinstance(inside, dict):
            said = str(inside)[:80]
            raise ConvertError(f"{path} sets {section}={said!r}, which is no section")
        fields |= {f"{section}.{key}": value for key, value in inside.items()}
    return fields
