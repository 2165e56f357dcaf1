"""Where a configuration comes from: a Python file, a name, or the JSON of a run.

`mine.py` is executed. A name, such as `scan`, is a configuration that ships with the
package. `runs/mine/config.json` is what a run keeps of its own; nothing in it is
executed, and it names classes of the package alone.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import json
import pathlib
import pkgutil
import sys
import typing
from typing import Any

from puredif_jax.runs import config, fields
from puredif_jax.runs.config import ConfigError

PACKAGE = pathlib.Path(__file__).parents[1]
HOMES = (PACKAGE / "configs", PACKAGE.parent / "configs")
"""Where shipped configurations lie: in an installed package, and in a clone."""

LAYERS = ("attacks", "data", "defenses", "diffusion", "networks", "stages")
"""Folders of the package with classes that a configuration may hold."""


def shipped() -> dict[str, pathlib.Path]:
    """The configurations that ship with the package, by name."""
    home = next((home for home in HOMES if home.is_dir()), HOMES[0])
    return {path.stem: path for path in sorted(home.glob("*.py"))}


def load(path: str) -> Any:
    """The configuration in a file, or the shipped one of that name.

    Args:
      path: a .py file with `get_config()`, a config.json that a run wrote, or a name.
        A shipped file can also be written as it lies in a clone: configs/NAME.py.

    Raises:
      ConfigError: no such file or name, no `get_config`, an exception in the file, a
        result that is not a frozen dataclass, or as `config.check` and `from_json`.
    """
    file, known = _file(path), shipped()
    import_kinds()
    if file.suffix == ".json" and file.is_file():
        return from_json(file)
    if not (file.suffix == ".py" and file.is_file()):
        close = config.closest(
            file.name, [*known, *(each.name for each in file.parent.glob("*.py"))]
        )
        raise ConfigError(
            f"config file {path!r} is not an existing .py file{close}: give a Python "
            "file that defines get_config(), the config.json of a run, or one of "
            f"{', '.join(known)}"
        )
    return _executed(path, file)


def _file(path: str) -> pathlib.Path:
    """The file of a path, or of the name of a shipped configuration."""
    file, known = pathlib.Path(path), shipped()
    name = path.removeprefix("configs/").removesuffix(".py")
    return (
        known[name] if name in known and (name == path or not file.exists()) else file
    )


def about(path: str) -> str:
    """What a configuration says of itself: the docstring of its file, or ""."""
    file = _file(path)
    if file.suffix != ".py":
        return ""
    return (ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "") + "\n"


def import_kinds() -> None:
    """Imports the modules of kinds, so that text can name each of their classes."""
    for layer in LAYERS:
        for module in pkgutil.iter_modules([str(PACKAGE / layer)]):
            importlib.import_module(f"{PACKAGE.name}.{layer}.{module.name}")


def from_json(path: pathlib.Path) -> Any:
    """The configuration from which `config.to_dict` made the JSON in a file.

    Raises:
      ConfigError: it is damaged, or has a class or a field that this version of the
        package does not have.
    """
    try:
        plain = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON file: {config.line(error)}") from error
    if not isinstance(plain, dict) or not isinstance(plain.get("type"), str):
        raise ConfigError(f"{path} is not the configuration of a run")
    if {*plain} == {"type"}:
        raise ConfigError(
            f"{path} is of a {plain['type']}, whose runs keep their configurations: "
            "give the config file, or the config.json of one run"
        )
    try:
        found = _Reader(path, _kinds()).made(plain, Any, "config")
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:  # a key of another type
        raise ConfigError(f"{path} cannot be read: {config.line(error)}") from error
    config.check(found)
    return found


def _executed(path: str, file: pathlib.Path) -> Any:
    """What `get_config()` of a Python file returns."""
    spec = importlib.util.spec_from_file_location(path, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path] = module  # where get_type_hints looks up the file's own classes
    try:
        spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        found: Any = get_config() if callable(get_config) else None
    except Exception as error:
        raise ConfigError(
            f"config file {path!r} failed with {config.line(error)}"
        ) from error
    if not (fields.is_node(found) and found.__dataclass_params__.frozen):
        kind = type(found).__name__
        does = f"returns a {kind} from" if callable(get_config) else "does not define"
        raise ConfigError(
            f"config file {path!r} {does} get_config(): it must define one that "
            "returns an instance of a frozen dataclass"
        )
    config.check(found)
    return found


def _kinds() -> dict[str, type]:
    """The package's own public dataclasses, by name."""
    import_kinds()
    found: dict[str, type] = {}
    for name, module in [*sys.modules.items()]:
        if name.split(".")[0] == PACKAGE.name:
            for each in vars(module).values():
                if isinstance(each, type) and each.__module__ == name:
                    found[each.__name__] = each
    return {
        name: each
        for name, each in found.items()
        if dataclasses.is_dataclass(each) and not name.startswith("_")
    }


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Values of JSON as what a configuration holds.

    path: the file, for messages.
    kinds: the classes that it may name.
    """

    path: pathlib.Path
    kinds: dict[str, type]

    def made(self, plain: Any, kind: Any, where: str) -> Any:
        """A value of the declared type, where JSON has less than Python."""
        members = fields.members_of(kind)
        if isinstance(plain, dict) and "type" in plain:
            return self._node(plain, where)
        if isinstance(plain, dict):
            to = next((m for m in members if typing.get_origin(m) is dict), None)
            key, item = typing.get_args(to) if to else (str, Any)
            return {
                fields.read(k, key): self.made(v, item, f"{where}.{k}")
                for k, v in plain.items()
            }
        if isinstance(plain, list):
            kinds = fields.items_of(kind, len(plain))
            return tuple(
                self.made(item, each, where)
                for item, each in zip(plain, kinds, strict=True)
            )
        if float in members and plain in ("inf", "-inf", "nan"):
            return float(plain)
        return plain

    def _node(self, plain: dict[str, Any], where: str) -> Any:
        """A dataclass, made of the fields that JSON has."""
        name = plain["type"]
        if name not in self.kinds:
            raise ConfigError(
                f"{where} in {self.path} is a {name}, which the package does not have: "
                "give the config file of that run"
            )
        kind = self.kinds[name]
        declared = fields.types_of(kind)
        taken = {f.name for f in dataclasses.fields(kind) if f.init}
        derived = {f.name for f in dataclasses.fields(kind)} - taken
        given = {k: v for k, v in plain.items() if k not in derived | {"type"}}
        if unknown := sorted({*given} - taken):
            raise ConfigError(
                f"{where} in {self.path} has {', '.join(unknown)}, which {name} does "
                "not have: another version of the package wrote it"
            )
        made = {
            field: self.made(value, declared.get(field), f"{where}.{field}")
            for field, value in given.items()
        }
        for field, value in made.items():
            if field in declared and not fields.fits(value, declared[field]):
                raise ConfigError(
                    f"{where}.{field} in {self.path} cannot be {value!r}: expected "
                    f"{fields.expected(declared[field])}"
                )
        try:
            return kind(**made)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{where} in {self.path} cannot be made: {config.line(error)}"
            ) from error
