"""The fields of a configuration with type, default and meaning: what `--help` shows."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from puredif_jax.runs import config, fields

_ENTRY = re.compile(r"(\w+(?:, \w+)*): +(.*)")
_WIDTH = 88


def documented(kind: type) -> dict[str, str]:
    """The meaning of each field of a class, from "Attributes:" of its docstring.

    An entry begins with a name, or several with commas between, and goes on in lines
    that are indented further. Of a field that a class does not name, its base class
    tells.
    """
    found: dict[str, str] = {}
    for parent in reversed(kind.__mro__):
        lines = inspect.cleandoc(vars(parent).get("__doc__") or "").split("\n")
        if "Attributes:" not in lines:
            continue
        names: list[str] = []
        entries = lines[lines.index("Attributes:") + 1 :]
        for line in entries:
            if not line.startswith(" "):  # an empty line, or another part
                break
            entry = _ENTRY.fullmatch(line.strip())
            if entry and _indent(line) == _indent(entries[0]):
                names = entry[1].split(", ")
                found |= dict.fromkeys(names, entry[2])
            else:
                found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def describe(wanted: Any) -> list[str]:
    """Every field of a configuration, in lines.

    A field that text can set to its value stands as `--config.NAME=VALUE`; below it are
    type, default and meaning. With them are the classes, made of their defaults, that
    text can set it to.
    """
    return list(_below(wanted, "config"))


def _below(node: Any, where: str) -> Iterator[str]:
    kinds, meanings = fields.types_of(node), documented(type(node))
    for field in dataclasses.fields(node):
        if not field.init:
            continue
        name, value = f"{where}.{field.name}", getattr(node, field.name)
        kind, meaning = kinds.get(field.name), meanings.get(field.name, "")
        if fields.is_node(value):
            yield f"{name}: {type(value).__name__}"
            classes = fields.written_classes(kind)
            if classes not in ([], [type(value).__name__]):
                named = f"--{name}=CLASS with CLASS one of {', '.join(classes)}"
                meaning = f"{named}: {meaning}"
            yield from _told(meaning)
            yield from _below(value, name)
            continue
        about = [fields.expected(kind)] if kind is not None else []
        about += _default(field, value)
        settable = kind is not None and fields.is_settable(kind)
        if settable and (text := _text(value, kind)) is not None:
            yield f"--{name}={text}"
        else:
            yield name if _is_large(value) else f"{name}: {_written(value)}"
            about += [] if settable else ["set in the config file"]
        yield from _told(f"{', '.join(about)}: {meaning}")


def _told(text: str) -> list[str]:
    indent = " " * 6
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _default(field: dataclasses.Field[Any], value: Any) -> list[str]:
    """The default in words; a dataclass shows it with its own fields."""
    default = field.default
    if default is dataclasses.MISSING and callable(field.default_factory):
        default = field.default_factory()
    if default is dataclasses.MISSING:
        return ["no default"]
    if _is_large(default):
        return []
    return ["the default" if value == default else f"default {_written(default)}"]


def _is_large(value: Any) -> bool:
    """Whether dataclasses are in it, which no line would hold."""
    items = value if isinstance(value, tuple) else (value,)
    return any(map(fields.is_node, items))


def _text(value: Any, kind: Any) -> str | None:
    """A value as `config.override` reads it for a settable type; None if it cannot.

    Of dataclasses text has the class, so their fields must have its defaults.
    """
    if not _is_large(value):
        return _written(value)
    text = ",".join(type(item).__name__ for item in value)
    try:
        return text if fields.read(text, kind) == value else None
    except (ValueError, fields.Unmade):
        return None


def _written(value: Any) -> str:
    """As `config.override` reads it, where it reads it."""
    plain = config.to_dict(value)
    if isinstance(plain, list):
        return ",".join(map(str, plain)) or "()"
    return str(plain)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
