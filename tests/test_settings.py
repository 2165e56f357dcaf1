"""What --help says of a configuration: every field, what it means, how to set it."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pathlib
import pkgutil
from collections.abc import Callable

import pytest
from tiny_config import get_config

from puredif_jax.runs import settings
from puredif_jax.runs.config import override
from puredif_jax.runs.settings import describe, documented
from puredif_jax.stages.experiment import Scan

PACKAGE = pathlib.Path(settings.__file__).parents[1]
# Layers of which a configuration may hold an instance.
LAYERS = ("attacks", "data", "defenses", "diffusion", "networks", "stages")


@dataclasses.dataclass(frozen=True)
class Base:
    """A base.

    Attributes:
      size: of the
        square: its side, in pixels.
      rate: of Adam.
    """

    size: int
    rate: float = 0.1


@dataclasses.dataclass(frozen=True)
class Heir(Base):
    """An heir.

    Attributes:
      first, second: both
        of them.
      rate: of its own.

    Raises:
      ValueError: never.
    """

    first: tuple[int, ...] = ()
    second: Callable[[], int] | None = None
    base: Base = Base(3)
    none: Base | None = None
    many: tuple[Base, ...] = (Base(1), Base(2))


def test_the_meaning_of_a_field_is_in_the_docstring() -> None:
    assert documented(Heir) == {
        "size": "of the square: its side, in pixels.",
        "rate": "of its own.",
        "first": "both of them.",
        "second": "both of them.",
    }
    assert documented(int) == {}


def classes() -> list[type]:
    """Dataclasses of these layers but for private ones and for trees of arrays."""
    names = [
        f"puredif_jax.{layer}.{module.name}"
        for layer in LAYERS
        for module in pkgutil.iter_modules([str(PACKAGE / layer)])
    ]
    found = [
        kind
        for module in map(importlib.import_module, names)
        for kind in vars(module).values()
        if inspect.isclass(kind)
        and kind.__module__ == module.__name__
        and dataclasses.is_dataclass(kind)
        and "_flax_dataclass" not in vars(kind)
        and not kind.__name__.startswith("_")
    ]
    assert len(found) > 40
    return found


@pytest.mark.parametrize("kind", classes(), ids=lambda kind: kind.__name__)
def test_every_field_of_every_configuration_has_a_meaning(kind) -> None:
    fields = {field.name for field in dataclasses.fields(kind) if field.init}
    assert fields - documented(kind).keys() == set()
    assert documented(kind).keys() - fields == set(), "of a field that is gone"


def test_every_field_is_shown_with_type_default_and_meaning() -> None:
    found: dict[str, str] = {}
    field = ""
    for line in describe(Heir(4, second=len)):
        assert len(line) <= 88
        if line.startswith("      "):
            found[field] = f"{found[field]} {line.strip()}".strip()
        else:
            field = line
            found[field] = ""
    unset = "(written none), the default, set in the config file:"
    assert found == {
        "--config.size=4": "int, no default: of the square: its side, in pixels.",
        "--config.rate=0.1": "float, the default: of its own.",
        "--config.first=()": (
            "tuple[int, ...] (written A,B or ()), the default: both of them."
        ),
        "config.second: builtins.len": (
            "Callable[[], int] | None (written none), default None, set in the config "
            "file: both of them."
        ),
        "config.base: Base": "",
        "--config.base.size=3": "int, no default: of the square: its side, in pixels.",
        "--config.base.rate=0.1": "float, the default: of Adam.",
        "config.none: None": f"{__name__}.Base | None {unset}",
        "config.many": (
            f"tuple[{__name__}.Base, ...] (written A,B or ()), set in the config file:"
        ),
    }


@pytest.mark.parametrize("wanted", [get_config(), Scan("scan", ("zoo",))])
def test_flags_that_are_shown_change_nothing(wanted) -> None:
    flags = [line for line in describe(wanted) if line.startswith("--")]
    assert len(flags) > 20
    for flag in flags:
        name, _, text = flag.removeprefix("--config.").partition("=")
        assert override(wanted, name, text) == wanted
