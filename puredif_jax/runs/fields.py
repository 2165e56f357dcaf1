"""Fields of a configuration: their declared types, and text as a value of a type."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from typing import Any

NONE = type(None)
UNIONS = (typing.Union, types.UnionType)
_CONTAINERS = (tuple, dict)
_BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_FORMS = {
    "bool": "true or false",
    "None": "none",
    "Optional": "none",
    "tuple": "A,B or ()",
    "dict": "KEY:VALUE,KEY:VALUE or {}",
}


def is_node(value: Any) -> bool:
    """Whether it is a dataclass, whose fields belong to the configuration."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def names_of(node: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(node) if field.init]


def types_of(node: Any) -> dict[str, Any]:
    """The declared type of each field of a dataclass, as far as they resolve."""
    try:
        return typing.get_type_hints(type(node))
    except NameError:  # a type imported only under TYPE_CHECKING
        return {}


def is_settable(kind: Any) -> bool:
    """Whether `override` can set a field of this type, in text."""
    members = typing.get_args(kind) if typing.get_origin(kind) in UNIONS else (kind,)
    return any(_is_readable(member) for member in members if member is not NONE)


def read(text: str, kind: Any) -> Any:
    """`text` as a value of the type `kind`; ValueError if it is not one."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is str:
        return text
    text = text.strip()
    if kind is bool and text.lower() in _BOOLS:
        return _BOOLS[text.lower()]
    if kind is int:
        if re.fullmatch(r"[+-]?[\d_]+", text):
            return int(text)
        number = float(text)
        if number.is_integer() and abs(number) < 2**53:  # above, floats skip integers
            return int(number)
    if kind is float:
        return float(text)
    if kind is NONE and text.lower() == "none":
        return None
    if origin is typing.Literal:
        return args[[str(option) for option in args].index(text)]
    if origin is tuple:
        items = _split(text, ",", "()")
        kinds = args[:1] * len(items) if args[1:] == (...,) else args
        return tuple(read(i, k) for i, k in zip(items, kinds, strict=True))
    if origin is dict:
        pairs = [_split(item, ":") for item in _split(text, ",", "{}")]
        return {read(key, args[0]): read(value, args[1]) for key, value in pairs}
    if origin in UNIONS:
        for member in sorted(args, key=_rank):
            try:
                return read(text, member)
            except ValueError:
                continue
    raise ValueError


def _split(text: str, separator: str, brackets: str = "") -> list[str]:
    """The parts of "a,b" or "(a, 'b')", without quotes; "()" has none.

    A separator between quotes is a part's own.
    """
    if brackets and text[:1] == brackets[0]:
        if text[-1:] != brackets[1]:
            raise ValueError
        text = text[1:-1].strip()
        if not text:
            return []
        if text[0] == brackets[0]:  # nested
            raise ValueError
    text, quoted = text.removesuffix(","), r"'[^']*'|\"[^\"]*\""
    part = rf"(?:{quoted}|[^{separator}])+"
    if not re.fullmatch(rf"{part}({separator}{part})*", text):
        raise ValueError
    items = [item.strip() for item in re.findall(part, text)]
    if "" in items:
        raise ValueError
    return [i[1:-1] if re.fullmatch(quoted, i) else i for i in items]


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a declared type, as far as that can be told."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in UNIONS:
        return any(fits(value, member) for member in args)
    if origin is typing.Literal:
        return value in args
    if origin is tuple and isinstance(value, tuple):
        kinds = args[:1] * len(value) if args[1:] == (...,) else args
        return len(kinds) == len(value) and all(map(fits, value, kinds))
    if origin is dict and isinstance(value, dict):
        return all(fits(k, args[0]) and fits(v, args[1]) for k, v in value.items())
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, (int, float))
    plain = origin or kind
    if not isinstance(plain, type) or getattr(plain, "_is_protocol", False):
        return True
    return isinstance(value, plain)


def _rank(kind: Any) -> int:
    """The order in which a union tries its members: scalars, containers, str."""
    return 2 if kind is str else typing.get_origin(kind) in _CONTAINERS


def _is_readable(kind: Any, inside: bool = False) -> bool:
    """Whether text can give a `kind`: a scalar, or a flat tuple or dict of scalars."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in UNIONS:
        return all(_is_readable(arg, inside) for arg in args)
    if origin in _CONTAINERS:
        return not inside and all(a is ... or _is_readable(a, True) for a in args)
    return origin is typing.Literal or kind in (bool, int, float, str, NONE)


def expected(kind: Any) -> str:
    """The type in words, with the ways to write it."""
    plain = isinstance(kind, type) and typing.get_origin(kind) is None
    name = kind.__name__ if plain else str(kind)
    name = re.sub(r"\b(typing|collections\.abc)\.", "", name)
    forms = [form for word, form in _FORMS.items() if re.search(rf"\b{word}\b", name)]
    written = f" (written {'; '.join(forms)})" if forms else ""
    return name.replace("Literal[", "one of [") + written
