"""Writes docs/amplification.md and its record from the runs of configs/speedup.py.

    python -m puredif_jax.main --config=configs/speedup.py
    python benchmarks/speedup_page.py runs/speedup

Finished runs are added to docs/results/speedup.json, which has the points of each. So
the page can be written while the sweep goes on, and from parts of it.
"""

from __future__ import annotations

import collections
import json
import pathlib
import sys
from typing import Any

import numpy as np

from puredif_jax.metrics.savings import Curve, Saving, cost_to, saving
from puredif_jax.runs.report import placeless
from puredif_jax.stages.amplify import RAW, REINFORCED, TRUE, Amplified, Point

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECORD = ROOT / "docs" / "results" / "speedup.json"
PAGE = ROOT / "docs" / "amplification.md"
LEVELS = (0.9, 0.95, 0.99)
Runs = dict[int, tuple[Point, ...]]  # by seed


def collected(top: pathlib.Path, record: dict[str, Any]) -> dict[str, Any]:
    """The record with what the finished runs of a sweep add to it."""
    for path in sorted(top.glob("*/*/*/report.json")):
        report = json.loads(path.read_text())
        found = Amplified.read(report["numbers"], str(path))
        if not found:
            continue
        record["runs"][str(path.parent.relative_to(top))] = {
            **found[0].numbers(),
            "frechet": {
                k: v for k, v in report["numbers"].items() if k.startswith("frechet")
            },
            "draws": report["config"]["evaluation"]["draws"],
            "environment": placeless(report["environment"]),
        }
    return record


def curve(runs: Runs, trigger: str, weights: str, cost: bool, draws: int) -> Curve:
    """Success of one trigger on one set of weights, a row for each seed."""
    rows = [
        [x for x in points if (x.trigger, x.weights) == (trigger, weights) and x.steps]
        for points in runs.values()
    ]
    rows = [each[: min(map(len, rows))] for each in rows]
    costs = [x.training + (x.reinforcement if cost else 0) for x in rows[0]]
    rates = [[x.rate for x in each] for each in rows]
    return Curve(np.array(costs, float), np.array(rates), draws)


def best(runs: Runs, trigger: str, level: float, cost: bool, draws: int) -> Curve:
    """The curve on the weights that reach the level first."""
    sets = list(dict.fromkeys(x.weights for points in runs.values() for x in points))
    found = [curve(runs, trigger, each, cost, draws) for each in sets]
    return min(found, key=lambda x: cost_to(x.costs, x.rates.mean(0), level))


def told(found: Saving, dear: Curve, cheap: Curve, level: float) -> str:
    """A factor as a cell; where the true trigger does not get there, a bound."""
    reached = cost_to(cheap.costs, cheap.rates.mean(0), level)
    if np.isnan(found.factor):
        return "not reached"
    if np.isinf(found.factor):
        return f"more than {dear.costs[-1] / reached:.1f}"
    high = f"{found.high:.1f}" if np.isfinite(found.high) else "no bound"
    return f"{found.factor:.1f} ({found.low:.1f} to {high})"


def factors(settings: dict[str, Runs], draws: int) -> list[dict[str, Any]]:
    """A row for each setting: factors at the levels, without and with the cost."""
    rows = []
    for name, runs in settings.items():
        row: dict[str, Any] = {"setting": name, "seeds": len(runs)}
        for cost in (False, True):
            for level in LEVELS:
                dear, cheap = (
                    best(runs, trigger, level, cost, draws)
                    for trigger in (TRUE, REINFORCED)
                )
                cell = told(saving(dear, cheap, level), dear, cheap, level)
                row[f"{level:.0%}" + ", with its cost" * cost] = cell
        rows.append(row)
    return rows


def successes(settings: dict[str, Runs]) -> list[dict[str, Any]]:
    """A row for each setting and step: both triggers, on the averaged weights."""
    rows = []
    for name, runs in settings.items():
        grouped: dict[tuple[int, str], list[Point]] = collections.defaultdict(list)
        for points in runs.values():
            for x in points:
                if x.weights != RAW:
                    grouped[x.steps, x.trigger].append(x)
        for step in dict.fromkeys(steps for steps, _ in grouped):
            true, own = grouped[step, TRUE], grouped[step, REINFORCED]
            rows.append(
                {
                    "setting": name,
                    "training steps": step,
                    "true trigger, %": percent(true, "mse<0.01"),
                    "reinforced, %": percent(own, "mse<0.01"),
                    "reinforced, SSIM > 0.8, %": percent(own, "ssim>0.8"),
                    "norm ratio": f"{np.mean([x.norm_ratio for x in own]):.2f}",
                    "cosine": f"{np.mean([x.cosine for x in own]):.2f}",
                }
            )
    return rows


def percent(points: list[Point], name: str) -> str:
    """Rates in percent, one for each seed."""
    return " ".join(f"{100 * x.rates[name]:.0f}" for x in points)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([str(x) for x in r.values()] for r in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


ABOUT = """
- **published**: Adam at 2e-4, a tenth of the samples poisoned, no moving average, and
  the clean image shows through outside the trigger. This is the recipe of the published
  attacks, with batches of 64 in place of 128.
- **fast**: Adam at 1e-3, half of the samples poisoned, a moving average, the bare
  trigger.
"""
FACTORS = """
Steps that the true trigger needs for a success, over the reinforced one's steps.
Success is the mean over the seeds. The interval is a bootstrap over seeds and draws.
With its cost, the network evaluations of all descents up to that step count as
training. Each trigger is measured on the weights that serve it best, raw or averaged.
Where the true trigger does not get there in the whole training, the factor is a lower
bound.
"""
STEPS = """
Step 0 is the clean model: what a trigger reaches there is no backdoor. There is a
number for each seed.
"""


def page(record: dict[str, Any]) -> str:
    settings: dict[str, Runs] = collections.defaultdict(dict)
    for name, run in record["runs"].items():
        setting, seed = name.rsplit("/", 1)
        (found,) = Amplified.read(run, name)
        settings[setting][int(seed)] = found.points
    draws = min(run["draws"] for run in record["runs"].values())
    ordered = {name: settings[name] for name in sorted(settings, reverse=True)}
    head = (
        "How many times more training does the true trigger need than a reinforced "
        f"one? {len(record['runs'])} trainings of `configs/speedup.py` answer: two "
        "attacks, three pairs of trigger and target, two recipes. All start from the "
        "shipped clean model. `benchmarks/speedup_page.py` writes this page. The "
        "record is `docs/results/speedup.json`."
    )
    success = (
        f"Success is the share of {draws} draws at an MSE of 0.01 of the target. "
        "Backdoors of ancestral sampling are drawn by `PathKeeping` in 50 steps."
    )
    parts = [
        "# Amplification, measured",
        head,
        ABOUT.strip(),
        success,
        "## Factors",
        FACTORS.strip(),
        table(factors(ordered, draws)),
        "## Success along the training",
        STEPS.strip(),
        table(successes(ordered)),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"runs": {}}
    for name in sys.argv[1:]:
        record = collected(pathlib.Path(name), record)
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    PAGE.write_text(page(record))


if __name__ == "__main__":
    main()
