"""Names that a user gives, and all models that they mean.

Nothing that may be a model is passed over: what cannot be scanned has a reason.
"""

from __future__ import annotations

import itertools
import os
import pathlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from puredif_jax.files.whole import expanded, safe_name
from puredif_jax.formats import hub
from puredif_jax.formats.diffusers_config import ConvertError
from puredif_jax.formats.known import format_of
from puredif_jax.formats.opening import unreadable
from puredif_jax.formats.search import Search
from puredif_jax.types import InputError

Models = dict[str, pathlib.Path | InputError]

LONGEST_LIST = 1_000_000  # bytes
MOST_COMMAS = 6  # in a path
MOST_ERRORS = 5  # that are said where there is no model at all
LISTS = ("", ".txt", ".list", ".lst", ".csv")  # suffixes of files that name models
# Names that a scan's folder has for itself.
RESERVED = ("config.json", "report.json", "report.html", "compiled", "lock")


class Found(NamedTuple):
    """What a search has found.

    models: by names of their own, a path that a format knows, or what is wrong.
    notes: sentences on what is not scanned and need not be.
    """

    models: Models
    notes: tuple[str, ...]


def find(
    names: Sequence[str], offline: bool = False, variant: str | None = None
) -> Found:
    """All models that names mean.

    Args:
      names: folders of models, folders of such folders, text files that name one a
        line, names or addresses of the Hub.
      offline: take from the Hub only what has been downloaded before.
      variant: of the weights.

    Raises:
      InputError: there is no model, and nothing that may be one.
    """
    rows: list[tuple[str, pathlib.Path | InputError]] = []
    notes: list[str] = []
    for name in _joined(names):
        try:
            path = hub.find_folder(name, offline, variant)
            if path.is_file() and format_of(path) is None:
                lines = _lines(path)
                if not lines:
                    raise _no_model(name)
                for number, line in lines.items():
                    try:
                        one = hub.find_folder(line, offline, variant)
                        rows += _rows(line, one, variant, notes)
                    except InputError as error:
                        where = f"line {number} of {path}: {error}"
                        rows.append((line, ConvertError(where)))
            else:
                rows += _rows(name, path, variant, notes)
        except InputError as error:
            rows.append((name, error))
        except OSError as error:
            rows.append((name, unreadable(name, error)))
    errors = [found for _, found in rows if isinstance(found, InputError)]
    if len(errors) == len(rows):
        left = len(errors) - MOST_ERRORS
        more = [f"and {left} more"] if left > 0 else []
        raise ConvertError("; ".join([*map(str, errors[:MOST_ERRORS]), *more]))
    models: Models = {}
    used, counts = set(RESERVED), dict[str, int]()
    for name, found in _once(rows):
        plain = tried = safe_name(name)
        while tried.lower() in used:
            counts[plain] = counts.get(plain, 1) + 1
            tried = f"{plain}-{counts[plain]}"
        used.add(tried.lower())
        models[tried] = found
    return Found(models, tuple(notes))


def _once(
    rows: Iterable[tuple[str, pathlib.Path | InputError]],
) -> Iterator[tuple[str, pathlib.Path | InputError]]:
    """The rows without models that an earlier row has, by another name or a link."""
    seen = set[pathlib.Path]()
    for name, found in rows:
        if isinstance(found, pathlib.Path):
            place = located(found)
            if place in seen:
                continue
            seen.add(place)
        yield name, found


def located(model: pathlib.Path) -> pathlib.Path:
    """Where a model lies, without links. A file may be one: what counts lies beside."""
    if model.is_dir():
        return pathlib.Path(os.path.realpath(model))
    return pathlib.Path(os.path.realpath(model.parent), model.name)


def distinct(name: str, taken: Collection[str]) -> str:
    """The name, if need be with the least number that makes it new in any case."""
    used, tried, count = {each.lower() for each in taken}, name, 1
    while tried.lower() in used:
        count += 1
        tried = f"{name}-{count}"
    return tried


def _joined(names: Sequence[str]) -> Iterator[str]:
    """The names; those that make up one path with commas in it are put together."""
    i = 0
    while i < len(names):
        for stop in range(min(len(names), i + MOST_COMMAS + 1), i + 1, -1):
            ways = itertools.product((",", ", "), repeat=stop - i - 1)
            tries = (_between(names[i:stop], way) for way in ways)
            whole = next(filter(_exists, tries), None)
            if whole is not None:
                yield whole
                i = stop
                break
        else:
            yield names[i]
            i += 1


def _between(parts: Sequence[str], commas: Sequence[str]) -> str:
    return "".join(map("".join, itertools.zip_longest(parts, commas, fillvalue="")))


def _exists(name: str) -> bool:
    try:
        return expanded(name).exists()
    except (OSError, RuntimeError, ValueError):
        return False


def _lines(path: pathlib.Path) -> dict[int, str]:
    """What a text file names, by the number of the line; "#" begins a remark.

    Raises:
      ConvertError: it is no text, or cannot be read.
    """
    try:
        if path.suffix.lower() not in LISTS or path.stat().st_size > LONGEST_LIST:
            raise UnicodeError
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except UnicodeError:
        raise ConvertError(
            f"{path} is a file, and not a text (.txt) that names models: give the "
            "folder of the model, which has unet/config.json in it"
        ) from None
    except OSError as error:
        raise unreadable(path, error) from error
    return {
        number: line
        for number, line in enumerate(lines, 1)
        if line and not line.startswith("#")
    }


def _no_model(name: str) -> ConvertError:
    return ConvertError(
        f"{name} is no model: give a folder with unet/config.json, a checkpoint file, "
        "a folder that has such, a text file that names one a line, or a name of the "
        "Hub"
    )


def _rows(
    name: str, path: pathlib.Path, variant: str | None, notes: list[str]
) -> list[tuple[str, pathlib.Path | InputError]]:
    """The rows of one name; raises ConvertError if it leads to nothing."""
    if path.is_file() and format_of(path) is not None:
        return [(f"{path.parent.name}.{path.name}", path)]
    if not path.is_dir():
        raise _no_model(name)
    search = Search(path, variant)
    search.run()
    notes += search.notes
    if not search.rows:
        raise _no_model(name)
    return search.rows
