"""Writes docs/claims.md, its pictures and its records from the runs of the claims.

    python -m puredif_jax.main --config=configs/claims.py
    python -m puredif_jax.main --config=configs/ablation.py
    python benchmarks/claims_page.py

Reads the finished runs of runs/claims and runs/ablation and adds them to the records,
docs/results/claims.json and claims_images.npz. The page is made from the records, so a
machine that holds a part of the runs adds a part. Runs that are not done yet are left
out and counted. A record is dropped when the configurations no longer name its run,
unless the run is of an option that was removed (`GONE`). The detector is calibrated
here on the calibrating clean models and judges the others.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from puredif_jax.defenses.base import Inverted
from puredif_jax.defenses.detector import Detector
from puredif_jax.defenses.features import Features
from puredif_jax.defenses.hypothesis import Fading, Hypothesis
from puredif_jax.defenses.inversion import Inversion
from puredif_jax.diffusion.schedules import LinearBetas
from puredif_jax.diffusion.solver import Ancestral, Deterministic
from puredif_jax.metrics import measures as metrics
from puredif_jax.networks.unet import SHIPPED
from puredif_jax.runs import sources
from puredif_jax.runs.report import placeless
from puredif_jax.stages.measure import Measured
from puredif_jax.stages.weights import WEIGHTS, Truth

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECORDS = ROOT / "docs/results/claims.json"
IMAGES = ROOT / "docs/results/claims_images.npz"
CALIBRATING = 20
GONE = ("target-refreshed-every-20-steps/",)  # an option that its ablation removed
KINDS = (Fading(Ancestral()), Fading(Deterministic()))
Row = dict[str, Any]
Found = dict[Hypothesis, Inverted]


def reports(folder: pathlib.Path) -> Iterator[tuple[str, Row]]:
    """The finished runs below a folder, by name."""
    for path in sorted(folder.glob("*/*/report.json")):
        yield str(path.parent.relative_to(folder)), json.loads(path.read_text())


def hours(run: pathlib.Path) -> float:
    """From the first file of a run to its last, with its interruptions."""
    begun, ended = ((run / f"{x}.json").stat().st_mtime for x in ("config", "report"))
    return (ended - begun) / 3600


def shown_hours(kinds: dict[str, dict[str, Row]]) -> str:
    """The hours that runs of each kind took, over the runs whose record has them."""
    known = {
        kind: [row["hours"] for row in runs.values() if "hours" in row]
        for kind, runs in kinds.items()
    }
    parts = [
        f"{np.median(found):.2f} for {kind} ({len(found)} known)"
        for kind, found in known.items()
        if found
    ]
    return f"Median hours of a run, one on each of two cores: {', '.join(parts)}."


def kind_of(name: str) -> Hypothesis:
    """The kind of backdoor that a run of this name trains."""
    return Fading(Ancestral() if "baddiffusion" in name else Deterministic())


def inversions(report: Row, method: str = "puredif") -> Found:
    """The inversions of the trained model by one method, by hypothesis."""
    rows = map(Inverted.read, report["numbers"]["trained"]["inversions"])
    kinds = {kind.name: kind for kind in KINDS}
    return {kinds[row.hypothesis]: row for row in rows if row.method == method}


def measured(report: Row) -> Measured:
    """What was measured of the model of a run."""
    (found,) = Measured.read(report["numbers"], "a record")
    return found


def successes(report: Row) -> dict[str, float]:
    """The share at MSE < 1e-2 of images of each kind."""
    return {each.images: each.rates["mse<0.01"] for each in measured(report).success}


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


def frechet_ratio(report: Row) -> float:
    """A trained model's distance over the distance of the model it started from."""
    distance = measured(report).frechet
    return distance["measured"] / distance["start"]


def success_row(name: str, report: Row) -> Row:
    """The attack of one model, and its inversions."""
    attack, rates = kind_of(name), successes(report)
    leaked = rates.get("the Frechet draws, measured")
    ours = inversions(report)[attack]
    row = {
        "model": name.partition("/")[2],
        "true trigger": percent(rates["draws, true trigger"]),
        "plain noise": percent(rates["draws, plain noise"]),
        "Frechet, of clean": f"{frechet_ratio(report):.2f}",
        "inverted": percent(ours.success),
        "of true": percent(ours.success / ours.true_success),
        "cosine": f"{ours.cosine:.3f}",
        "relative L2": f"{ours.relative_l2:.3f}",
    }
    made = report["numbers"]["trained"]["inversions"]
    methods = [str(row["method"]) for row in made]
    baselines = dict.fromkeys(each for each in methods if each.startswith("elijah"))
    for baseline in baselines:
        found = inversions(report, baseline)[attack]
        row[baseline] = f"{percent(found.success)}, {found.cosine:.2f}"
    if leaked is not None:
        row["targets among the Frechet draws"] = percent(leaked)
    return row


def calibrating(clean: dict[str, Row]) -> list[str]:
    """The names of the clean models that calibrate."""
    return [n for n in sorted(clean) if int(n.partition("/")[2]) < CALIBRATING]


def clean_scores(
    clean: dict[str, Row], detector: Detector, method: str = "puredif"
) -> tuple[float, ...]:
    """The scores of the calibrating models: each model's largest over hypotheses."""
    return tuple(
        round(max(detector.score(row.features) for row in found.values()), 3)
        for found in (inversions(clean[n], method) for n in calibrating(clean))
    )


def detect(clean: dict[str, Row], backdoored: dict[str, Row]) -> list[str]:
    """Calibrates on some clean models and judges the others; paragraphs."""
    known = calibrating(clean)
    held_out = [n for n in sorted(clean) if n not in known]
    calibrated = Detector(clean=clean_scores(clean, Detector()))
    rows, outcomes = [], {}
    for name, report in [*backdoored.items(), *((n, clean[n]) for n in held_out)]:
        found = {k: row.features for k, row in inversions(report).items()}
        verdict = calibrated.judge(found)
        outcomes[name] = verdict
        rows.append(
            {
                "model": name,
                "verdict": verdict.outcome,
                "score": f"{verdict.score:.2f}",
                "p": f"{verdict.p_value:.3f}",
                "hypothesis": verdict.hypothesis,
            }
        )
        for kind, row in inversions(report, "elijah").items():
            rows[-1][f"Elijah's trigger, {kind.name}: uniformity, variation"] = (
                f"{row.uniformity:.2f}, {row.variation:.2f}"
            )
    doubt, alarm = calibrated.bounds
    right = {
        "backdoored": [outcomes[n].outcome == "backdoored" for n in backdoored],
        "clean": [outcomes[n].outcome == "clean" for n in held_out],
    }
    shown = []
    for kind, correct in right.items():
        if not correct:
            shown.append(f"no {kind} models yet")
            continue
        low, high = metrics.share_interval(sum(correct), len(correct))
        shown.append(
            f"{sum(correct)} of {len(correct)} {kind} models right (95 % interval "
            f"{percent(low)} to {percent(high)})"
        )
    ranges = []
    groups = {
        f"{len(known)} calibrating": [clean[n] for n in known],
        f"{len(held_out)} held-out clean": [clean[n] for n in held_out],
        f"{len(backdoored)} backdoored": list(backdoored.values()),
    }
    for name in Features._fields:
        low_is_bad = name not in ("alignment", "kl_mean", "kl_variance")
        best = min if low_is_bad else max
        values = {
            group: [
                best(getattr(row, name) for row in inversions(r).values())
                for r in found
            ]
            for group, found in groups.items()
        }
        sign = -1 if low_is_bad else 1
        positive = [sign * x for x in [*values.values()][2]]
        negative = [sign * x for group in [*values.values()][:2] for x in group]
        ranges.append(
            {"feature": f"{name}, {'lower' if low_is_bad else 'higher'} of two"}
            | {k: f"{min(v):.3g} to {max(v):.3g}" for k, v in values.items() if v}
            | {"AUC": f"{metrics.auc(positive, negative):.3f}"}
        )
    for name in ("uniformity", "variation"):
        low = {
            group: [
                -min(getattr(row, name) for row in inversions(r, "elijah").values())
                for r in found
            ]
            for group, found in groups.items()
        }
        calibration, held, positive = low.values()
        ranges.append(
            {"feature": f"{name} of Elijah's trigger, lower of two"}
            | {k: f"{-max(v):.3g} to {-min(v):.3g}" for k, v in low.items() if v}
            | {"AUC": f"{metrics.auc(positive, calibration + held):.3f}"}
        )
    return [
        f"The score is -log10 of `gain`, the larger of two hypotheses. "
        f"{len(known)} clean models calibrate: {list(calibrated.clean)}. A score "
        f"above {doubt:.2f} (their mean and {calibrated.doubt:g} standard deviations) "
        f"is doubtful, above {alarm:.2f} ({calibrated.alarm:g}) backdoored. No "
        f"p-value can be below 1/{len(known) + 1}. " + "; ".join(shown) + ".",
        table(rows),
        "Why `gain`: the table has the range of every feature over the models. AUC is "
        "the area under the ROC curve between the backdoored and all clean ones.",
        table(ranges),
    ]


def ablation_rows(runs: dict[str, Row]) -> list[Row]:
    """Mean and spread over seeds of each change on each model."""
    cells: dict[str, dict[str, list[Inverted]]] = {}
    for name, report in runs.items():
        change, _, rest = name.partition("/")
        model = rest.rpartition("-")[0]
        (row,) = map(Inverted.read, report["numbers"][model]["inversions"])
        cells.setdefault(change, {}).setdefault(model, []).append(row)
    rows = []
    for change in sorted(cells, key=lambda c: (c not in ("base", "default"), c)):
        for model, found in sorted(cells[change].items()):

            def spread(name: str, digits: int, found: list[Inverted] = found) -> str:
                values = [getattr(row, name) for row in found]
                return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"

            share = [row.success for row in found]
            rows.append(
                {
                    "change": change.replace("-", " "),
                    "model": model,
                    "seeds": len(found),
                    "success": " ".join(f"{100 * s:.0f}" for s in share),
                    "cosine": spread("cosine", 3),
                    "relative L2": spread("relative_l2", 3),
                    "held-out error": spread("shift", 4),
                    "evaluations": found[0].evaluations,
                }
            )
    return rows


def tiles(folder: pathlib.Path, name: str) -> np.ndarray:
    """True and inverted trigger, both targets, four draws: `[8, H, W]`, of bytes."""
    schedule = LinearBetas().tables()
    truth = Truth.beside(folder / WEIGHTS, schedule, SHIPPED.image_shape)
    if truth is None:
        raise SystemExit(f"{folder} has no truth of its backdoor")
    with np.load(folder / f"results/puredif_trained_{kind_of(name).name}.npz") as file:
        found = dict(file)
    images = [truth.trigger, found["delta"], truth.target, found["target"]]
    shown = np.stack([*images, *found["draws"][:4]])[..., 0]
    return np.round(127.5 * (np.clip(shown, -1, 1) + 1)).astype(np.uint8)


def pictures(images: dict[str, np.ndarray]) -> None:
    """docs/claims_triggers.png: a row a backdoored model."""
    columns = ("true trigger", "inverted", "target", "estimated target", "draws")
    figure, axes = plt.subplots(
        len(images), 8, figsize=(8.5, 1.05 * len(images)), squeeze=False
    )
    for row, (name, shown) in zip(axes, sorted(images.items()), strict=True):
        for axis, image in zip(row, shown, strict=True):
            axis.imshow(image, cmap="gray", vmin=0, vmax=255)
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(
            name.partition("/")[2].replace("-", "\n", 1),
            fontsize=6,
            rotation=0,
            ha="right",
            va="center",
        )
    for axis, title in zip(axes[0], columns, strict=False):
        axis.set_title(title, fontsize=7)
    figure.savefig(ROOT / "docs/claims_triggers.png", dpi=110, bbox_inches="tight")


def absent(sweep: str, found: dict[str, Row]) -> str:
    """Which runs of a configuration have no record, in a sentence; or nothing."""
    runs = sources.load(str(ROOT / f"configs/{sweep}.py")).experiments
    names = [run.workdir for run in runs if run.workdir not in found]
    if not names:
        return ""
    kinds = Counter(name.partition("/")[0] for name in names)
    shown = names if len(names) <= 3 else [f"{n} of {k}" for k, n in kinds.items()]
    return f"Not done yet of `configs/{sweep}.py`: {', '.join(shown)}."


def earlier(audited: dict[str, Row]) -> str:
    """How many models were inverted by another default than today's, in a sentence."""
    today = Inversion().evaluations(Fading())
    used = Counter(
        row.evaluations
        for report in audited.values()
        for row in list(inversions(report).values())[:1]
    )
    others = ", ".join(f"{n} with {k:,}" for k, n in used.items() if k != today)
    if not others:
        return ""
    return (
        f"Inversion has {today:,} network evaluations a hypothesis by default. Of the "
        f"audited models: {others}."
    )


def collect(folders: dict[str, pathlib.Path]) -> dict[str, dict[str, Row]]:
    """The stored records and the finished runs, by sweep and run.

    Only runs that the configurations name, or that `GONE` names, are kept.
    """
    records = json.loads(RECORDS.read_text())
    with np.load(IMAGES) as file:
        images = dict(file)
    for sweep, folder in folders.items():
        for name, report in reports(folder):
            records[sweep][name] = {
                "numbers": report["numbers"],
                "environment": placeless(report["environment"]),
                "hours": round(hours(folder / name), 3),
            }
            if name.startswith("backdoored/"):
                images[name] = tiles(folder / name, name)
        runs = sources.load(str(ROOT / f"configs/{sweep}.py")).experiments
        named = {experiment.workdir for experiment in runs}
        records[sweep] = {
            k: v for k, v in records[sweep].items() if k in named or k.startswith(GONE)
        }
    images = {k: v for k, v in images.items() if k in records["claims"]}
    sweeps = [
        f"{json.dumps(sweep)}:{{\n"
        + ",\n".join(
            f"{json.dumps(name)}:{json.dumps(runs[name], separators=(',', ':'))}"
            for name in sorted(runs)
        )
        + "}"
        for sweep, runs in records.items()
    ]
    RECORDS.write_text("{" + ",\n".join(sweeps) + "}\n")
    np.savez_compressed(IMAGES, **images)
    if images:
        pictures(images)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = ("claims", "ablation")
    for name in names:
        parser.add_argument(f"--{name}", default=f"runs/{name}", type=pathlib.Path)
    arguments = vars(parser.parse_args())
    records = collect({name: arguments[name] for name in names})
    runs, ablation = (records[name] for name in names)
    missing = [absent(sweep, records[sweep]) for sweep in names]
    clean = {k: v for k, v in sorted(runs.items()) if k.startswith("clean/")}
    backdoored = {k: v for k, v in sorted(runs.items()) if k.startswith("backdoored/")}
    attacks = [success_row(name, report) for name, report in backdoored.items()]
    parts = [
        "# The claims, measured",
        "Written by `benchmarks/claims_page.py` from the runs of `configs/claims.py` "
        f"and `configs/ablation.py`: {len(backdoored)} backdoored models, {len(clean)} "
        f"clean ones, {len(ablation)} runs of the ablation. They are of the commits "
        "that "
        "`docs/results/claims.json` names, not of today's defaults: two hypotheses, "
        "the shift loss with a survey, `gain` as defined there, ancestral success by "
        "DDPM in 100 steps. "
        + " ".join(filter(None, [*missing, earlier({**backdoored, **clean})])),
        shown_hours(
            {
                "a backdoored model": backdoored,
                "a clean one": clean,
                "one of the ablation": ablation,
            }
        ),
        "## Attack and inversion",
        "All are trained with the bare trigger (`trigger_only`). Success is the share "
        "of 256 draws at MSE < 1e-2 of the target, under the attack's own sampler. "
        "Elijah's success and cosine stand beside it.",
        table(attacks),
        *(
            "A training as long as the longest of these, without a backdoor, ends at "
            f"{frechet_ratio(report):.2f} of the clean model's Frechet distance."
            for name, report in runs.items()
            if name.startswith("control/")
        ),
        "![triggers and draws](claims_triggers.png)",
    ]
    if clean and backdoored:
        parts += ["## Detection", *detect(clean, backdoored)]
    if ablation:
        parts += [
            "## Ablation of the inversion",
            "One factor at a time, on two shipped models under their own hypotheses "
            "(`configs/ablation.py`). `base` is what a row changes: the default of "
            "their search, with the four starts of a survey alone and twice as many "
            "draws of noise. Success is in % of 128 draws, a number for each seed. "
            "The other measures are mean and standard deviation over the seeds. "
            "Network evaluations are counted over survey and descent, three for one "
            "with its gradient.",
            table(ablation_rows(ablation)),
        ]
    (ROOT / "docs/claims.md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
