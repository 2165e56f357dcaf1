"""Writes docs/detection.md, its record and its plot from the runs of configs/zoo.py.

    python -m puredif_jax.main --config=configs/zoo.py
    python benchmarks/detection_page.py runs/zoo

Finished runs are added to docs/results/detection.json, a row a model. So the page can
be written while the sweep goes on, and from parts of it.
"""

from __future__ import annotations

import collections
import json
import math
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats
from speedup_page import table

from puredif_jax.metrics import measures as metrics
from puredif_jax.runs.report import placeless
from puredif_jax.stages.base import results
from puredif_jax.stages.finding import Finding
from puredif_jax.stages.measure import Measured

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"
RECORD = DOCS / "results" / "detection.json"
PAGE = DOCS / "detection.md"
PLOT = DOCS / "figures" / "detection.svg"
HALVES = ("development", "test")
FIRES = 0.2  # from which share on a backdoor counts
BINS = (0.0, 0.2, 0.6, 0.9, 1.01)
RATES = (0.0, 0.1, 0.2, 0.31)
Row = dict[str, Any]
METHODS = {
    "PureDiffusion": "score",
    "Elijah, uniformity": "elijah uniformity",
    "Elijah, variation": "elijah variation",
    "TERD, mean": "terd mean",
    "TERD, variance": "terd variance",
}
"""Statistics of a model by which it is judged; the larger, the more like a backdoor."""


def about(attack: Row | None) -> str:
    """An attack in the words of a table, from a configuration in JSON."""
    if attack is None:
        return ""
    name, trigger = str(attack["type"]), attack["trigger"]["type"]
    if name == "TrojDiff":
        return f"{name}, {trigger.lower()}"
    if "psi" not in attack:
        return name
    solver = attack["solver"]["type"].lower()
    return f"{name}, psi {attack['psi']:g}, {solver}"


def largest(found: Finding, method: str, measure: str, sign: int = 1) -> float | None:
    """The largest of a measure over the hypotheses of a defense, or of its negative.

    None where there is no finite one.
    """
    values = [
        sign * float(getattr(each, measure))
        for each in found.inversions
        if each.method.startswith(method) and getattr(each, measure) is not None
    ]
    return max(filter(math.isfinite, values), default=None)


def row(report: Row, where: str) -> Row:
    """What the record keeps of one model."""
    parts = results(report["numbers"], where)
    (found,) = (each for each in parts if isinstance(each, Finding))
    (measured,) = (each for each in parts if isinstance(each, Measured))
    made, attack = report["config"], report["config"]["attack"]
    best = next(
        (
            each
            for each in found.inversions
            if each.method == "puredif" and each.hypothesis == found.verdict.hypothesis
        ),
        None,
    )
    fires = {rate.images: rate.rates["mse<0.01"] for rate in measured.success}
    weights = pathlib.PurePath(made["weights"])
    return {
        "network": weights.parent.name or "shipped",
        "attack": about(attack),
        "trigger": attack["trigger"]["type"] if attack else "",
        "see-through": bool(attack) and not attack["trigger_only"],
        "rate": attack["poison_rate"] if attack else 0.0,
        "steps": made["training"]["steps"],
        "fires": fires.get("draws, true trigger"),
        "outcome": found.verdict.outcome,
        "score": score if math.isfinite(score := found.verdict.score) else None,
        "p": found.verdict.p_value,
        "hypothesis": found.verdict.hypothesis,
        "success": best.success if best else None,
        "cosine": best.cosine if best else None,
        "relative l2": best.relative_l2 if best else None,
        "elijah uniformity": largest(found, "elijah", "trimmed", -1),
        "elijah variation": largest(found, "elijah", "summed", -1),
        "terd mean": largest(found, "terd", "kl_mean"),
        "terd variance": largest(found, "terd", "kl_variance"),
        "seconds": sum(x.seconds for x in found.inversions if x.method == "puredif"),
    }


def collected(top: pathlib.Path, record: Row) -> Row:
    """The record with what the finished runs of a sweep add to it."""
    for path in sorted(top.glob("*/*/report.json")):
        if path.parts[-3] in HALVES:
            report = json.loads(path.read_text())
            name = str(path.parent.relative_to(top))
            record["models"][name] = row(report, str(path))
            record["environment"] = placeless(report["environment"])
    return record


def half(record: Row, name: str) -> tuple[list[Row], list[Row]]:
    """The backdoored models of a half that count, and its clean ones."""
    found = [v for k, v in record["models"].items() if k.startswith(f"{name}/")]
    bad = [x for x in found if x["attack"] and x["fires"] >= FIRES]
    return bad, [x for x in found if not x["attack"]]


def values(rows: Iterable[Row], statistic: str) -> np.ndarray:
    """Of models; one that has none, as after a diverged search, counts as the least."""
    found = [x[statistic] for x in rows]
    return np.array([-np.inf if x is None else x for x in found], float)


def share(count: int, total: int) -> str:
    """A share with its 95 % interval."""
    if not total:
        return "none"
    low, high = metrics.share_interval(count, total)
    return f"{count} of {total} ({low:.2f} to {high:.2f})"


def threshold(bad: np.ndarray, clean: np.ndarray) -> float:
    """The score above which most of these models of both kinds are judged rightly."""
    bounds = np.unique(np.concatenate([bad, clean]))
    bounds = bounds[np.isfinite(bounds)]
    if not len(bounds):
        return 0.0
    bounds = np.concatenate([bounds[:1] - 1, (bounds[1:] + bounds[:-1]) / 2])
    right = [(bad > x).mean() + (clean <= x).mean() for x in bounds]
    return float(bounds[int(np.argmax(right))])


def compared(record: Row) -> list[Row]:
    """A row for each statistic: how it tells the models of the test half apart."""
    bad, clean = half(record, "test")
    known = half(record, "development")
    if not bad or not clean:
        return []
    rows = []
    for name, statistic in METHODS.items():
        high, low = values(bad, statistic), values(clean, statistic)
        interval = "{:.3f} to {:.3f}".format(*metrics.bootstrap(metrics.auc, high, low))
        found: Row = {
            "statistic": name,
            "AUC": f"{metrics.auc(high, low):.3f} ({interval})",
            "found at 1 % false alarms, rounded down": (
                f"{metrics.true_positive_rate(high, low):.0%}"
            ),
            "models without it": int(np.isinf([*high, *low]).sum()),
            "right, by the development half": "none yet",
        }
        if all(known):
            bound = threshold(*(values(x, statistic) for x in known))
            right = int((high > bound).sum() + (low <= bound).sum())
            found["right, by the development half"] = share(right, len(bad + clean))
        rows.append(found)
    return rows


def grouped(bad: Sequence[Row], by: str, key: Callable[[Row], str]) -> list[Row]:
    """A row for each group of backdoored models of the test half."""
    groups: dict[str, list[Row]] = collections.defaultdict(list)
    for each in bad:
        groups[key(each)].append(each)
    return [
        {
            by: name,
            "called backdoored": share(
                sum(x["outcome"] == "backdoored" for x in rows), len(rows)
            ),
            "could not tell": sum(x["outcome"] == "could not tell" for x in rows),
            "clean": sum(x["outcome"] == "clean" for x in rows),
            "fires at least 0.9 times as often": share(
                sum((x["success"] or 0) >= 0.9 * x["fires"] for x in rows), len(rows)
            ),
            "cosine, median": f"{np.median([x['cosine'] or 0 for x in rows]):.3f}",
        }
        for name, rows in sorted(groups.items())
    ]


def left_out(record: Row, by: str) -> list[Row]:
    """A row for each group: judged by a bound from all others of the development half.

    Clean models have no attack, so all of them stay where attacks are left out.
    """
    known_bad, known_clean = half(record, "development")
    bad, clean = half(record, "test")
    rows = []
    for name in sorted({x[by] for x in bad}):
        others = [
            [x for x in rows if x[by] != name] for rows in (known_bad, known_clean)
        ]
        own_bad = [x for x in bad if x[by] == name]
        own_clean = [x for x in clean if by == "attack" or x[by] == name]
        if not all((*others, own_bad, own_clean)):
            continue
        found: Row = {f"left out: {by}": name}
        for title, statistic in METHODS.items():
            bound = threshold(*(values(each, statistic) for each in others))
            caught = (values(own_bad, statistic) > bound).sum()
            passed = (values(own_clean, statistic) <= bound).sum()
            found[title] = (
                f"{caught} of {len(own_bad)}, {passed} of {len(own_clean)} clean"
            )
        rows.append(found)
    return rows


def between(bounds: Sequence[float], value: float) -> str:
    """The interval in which a share lies, in percent."""
    at = int(np.searchsorted(bounds, value, side="right"))
    return f"{bounds[at - 1]:.0%} to {min(bounds[at], 1):.0%}"


def plot(record: Row) -> None:
    """True alarms over false ones on the test half, a line for each statistic."""
    bad, clean = half(record, "test")
    figure = Figure((5, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, statistic in METHODS.items():
        high, low = values(bad, statistic), values(clean, statistic)
        bounds = np.sort(np.concatenate([high, low, [np.inf, -np.inf]]))[::-1]
        x, y = ([(group >= b).mean() for b in bounds] for group in (low, high))
        axes.step(x, y, where="post", label=name)
    axes.set_xlabel("clean models called backdoored")
    axes.set_ylabel("backdoored models called so")
    axes.legend(frameon=False)
    figure.savefig(PLOT, metadata={"Date": None})


def summary(record: Row) -> list[str]:
    """The sentences that head the page."""
    bad, clean = half(record, "test")
    lines = []
    for kind, rows in (("backdoored", bad), ("clean", clean)):
        counts = (
            f'"{word}" {share(sum(x["outcome"] == word for x in rows), len(rows))}'
            for word in ("backdoored", "could not tell", "clean")
        )
        lines.append(f"- {len(rows)} {kind} models were called: {', '.join(counts)}.")
    if len(clean) > 1:
        p = values(clean, "p")
        found = stats.kstest(p, "uniform")
        lines.append(
            f"- The least p-value of a clean model is {p.min():.2g}. The distance of "
            f"all from the uniform distribution is {found.statistic:.2f} "
            f"(Kolmogorov-Smirnov test, p = {found.pvalue:.2g})."
        )
    return lines


def page(record: Row) -> str:
    counts = {name: sum(map(len, half(record, name))) for name in HALVES}
    bad, _ = half(record, "test")
    weak = sum(
        bool(x["attack"]) and x["fires"] < FIRES for x in record["models"].values()
    )
    parts = [
        "# Detection on a zoo",
        f"{counts['development']} models of the development half of `configs/zoo.py` "
        f"and {counts['test']} of its test half are judged, by the default search and "
        f"detector. Backdoors count that fire in {FIRES:.0%} of draws or more. {weak} "
        "further ones fire less often. `benchmarks/detection_page.py` writes this "
        "page. The record is `docs/results/detection.json`.",
        "## The test half",
        "\n".join(summary(record)),
        "Each statistic is also given the bound that is best on the development half. "
        "The intervals of AUC are a bootstrap over models.",
        table(compared(record)),
        "![True alarms over false ones](figures/detection.svg)",
        "## By attack",
        table(grouped(bad, "attack", lambda x: x["attack"])),
        "## By trigger, poison rate and firing rate",
        table(grouped(bad, "trigger", lambda x: x["trigger"])),
        table(grouped(bad, "poison rate", lambda x: between(RATES, x["rate"]))),
        table(grouped(bad, "true trigger fires", lambda x: between(BINS, x["fires"]))),
        "## What was never seen",
        "The bound comes from the development half, without the attack or the network "
        "of the row. The row counts what it judges rightly in the test half: "
        "backdoored models of that attack or network, and clean ones, of that network "
        "or all. A third of the models start from the network that calibrates the "
        "detector, the shipped one; it knows no other network of the zoo.",
        table(left_out(record, "attack")),
        table(left_out(record, "network")),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    record: Row = {"models": {}}
    if RECORD.exists():
        record = json.loads(RECORD.read_text())
    for name in sys.argv[1:]:
        record = collected(pathlib.Path(name), record)
    if not record["models"]:
        sys.exit("no run is finished yet")
    text = json.dumps(record, indent=1, allow_nan=False)
    RECORD.write_text(f"{text}\n")
    if all(half(record, "test")):
        plot(record)
    PAGE.write_text(page(record))


if __name__ == "__main__":
    main()
