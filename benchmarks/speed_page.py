"""Puts the measurements of benchmarks/speed.py into docs/speed.md: a table and a plot.

    python benchmarks/speed_page.py docs/results/speed*.jsonl

The table is written between the two comments `table` of the page; a measurement that
was made again counts as it was made last.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
from typing import Any

import matplotlib.pyplot as plt

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"
SIDES = ("puredif_jax", "torch", "torch.compile")
MARK = "<!-- table -->"
Row = dict[str, Any]


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f}" if seconds >= 0.1 else f"{1000 * seconds:.1f}"


def median(rows: dict[str, Row], side: str) -> float:
    """Seconds a step of a side; NaN where it did not run."""
    return rows[side]["median seconds a step"] if side in rows else math.nan


def cells(rows: dict[str, Row]) -> list[str]:
    """Milliseconds a step of each side, and how our time compares with theirs."""
    ours = median(rows, "puredif_jax")
    found = []
    for side in SIDES:
        if side not in rows:
            found.append("")
            continue
        seconds = median(rows, side)
        spread = rows[side]["seconds a step"]
        text = milliseconds(seconds)
        if len(spread) > 1:
            text += f" ({milliseconds(min(spread))} to {milliseconds(max(spread))})"
        ratio = "" if math.isnan(ours) else f": {ours / seconds:.2f}"
        found.append(text if side == SIDES[0] else text + ratio)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measurements", type=pathlib.Path, nargs="+")
    options = parser.parse_args()
    groups: dict[tuple[str, ...], dict[str, Row]] = {}
    for path in options.measurements:
        for row in map(json.loads, path.read_text().splitlines()):
            names = ("device", "work", "precision", "threads", "task")
            groups.setdefault(tuple(str(row[n]) for n in names), {})[row["side"]] = row
    lines = [
        "| device | work | precision | task | puredif_jax, ms a step | PyTorch eager, "
        "and our time over it | torch.compile, and our time over it |",
        "| --- " * 7 + "|",
    ]
    for (device, work, precision, threads, task), rows in groups.items():
        where = f"{device}, {threads} threads" if device == "cpu" else device
        lines.append(
            "| " + " | ".join([where, work, precision, task, *cells(rows)]) + " |"
        )
    page = DOCS / "speed.md"
    before, _, rest = page.read_text().partition(MARK)
    _, _, after = rest.partition(MARK)
    table = "\n".join(lines)
    page.write_text(f"{before}{MARK}\n\n{table}\n\n{MARK}{after}")

    figure, axes = plt.subplots(figsize=(8, 0.5 + 0.45 * len(groups)))
    for offset, side in enumerate(SIDES):
        relative = [
            median(rows, side) / median(rows, SIDES[0]) for rows in groups.values()
        ]
        places = [i + 0.27 * (offset - 1) for i in range(len(groups))]
        axes.barh(places, relative, 0.25, label=side)
    axes.set_yticks(range(len(groups)), [f"{k[1]}, {k[2]}: {k[4]}" for k in groups])
    axes.invert_yaxis()
    axes.set_xlabel("time of a step, over puredif_jax's")
    axes.legend()
    figure.savefig(DOCS / "speed.png", dpi=100, bbox_inches="tight")


if __name__ == "__main__":
    main()
