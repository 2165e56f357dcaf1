"""The config.yml of the DDIM and TrojDiff code bases; nothing in it is executed.

Only this much of YAML is read: sections with fields of one line each. The code writes
its own objects into the file as tags, which are passed over.
"""

from __future__ import annotations

import pathlib
import re
from typing import NamedTuple

from puredif_jax.diffusion.schedules import LinearBetas, ScaledLinearBetas
from puredif_jax.formats.diffusers_config import ConvertError
from puredif_jax.formats.opening import refuse_broken, unreadable
from puredif_jax.networks.fields import WIDEST

CONFIG = "config.yml"
LARGEST = 1_000_000  # bytes
LONGEST_SCHEDULE = 100_000
_RULES: dict[str, type[LinearBetas]] = {
    "linear": LinearBetas,
    "quad": ScaledLinearBetas,
}
_LINE = re.compile(r"(?P<indent> *)(?P<key>[\w-]+):(?: +(?P<value>.*))?")


class Config(NamedTuple):
    """What is taken from the file; None for what it does not say.

    image_size: the side of an image.
    betas: the noise schedule.
    """

    image_size: int | None
    betas: LinearBetas | None


def read_config(path: pathlib.Path) -> Config:
    """What the file says, or nothing where there is none.

    Raises:
      ConvertError: it cannot be read, or sets what is not supported.
    """
    if not path.is_file():
        return Config(None, None)
    fields = _fields(path)

    def number(name: str, default: float, least: float, most: float) -> float:
        text = fields.get(name, f"{default}")
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            raise ConvertError(
                f"{path} sets {name}={text[:80]!r}: it must be a number from {least:g} "
                f"to {most:g}"
            )
        return value

    for name, off in (("data.rescaled", "true"), ("data.logit_transform", "false")):
        if fields.get(name, off).lower() != off:
            raise ConvertError(
                f"{path} sets {name}={fields[name][:80]!r}, which is not supported: "
                f"only {off} is"
            )
    size = None
    if "data.image_size" in fields:
        size = int(number("data.image_size", 0, 1, WIDEST))
    if not any(name.startswith("diffusion.") for name in fields):
        return Config(size, None)
    rule = fields.get("diffusion.beta_schedule", "linear")
    if rule not in _RULES:
        raise ConvertError(
            f"{path} sets diffusion.beta_schedule={rule[:80]!r}: read are "
            f"{', '.join(_RULES)}"
        )
    steps = int(number("diffusion.num_diffusion_timesteps", 1000, 2, LONGEST_SCHEDULE))
    start = number("diffusion.beta_start", 1e-4, 0, 1)
    end = number("diffusion.beta_end", 0.02, 0, 1)
    try:
        return Config(size, _RULES[rule](steps, start, end))
    except ValueError as error:
        raise ConvertError(f"{path} is not a schedule: {error}") from error


def _fields(path: pathlib.Path) -> dict[str, str]:
    """Text by "section.field"."""
    refuse_broken(path)
    try:
        if path.stat().st_size > LARGEST:
            raise ConvertError(f"{path} is larger than {LARGEST} bytes")
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise unreadable(path, error) from error
    except UnicodeError as error:
        raise ConvertError(f"{path} is no text of UTF-8") from error
    found: dict[str, str] = {}
    section = ""
    for line in lines:
        match = _LINE.fullmatch(line.partition(" #")[0].rstrip())
        if match is None:
            continue
        if not match["indent"]:
            section = match["key"]
        elif match["value"]:
            value = match["value"].strip().strip("'\"")
            found.setdefault(f"{section}.{match['key']}", value)
    return found
