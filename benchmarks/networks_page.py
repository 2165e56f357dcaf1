"""Writes docs/networks.md and the records from a scan of the networks of networks.py.

    python benchmarks/networks.py FOLDER GROUP --garments FILE --cifar FILE
    python -m puredif_jax.main --config=configs/scan.py --config.model=FOLDER \\
        --config.workdir=RUN
    python benchmarks/networks_page.py RUN

GROUP is `bases`, `test` and `threats`, one after another, whole or in parts. A network
that RUN does not have keeps its row of the record, if it was trained by the same seed;
one that has none is counted.
docs/threats.md is written by hand from the record of `threats`.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import networks
import numpy as np
from safetensors.numpy import load_file
from scipy import stats

from puredif_jax.attacks.base import Attack
from puredif_jax.metrics import measures as metrics
from puredif_jax.runs.report import placeless

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "networks.md"
KEPT = ("cosine", "relative_l2", "success", "success of the true trigger")
FIRES = 0.2  # from which share on a true trigger is one to be matched
Row = dict[str, Any]


def plain_success(run: pathlib.Path, weights: str, attack: Attack) -> Row:
    """How often the target is drawn without the trigger, by the attack's sampling."""
    target = load_file(pathlib.Path(weights) / "truth.safetensors")["target"]
    (path,) = run.glob(f"results/plain_{run.name}*_{attack.solver.name}.npz")
    found = metrics.success(np.load(path)["images"], target)
    return {"success without a trigger": found["mse<0.01"]}


def row(run: pathlib.Path, recipe: networks.Recipe) -> Row:
    """What the record keeps of one model."""
    attack = recipe.attack
    report = json.loads((run / "report.json").read_text())
    found = report["numbers"][run.name]
    verdict, inversions = found["verdict"], found["inversions"]
    if not inversions:
        sys.exit(f"{run.name} was not judged: {verdict['reason']}")
    best = next(x for x in inversions if x["hypothesis"] == verdict["hypothesis"])
    return {
        "seed": recipe.seed,
        "commit": report["environment"]["commit"],
        "outcome": verdict["outcome"],
        "score": verdict["score"],
        "p": verdict["p_value"],
        "hypothesis": verdict["hypothesis"],
        "scores": {x["hypothesis"]: x["score"] for x in inversions},
        "fall of the loss": {
            x["hypothesis"]: x["fall of the loss"] for x in inversions
        },
        **{key: best[key] for key in KEPT if key in best},
        **({} if attack is None else plain_success(run, found["weights"], attack)),
        "seconds": sum(x["seconds"] for x in inversions),
        "sha256": found["sha256"],
    }


def share(count: int, of: int) -> str:
    """A share with its exact 95 % interval (Clopper and Pearson)."""
    low, high = stats.binomtest(count, of).proportion_ci()
    return f"{count} of {of} (95 % interval {low:.2f} to {high:.2f})"


def about(attack: Attack) -> str:
    """An attack in the words of a table."""
    kind, solver = type(attack).__name__, attack.solver.title
    psi = getattr(attack, "psi", None)
    parts = [
        kind if psi is None else f"{kind} psi {psi:g}, {solver}",
        f"{type(attack.trigger).__name__} to {type(attack.target).__name__}",
    ]
    return ", ".join(parts + ([] if attack.trigger_only else ["see-through"]))


def summary(bad: dict[str, Row], clean: dict[str, Row]) -> list[str]:
    """The sentences that head the page."""
    lines = []
    for kind, rows in (("backdoored", bad), ("clean", clean)):
        if not rows:
            continue
        counts = {
            word: sum(each["outcome"] == word for each in rows.values())
            for word in ("backdoored", "could not tell", "clean")
        }
        told = ", ".join(
            f'"{word}" {share(count, len(rows))}' for word, count in counts.items()
        )
        lines.append(f"- {len(rows)} {kind} networks were called: {told}.")
    if bad and clean:
        high, low = ([x["score"] for x in rows.values()] for rows in (bad, clean))
        auc = stats.mannwhitneyu(high, low).statistic / (len(high) * len(low))
        lines.append(
            f"- Area under the curve of the score: {auc:.3f}. Clean networks have "
            f"{min(low):.2f} to {max(low):.2f}, backdoored ones {min(high):.2f} to "
            f"{max(high):.2f}."
        )
    if clean:
        p = [each["p"] for each in clean.values()]
        test = stats.kstest(p, "uniform")
        quartiles = ", ".join(f"{x:.2f}" for x in np.quantile(p, [0.25, 0.5, 0.75]))
        lines.append(
            f"- The {len(p)} p-values of clean networks have the quartiles "
            f"{quartiles}; the least is {min(p):.3f}. Their distance from the uniform "
            f"distribution is {test.statistic:.2f} (Kolmogorov-Smirnov test, "
            f"p = {test.pvalue:.3f})."
            + " They are too large rather than too small: these networks score lower "
            "than the clean models that calibrate."
            * bool(test.pvalue < 0.05 and np.median(p) > 0.5)
        )
    fire = [x for x in bad.values() if x["success of the true trigger"] >= FIRES]
    if fire:
        kept = sum(x["success"] >= 0.9 * x["success of the true trigger"] for x in fire)
        lines.append(
            f"- Of backdoors that fire in {FIRES:.0%} of draws or more, the inverted "
            f"trigger fires at least 0.9 times as often in {share(kept, len(fire))}."
        )
    return lines


def page(record: Row) -> str:
    recipes = {
        each.name: each
        for each in networks.BASES + networks.BACKDOORED + networks.CLEAN
    }
    models = record["models"]
    bad = {k: v for k, v in models.items() if recipes[k].attack is not None}
    clean = {k: v for k, v in models.items() if recipes[k].attack is None}
    found = {recipes[name].base or name for name in models} - {"shipped"}
    bases = ", ".join(f"`{name}`" for name in sorted(found))
    lines = [
        "# Held-out networks",
        "",
        f"{len(models)} of {len(recipes)} networks have been scanned, by the default "
        "search and detector, each once. No choice of these two rests on them.",
        "",
        "Two further networks were misjudged by earlier searches and detectors, which "
        "were then changed. One has a backdoor that fires in every draw and was called "
        "clean. One is a clean network of one class, of the base `t_base_gb`, and was "
        "called backdoored. So they count no longer: `t_b06` has another seed, and "
        "`t_cgbclass` another class and seed. `t_p01` was scanned once more after its "
        "draws showed a fault of the sampler. The backdoor of `t_p03`, psi 0 under "
        "deterministic sampling, never fires, so `t_p05` was added. All are judged by "
        "the detector of today, from what the searches stored. "
        "The loss of the repair was changed "
        "after repairs of eight grey networks of this page, so they are not held out "
        "for the repair ([notebook](notebook/2026-11-30-leap.md)).",
        "",
        "`benchmarks/networks.py` trains 25 backdoored and 24 clean ones, of five "
        "kinds and two sets of images. They differ in width, depth and attention, "
        "in attack, trigger, target, firing rate and training. "
        f"Those scanned start from the bases {bases}; g is grey and c is colour. This "
        "page is written by `benchmarks/networks_page.py`. The record is "
        "`docs/results/networks.json`.",
        "",
        "The hypotheses are `sde` (ancestral sampling), `ode` (deterministic sampling) "
        "and `trojan` (shifted and narrowed noise).",
        "",
        *summary(bad, clean),
        "",
        "| network | of | attack | verdict | score | p | hypothesis "
        "| cosine, relative L2 | fires: inverted, true, none |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in bad.items():
        recipe = recipes[name]
        assert recipe.attack is not None
        cells = (
            f"`{name}`",
            recipe.base,
            about(recipe.attack),
            found["outcome"],
            f"{found['score']:.2f}",
            f"{found['p']:.2g}",
            found["hypothesis"],
            f"{found['cosine']:.3f}, {found['relative_l2']:.2f}",
            f"{found['success']:.0%}, {found['success of the true trigger']:.0%}, "
            f"{found['success without a trigger']:.0%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| clean network | of | verdict | score | p |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    for name, found in clean.items():
        of = recipes[name].base or "fresh weights"
        lines.append(
            f"| `{name}` | {of} | {found['outcome']} | {found['score']:.2f} | "
            f"{found['p']:.2g} |"
        )
    return "\n".join(lines) + "\n"


def record(run: pathlib.Path, recipes: tuple[networks.Recipe, ...], known: Row) -> Row:
    """What a scan says of networks of these recipes, and what was known of others."""
    stored = known.get("models", {})
    rows = {
        each.name: stored[each.name]
        for each in recipes
        if stored.get(each.name, {}).get("seed") == each.seed
    }
    done = [each for each in recipes if (run / each.name / "report.json").exists()]
    rows |= {each.name: row(run / each.name, each) for each in done}
    environment = known.get("environment")
    if done:
        report = json.loads((run / done[0].name / "report.json").read_text())
        environment = placeless(report["environment"])
    lines = (__doc__ or "").replace("\\\n", "").splitlines()
    return {
        "command": [" ".join(x.split()) for x in lines if x.startswith("    ")],
        "environment": environment,
        "models": {each.name: rows[each.name] for each in recipes if each.name in rows},
    }


def main() -> None:
    run = pathlib.Path(sys.argv[1])
    recipes = networks.BASES + networks.BACKDOORED + networks.CLEAN
    for name, group in (("networks", recipes), ("threats", networks.threats(""))):
        path = RESULTS / f"{name}.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        found = record(run, group, known)
        path.write_text(json.dumps(found, indent=1) + "\n")
        if name == "networks":
            PAGE.write_text(page(found))
        print(f"{path}: {len(found['models'])} of {len(group)} networks")


if __name__ == "__main__":
    main()
