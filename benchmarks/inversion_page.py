"""Writes docs/inversion.md, its record and plot, from runs of configs/inversion.py.

    python -m puredif_jax.main --config=configs/inversion.py
    python benchmarks/inversion_page.py runs/inversion

Finished runs are added to docs/results/inversion.json, a row an inversion. So the page
can be written while the sweep goes on, and from parts of it.
"""

from __future__ import annotations

import collections
import json
import math
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from detection_page import about
from matplotlib.figure import Figure
from speedup_page import table

from puredif_jax.defenses.hypothesis import Fading
from puredif_jax.defenses.puredif import Puredif
from puredif_jax.diffusion.solver import Ancestral
from puredif_jax.runs.report import placeless
from puredif_jax.stages.finding import Finding

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"
RECORD = DOCS / "results" / "inversion.json"
PAGE = DOCS / "inversion.md"
PLOT = DOCS / "figures" / "inversion.svg"
EXACT = 0.1  # relative L2 of a trigger that counts as found
AS_GOOD = 1.1  # times the best distance of a run
SEARCHES = {"puredif": 1 + len(Puredif().placebos(Fading(Ancestral())))}
"""Searches of equal cost that an inversion counts, where it is not one."""
DEFENSES = {"puredif": "PureDiffusion", "elijah": "Elijah", "terd": "TERD"}
KEPT = {
    "evaluations": "evaluations",
    "relative l2": "relative_l2",
    "cosine": "cosine",
    "success": "success",
    "success of the true trigger": "true_success",
    "seconds": "seconds",
}
Row = dict[str, Any]


def rows(report: Row, where: str) -> list[Row]:
    """What the record keeps of one run: a row for each inversion.

    A method without a budget has the settings of its defense. Evaluations and seconds
    are of the search itself, without the placebos beside it.
    """
    made = []
    for finding in Finding.some(report["numbers"], where):
        for each in finding.inversions:
            name, _, budget = each.method.partition(", ")
            values = {k: getattr(each, v) for k, v in KEPT.items()}
            finite = {
                k: v if v is not None and math.isfinite(v) else None
                for k, v in values.items()
            }
            for cost in ("evaluations", "seconds"):
                if (value := finite[cost]) is not None:
                    finite[cost] = value / SEARCHES.get(name, 1)
            made.append({"defense": name, "budget": budget or "its own", **finite})
    return made


def collected(top: pathlib.Path, record: Row) -> Row:
    """The record with what the finished runs of a sweep add to it."""
    for path in sorted(top.glob("*/*/report.json")):
        report = json.loads(path.read_text())
        attack = report["config"]["attack"]
        record["runs"][str(path.parent.relative_to(top))] = {
            "attack": f"{about(attack)}, {attack['trigger']['type']}",
            "inversions": rows(report, str(path)),
            "environment": placeless(report["environment"]),
        }
    return record


Runs = dict[str, list[Row]]  # the inversions of each run, the cheapest first


def lines(record: Row) -> dict[tuple[str, str], Runs]:
    """The runs of each backdoor and defense, by name."""
    found: dict[tuple[str, str], Runs] = collections.defaultdict(dict)
    for name, run in sorted(record["runs"].items()):
        for defense in DEFENSES:
            own = [x for x in run["inversions"] if x["defense"] == defense]
            if own:
                own.sort(key=lambda x: x["evaluations"])
                found[name.split("/")[0], defense][name] = own
    return dict(sorted(found.items()))


def distance(row: Row) -> float:
    """Relative L2; a search that diverged is as far as can be."""
    found = row["relative l2"]
    return math.inf if found is None else float(found)


def reached(run: Sequence[Row], level: float) -> float | None:
    """Evaluations of the cheapest inversion at that distance; None if none is."""
    costs = (x["evaluations"] for x in run if distance(x) <= level)
    return min(costs, default=None)


def best(run: Sequence[Row]) -> Row | None:
    """The cheapest inversion that is nearly as exact as any; None if all diverged."""
    least = min(map(distance, run))
    if math.isinf(least):
        return None
    return next(x for x in run if distance(x) <= AS_GOOD * least)


def listed(values: Iterable[float | None], form: str) -> str:
    """A number for each run."""
    return " ".join("never" if x is None else format(x, form) for x in values)


def times(theirs: Row | None, ours: Sequence[Row]) -> float | None:
    """Evaluations of an inversion over ours that are as exact; None if none is."""
    cost = None if theirs is None else reached(ours, distance(theirs))
    return None if theirs is None or cost is None else theirs["evaluations"] / cost


def compared(record: Row) -> list[Row]:
    """A row for each backdoor and defense: how exact, at which cost.

    The last column divides the evaluations of another defense at its best by those
    with which PureDiffusion is as exact.
    """
    known = lines(record)
    made = []
    for (backdoor, defense), runs in known.items():
        found = {name: best(run) for name, run in runs.items()}
        ours = known.get((backdoor, "puredif"), {})
        ratios = [times(found[name], ours.get(name, [])) for name in runs]
        made.append(
            {
                "backdoor": backdoor,
                "defense": DEFENSES[defense],
                f"evaluations to relative L2 {EXACT}": listed(
                    (reached(run, EXACT) for run in runs.values()), ",.0f"
                ),
                "best relative L2": listed(
                    (x and distance(x) for x in found.values()), ".3f"
                ),
                "its evaluations": listed(
                    (x and x["evaluations"] for x in found.values()), ",.0f"
                ),
                "times the evaluations of PureDiffusion for the same": (
                    "" if defense == "puredif" else listed(ratios, ".1f")
                ),
            }
        )
    return made


def cell(value: float | None, form: str) -> str:
    """A number; nothing where a search has diverged."""
    return "" if value is None else format(value, form)


def details(record: Row) -> list[Row]:
    """A row for each inversion of each run."""
    return [
        {
            "backdoor, seed": name.replace("/", ", "),
            "defense": DEFENSES[each["defense"]],
            "settings": each["budget"],
            "evaluations": f"{each['evaluations']:,.0f}",
            "relative L2": cell(each["relative l2"], ".3f"),
            "cosine": cell(each["cosine"], ".3f"),
            "success": cell(each["success"], ".0%"),
            "true trigger": cell(each["success of the true trigger"], ".0%"),
            "seconds": cell(each["seconds"], ".0f"),
        }
        for name, run in sorted(record["runs"].items())
        for defense in DEFENSES
        for each in sorted(run["inversions"], key=lambda x: x["evaluations"])
        if each["defense"] == defense
    ]


def plot(record: Row) -> None:
    """Relative L2 over evaluations, a panel a backdoor, a line a run."""
    known = lines(record)
    backdoors = list(dict.fromkeys(name for name, _ in known))
    figure = Figure((4 * len(backdoors), 3.4), layout="constrained")
    panels = figure.subplots(1, len(backdoors), sharey=True, squeeze=False)[0]
    colours = dict(zip(DEFENSES, ("tab:blue", "tab:orange", "tab:green"), strict=True))
    for panel, backdoor in zip(panels, backdoors, strict=True):
        for defense, title in DEFENSES.items():
            for i, run in enumerate(known.get((backdoor, defense), {}).values()):
                x, y = [r["evaluations"] for r in run], [distance(r) for r in run]
                label = "" if i else title
                panel.loglog(x, y, "o-", ms=3, color=colours[defense], label=label)
        panel.axhline(EXACT, color="grey", linewidth=0.5)
        panel.set_title(backdoor)
        panel.set_xlabel("evaluations of the network on an image")
    panels[0].set_ylabel("relative L2 to the true trigger")
    panels[0].legend(frameon=False)
    figure.savefig(PLOT, metadata={"Date": None})


def page(record: Row) -> str:
    attacks = sorted({run["attack"] for run in record["runs"].values()})
    parts = [
        "# Inversion, by its cost",
        f"{len(record['runs'])} models are inverted by three defenses, at several "
        f"costs each: {'; '.join(attacks)}. A gradient of the network on an image "
        "counts as three evaluations. Each inversion is given the hypothesis of the "
        "attack. What PureDiffusion spends on placebos, which only a verdict needs, "
        "is left out. `configs/inversion.py` has the settings, and "
        "`benchmarks/inversion_page.py` writes this page. The record is "
        "`docs/results/inversion.json`.",
        "![Relative L2 over evaluations](figures/inversion.svg)",
        f"The grey line is at a relative L2 of {EXACT}. A search that diverged has no "
        "point.",
        "There is a number for each seed. The best of a defense is its cheapest "
        f"inversion within {AS_GOOD} times its least distance. The last column divides "
        "its evaluations by PureDiffusion's, for the cheapest inversion that is as "
        "exact. Budgets are a factor of three apart, and so are these numbers. "
        "`never`: no inversion was.",
        table(compared(record)),
        "## Every inversion",
        "`its own` are the published settings of Elijah and TERD, and the default of "
        "PureDiffusion. Success is the share of draws below an MSE of 0.01 to the "
        "target.",
        table(details(record)),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    record: Row = {"runs": {}}
    if RECORD.exists():
        record = json.loads(RECORD.read_text())
    for name in sys.argv[1:]:
        record = collected(pathlib.Path(name), record)
    if not record["runs"]:
        sys.exit("no run is finished yet")
    RECORD.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    plot(record)
    PAGE.write_text(page(record))


if __name__ == "__main__":
    main()
