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
from typing import Any, NamedTuple

import numpy as np
from savings import Curve, Saving, saving

from puredif_jax.runs.report import placeless
from puredif_jax.stages.amplify import REINFORCED, TRUE, Amplified, Point

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECORD = ROOT / "docs" / "results" / "speedup.json"
PAGE = ROOT / "docs" / "amplification.md"
LEVELS = (0.9, 0.95, 0.99)
CHOSEN = "-chosen"


class Run(NamedTuple):
    """What a run has measured, and of how many draws each rate is."""

    points: tuple[Point, ...]
    draws: int


Runs = dict[int, Run]  # by seed


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


def curves(runs: Runs, trigger: str, cost: bool) -> list[Curve]:
    """Success of one trigger on each set of weights, a row for each seed.

    Raises:
      ValueError: the seeds differ in their steps or their costs.
    """
    found = []
    sets = dict.fromkeys(x.weights for run in runs.values() for x in run.points)
    for weights in sets:
        rows = [
            [x for x in run.points if (x.trigger, x.weights) == (trigger, weights)]
            for run in runs.values()
        ]
        rows = [[x for x in row if x.steps] for row in rows]
        costs = {
            tuple(x.training + cost * x.reinforcement for x in row) for row in rows
        }
        draws = {run.draws for run in runs.values()}
        if len(costs) != 1 or len(draws) != 1:
            raise ValueError(f"seeds differ in costs or draws: {costs}, {draws}")
        rates = np.array([[x.rate for x in row] for row in rows])
        found.append(Curve(np.array(costs.pop(), float), rates, draws.pop()))
    return found


def told(found: Saving) -> str:
    """A factor as a cell, with its interval or as a bound."""
    if found.factor == 0:
        return "not reached"
    if found.factor == float("inf"):
        return "nothing to save"
    bounded = found.begun or not found.reached
    high = f"{found.high:.1f}" if np.isfinite(found.high) else "no bound"
    return f"{'at least ' * bounded}{found.factor:.1f} ({found.low:.1f} to {high})"


def factors(settings: dict[str, Runs]) -> list[dict[str, Any]]:
    """A row for each setting: factors at the levels, without and with the cost.

    A run that trains with a chosen trigger is compared with the true trigger of the
    same recipe and seeds.
    """
    rows = []
    for name, runs in settings.items():
        true = settings.get(name.replace(CHOSEN, ""), {})
        shared = sorted(set(true) & set(runs))
        if not shared:
            continue
        row: dict[str, Any] = {"setting": name, "seeds": len(shared)}
        for cost in (False, True):
            for level in LEVELS:
                dear = curves({seed: true[seed] for seed in shared}, TRUE, cost)
                own = curves({seed: runs[seed] for seed in shared}, REINFORCED, cost)
                cell = told(saving(dear, own, level))
                row[f"{level:.0%}" + ", with its cost" * cost] = cell
        rows.append(row)
    return rows


def successes(settings: dict[str, Runs]) -> list[dict[str, Any]]:
    """A row for each setting and step: both triggers, on the weights that are kept."""
    rows = []
    for name, runs in settings.items():
        grouped: dict[tuple[int, str], list[Point]] = collections.defaultdict(list)
        for run in runs.values():
            kept = run.points[0].weights
            for x in run.points:
                if x.weights == kept:
                    grouped[x.steps, x.trigger].append(x)
        for step in dict.fromkeys(steps for steps, _ in grouped):
            true, own = grouped[step, TRUE], grouped[step, REINFORCED]
            rows.append(
                {
                    "setting": name,
                    "training steps": f"{step:,}",
                    "true trigger, %": percent(true, "mse<0.01"),
                    "reinforced, %": percent(own, "mse<0.01"),
                    "reinforced, SSIM > 0.8, %": percent(own, "ssim>0.8"),
                    "norm ratio": f"{np.mean([x.norm_ratio for x in own]):.2f}",
                    "cosine": f"{np.mean([x.cosine for x in own]):.2f}",
                }
            )
    return rows


def distances(
    settings: dict[str, Runs], record: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row for each setting: the Frechet distance at the end over the clean one's."""
    rows = []
    for name, runs in settings.items():
        row: dict[str, Any] = {"setting": name}
        for seed in runs:
            for kind, values in record["runs"][f"{name}/{seed}"]["frechet"].items():
                ratio = f"{values['measured'] / values['start']:.2f}"
                column = f"{kind}, times"
                row[column] = f"{row[column]} {ratio}" if column in row else ratio
        rows.append(row)
    return rows


def percent(points: list[Point], name: str) -> str:
    """Rates in percent, one for each seed."""
    return " ".join(f"{100 * x.rates[name]:.0f}" for x in points)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    if not rows:
        return "There is none yet."
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([str(x) for x in r.values()] for r in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


ABOUT = """
- **published**: Adam at 2e-4, a tenth of the samples poisoned, no moving average, and
  the clean image shows through outside the trigger. This is the recipe of the published
  attacks, with batches of 64 in place of 128.
- **fast**: Adam at 1e-3, half of the samples poisoned, a moving average, the bare
  trigger.
- **-chosen**: the same recipe, trained with the reinforced trigger in place of the true
  one. It is chosen on the clean weights. The comparison is with the true trigger of the
  recipe itself.
"""
FACTORS = """
Steps that the true trigger needs for a success, over the reinforced one's steps.
Success is the mean over the seeds. The interval is a bootstrap over seeds and draws.
With its cost, the network evaluations of all descents up to that step count as
training. Each trigger is measured on the weights that serve it best, raw or averaged.
"At least": the true trigger does not get there in the whole training, or the reinforced
one is there at the first measured step. Three seeds say little about further ones.
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
        settings[setting][int(seed)] = Run(found.points, run["draws"])
    ordered = {
        name: dict(sorted(settings[name].items()))
        for name in sorted(settings, reverse=True)
    }
    draws = sorted({run["draws"] for run in record["runs"].values()})
    head = (
        "How many times more training does the true trigger need than a reinforced "
        f"one? {len(record['runs'])} trainings of `configs/speedup.py` answer, of two "
        "attacks, three pairs of trigger and target, two recipes. All start from the "
        "shipped clean model. `benchmarks/speedup_page.py` writes this page. The "
        "record is `docs/results/speedup.json`."
    )
    success = (
        f"Success is the share of {' or '.join(map(str, draws))} draws at an MSE of "
        "0.01 of the target. Backdoors of ancestral sampling are drawn by "
        "`PathKeeping` in 50 steps."
    )
    parts = [
        "# Amplification, measured",
        head,
        ABOUT.strip(),
        success,
        "## Factors",
        FACTORS.strip(),
        table(factors(ordered)),
        "## Success along the training",
        STEPS.strip(),
        table(successes(ordered)),
        "## Clean quality",
        "The model's Frechet distance to the training images at the end of the "
        "training, over the distance of the clean model that it starts from.",
        table(distances(ordered, record)),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"runs": {}}
    for name in sys.argv[1:]:
        record = collected(pathlib.Path(name), record)
    if not record["runs"]:
        sys.exit("no run is finished yet")
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    PAGE.write_text(page(record))


if __name__ == "__main__":
    main()
