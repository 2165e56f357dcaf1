"""The page of inversions by their cost: from rows to cells."""

import dataclasses
import json
import math
import re

import inversion_page
from test_finding import CLEAN, PLAIN

from puredif_jax.defenses.hypothesis import Fading
from puredif_jax.defenses.puredif import Puredif
from puredif_jax.diffusion.solver import Ancestral
from puredif_jax.runs.page import plain


def row(defense: str, evaluations: int, distance: float | None) -> dict:
    return {
        "defense": defense,
        "budget": f"{evaluations // 3} gradients",
        "evaluations": evaluations,
        "relative l2": distance,
        "cosine": None if distance is None else 1 - distance / 2,
        "success": None if distance is None else 0.9,
        "success of the true trigger": 0.95,
        "seconds": 2.0,
    }


def record(**runs: list[dict]) -> dict:
    """Two seeds of one backdoor; further runs take the place of some."""
    ours = [row("puredif", 3000, 0.2), row("puredif", 9000, 0.05)]
    theirs = [row("terd", 90_000, 0.15), row("terd", 9000, 0.6)]
    made = {"box/0": ours + theirs, "box/1": ours + theirs} | {
        name.replace("_", "/"): found for name, found in runs.items()
    }
    return {
        "runs": {
            name: {"attack": "BadDiffusion, Box", "inversions": found}
            for name, found in made.items()
        }
    }


def test_a_defense_at_its_best_is_compared_with_what_is_as_exact() -> None:
    ours, theirs = inversion_page.compared(record())
    assert ours["defense"] == "PureDiffusion" and theirs["defense"] == "TERD"
    assert ours["evaluations to relative L2 0.1"] == "9,000 9,000"
    assert theirs["evaluations to relative L2 0.1"] == "never never"
    assert theirs["best relative L2"] == "0.150 0.150"
    column = "times the evaluations of PureDiffusion for the same"
    assert theirs[column] == "10.0 10.0" and ours[column] == ""


def test_a_cheaper_inversion_that_is_less_exact_is_no_match() -> None:
    better = [row("puredif", 3000, 0.2), row("terd", 9000, 0.1)]
    _, theirs = inversion_page.compared(record(box_1=better))
    assert theirs["times the evaluations of PureDiffusion for the same"] == "10.0 never"
    assert theirs["evaluations to relative L2 0.1"] == "never 9,000"


def test_a_search_that_diverged_found_nothing() -> None:
    lost = [row("puredif", 3000, 0.2), row("terd", 9000, None)]
    text = inversion_page.page(record(box_1=lost))
    assert "| box, 1 | TERD | 3000 gradients | 9,000 |  |  |  | 95% | 2 |" in text
    theirs = inversion_page.compared(record(box_1=lost))[1]
    assert theirs["best relative L2"] == "0.150 never"
    assert theirs["times the evaluations of PureDiffusion for the same"] == "10.0 never"


def test_a_defense_is_not_charged_for_what_brings_nothing() -> None:
    flat = [
        row("puredif", 3000, 0.2),
        row("terd", 9000, 0.51),
        row("terd", 90_000, 0.5),
    ]
    theirs = inversion_page.compared(record(box_1=flat))[1]
    assert theirs["its evaluations"] == "90,000 9,000"
    assert theirs["times the evaluations of PureDiffusion for the same"] == "10.0 3.0"


def test_runs_are_compared_by_name() -> None:
    """One run has no inversion of ours."""
    alone = record(box_0=[row("terd", 9000, 0.6)])
    theirs = inversion_page.compared(alone)[1]
    assert theirs["times the evaluations of PureDiffusion for the same"] == "never 10.0"


def test_the_plot_has_a_line_for_each_run(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(inversion_page, "PLOT", tmp_path / "plot.svg")
    inversion_page.plot(record())
    text = (tmp_path / "plot.svg").read_text()
    dotted = re.findall(r"clip-path=[^>]*stroke: #([0-9a-f]{6})", text)
    assert dotted.count("1f77b4") == dotted.count("2ca02c") == 2


def test_runs_are_added_to_a_record(tmp_path) -> None:
    """What a run has written: a search by its own settings, and one by a budget."""
    lost = dataclasses.replace(PLAIN, method="terd", relative_l2=math.inf)
    cheap = dataclasses.replace(PLAIN, method="terd, 10000 gradients", relative_l2=0.5)
    found = dataclasses.replace(CLEAN, inversions=(lost, cheap))
    attack = {"type": "BadDiffusion", "trigger": {"type": "Box"}}
    report = {
        "numbers": found.numbers(),
        "config": {"attack": attack},
        "environment": {"command": "main.py"},
    }
    folder = tmp_path / "box" / "0"
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(plain(report)))
    made = inversion_page.collected(tmp_path, {"runs": {"old/0": {}}})["runs"]
    assert set(made) == {"old/0", "box/0"}
    assert made["box/0"]["attack"] == "BadDiffusion, Box"
    first, second = made["box/0"]["inversions"]
    assert (first["defense"], first["budget"]) == ("terd", "its own")
    assert first["relative l2"] is None and second["relative l2"] == 0.5
    assert (second["defense"], second["budget"]) == ("terd", "10000 gradients")


def test_the_cost_of_placebos_is_left_out() -> None:
    """What a bench counts of an inversion, by a budget of 3,000 gradients."""
    hypothesis, ours = Fading(Ancestral()), Puredif(budget=3000)
    search = ours.inversions([hypothesis])[hypothesis]
    every = sum(map(search.evaluations, (hypothesis, *ours.placebos(hypothesis))))
    seen = dataclasses.replace(PLAIN, evaluations=every, method=ours.name)
    found = dataclasses.replace(CLEAN, inversions=(seen,)).numbers()
    (made,) = inversion_page.rows({"numbers": found}, "it")
    assert made["defense"] == "puredif" and made["budget"] == "3000 gradients"
    assert made["evaluations"] == search.evaluations(hypothesis)
    assert made["seconds"] == seen.seconds / 3
