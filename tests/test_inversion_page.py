"""The page of inversions by their cost: from rows to cells."""

import dataclasses
import json
import math

import inversion_page
from test_finding import CLEAN, PLAIN

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
    assert "| box, 1 | TERD | 3000 gradients | 9,000 | inf |  |  | 95% | 2 |" in text


def test_the_plot_has_a_line_for_each_run(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(inversion_page, "PLOT", tmp_path / "plot.svg")
    inversion_page.plot(record())
    assert "</svg>" in (tmp_path / "plot.svg").read_text()


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
