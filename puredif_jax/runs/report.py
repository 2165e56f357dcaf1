"""What a run leaves behind: scalars as JSON lines, a report as JSON and as one page."""

from __future__ import annotations

import csv
import datetime
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
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
from absl import logging
from tqdm import tqdm

from puredif_jax.files.sealed import seal
from puredif_jax.files.whole import write_whole, writing
from puredif_jax.runs.page import Judgement, Section, plain, render
from puredif_jax.types import shown

# The folders of an absolute path or a URL, also one after "=" or in a list.
_FOLDERS = r"(?<![\w.\-])(?:\w+:/)?(?:~[^/,;:='\"]*)?/(?:[^,;:='\"]*/)?"


class Metrics:
    """The scalars of a run: `metrics.jsonl` in its folder, a JSON object a line.

    Each line carries its CRC-32. A damaged line is left out, with a warning in the log;
    the last line may be torn where a run was killed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._path = os.path.join(folder, "metrics.jsonl")

    def rewind(self, stage: str, step: int) -> None:
        """Drops what `stage` wrote after `step`, and any line that a kill tore."""
        kept = [t for t, r in self._rows() if r["stage"] != stage or r["step"] <= step]
        if os.path.exists(self._path):
            write_whole(self._path, "".join(f"{text}\n" for text in kept).encode())

    def write(self, stage: str, step: int, **scalars: npt.ArrayLike) -> None:
        """Appends a line; a value is a scalar or `[K]`, of numpy, jax or Python."""
        row = plain({"stage": stage, "step": step, **scalars})
        text = json.dumps(row | {"crc32": _crc(row)})
        with writing(self._path):
            os.makedirs(os.path.dirname(self._path) or ".", exist_ok=True)
            with open(self._path, "a", encoding="utf-8") as file:  # closed, so flushed
                file.write(text + "\n")

    def read(self, stage: str) -> dict[str, np.ndarray]:
        """Columns `[rows]` or `[rows, K]`, nan where a row has none; "step" in int."""
        rows = [row for _, row in self._rows() if row.pop("stage") == stage]
        columns = {"step": np.array([row.pop("step") for row in rows], np.int64)}
        for name in dict.fromkeys(name for row in rows for name in row):
            values = [np.array(row.get(name, math.nan), np.float64) for row in rows]
            columns[name] = np.stack(np.broadcast_arrays(*values))
        return columns

    def seconds(self, *stages: str) -> float:
        """The seconds of stages, of all calls together, as far as they are recorded."""
        told = (row for _, row in self._rows() if row["stage"] in stages)
        return sum(float(row.get("seconds", 0)) for row in told)

    def _rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every whole line, as text and as an object."""
        if not os.path.exists(self._path):
            return
        with open(self._path, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                try:
                    row = dict(json.loads(line))
                    whole = row.pop("crc32") == _crc(row)
                except (KeyError, TypeError, ValueError, RecursionError):
                    whole = False
                if whole:
                    yield line.rstrip("\n"), row
                elif line.endswith("\n"):
                    logging.warning(
                        "%s: line %d is damaged and left out, so seconds and curves "
                        "lack what it said",
                        self._path,
                        number,
                    )


def _crc(row: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(row, sort_keys=True).encode())


def progress(total: int, initial: int, label: str, enabled: bool) -> tqdm:
    """A bar on stderr with rate and time left; in a log, a line every ten seconds."""
    style: dict[str, Any] = {"file": sys.stderr, "dynamic_ncols": True}
    if not sys.stderr.isatty():
        style = {"file": _Log(sys.stderr), "bar_format": "{l_bar}{r_bar}"}
    label = shown(label, 80)
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
class Report:
    """What a run found, and with what.

    Attributes:
      title: heading of the page.
      judgements: of the models that were judged.
      summary: of all of them, in a line.
      about: paragraphs on what the verdicts cover.
      sections: what was found.
      config: what was configured.
      environment: as the function of this name returns it.
      numbers: results, for other programs.
    """

    title: str
    judgements: tuple[Judgement, ...] = ()
    summary: str = ""
    about: str = ""
    sections: tuple[Section, ...] = ()
    config: Mapping[str, object] = field(default_factory=dict)
    environment: Mapping[str, object] = field(default_factory=dict)
    numbers: Mapping[str, object] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """For a terminal: a line for each model, and one for all of them."""
        lines = [judged.line for judged in self.judgements]
        return "\n".join([*lines, *([self.summary] if self.summary else [])])

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Writes `report.html`, then `report.json`, which tells that a run is done."""
        tree = [below for section in self.sections for below in section.tree()]
        document = {
            "title": self.title,
            "verdict": self.verdict,
            "judgements": [vars(judged) for judged in self.judgements],
            "about": self.about,
            "sections": [{"title": s.title, "table": s.table} for s in tree],
            "config": self.config,
            "environment": self.environment,
            "numbers": self.numbers,
        }
        page = render(
            self.title,
            self.summary,
            self.judgements,
            self.about,
            _facts(self.environment),
            self.numbers,
            self.sections,
            {
                "Configuration": _json(self.config),
                "Environment": _json(self.environment),
            },
        )
        text = _json(seal(plain(document)))
        with writing(folder):
            os.makedirs(folder, exist_ok=True)
        write_whole(f"{folder}/report.html", page.encode())
        # What UTF-8 does not have becomes an escape of JSON's: \udcff, say.
        write_whole(f"{folder}/report.json", text.encode(errors="backslashreplace"))


def environment() -> dict[str, object]:
    """Date, software, load, commit, and the command as it was typed."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    installed = {d.name: d.version for d in importlib.metadata.distributions()}
    now = datetime.datetime.now().astimezone()
    return {
        "date": now.isoformat(sep=" ", timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "load": [round(load, 2) for load in os.getloadavg()],
        "puredif_jax": installed.get("puredif_jax"),
        **{name: installed.get(name) for name in packages},
        "commit": _commit(),
        "command": shlex.join(sys.orig_argv),
    }


def as_csv(rows: Sequence[Mapping[str, object]]) -> bytes:
    """Rows of a table as CSV: a column for each name in any row, in their order."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode(errors="backslashreplace")


def placeless(environment: Mapping[str, object]) -> dict[str, object]:
    """An environment for a record to publish: its command without folders."""
    words = shlex.split(str(environment["command"]))
    command = [re.sub(_FOLDERS, ".../", word) for word in words]
    return {**environment, "command": shlex.join(command)}


def _facts(environment: Mapping[str, object]) -> dict[str, str]:
    """What of an environment belongs on the first screen."""
    facts = {}
    if date := environment.get("date"):
        facts["Made"] = str(date)
    names = ("puredif_jax", "jax", "python", "commit", "device")
    known = [f"{name} {environment[name]}" for name in names if environment.get(name)]
    if known:
        facts["With"] = ", ".join(known)
    if command := environment.get("command"):
        facts["Command"] = str(command)
    return facts


def _commit() -> str | None:
    """The commit of the checkout that has this package at its top, if it is in one."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    command = ["git", "-C", package, "rev-parse", "--show-prefix", "HEAD"]
    try:
        found = subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    prefix, _, commit = found.strip().partition("\n")
    return commit if prefix == os.path.basename(package) + "/" else None


def _json(value: object) -> str:
    return json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False)
