"""Findings in words, and as they come back from a report."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
from typing import get_args

import numpy as np
import pytest

import puredif_jax
from puredif_jax.defenses.base import Inverted, Outcome, Verdict
from puredif_jax.runs.report import Report
from puredif_jax.stages import finding
from puredif_jax.stages.base import results
from puredif_jax.stages.finding import Finding, next_steps, scope
from puredif_jax.stages.scan_report import STATUS
from puredif_jax.types import InputError

VERDICT = Verdict("clean", 0.2, 3 / 21, "sde", "so it is", 0.25, 0.5, 20)
PLAIN = Inverted(
    method="puredif",
    hypothesis="sde",
    gain=0.6,
    memory=0.7,
    heldout=0.1,
    uniformity=0.9,
    variation=0.8,
    alignment=0.95,
    repeats=0.03,
    kl_mean=0.4,
    kl_variance=0.02,
    evaluations=480,
    seconds=1.5,
)
WHOLE = dataclasses.replace(
    PLAIN, **{x.name: 0.25 for x in dataclasses.fields(Inverted) if x.default is None}
)
CLEAN = Finding(
    "mine",
    "models/mine",
    {"unet/x.safetensors": "ab" * 32},
    ("weights of F16 are cast to float32",),
    VERDICT,
    "this network",
    ("sde", "ode"),
    ("of ancestral sampling", "of deterministic sampling"),
    ("of a third kind",),
    (PLAIN, WHOLE),
    {"elijah": VERDICT._replace(outcome="backdoored", hypothesis="ode")},
)
HALF = dataclasses.replace(
    CLEAN, hypotheses=("ode",), sought=("of deterministic sampling",)
)


@pytest.mark.parametrize("score", [0.2, -math.inf])
def test_a_finding_comes_back_from_its_report(tmp_path, score) -> None:
    """With an inversion of which nothing more was measured, and one of which all was;
    among the results of other stages."""
    verdict, row = (
        VERDICT._replace(score=score),
        dataclasses.replace(WHOLE, score=score),
    )
    found = dataclasses.replace(CLEAN, verdict=verdict, inversions=(PLAIN, row))
    other = dataclasses.replace(found, label="other", others={})
    numbers = {"success": [], "status": 3} | found.numbers() | other.numbers()
    Report("Run", numbers=numbers).write(tmp_path)
    stored = json.loads((tmp_path / "report.json").read_text())["numbers"]
    assert Finding.read(stored, "it") == [found, other]
    assert [x for x in results(stored, "it") if isinstance(x, Finding)] == [
        found,
        other,
    ]
    assert Finding.read({"status": 3, "success": []}, "it") == []


@pytest.mark.parametrize(
    "change",
    [
        {"verdict": None},
        {"verdict": {"outcome": "clean"}},
        {"verdict": {**VERDICT._asdict(), "outcome": "\x1b[2Jclean"}},
        {"verdict": {**VERDICT._asdict(), "hypothesis": "vp"}},
        {"verdict": {**VERDICT._asdict(), "score": "many"}},
        {"calibration": "somehow"},
        {"inversions": 3},
        {"inversions": [3]},
        {"hypotheses": ["ode"]},
        {"hypotheses": None},
        {"sought": 3},
        {"inversions": [PLAIN.row() | {"gain": "many"}]},
        {"inversions": [{k: v for k, v in PLAIN.row().items() if k != "gain"}]},
        {"others": 3},
        {"others": {"elijah": None}},
        {"others": {"elijah": {"outcome": "clean"}}},
        {"sha256": "ab"},
    ],
)
def test_a_report_of_something_else_is_named(change) -> None:
    with pytest.raises(InputError, match="a/report.json is no report of an audit"):
        found = CLEAN.numbers()["mine"] | change
        Finding.read({"mine": found}, "a/report.json")


def test_a_report_on_no_model_is_none_of_a_scan() -> None:
    with pytest.raises(InputError, match="a/report.json is no report of an audit"):
        Finding.some({}, "a/report.json")
    assert Finding.some(CLEAN.numbers(), "a/report.json") == [CLEAN]
    both = CLEAN.numbers() | {"repaired": CLEAN.numbers()["mine"]}
    labels = [each.label for each in Finding.some(both, "a/report.json")]
    assert labels == ["mine", "repaired"]


def test_a_finding_is_a_row_of_many_runs() -> None:
    tables = CLEAN.tables()
    assert tables["verdicts"] == [{"model": "mine"} | VERDICT._asdict()]
    assert tables["inversions"] == [{"model": "mine"} | x.row() for x in (PLAIN, WHOLE)]
    assert "success" not in PLAIN.row() and WHOLE.row()["success, unclipped"] == 0.25


def test_every_measure_has_a_name_and_a_meaning_of_its_own() -> None:
    meanings = Inverted.meanings()
    assert WHOLE.row().keys() == {"method", "hypothesis", *meanings}
    assert len(meanings) == len(dataclasses.fields(Inverted)) - 2
    assert all(meanings.values())
    assert PLAIN.features.gain == np.float32(0.6)


def test_the_first_screen_says_how_sure_and_of_what() -> None:
    judged = CLEAN.judged("mine", "Why.", "mine/report.html")
    assert judged.sure == (
        "score 0.2, clean up to 0.25, backdoored above 0.5; p = 0.14 by 20 clean "
        "models; calibrated for this network"
    )
    assert (judged.outcome, judged.detail) == ("clean", "Why.")
    assert judged.facts == {
        "Weights": "models/mine",
        "SHA-256 of unet/x.safetensors": "ab" * 32,
        "As it was read": "weights of F16 are cast to float32",
    }
    assert CLEAN.judgement() == CLEAN.judged("mine", "So it is.")
    shards = {f"{i}": f"{i:064x}" for i in range(5)}
    facts = dataclasses.replace(CLEAN, sha256=shards).judgement().facts
    assert len(facts) == 6 and facts["More files"].startswith("2;")


def test_the_scope_says_what_was_not_sought_and_where_nothing_is_known() -> None:
    assert scope([]) == ""
    text = scope([CLEAN])
    assert "of ancestral sampling; of deterministic sampling." in text
    assert "Not sought: of a third kind; any backdoor whose path is another" in text
    assert "not calibrated" not in text and "Only in some" not in text
    other = dataclasses.replace(CLEAN, calibration="another network")
    assert "not calibrated" in other.sure and "not calibrated" in scope([CLEAN, other])
    text = scope([CLEAN, HALF])
    assert "noise: of deterministic sampling. Not sought" in text
    assert text.endswith("Only in some models: of ancestral sampling.")
    assert "ancestral" not in scope([HALF])
    other = dataclasses.replace(HALF, hypotheses=("sde",), sought=(CLEAN.sought[0],))
    text = scope([HALF, other])
    assert "noise: of no kind in every model. Not sought" in text
    assert text.endswith("of deterministic sampling; of ancestral sampling.")


def test_there_is_a_next_step_for_each_outcome_that_there_is() -> None:
    assert finding.NEXT.keys() == {*get_args(Outcome), *STATUS, "not done yet"}
    titles = [x.title for x in next_steps(["clean", "error", "clean"]).sections]
    assert titles == ["clean", "error"]


def test_the_page_names_no_path_that_an_installed_package_lacks() -> None:
    other = dataclasses.replace(CLEAN, calibration="another network")
    texts = [*finding.NEXT.values(), *Inverted.meanings().values()]
    texts += [scope([other]), scope([HALF]), VERDICT.reason]
    package = pathlib.Path(puredif_jax.__file__).parent / "stages"
    source = (package / "audit.py").read_text() + (
        package / "scan_report.py"
    ).read_text()
    for text in (*texts, source):
        assert not re.search(r"\b(docs|configs|benchmarks|tests)/", text)
