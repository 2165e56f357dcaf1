"""What --help says of a configuration: every field, what it means, how to set it."""

from __future__ import annotations

import abc
import dataclasses
import importlib
import inspect
import pathlib
import pkgutil
from collections.abc import Callable

import flax.linen
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
        and not issubclass(kind, flax.linen.Module)
        and not kind.__name__.startswith("_")
    ]
    assert len(found) > 40
    return found


@pytest.mark.parametrize("kind", classes(), ids=lambda kind: kind.__name__)
def test_every_field_of_every_configuration_has_a_meaning(kind) -> None:
    """In the docstring, or with the field itself."""
    fields = {field.name for field in dataclasses.fields(kind) if field.init}
    told = {field.name for field in dataclasses.fields(kind) if field.metadata}
    of_class = {
        name
        for parent in kind.__mro__
        for name, hint in vars(parent).get("__annotations__", {}).items()
        if str(hint).startswith("ClassVar")
    }
    assert fields - documented(kind).keys() - told == set()
    gone = documented(kind).keys() - fields - of_class
    assert gone == set(), "of a field that is gone"


def shown(wanted) -> dict[str, str]:
    """What is said of each field, by its line."""
    found: dict[str, str] = {}
    field = ""
    for line in describe(wanted):
        assert len(line) <= 88
        if line.startswith("      "):
            found[field] = f"{found[field]} {line.strip()}".strip()
        else:
            field = line
            found[field] = ""
    return found


def test_every_field_is_shown_with_type_default_and_meaning() -> None:
    classes = "classes: Base(size), Heir(size)"
    assert shown(Heir(4, second=len)) == {
        "--config.size=4": "int, no default: of the square: its side, in pixels.",
        "--config.rate=0.1": "float, the default: of its own.",
        "--config.first=()": (
            "tuple[int, ...] (written A,B or ()), the default: both of them."
        ),
        "config.second: builtins.len": (
            "Callable[[], int] | None (written none), default None, set in the config "
            "file: both of them."
        ),
        "config.base: Base": (
            "--config.base=CLASS with CLASS one of Base(size), Heir(size):"
        ),
        "--config.base.size=3": "int, no default: of the square: its side, in pixels.",
        "--config.base.rate=0.1": "float, the default: of Adam.",
        "--config.none=None": f"Base | None (written none; {classes}), the default:",
        "config.many": f"tuple[Base, ...] (written A,B or (); {classes}):",
    }


class Hypothesis(abc.ABC):
    """A base."""

    @abc.abstractmethod
    def shift(self) -> float: ...


@dataclasses.dataclass(frozen=True)
class Fading(Hypothesis):
    """A kind.

    Attributes:
      rate: of it.
    """

    rate: float = 0.5

    def shift(self) -> float:
        return self.rate


@dataclasses.dataclass(frozen=True)
class NoiseShift(Hypothesis):
    """Another kind."""

    def shift(self) -> float:
        return 1.0


@dataclasses.dataclass(frozen=True)
class Classes:
    """Fields that classes are named for.

    Attributes:
      one: abstract.
      only: of one class.
      none: optional.
      all: of defaults.
      other: of other values.
      mixed: a class or a number.
    """

    one: Hypothesis = Fading()
    only: NoiseShift = NoiseShift()
    none: Fading | None = None
    all: tuple[Hypothesis, ...] = (Fading(), NoiseShift())
    other: tuple[Hypothesis, ...] = (Fading(0.25),)
    mixed: Hypothesis | float = 0.5


def test_the_classes_that_a_field_can_take_are_named() -> None:
    many = "tuple[Hypothesis, ...] (written A,B or (); classes: Fading, NoiseShift)"
    assert shown(Classes()) == {
        "config.one: Fading": (
            "--config.one=CLASS with CLASS one of Fading, NoiseShift: abstract."
        ),
        "--config.one.rate=0.5": "float, the default: of it.",
        "config.only: NoiseShift": "of one class.",
        "--config.none=None": "Fading | None (written none), the default: optional.",
        "--config.all=Fading,NoiseShift": f"{many}: of defaults.",
        "config.other": f"{many}: of other values.",
        "--config.mixed=0.5": (
            "Hypothesis | float (classes: Fading, NoiseShift), the default: a class or "
            "a number."
        ),
    }


@pytest.mark.parametrize(
    "wanted, least",
    [
        (get_config(), 20),
        (Scan("scan", ("zoo",)), 20),
        (Classes(), 4),
        (Classes(one=NoiseShift(), none=Fading(0.1), all=(NoiseShift(),)), 3),
    ],
)
def test_flags_that_are_shown_change_nothing(wanted, least) -> None:
    flags = [line for line in describe(wanted) if line.startswith("--")]
    assert len(flags) >= least
    for flag in flags:
        name, _, text = flag.removeprefix("--config.").partition("=")
        assert override(wanted, name, text) == wanted
