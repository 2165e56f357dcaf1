"""Config files, `--config.a.b=value` overrides and the JSON form of a config.

A config is a tree of frozen dataclasses of Python scalars, tuples, dicts, functions
and None; a config file is a Python file whose `get_config()` returns such a tree.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import functools
import importlib.util
import math
import pathlib
import re
import sys
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from absl import flags

from puredif_jax.types import InputError

_NONE = type(None)
_UNIONS = (typing.Union, types.UnionType)
_CONTAINERS = (tuple, dict)
_BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_FORMS = {
    "bool": "true or false",
    "None": "none",
    "Optional": "none",
    "tuple": "A,B or ()",
    "dict": "KEY:VALUE,KEY:VALUE or {}",
}


class ConfigError(InputError):
    """A user's mistake in a config: one sentence, what was found and what is valid."""


def load(path: str) -> Any:
    """The config that the file at `path` returns from `get_config()`.

    Raises:
      ConfigError: no such .py file, no `get_config`, an exception in the file, a
        result that is not a frozen dataclass, or as `check`.
    """
    file = pathlib.Path(path)
    spec = importlib.util.spec_from_file_location(path, file)
    if not (file.suffix == ".py" and file.is_file() and spec and spec.loader):
        close = _closest(file.name, (p.name for p in file.parent.glob("*.py")))
        raise ConfigError(
            f"config file {path!r} is not an existing .py file{close}: give a Python "
            "file that defines get_config()"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[path] = module  # where get_type_hints looks up the file's own classes
    try:
        spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        config: Any = get_config() if callable(get_config) else None
    except Exception as error:
        raise ConfigError(f"config file {path!r} failed with {_line(error)}") from error
    if not (is_node(config) and config.__dataclass_params__.frozen):
        kind = type(config).__name__
        found = f"returns a {kind} from" if callable(get_config) else "does not define"
        raise ConfigError(
            f"config file {path!r} {found} get_config(): it must define one that "
            "returns an instance of a frozen dataclass"
        )
    check(config)
    return config


def from_flags(argv: Sequence[str]) -> tuple[Any, list[str]]:
    """Loads `--config=FILE.py` and applies each `--config.NAME=VALUE` in order.

    A space may stand for "=". Dataclasses check themselves after each override, so of
    two fields that bound each other, one may have to be set first.

    Args:
      argv: the command line, program name first.

    Returns:
      The config, and the program name with the flags that absl defines, untouched.

    Raises:
      ConfigError: any other argument, no file, no value, or as `load` and `override`.
    """
    paths, overrides, remaining = [], [], list(argv[:1])
    tokens = collections.deque(argv[1:])
    while tokens:
        token = tokens.popleft()
        name, equals, value = token.partition("=")
        flag = _absl_flag(name)
        if re.fullmatch(r"--?config(\..*)?", name):
            if not equals and (not tokens or tokens[0].startswith("--")):
                raise ConfigError(f"{name} has no value: write {name}=VALUE")
            value = value if equals else tokens.popleft()
            if "." in name:
                overrides.append((name.partition(".")[2], value))
            else:
                paths.append(value)
        elif flag is not None:
            remaining.append(token)
            if not equals and not flag.boolean and tokens:
                remaining.append(tokens.popleft())
        else:
            raise ConfigError(
                f"unknown argument {token!r}: valid are --config=FILE.py, "
                "--config.NAME=VALUE and absl's flags, such as --verbosity=1"
            )
    if len(paths) != 1:
        raise ConfigError(
            f"{len(paths)} config files are given ({', '.join(paths) or 'none'}): give "
            "one, such as --config=configs/quickstart.py"
        )
    config = load(paths[0])
    for path, text in overrides:
        config = override(config, path, text)
    return config, remaining


def override(config: Any, path: str, text: str) -> Any:
    """`config` with the field at the dotted `path` set to `text`, read as its type.

    bool: true false yes no 1 0; int: 50 1_000 1e3; float: 0.1 inf; str: as it is;
    Literal: one of its values; tuple: 1,2 or (1,2) or (); dict: a:1,b:2 or {'a':1} or
    {}; none where None is allowed. A union tries scalars, then containers, then str.

    Args:
      config: a frozen dataclass.
      path: field names from the root, such as "attack.trigger.size".
      text: the new value.

    Raises:
      ConfigError: unknown name, text that is not of the field's type, a field that
        text cannot set, or a value that a dataclass's `__post_init__` rejects.
    """
    return _override(config, path.split("."), text, "config", f"config.{path}")


def check(config: Any, where: str = "config") -> None:
    """Compares every field, and those below, with its declared type.

    A whole number serves as a float. Protocols, functions and types that do not
    resolve are not judged.

    Raises:
      ConfigError: a value is of another type; names it and what is valid.
    """
    kinds = types_of(config)
    for name in _names(config):
        value = getattr(config, name)
        if name in kinds and not _fits(value, kinds[name]):
            shown = _held(value) if is_node(value) else repr(value)[:80]
            raise ConfigError(
                f"{where}.{name} cannot be {shown}: expected {expected(kinds[name])}"
            )
        items = value if isinstance(value, tuple) else (value,)
        for item in items:
            if is_node(item):
                check(item, f"{where}.{name}")


def types_of(node: Any) -> dict[str, Any]:
    """The declared type of each field of a dataclass, as far as they resolve."""
    try:
        return typing.get_type_hints(type(node))
    except NameError:  # a type imported only under TYPE_CHECKING
        return {}


def is_settable(kind: Any) -> bool:
    """Whether `override` can set a field of this type, in text."""
    members = typing.get_args(kind) if typing.get_origin(kind) in _UNIONS else (kind,)
    return any(_is_readable(member) for member in members if member is not _NONE)


def to_dict(config: Any) -> dict[str, Any]:
    """The config as JSON-ready dicts, lists and scalars.

    A dataclass becomes {"type": class name, **fields}, a tuple a list, a function its
    qualified name, inf and nan strings.

    Raises:
      ConfigError: a value of another kind, such as an array.
    """
    return _plain(config, "config")


def _override(node: Any, names: list[str], text: str, where: str, full: str) -> Any:
    """`node` with the field at `names` replaced; `where` is the path to `node`."""
    kind, name, valid = type(node).__name__, names[0], _names(node)
    if name not in valid:
        raise ConfigError(
            f"{where} has no field {name!r}{_closest(name, valid)}: the names "
            f"of {kind} are {', '.join(valid)}"
        )
    where, value = f"{where}.{name}", getattr(node, name)
    if len(names) == 1:
        value = _read_field(node, name, text, where)
    elif is_node(value):
        value = _override(value, names[1:], text, where, full)
    else:
        remedy = "set it in a config file" if value is None else f"set {where} itself"
        raise ConfigError(
            f"{where} is {_held(value)} and has no field {names[1]!r}: {remedy}"
        )
    try:
        return dataclasses.replace(node, **{name: value})
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{full} cannot be {text!r}: {kind} raises {_line(error)}"
        ) from error


def _read_field(node: Any, name: str, text: str, where: str) -> Any:
    """`text` as the declared type of `node.name`."""
    value, cannot = getattr(node, name), f"{where} cannot be {text!r}"
    try:
        kind = typing.get_type_hints(type(node))[name]
    except NameError as error:  # a type imported only under TYPE_CHECKING
        raise ConfigError(
            f"{cannot}, set it in a config file: the types of {type(node).__name__} "
            f"do not resolve, {_line(error)}"
        ) from error
    members = typing.get_args(kind) if typing.get_origin(kind) in _UNIONS else (kind,)
    if _NONE in members and text.strip().lower() == "none":
        return None
    if is_node(value):
        raise ConfigError(
            f"{cannot}, it is {_held(value)}: set one of its fields, such as "
            f"{where}.NAME with NAME one of {', '.join(_names(value))}"
        )
    if not is_settable(kind):
        raise ConfigError(
            f"{cannot}, it is {_held(value)}: set it in a config file, to "
            f"{expected(kind)}"
        )
    try:
        return _read(text, kind)
    except ValueError:
        raise ConfigError(f"{cannot}: expected {expected(kind)}") from None


def _read(text: str, kind: Any) -> Any:
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
    if kind is _NONE and text.lower() == "none":
        return None
    if origin is typing.Literal:
        return args[[str(option) for option in args].index(text)]
    if origin is tuple:
        items = _split(text, ",", "()")
        kinds = args[:1] * len(items) if args[1:] == (...,) else args
        return tuple(_read(i, k) for i, k in zip(items, kinds, strict=True))
    if origin is dict:
        pairs = [_split(item, ":") for item in _split(text, ",", "{}")]
        return {_read(key, args[0]): _read(value, args[1]) for key, value in pairs}
    if origin in _UNIONS:
        for member in sorted(args, key=_rank):
            try:
                return _read(text, member)
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


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a declared type, as far as that can be told."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in _UNIONS:
        return any(_fits(value, member) for member in args)
    if origin is typing.Literal:
        return value in args
    if origin is tuple and isinstance(value, tuple):
        kinds = args[:1] * len(value) if args[1:] == (...,) else args
        return len(kinds) == len(value) and all(map(_fits, value, kinds))
    if origin is dict and isinstance(value, dict):
        return all(_fits(k, args[0]) and _fits(v, args[1]) for k, v in value.items())
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
    if origin in _UNIONS:
        return all(_is_readable(arg, inside) for arg in args)
    if origin in _CONTAINERS:
        return not inside and all(a is ... or _is_readable(a, True) for a in args)
    return origin is typing.Literal or kind in (bool, int, float, str, _NONE)


def expected(kind: Any) -> str:
    """The type in words, with the ways to write it."""
    plain = isinstance(kind, type) and typing.get_origin(kind) is None
    name = kind.__name__ if plain else str(kind)
    name = re.sub(r"\b(typing|collections\.abc)\.", "", name)
    forms = [form for word, form in _FORMS.items() if re.search(rf"\b{word}\b", name)]
    written = f" (written {'; '.join(forms)})" if forms else ""
    return name.replace("Literal[", "one of [") + written


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


def _absl_flag(name: str) -> flags.Flag | None:
    """The absl flag that `--name` or `--noname` sets, if any."""
    known, bare = flags.FLAGS, re.sub("^--?", "", name)
    if bare == name or bare in known:
        return None if bare == name else known[bare]
    negated = bare[:2] == "no" and bare[2:] in known and known[bare[2:]].boolean
    return known[bare[2:]] if negated else None


def is_node(value: Any) -> bool:
    """Whether it is a dataclass, whose fields belong to the configuration."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _names(node: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(node) if field.init]


def _held(value: Any) -> str:
    if value is None:
        return "None"
    function = callable(value) and not is_node(value)
    return "a function" if function else f"of type {type(value).__name__}"


def _closest(name: str, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(valid), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _line(error: Exception) -> str:
    """The error's type and message in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}"
