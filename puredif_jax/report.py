"""What a run leaves behind: scalars as JSON lines, a report as JSON and as one page.

The page holds its pictures and style itself: it fetches nothing and runs no script.
What draws is loaded only when something is drawn.
"""

from __future__ import annotations

import base64
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
from tqdm import tqdm  # type: ignore[import-untyped]

Path = str | os.PathLike
Lines = Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]]

_PACKAGES = "jax jaxlib flax optax orbax-checkpoint numpy".split()
_COLOURS = ["#3b82c4", "#d9722e", "#2a9d6f", "#b85cc4", "#b8922a", "#d14b5a"]
_GREY = "#808790"  # of axes: readable on a light and on a dark page
# The folders of an absolute path or a URL, also one after "=" or in a list.
_FOLDERS = r"(?<![\w.\-])(?:\w+:/)?(?:~[^/,;:='\"]*)?/(?:[^,;:='\"]*/)?"


class Metrics:
    """The scalars of a run: `metrics.jsonl` in its folder, a JSON object a line."""

    def __init__(self, folder: Path) -> None:
        self._path = os.path.join(folder, "metrics.jsonl")

    def rewind(self, stage: str, step: int) -> None:
        """Drops what `stage` wrote after `step`, and any line that a kill tore."""
        kept = [t for t, r in self._rows() if r["stage"] != stage or r["step"] <= step]
        if os.path.exists(self._path):
            _replace(self._path, "".join(f"{text}\n" for text in kept))

    def write(self, stage: str, step: int, **scalars: npt.ArrayLike) -> None:
        """Appends a line; a value is a scalar or `[K]`, of numpy, jax or Python."""
        for name, array in zip(scalars, map(np.asarray, scalars.values()), strict=True):
            if array.ndim > 1 or array.dtype.kind in "OSU":
                raise ValueError(
                    f"metric {name!r} is of type {array.dtype} and shape {array.shape}:"
                    " expected a number or a vector of numbers"
                )
        row = json.dumps(_plain({"stage": stage, "step": step, **scalars}))
        os.makedirs(os.path.dirname(self._path) or ".", exist_ok=True)
        with open(self._path, "a", encoding="utf-8") as file:  # closed, so flushed
            file.write(row + "\n")

    def read(self, stage: str) -> dict[str, np.ndarray]:
        """The columns of `stage`, "step" first: `[rows]`, or `[rows, K]` of vectors.

        Where a row lacks a column, the column is nan.
        """
        rows = [row for _, row in self._rows() if row.pop("stage") == stage]
        columns: dict[str, np.ndarray] = {"step": np.zeros(0, np.int64)}
        for name in dict.fromkeys(name for row in rows for name in row):
            values = [_unplain(row.get(name, math.nan)) for row in rows]
            shape = max((value.shape for value in values), key=len)
            columns[name] = np.stack([np.broadcast_to(v, shape) for v in values])
        return columns

    def _rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every whole line, as text and as an object."""
        if not os.path.exists(self._path):
            return
        with open(self._path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    yield line.rstrip("\n"), json.loads(line)
                except ValueError:
                    continue


def progress(total: int, initial: int, label: str, enabled: bool) -> tqdm:
    """A bar on stderr with rate and time left; in a log, a line every ten seconds."""
    style: dict[str, Any] = {"file": sys.stderr, "dynamic_ncols": True}
    if not sys.stderr.isatty():
        shape = "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} "
        shape += "[{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        style = {"file": _Log(sys.stderr), "bar_format": shape}
    return tqdm(total=total, initial=initial, desc=label, disable=not enabled, **style)


class _Log:
    """A stream for tqdm: lines instead of "\\r", one in a while and always the last."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._pending, self._written = stream, "", -math.inf

    def write(self, text: str) -> None:
        self._pending = text.strip() or self._pending
        due = time.monotonic() - self._written >= 10
        if self._pending and (due or text == "\n"):  # the newline on which tqdm closes
            self._stream.write(self._pending + "\n")
            self._pending, self._written = "", time.monotonic()

    def flush(self) -> None:
        self._stream.flush()


@dataclass(frozen=True)
class Section:
    """A part of a report.

    table: rows; its columns are the union of their names, in order.
    pictures: caption, and `[H, W, C]` or a grid `[N, H, W, C]` in [-1, 1], C of 1 or 3.
      A caption that starts with "difference" asks for signed colours around 0.
    curves: caption, and named lines (x, y), each `[n]`.
    """

    title: str
    text: str = ""
    table: tuple[Mapping[str, object], ...] = ()
    pictures: tuple[tuple[str, np.ndarray], ...] = ()
    curves: tuple[tuple[str, Lines], ...] = ()


@dataclass(frozen=True)
class Report:
    """What a run found, and with what."""

    title: str
    verdict: str = ""
    sections: tuple[Section, ...] = ()
    config: Mapping[str, object] = field(default_factory=dict)
    environment: Mapping[str, object] = field(default_factory=dict)
    numbers: Mapping[str, object] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Writes `report.json`, then `report.html`, each in one move."""
        names = ("title", "verdict", "numbers", "config", "environment")
        content = {name: getattr(self, name) for name in names}
        tables = [{"title": s.title, "rows": s.table} for s in self.sections if s.table]
        os.makedirs(folder, exist_ok=True)
        text = _json({**content, "tables": tables})
        _replace(os.path.join(folder, "report.json"), text + "\n")
        _replace(os.path.join(folder, "report.html"), _page(self))


def environment() -> dict[str, object]:
    """Software, load, commit and command line, without names or absolute paths."""
    program, *arguments = sys.argv or [""]
    hidden = [re.sub(_FOLDERS, ".../", argument) for argument in arguments]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "load": [round(load, 2) for load in os.getloadavg()],
        **{name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
        "command": shlex.join([os.path.basename(program), *hidden]),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that has this package at its top, if it is in one."""
    package = os.path.dirname(os.path.abspath(__file__))
    command = ["git", "-C", package, "rev-parse", "--show-prefix", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    prefix, _, commit = done.stdout.strip().partition("\n")
    at_top = prefix == os.path.basename(package) + "/"  # not installed in another's
    return commit if done.returncode == 0 and at_top else None


def _replace(path: str, text: str) -> None:
    """Writes the file under another name and renames it: whole or not at all."""
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(path + ".tmp", path)


def _json(value: object) -> str:
    return json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    """`value` as JSON has it: arrays as lists, nan and inf as strings."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, (list, tuple)) or np.ndim(value):
        return [_plain(item) for item in value]
    scalar = np.asarray(value)[()]
    if isinstance(scalar, (np.bool, np.integer)):
        return scalar.item()
    try:
        number = float(str(scalar))  # a float32 0.1 as 0.1, not 0.10000000149
    except ValueError:
        return str(value)
    return number if math.isfinite(number) else str(number)


def _unplain(value: Any) -> np.ndarray:
    """A number or `[K]` from what `_plain` made of it."""
    items = value if isinstance(value, list) else [value]
    array = np.array([float(i) if isinstance(i, str) else i for i in items])
    return array if isinstance(value, list) else array[0]


def _page(report: Report) -> str:
    """The whole of report.html."""
    parts = [f"<h1>{escape(report.title)}</h1>"]
    if report.verdict:
        parts.append(f'<p class="verdict">{escape(report.verdict)}</p>')
    parts.append(_table([{"number": k, "value": v} for k, v in report.numbers.items()]))
    parts += map(_section, report.sections)
    for name, content in ("Config", report.config), ("Environment", report.environment):
        text = escape(_json(content))
        parts.append(f"<details><summary>{name}</summary><pre>{text}</pre></details>")
    return _PAGE.replace("TITLE", escape(report.title)).replace(
        "BODY", "\n".join(parts)
    )


def _section(section: Section) -> str:
    """A section's HTML: text, table, pictures side by side, curves."""
    paragraphs = [p for p in re.split(r"\n\s*\n", section.text) if p.strip()]
    figures = "".join(
        _picture(caption, picture) for caption, picture in section.pictures
    )
    curves = "".join(_curves(caption, lines) for caption, lines in section.curves)
    parts = [
        f"<h2>{escape(section.title)}</h2>",
        *(f"<p>{escape(p)}</p>" for p in paragraphs),
        _table(section.table),
    ]
    return ""
