"""The command line as a configuration, in two forms.

    python -m puredif_jax.main --config=FILE --config.NAME=VALUE ...
    puredif FILE [MODEL ...] --NAME=VALUE ...

FILE is a config file, the name of a shipped one or the config.json of a run.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence
from typing import Any, Protocol, Self

from absl import flags

from puredif_jax.runs import fields
from puredif_jax.runs.config import ConfigError, override
from puredif_jax.runs.sources import load, shipped


class Aimed(Protocol):
    """A configuration that works on models that a command names."""

    def aimed(self, models: tuple[str, ...]) -> Self:
        """The same, on these models; ValueError if it takes none."""
        ...


def from_flags(argv: Sequence[str]) -> tuple[Any, list[str]]:
    """Loads `--config=FILE` and applies each `--config.NAME=VALUE` in order.

    A space may stand for "=". Dataclasses check themselves after each override. Where
    two fields bound each other, their order in the command matters.

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
        if re.fullmatch(r"--?config(\..*)?", name):
            value = value if equals else _value(name, tokens)
            if "." in name:
                overrides.append((name.partition(".")[2], value))
            else:
                paths.append(value)
        elif (flag := _absl_flag(name)) is not None:
            remaining += _of_absl(token, flag, tokens)
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


def from_words(argv: Sequence[str]) -> tuple[Any, list[str]]:
    """Loads the configuration that the first word names, and applies the others.

    Further words are models. `--NAME=VALUE` sets a field; a space may stand for "=",
    and a switch without a value is true. `--config.NAME` is the same as `--NAME`.

    Args:
      argv: the command line, program name first.

    Returns:
      The config, and the program name with the flags that absl defines, untouched.

    Raises:
      ConfigError: no word, a model where none is taken, no value, or as `load` and
        `override`.
    """
    remaining, models = list(argv[:1]), []
    tokens = collections.deque(argv[1:])
    if not tokens or tokens[0].startswith("-"):
        raise ConfigError(
            "the command needs a configuration first: a file, the config.json of a "
            f"run, or one of {', '.join(shipped())}"
        )
    config = load(tokens.popleft())
    overrides: list[tuple[str, str]] = []
    while tokens:
        token = tokens.popleft()
        name, equals, value = token.partition("=")
        path = re.sub(r"^--?(config\.)?", "", name)
        if not token.startswith("-"):
            models.append(token)
        elif (flag := _absl_flag(name)) is not None:
            remaining += _of_absl(token, flag, tokens)
        else:
            switch = not equals and _is_switch(config, path)
            read = "true" if switch else value if equals else _value(name, tokens)
            overrides.append((path, read))
    if models:
        config = _aimed(config, tuple(models))
    for path, text in overrides:
        config = override(config, path, text)
    return config, remaining


def _aimed(config: Aimed, models: tuple[str, ...]) -> Any:
    try:
        return config.aimed(models)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _value(name: str, tokens: collections.deque[str]) -> str:
    """The token after a flag without "="."""
    if not tokens or tokens[0].startswith("--"):
        raise ConfigError(f"{name} has no value: write {name}=VALUE")
    return tokens.popleft()


def _is_switch(config: Any, path: str) -> bool:
    """Whether the field at a path is declared as a bool."""
    *parents, last = path.split(".")
    for name in parents:
        config = getattr(config, name, None)
    return fields.is_node(config) and fields.types_of(config).get(last) is bool


def _of_absl(
    token: str, flag: flags.Flag[Any], tokens: collections.deque[str]
) -> list[str]:
    """An argument that absl reads, with its value."""
    if "=" not in token and not flag.boolean and tokens:
        return [token, tokens.popleft()]
    return [token]


def _absl_flag(name: str) -> flags.Flag[Any] | None:
    """The absl flag that `--name` or `--noname` sets, if any."""
    known, bare = flags.FLAGS, re.sub("^--?", "", name)
    if bare == name or bare in known:
        return None if bare == name else known[bare]
    negated = bare[:2] == "no" and bare[2:] in known and known[bare[2:]].boolean
    return known[bare[2:]] if negated else None
