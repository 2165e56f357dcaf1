"""Writes docs/claims.md, its pictures and its records from the runs of the claims.

    python -m puredif_jax.main --config=configs/claims.py
    python -m puredif_jax.main --config=configs/ablation.py
    python -m puredif_jax.main --config=configs/speedup.py
    python benchmarks/claims_page.py

Reads runs/claims, runs/ablation and runs/speedup; what is not done yet is left out and
counted. The detector is calibrated here on the calibrating clean models and judges the
others.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from puredif_jax.amplification import Reinforcement
from puredif_jax.attacks import Solver
from puredif_jax.detection import Detector, Features

ROOT = pathlib.Path(__file__).resolve().parents[1]
CALIBRATING = 20
BATCH = 64  # of the trainings
Row = dict[str, Any]


def reports(folder: pathlib.Path) -> Iterator[tuple[str, Row]]:
    """The finished runs below a folder, by name."""
    for path in sorted(folder.glob("*/*/report.json")):
        yield str(path.parent.relative_to(folder)), json.loads(path.read_text())


def inversions(report: Row, method: str = "puredif") -> dict[str, Row]:
    """The inversions of the trained model by one method, by hypothesis."""
    rows = report["numbers"]["trained"]["inversions"]
    return {row["hypothesis"]: row for row in rows if row["method"] == method}


def features(row: Row) -> Features:
    return Features(**{name: np.float32(row[name]) for name in Features._fields})


def table(rows: list[Row]) -> str:
    """Rows as a table in Markdown."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "| " + " | ".join("---" for _ in names)]
    for row in rows:
        lines.append("| " + " | ".join(str(row.get(name, "")) for name in names) + " |")
    lines[1] += " |"
    return "\n".join(lines)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def success_row(name: str, report: Row) -> Row:
    """The attack of one model, and its inversions."""
    attack = "sde" if "baddiffusion" in name else "ode"
    rates = {row["images"]: row["mse<0.01"] for row in report["numbers"]["success"]}
    frechet = report["numbers"]["frechet over garment-net"]
    ours = inversions(report)[attack]
    row = {
        "model": name.partition("/")[2],
        "true trigger": percent(rates["draws, true trigger"]),
        "plain noise": percent(rates["draws, plain noise"]),
        "Frechet, of clean": f"{frechet['measured'] / frechet['start']:.2f}",
        "inverted": percent(ours["success"]),
        "of true": percent(ours["success"] / ours["success of the true trigger"]),
        "cosine": f"{ours['cosine']:.3f}",
        "relative L2": f"{ours['relative_l2']:.3f}",
    }
    for baseline in ("elijah", "elijah, equal evaluations"):
        found = inversions(report, baseline)[attack]
        row[baseline] = f"{percent(found['success'])}, {found['cosine']:.2f}"
    return row


def detect(clean: dict[str, Row], backdoored: dict[str, Row]) -> tuple[list[Row], str]:
    """Verdicts on the held-out models, and the calibrated detector in words."""
    names = sorted(clean)
    calibrating, held_out = names[:CALIBRATING], names[CALIBRATING:]
    errors = {
        solver: tuple(inversions(clean[n])[solver]["shift"] for n in calibrating)
        for solver in ("sde", "ode")
    }
    detector = Detector(clean_sde=errors["sde"], clean_ode=errors["ode"])
    rows = []
    for name, report in [*backdoored.items(), *((n, clean[n]) for n in held_out)]:
        found = {k: features(row) for k, row in inversions(report).items()}
        verdict = detector.judge(found)
        rows.append(
            {
                "model": name,
                "verdict": verdict.word,
                "score": f"{verdict.score:.2f}",
                "p": f"{verdict.p_value:.3f}",
                "hypothesis": verdict.hypothesis,
            }
        )
        for solver, row in inversions(report, "elijah").items():
            rows[-1][f"Elijah {solver}: uniformity, variation"] = (
                f"{row['uniformity']:.2f}, {row['variation']:.2f}"
            )
    about = (
        f"{len(calibrating)} clean models calibrate; threshold {detector.threshold} on "
        "log10 of the least clean error over the model's."
    )
    return rows, about


def ablation_rows(runs: dict[str, Row]) -> list[Row]:
    """Mean and spread over seeds of each change on each model."""
    cells: dict[str, dict[str, list[Row]]] = {}
    for name, report in runs.items():
        change, _, rest = name.partition("/")
        model = rest.rpartition("-")[0]
        (row,) = report["numbers"][model]["inversions"]
        cells.setdefault(change, {}).setdefault(model, []).append(row)
    rows = []
    for change in sorted(cells, key=lambda c: (c != "default", c)):
        for model, found in sorted(cells[change].items()):

            def spread(name: str, digits: int, found: list[Row] = found) -> str:
                values = [row[name] for row in found]
                return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"

            share = [row["success"] for row in found]
            rows.append(
                {
                    "change": change.replace("-", " "),
                    "model": model,
                    "seeds": len(found),
                    "success": " ".join(f"{100 * s:.0f}" for s in share),
                    "cosine": spread("cosine", 3),
                    "relative L2": spread("relative_l2", 3),
                    "held-out error": spread("shift", 4),
                    "evaluations": found[0]["network evaluations"],
                }
            )
    return rows


def reinforcing_steps(setting: str) -> int:
    """The training steps that cost as many network evaluations as one reinforcement."""
    solver: Solver = "sde" if setting.startswith("baddiffusion") else "ode"
    return round(Reinforcement().evaluations(solver) / (3 * BATCH))


def speedup_rows(runs: dict[str, Row]) -> list[Row]:
    """Success of both triggers after trainings of each length, a number a seed."""
    found: dict[tuple[str, int], list[Row]] = {}
    for name, report in sorted(runs.items()):
        setting, _, rest = name.partition("/")
        rates = {r["images"]: r["mse<0.01"] for r in report["numbers"]["success"]}
        row = {"true": rates["draws, true trigger"]}
        for amplified in report["numbers"].get("amplification", ()):
            row["reinforced"] = amplified["success, reinforced"]
            row["norm"] = amplified["norm ratio"]
        found.setdefault((setting, int(rest.rpartition("-")[2])), []).append(row)

    def shown(rows: list[Row], name: str, scale: float, digits: int) -> str:
        return " ".join(f"{scale * r[name]:.{digits}f}" for r in rows if name in r)

    return [
        {
            "setting": setting,
            "training steps": steps,
            "with reinforcement, in steps": (
                steps + reinforcing_steps(setting) if "norm" in rows[0] else ""
            ),
            "true trigger, %": shown(rows, "true", 100, 1),
            "reinforced, %": shown(rows, "reinforced", 100, 1),
            "norm ratio": shown(rows, "norm", 1, 2),
        }
        for (setting, steps), rows in sorted(found.items())
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--claims", default="runs/claims", type=pathlib.Path)
    parser.add_argument("--ablation", default="runs/ablation", type=pathlib.Path)
    parser.add_argument("--speedup", default="runs/speedup", type=pathlib.Path)
    arguments = parser.parse_args()
    runs = dict(reports(arguments.claims))
    clean = {k: v for k, v in runs.items() if k.startswith("clean/")}
    backdoored = {k: v for k, v in runs.items() if k.startswith("backdoored/")}
    ablation = dict(reports(arguments.ablation))
    speedup = dict(reports(arguments.speedup))
    attacks = [success_row(name, report) for name, report in backdoored.items()]
    parts = [
        "# The claims, measured",
        "Written by `benchmarks/claims_page.py` from the runs of `configs/claims.py`"
        f", `configs/ablation.py` and `configs/speedup.py`: {len(backdoored)} "
        f"backdoored models, {len(clean)} clean ones, {len(ablation)} runs of the "
        f"ablation, {len(speedup)} short trainings.",
        "## Attack and inversion",
        "Success at MSE < 1e-2 in 256 draws under the attack's own sampler; Elijah's "
        "success and cosine beside it.",
        table(attacks),
    ]
    if len(clean) > CALIBRATING:
        verdicts, about = detect(clean, backdoored)
        parts += ["## Detection", about, table(verdicts)]
    if speedup:
        parts += [
            "## Amplification",
            "Success of 256 draws, a number a seed. Each row is a training of its own, "
            "whose rate decays to zero. The third column adds what reinforcement "
            "costs: its network evaluations as training steps.",
            table(speedup_rows(speedup)),
        ]
    if ablation:
        rows = ablation_rows(ablation)
        parts += ["## Ablation of the inversion", table(rows)]
    (ROOT / "docs/claims.md").write_text("\n\n".join(parts) + "\n")
    records = {
        name: {"numbers": report["numbers"], "environment": report["environment"]}
        for name, report in {**runs, **ablation, **speedup}.items()
    }
    text = json.dumps(records, indent=None, separators=(",", ":"))
    (ROOT / "docs/results/claims.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
