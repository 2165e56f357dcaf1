"""What a run leaves behind: scalars as JSON lines, a report as JSON and as one page.

The page holds all that it shows: it fetches nothing and runs no script.
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
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, NamedTuple, TextIO
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
from absl import logging
from tqdm import tqdm  # type: ignore[import-untyped]

from puredif_jax.files import write_whole, writing
from puredif_jax.sealed import seal

Lines = Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]]

_GREY = "#808790"  # of axes: readable on a light and on a dark page
# The folders of an absolute path or a URL, also one after "=" or in a list.
_FOLDERS = r"(?<![\w.\-])(?:\w+:/)?(?:~[^/,;:='\"]*)?/(?:[^,;:='\"]*/)?"


class Metrics:
    """The scalars of a run: `metrics.jsonl` in its folder, a JSON object a line.

    Each line carries its CRC-32. One that is damaged is left out, with a word in the
    log; the last line may be torn where a run was killed.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self._path = os.path.join(folder, "metrics.jsonl")

    def rewind(self, stage: str, step: int) -> None:
        """Drops what `stage` wrote after `step`, and any line that a kill tore."""
        kept = [t for t, r in self._rows() if r["stage"] != stage or r["step"] <= step]
        if os.path.exists(self._path):
            write_whole(self._path, "".join(f"{text}\n" for text in kept).encode())

    def write(self, stage: str, step: int, **scalars: npt.ArrayLike) -> None:
        """Appends a line; a value is a scalar or `[K]`, of numpy, jax or Python."""
        row = _plain({"stage": stage, "step": step, **scalars})
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
        """What stages took, of all calls together, as far as they have told."""
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
                        "lack what it told",
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
    """A part of a report: text, rows of a table, captioned pictures and lines.

    pictures: `[H, W, C]` or a grid `[N, H, W, C]` in [-1, 1], C of 1 or 3; a caption
      that starts with "difference" is drawn in blue and red around 0.
    curves: named lines (x, y), each `[n]`.
    """

    title: str
    text: str = ""
    table: tuple[Mapping[str, object], ...] = ()
    pictures: tuple[tuple[str, np.ndarray], ...] = ()
    curves: tuple[tuple[str, Lines], ...] = ()


class Part(NamedTuple):
    """What a stage adds to a report."""

    numbers: dict[str, Any]
    section: Section


@dataclass(frozen=True)
class Report:
    """What a run found, and with what."""

    title: str
    verdict: str = ""
    sections: tuple[Section, ...] = ()
    config: Mapping[str, object] = field(default_factory=dict)
    environment: Mapping[str, object] = field(default_factory=dict)
    numbers: Mapping[str, object] = field(default_factory=dict)

    def write(self, folder: str | os.PathLike) -> None:
        """Writes `report.html`, then `report.json`, which tells that a run is done."""
        sections = [{"title": s.title, "table": s.table} for s in self.sections]
        text = _json(seal(_plain({**vars(self), "sections": sections})))
        with writing(folder):
            os.makedirs(folder, exist_ok=True)
        write_whole(f"{folder}/report.html", _page(self).encode())
        write_whole(f"{folder}/report.json", text.encode())


def environment() -> dict[str, object]:
    """Software, load, commit and command line, without names or absolute paths."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    installed = {d.name: d.version for d in importlib.metadata.distributions()}
    command = [re.sub(_FOLDERS, ".../", argument) for argument in sys.argv]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "load": [round(load, 2) for load in os.getloadavg()],
        **{name: installed.get(name) for name in packages},
        "commit": _commit(),
        "command": shlex.join(command),
    }


def _commit() -> str | None:
    """The commit of the checkout that has this package at its top, if it is in one."""
    package = os.path.dirname(os.path.abspath(__file__))
    command = ["git", "-C", package, "rev-parse", "--show-prefix", "HEAD"]
    try:
        found = subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    prefix, _, commit = found.strip().partition("\n")
    return commit if prefix == os.path.basename(package) + "/" else None


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


def _page(report: Report) -> str:
    title, verdict = escape(report.title), escape(report.verdict)
    body = f"<h1>{title}</h1>" + (f'<p class="box">{verdict}</p>' if verdict else "")
    plain = {k: v for k, v in report.numbers.items() if not _nested(v)}
    body += _table([{"number": k, "value": v} for k, v in plain.items()])
    body += "".join(map(_section, report.sections))
    for name, content in ("Config", report.config), ("Environment", report.environment):
        pre = f"<pre>{escape(_json(content))}</pre>"
        body += f"<details><summary>{name}</summary>{pre}</details>\n"
    return f"{_HEAD}<title>{title}</title></head>\n<body>{body}{_FOOT}</body></html>\n"


def _nested(value: object) -> bool:
    """Whether it has names within; what these are of is in a section's table."""
    rows = value if isinstance(value, (list, tuple)) else (value,)
    return not rows or any(isinstance(row, Mapping) for row in rows)


def _section(section: Section) -> str:
    paragraphs = re.split(r"\n\s*\n", section.text.strip())
    html = f"<section><h2>{escape(section.title)}</h2>\n"
    html += "".join(f"<p>{escape(text)}</p>\n" for text in paragraphs if text)
    html += _table(section.table) + '<div class="row">'
    figures = [(caption, _picture(caption, x)) for caption, x in section.pictures]
    figures += [(caption, _curves(caption, x)) for caption, x in section.curves]
    for caption, img in figures:
        html += f"<figure>{img}<figcaption>{escape(caption)}</figcaption></figure>\n"
    return html + "</div></section>\n"


def _table(rows: Sequence[Mapping[str, object]]) -> str:
    """The rows, or nothing; a column with a number in it is set to the right."""
    lines = [""] * (len(rows) + 1)
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [_plain(row.get(name)) for row in rows]
        kind = ' class="n"' if {int, float} & set(map(type, values)) else ""
        lines[0] += f"<th{kind}>{escape(str(name))}</th>"
        for i, value in enumerate(values, start=1):
            cell = escape(_shown(value))
            if name == "report" and value is not None:  # a path beside this page
                cell = f'<a href="{quote(str(value))}">{cell}</a>'
            lines[i] += f"<td{kind}>{cell}</td>"
    html = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table>{html}</table></div>\n' if rows else ""


def _shown(value: Any) -> str:
    """What `_plain` returns, for a reader: floats with four significant digits."""
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if isinstance(value, float):
        return f"{value:.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.4g}"
    return "–" if value is None else str(value)


def _picture(caption: str, picture: npt.ArrayLike) -> str:
    """An image, or a grid in rows of eight, in its own pixels; nan is transparent."""
    from PIL import Image

    images = np.asarray(picture, np.float32)
    if images.ndim not in (3, 4) or images.shape[-1] not in (1, 3):
        found = f"picture {caption!r} has shape {images.shape}"
        raise ValueError(f"{found}: expected [H, W, C] or [N, H, W, C], C of 1 or 3")
    if not images.size:
        return "(no images)"
    scale = max(1, round((128 if images.ndim == 3 else 64) / images.shape[-2]))
    images = images.reshape(-1, *images.shape[-3:])
    columns = min(len(images), 8)
    gaps = ((0, -len(images) % columns), (0, 1), (0, 1), (0, 0))
    tiles = np.pad(images, gaps, constant_values=np.nan)
    rows = tiles.reshape(-1, columns, *tiles.shape[1:])
    grid = np.vstack([np.hstack(row) for row in rows])[:-1, :-1]
    if caption.lower().startswith("difference"):
        pixels, key = _signed(grid)
    else:
        alpha = np.isfinite(grid).all(-1, keepdims=True) * 2 - 1
        rgba = np.dstack([np.broadcast_to(grid, (*grid.shape[:2], 3)), alpha])
        levels = np.nan_to_num((rgba + 1) * 127.5).round().clip(0, 255)
        pixels, key = levels.astype(np.uint8), ""
    image = Image.fromarray(pixels)
    return _img(image.save, caption, image.width * scale, "pixels") + key


def _signed(grid: np.ndarray) -> tuple[np.ndarray, str]:
    """Blue below 0, red above, by the channel that differs most; and a colour bar."""
    import matplotlib
    from PIL import Image

    most = np.nan_to_num(np.abs(grid)).argmax(-1, keepdims=True)
    values = np.take_along_axis(grid, most, -1)[..., 0]
    limit = np.abs(values[np.isfinite(values)]).max(initial=0) or 1.0
    colours = matplotlib.colormaps["RdBu_r"]  # nan is transparent
    ramp = Image.fromarray(colours(np.linspace(0, 1, 64)[None], bytes=True))
    key = f"{-limit:.3g} {_img(ramp.save, 'to', 64, 'ramp')} {limit:.3g}"
    pixels = colours((values / limit + 1) / 2, bytes=True)
    return pixels, f'<div class="key">{key}</div>'


def _curves(caption: str, lines: Lines) -> str:
    """Named lines on one pair of axes, logarithmic over more than two decades.

    Those of scouts, by their name, are thin and grey, and one of them is in the legend.
    """
    from matplotlib.figure import Figure

    plot = Figure((6.4, 3.2), dpi=200, facecolor="none", layout="constrained")
    axes = plot.add_subplot(facecolor="none", frame_on=False)
    scouts = [name for name in lines if "scout" in name]
    for name, (x, y) in lines.items():
        style: dict[str, Any] = {"label": name.replace("$", r"\$")}  # not a formula
        if name in scouts:
            label = "scouts" if name == scouts[0] else None
            style = {"label": label, "color": _GREY, "linewidth": 0.6, "zorder": 1}
        axes.plot(np.ravel(x), np.ravel(y), marker="." * (np.size(y) == 1), **style)
    if 0 < 100 * axes.dataLim.ymin < axes.dataLim.ymax:  # of what is finite
        axes.set_yscale("log")
    axes.grid(color=_GREY, alpha=0.25, linewidth=0.6)
    axes.tick_params(colors=_GREY, which="both", length=0)
    if lines:
        axes.legend(frameon=False, labelcolor=_GREY)
    return _img(plot.savefig, caption, 640, "plot")


def _img(save: Callable[..., object], alt: str, width: int, kind: str) -> str:
    file = io.BytesIO()
    save(file, format="png")
    data = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return f'<img class="{kind}" width="{width}" alt="{escape(alt)}" src="{data}">'


_HEAD = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root { color-scheme: light dark; --page: #fff; --ink: #1d2127; --soft: #5b6470;
  --line: #d8dde3; --box: #eef2f6; --edge: #5b7c99 }
@media (prefers-color-scheme: dark) { :root { --page: #15181c; --ink: #e3e6ea;
  --soft: #9aa4af; --line: #343b43; --box: #1f252c; --edge: #7f9db8 } }
body { max-width: 68rem; margin: auto; padding: 2rem 1rem; background: var(--page);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif }
h2 { margin: 0; font-size: 1.2rem }  p { max-width: 46rem; margin: .6rem 0 }
section, footer { border-top: 1px solid var(--line); margin-top: 2rem; padding: 1rem 0 }
.box { max-width: none; padding: .8rem 1.1rem; font-size: 1.3rem; font-weight: 600;
  background: var(--box); border-left: .35rem solid var(--edge); border-radius: .3rem }
table { border-collapse: collapse; font-size: .93rem; margin-top: .6rem }
th, td { padding: .3rem 1.2rem .3rem 0; border-bottom: 1px solid var(--line) }
th, figcaption, footer, .key { color: var(--soft); font-size: .85rem; line-height: 1.4 }
th { text-align: left }  .n { text-align: right; font-variant-numeric: tabular-nums }
.row { display: flex; flex-wrap: wrap; gap: 1.2rem; margin-top: 1rem }
figure { margin: 0; min-width: 8rem; max-width: 100% }  .wide, pre { overflow-x: auto }
figcaption { width: 0; min-width: 100% } /* as wide as the picture, never wider */
img { display: block; max-width: 100%; height: auto; margin-bottom: .4rem }
.pixels { image-rendering: pixelated; background: var(--line) }  .key { display: flex }
.ramp { height: .6rem; margin: .3rem .4rem }  summary { cursor: pointer }
pre { padding: .8rem 1rem; background: var(--box); font-size: .82rem }
</style>"""
_FOOT = "<footer>Defence research: finding backdoors in models to remove them.</footer>"
