"""A configuration: its fields set by text, its checks and its JSON form.

It is a tree of frozen dataclasses of Python scalars, tuples, dicts, functions and None.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from puredif_jax.runs.fields import (
    NONE,
    Unmade,
    classes_of,
    expected,
    fits,
    is_node,
    is_settable,
    members_of,
    names_of,
    read,
    types_of,
    written_classes,
)
from puredif_jax.types import InputError


class ConfigError(InputError):
    """A user's mistake in a config: one sentence, what was found and what is valid."""


def override(config: Any, path: str, text: str) -> Any:
    """`config` with the field at the dotted `path` set to `text`, read as its type.

    bool: true false yes no 1 0; int: 50 1_000 1e3; float: 0.1 inf; str: as it is;
    Literal: one of its values; tuple: 1,2 or (1,2) or (); dict: a:1,b:2 or {'a':1} or
    {}; none where None is allowed. A union tries scalars, then containers, then str.
    A dataclass or an abstract base, also as an item of a tuple: the name of a class of
    that kind, which is made of its defaults, or with values: StopSign,
    Blend(gamma=0.8) (`puredif_jax.runs.fields.classes_of`).

    Args:
      config: a frozen dataclass.
      path: field names from the root, such as "attack.trigger.size".
      text: the new value.

    Raises:
      ConfigError: unknown name, text that is not of the field's type, a field that
        text cannot set, or a value that a dataclass's `__post_init__` rejects. Where
        classes are valid, the sentence names those that can be made of their defaults.
    """
    return _override(config, path.split("."), text, "config", f"config.{path}")


def check(config: Any, where: str = "config") -> None:
    """Compares every field, and those below, with its declared type.

    A whole number serves as a float, and an instance of any class that inherits from a
    declared one as that. Protocols, functions and types that do not resolve are not
    judged.

    Raises:
      ConfigError: a value is of another type; names it and what is valid.
    """
    kinds = types_of(config)
    for name in names_of(config):
        value = getattr(config, name)
        if name in kinds and not fits(value, kinds[name]):
            shown = _held(value) if is_node(value) else repr(value)[:80]
            raise ConfigError(
                f"{where}.{name} cannot be {shown}: expected {expected(kinds[name])}"
            )
        items = value if isinstance(value, tuple) else (value,)
        for item in items:
            if is_node(item):
                check(item, f"{where}.{name}")


def to_dict(config: Any) -> dict[str, Any]:
    """The config as JSON-ready dicts, lists and scalars.

    A dataclass becomes {"type": class name, **fields}, a tuple a list, a function its
    qualified name, inf and nan strings.

    Raises:
      ConfigError: a value of another kind, such as an array.
    """
    found: dict[str, Any] = _plain(config, "config")
    return found


def _override(node: Any, names: list[str], text: str, where: str, full: str) -> Any:
    """`node` with the field at `names` replaced; `where` is the path to `node`."""
    kind, name, valid = type(node).__name__, names[0], names_of(node)
    if name not in valid:
        raise ConfigError(
            f"{where} has no field {name!r}{closest(name, valid)}: the names "
            f"of {kind} are {', '.join(valid)}"
        )
    where, value = f"{where}.{name}", getattr(node, name)
    if len(names) == 1:
        value = _read_field(node, name, text, where)
    elif is_node(value):
        value = _override(value, names[1:], text, where, full)
    else:
        remedy = f"set {where} itself"
        if value is None:
            classes = ", ".join(written_classes(types_of(node).get(name)))
            first = f", or --{where}=CLASS first, with CLASS one of {classes}"
            remedy = f"set it in a config file{first if classes else ''}"
        raise ConfigError(
            f"{where} is {_held(value)} and has no field {names[1]!r}: {remedy}"
        )
    try:
        return dataclasses.replace(node, **{name: value})
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{full} cannot be {text!r}: {kind} raises {line(error)}"
        ) from error


def _read_field(node: Any, name: str, text: str, where: str) -> Any:
    """`text` as the declared type of `node.name`."""
    value, cannot = getattr(node, name), f"{where} cannot be {text!r}"
    try:
        kind = typing.get_type_hints(type(node))[name]
    except NameError as error:  # a type imported only under TYPE_CHECKING
        raise ConfigError(
            f"{cannot}, set it in a config file: the types of {type(node).__name__} "
            f"do not resolve, {line(error)}"
        ) from error
    if NONE in members_of(kind) and text.strip().lower() == "none":
        return None
    below = ""
    if is_node(value):
        below = (
            f"set one of its fields, such as {where}.NAME with NAME one of "
            f"{', '.join(names_of(value))}"
        )
        if not classes_of(kind):
            raise ConfigError(f"{cannot}, it is {_held(value)}: {below}")
    if not is_settable(kind):
        raise ConfigError(
            f"{cannot}, it is {_held(value)}: set it in a config file, to "
            f"{expected(kind)}"
        )
    try:
        return read(text, kind)
    except Unmade as error:
        raise ConfigError(f"{cannot}: {error}") from error
    except ValueError:
        if below:
            cannot, below = f"{cannot}, it is {_held(value)}", f", or {below}"
        raise ConfigError(f"{cannot}: expected {expected(kind)}{below}") from None


def _plain(value: Any, where: str) -> Any:
    if is_node(value):
        plain: dict[str, Any] = {"type": type(value).__name__}
        for name in (field.name for field in dataclasses.fields(value)):
            plain[name] = _plain(getattr(value, name), f"{where}.{name}")
        return plain
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [_plain(item, where) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item, where) for key, item in value.items()}
    if isinstance(value, functools.partial):
        parts = [repr(_plain(arg, where)) for arg in value.args]
        parts += [f"{k}={_plain(arg, where)!r}" for k, arg in value.keywords.items()]
        return f"{_plain(value.func, where)}({', '.join(parts)})"
    if callable(value):
        named = value if hasattr(value, "__qualname__") else type(value)
        return f"{named.__module__}.{named.__qualname__}"
    raise ConfigError(
        f"{where} is {_held(value)}: a config holds dataclasses, scalars, tuples, "
        "dicts, functions and None"
    )


def _held(value: Any) -> str:
    if value is None:
        return "None"
    function = callable(value) and not is_node(value)
    return "a function" if function else f"of type {type(value).__name__}"


def closest(name: str, valid: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" of the closest valid name; empty if none is close."""
    close = difflib.get_close_matches(name, list(valid), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def line(error: Exception) -> str:
    """An error's type and message in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}"


def without(tree: Any, names: Collection[str]) -> Any:
    """A configuration as plain data, less the fields of these names at any depth."""
    if isinstance(tree, Mapping):
        return {k: without(v, names) for k, v in tree.items() if k not in names}
    if isinstance(tree, list | tuple):
        return [without(each, names) for each in tree]
    return tree
