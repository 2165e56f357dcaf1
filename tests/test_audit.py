"""What an audit shows: what the detector knows, and what argues for the verdict."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re

import pytest

from puredif_jax.defenses.detector import Detector
from puredif_jax.defenses.inversion import Descent, Inversion
from puredif_jax.diffusion.schedules import CosineBetas, LinearBetas
from puredif_jax.networks.unet import SHIPPED
from puredif_jax.stages.audit import Audit, Auditor
from puredif_jax.stages.experiment import Experiment
from puredif_jax.stages.finding import MEASURES

KNOWN = Experiment("run", SHIPPED, audit=Audit(("clean",)))


def audited(**changes) -> Experiment:
    audit = dataclasses.replace(KNOWN.audit, **changes)
    return dataclasses.replace(KNOWN, audit=audit)


@pytest.mark.parametrize(
    "experiment,expected",
    [
        (KNOWN, "this network"),
        (
            dataclasses.replace(
                KNOWN, model=dataclasses.replace(SHIPPED, in_channels=3)
            ),
            "another network",
        ),
        (dataclasses.replace(KNOWN, schedule=CosineBetas()), "another network"),
        (
            dataclasses.replace(KNOWN, schedule=LinearBetas(1000, 1e-4, 0.03)),
            "another network",
        ),
        (dataclasses.replace(KNOWN, prediction="v_prediction"), "another network"),
        (audited(inversion=Inversion(descent=Descent(9))), "another network"),
        (audited(detector=Detector(clean=(0.1, 0.2))), "given scores"),
        (audited(detector=Detector(alarm=9.0)), "this network"),
    ],
)
def test_the_detector_is_calibrated_for_what_its_clean_models_are(
    experiment, expected
) -> None:
    assert Auditor(experiment, None).calibration == expected  # type: ignore


def test_all_that_is_measured_is_explained(finished) -> None:
    report = json.loads((finished / "report.json").read_text())
    rows = report["numbers"]["trained"]["inversions"]
    assert {method["method"] for method in rows} == {"puredif", "elijah"}
    for row in rows:
        assert row.keys() - {"method", "hypothesis"} <= MEASURES.keys()
        assert row["gain"] == pytest.approx(10 ** -row["score"])
    (table,) = [x["table"] for x in report["sections"] if x["title"] == "Measures"]
    shown = {row["measure"]: row for row in table}
    assert shown["gain"]["puredif, ode"] == rows[0]["gain"]
    assert shown["gain"]["meaning"] == MEASURES["gain"]


def test_the_report_of_a_run_names_its_verdict_and_its_weights(finished) -> None:
    report = json.loads((finished / "report.json").read_text())
    (line,) = report["verdict"].splitlines()
    assert re.fullmatch(
        r"(clean|could not tell): trained \(score .*, clean up to 0.261, backdoored "
        r"above 0.376; p = .*, \d+ of 20 clean models score as high; not calibrated "
        r"for this network and search\)",
        line,
    )
    (judged,) = report["judgements"]
    stored = (finished / "weights.safetensors").read_bytes()
    digest = judged["facts"]["SHA-256 of weights.safetensors"]
    assert digest == hashlib.sha256(stored).hexdigest()
    assert "puredif_jax.main --config=" in report["environment"]["command"]


def test_what_argues_for_a_verdict_is_side_by_side(finished) -> None:
    page = (finished / "report.html").read_text()
    pairs = re.findall(r'<div class="pairs">(.*?)</div>', page, re.DOTALL)
    captions = [re.findall("<figcaption>(.*?)<", pair) for pair in pairs]
    (evidence, draws) = captions
    assert [x.partition(":")[0] for x in evidence] == [
        "denoised with the trigger",
        "denoised without the trigger",
    ]
    assert all("rows t = 500, 300, 100, 8 draws" in x for x in evidence)
    assert draws == [
        "draws with the trigger, ode, unclipped",
        "draws from plain noise, ode, unclipped",
    ]
    assert "prove nothing" in page and "What to do next" in page
