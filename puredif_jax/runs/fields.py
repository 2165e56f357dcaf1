"""Fields of a configuration: their declared types, and text as a value of a type.

Where a type is a dataclass or an abstract base, text names a class of that kind. The
class is made of its defaults, such as `Blend`, or of given values, such as
`Blend(0.8)`. Classes are found as they are defined, a user's own among them; there is
no list of them.
"""

from __future__ import annotations

import abc
import ast
import collections
import contextlib
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

NONE = type(None)
UNIONS = (typing.Union, types.UnionType)
_CONTAINERS = (tuple, dict)
_CALL = re.compile(r"\w\(")
_BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_FORMS = {
    "bool": "true or false",
    "None": "none",
    "Optional": "none",
    "tuple": "A,B or ()",
    "dict": "KEY:VALUE,KEY:VALUE or {}",
}


class Unmade(Exception):
    """A class that cannot be made of its defaults, or of what is given; says why."""


def is_node(value: Any) -> bool:
    """Whether it is a dataclass, whose fields belong to the configuration."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def names_of(node: Any) -> list[str]:
    """The fields of a dataclass that can be given to it."""
    return [field.name for field in dataclasses.fields(node) if field.init]


def types_of(node: Any) -> dict[str, Any]:
    """The declared type of each field of a dataclass, as far as they resolve."""
    try:
        return typing.get_type_hints(node if isinstance(node, type) else type(node))
    except NameError:  # a type imported only under TYPE_CHECKING
        return {}


def members_of(kind: Any) -> tuple[Any, ...]:
    """The members of a declared type that is a union; any other type by itself."""
    return typing.get_args(kind) if typing.get_origin(kind) in UNIONS else (kind,)


def items_of(kind: Any, count: int) -> tuple[Any, ...]:
    """The declared types of so many items of a tuple; `Any` where none is declared."""
    tuples = (m for m in members_of(kind) if typing.get_origin(m) is tuple)
    args = typing.get_args(next(tuples, None)) or (Any, ...)
    kinds = args[:1] * count if args[-1] is ... else args
    return (*kinds, *[Any] * (count - len(kinds)))[:count]


def classes_of(kind: Any) -> dict[str, type]:
    """The classes that text can name for a value of a declared type, by these names.

    They are the dataclasses among the members of the type and among all that inherit
    from one and are defined by now. Abstract ones and private ones are left out. Two of
    one name go by the names of their modules, too. If a class was defined again, the
    last one counts.
    """
    found: dict[tuple[str, str], type] = {}
    for member in filter(_is_kind, members_of(kind)):
        for each in filter(_is_made, _descent(member)):
            found[each.__module__, each.__qualname__] = each
    count = collections.Counter(each.__name__ for each in found.values())
    return {
        x.__name__ if count[x.__name__] == 1 else f"{x.__module__}.{x.__name__}": x
        for x in found.values()
    }


def written_classes(kind: Any) -> list[str]:
    """These classes as text: `Name`, or `Name(field, ...)` with what it needs."""
    found = []
    for name, each in classes_of(kind).items():
        needed = [
            field.name
            for field in dataclasses.fields(each)
            if field.init
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ]
        found.append(f"{name}({', '.join(needed)})" if needed else name)
    return found


def is_settable(kind: Any) -> bool:
    """Whether `override` can set a field of this type, in text."""
    return any(_is_readable(x) for x in members_of(kind) if x is not NONE)


def read(text: str, kind: Any) -> Any:
    """`text` as a value of the type `kind`.

    Raises:
      ValueError: it is not one.
      Unmade: it names a class that does not take its own defaults, or what is given.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is str:
        return text
    text = text.strip()
    if text in (classes := classes_of(kind)):
        return _made(classes[text], {})
    if _CALL.search(text) and any(map(classes_of, _with_items(kind))):
        with contextlib.suppress(ValueError):  # else it may be a text with brackets
            return _built(_parsed(text), kind)
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
            if _is_kind(member):
                continue  # its classes are those of the union
            try:
                return read(text, member)
            except ValueError:
                continue
    raise ValueError


def _parsed(text: str) -> ast.expr:
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError from error


def _built(node: ast.expr, kind: Any) -> Any:
    """A value of a type, of an expression that names classes and gives them literals.

    Nothing is executed but the classes, which are of the declared kinds.
    """
    classes = classes_of(kind)
    if isinstance(node, ast.Name) and node.id in classes:
        return _made(classes[node.id], {})
    if isinstance(node, ast.Tuple | ast.List):
        return tuple(map(_built, node.elts, items_of(kind, len(node.elts))))
    if not isinstance(node, ast.Call):
        try:
            return ast.literal_eval(node)
        except (TypeError, RecursionError, MemoryError) as error:
            raise ValueError from error
    name = ast.unparse(node.func)
    if name not in classes:
        raise ValueError
    declared, names = types_of(classes[name]), names_of(classes[name])
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    given |= dict(zip(names, node.args, strict=False))
    if len(given) < len(node.keywords) + len(node.args) or not {*given} <= {*names}:
        raise Unmade(f"{name} takes {', '.join(names)}, each once")
    made = {
        key: _built(value, declared.get(key)) for key, value in given.items() if key
    }
    return _made(classes[name], made)


def _made(kind: type, given: dict[str, Any]) -> Any:
    declared = types_of(kind)
    for name, value in given.items():
        if name in declared and not fits(value, declared[name]):
            raise Unmade(
                f"{kind.__name__}.{name} cannot be {value!r}: expected "
                f"{expected(declared[name])}"
            )
    try:
        return kind(**given)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        shown = ", ".join(f"{k}={v!r}" for k, v in given.items())
        raise Unmade(
            f"{kind.__name__}({shown}) raises {type(error).__name__}: {reason}"
        ) from error


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
    """Whether a value is of a declared type, as far as that can be checked."""
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


def _is_kind(kind: Any) -> bool:
    """Whether a declared type is a dataclass, or an abstract base and no protocol."""
    if not isinstance(kind, type) or getattr(kind, "_is_protocol", False):
        return False
    return dataclasses.is_dataclass(kind) or isinstance(kind, abc.ABCMeta)


def _descent(kind: type) -> Iterator[type]:
    """A class and all that inherit from it."""
    yield kind
    heirs: list[type] = kind.__subclasses__()
    for heir in heirs:
        yield from _descent(heir)


def _is_made(kind: type) -> bool:
    """Whether it is a public dataclass that can have instances."""
    if inspect.isabstract(kind) or not dataclasses.is_dataclass(kind):
        return False
    return not kind.__name__.startswith("_")


def _is_readable(kind: Any, inside: bool = False) -> bool:
    """Whether text can give a `kind`: a plain value, or a flat tuple or dict of some.

    A plain value is a scalar, or an instance of a class that text can name.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in UNIONS:
        return all(_is_readable(arg, inside) for arg in args)
    if origin in _CONTAINERS:
        return not inside and all(a is ... or _is_readable(a, True) for a in args)
    if origin is typing.Literal or kind in (bool, int, float, str, NONE):
        return True
    return bool(classes_of(kind))


def expected(kind: Any) -> str:
    """The type in words, with the ways to write it.

    The classes that text can name follow, unless the type names the same ones.
    """
    plain = isinstance(kind, type) and typing.get_origin(kind) is None
    name = kind.__name__ if plain else str(kind)
    name = re.sub(r"\b(typing|collections\.abc)\.", "", name)
    parts = _with_items(kind)
    declared = [x for part in parts for x in members_of(part) if _is_kind(x)]
    for each in declared:
        name = name.replace(f"{each.__module__}.{each.__qualname__}", each.__name__)
    forms = [form for word, form in _FORMS.items() if re.search(rf"\b{word}\b", name)]
    about = [f"written {'; '.join(forms)}"] if forms else []
    classes = dict.fromkeys(each for part in parts for each in written_classes(part))
    if classes and {*classes} != {each.__name__ for each in declared}:
        about.append(f"classes: {', '.join(classes)}")
    written = f" ({'; '.join(about)})" if about else ""
    return name.replace("Literal[", "one of [") + written


def _with_items(kind: Any) -> list[Any]:
    """A declared type, and the types of the items of its containers."""
    found = [kind]
    for member in members_of(kind):
        if typing.get_origin(member) in _CONTAINERS:
            found += typing.get_args(member)
    return found
