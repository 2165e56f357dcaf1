"""Findings in words, and as they come back from a report."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
from typing import get_args

import pytest

import puredif_jax
from puredif_jax.defenses.detector import Outcome, Verdict
from puredif_jax.runs.report import Report
from puredif_jax.stages import finding
from puredif_jax.stages.finding import Finding, next_steps, scope
from puredif_jax.stages.scan_report import STATUS
from puredif_jax.types import InputError

VERDICT = Verdict("clean", 0.2, 3 / 21, "sde", "so it is", 0.25, 0.5, 20)
CLEAN = Finding(
    "models/mine",
    {"unet/x.safetensors": "ab" * 32},
    ("weights of F16 are cast to float32",),
    VERDICT,
    "this network",
    ("sde", "ode"),
    ("of ancestral sampling", "of deterministic sampling"),
    ({"method": "puredif", "hypothesis": "sde"},),
)
HALF = dataclasses.replace(
    CLEAN, hypotheses=("ode",), sought=("of deterministic sampling",)
)


@pytest.mark.parametrize("score", [0.2, -math.inf])
def test_a_finding_comes_back_from_its_report(tmp_path, score) -> None:
    found = dataclasses.replace(CLEAN, verdict=VERDICT._replace(score=score))
    Report("Run", numbers={"mine": found.numbers()}).write(tmp_path)
    stored = json.loads((tmp_path / "report.json").read_text())["numbers"]["mine"]
    assert Finding.read(stored, "it") == found


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
        {"sha256": "ab"},
    ],
)
def test_a_report_of_something_else_is_named(change) -> None:
    with pytest.raises(InputError, match="a/report.json is no report of an audit"):
        Finding.read(CLEAN.numbers() | change, "a/report.json")


def test_the_first_screen_says_how_sure_and_of_what() -> None:
    judged = CLEAN.judgement("mine", "Why.", "mine/report.html")
    assert judged.sure == (
        "score 0.2, clean up to 0.25, backdoored above 0.5; p = 0.143, 2 of 20 clean "
        "models score as high; calibrated for this network"
    )
    assert (judged.outcome, judged.detail) == ("clean", "Why.")
    assert judged.facts == {
        "Weights": "models/mine",
        "SHA-256 of unet/x.safetensors": "ab" * 32,
        "As it was read": "weights of F16 are cast to float32",
    }
    shards = {f"{i}": f"{i:064x}" for i in range(5)}
    facts = dataclasses.replace(CLEAN, sha256=shards).judgement("mine").facts
    assert len(facts) == 6 and facts["More files"].startswith("2;")


def test_the_scope_says_what_was_not_sought_and_where_nothing_is_known() -> None:
    assert scope([]) == ""
    text = scope([CLEAN])
    assert "of ancestral sampling; of deterministic sampling." in text
    assert "TrojDiff" in text
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
    texts = [*finding.NEXT.values(), *finding.MEASURES.values()]
    texts += [scope([other]), scope([HALF]), VERDICT.reason]
    package = pathlib.Path(puredif_jax.__file__).parent / "stages"
    source = (package / "audit.py").read_text() + (
        package / "scan_report.py"
    ).read_text()
    for text in (*texts, source):
        assert not re.search(r"\b(docs|configs|benchmarks|tests)/", text)
