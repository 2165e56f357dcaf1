"""What an audit shows: what the detector knows, and what argues for the verdict."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re

import numpy as np
import pytest
from tiny_config import ANY, get_config

from puredif_jax.defenses.base import Inverted
from puredif_jax.defenses.blocks import Blocks
from puredif_jax.defenses.denoising_error import DenoisingError
from puredif_jax.defenses.descent import Descent
from puredif_jax.defenses.detector import Detector
from puredif_jax.defenses.elijah import Uniformity
from puredif_jax.defenses.hypothesis import Fading, Trojan
from puredif_jax.defenses.inversion import Inversion
from puredif_jax.defenses.spectrum import Spectrum
from puredif_jax.diffusion.schedules import CosineBetas, LinearBetas
from puredif_jax.diffusion.solver import Ancestral
from puredif_jax.networks.unet import SHIPPED
from puredif_jax.stages.audit import Audit
from puredif_jax.stages.calibration import clean_scores
from puredif_jax.stages.experiment import Experiment
from puredif_jax.stages.inspector import _reached
from puredif_jax.stages.perform import context_of, open_lab, perform

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
    tmp_path, experiment, expected
) -> None:
    experiment = dataclasses.replace(experiment, workdir=str(tmp_path))
    context = context_of(experiment, open_lab(experiment))
    assert experiment.audit._calibration(context) == expected


def test_all_that_is_measured_is_explained(finished) -> None:
    report = json.loads((finished / "report.json").read_text())
    rows = report["numbers"]["trained"]["inversions"]
    meanings = Inverted.meanings()
    assert {method["method"] for method in rows} == {"puredif", "elijah"}
    for row in rows:
        assert row.keys() - {"method", "hypothesis"} <= meanings.keys()
        assert row["gain"] == pytest.approx(10 ** -row["score"])
    (table,) = [x["table"] for x in report["sections"] if x["title"] == "Measures"]
    shown = {row["measure"]: row for row in table}
    assert shown["gain"]["puredif, ode"] == rows[0]["gain"]
    assert shown["gain"]["meaning"] == meanings["gain"]


def test_a_baseline_has_a_verdict_of_its_own(finished) -> None:
    """Of Elijah, in the file and on the page; that of the first defense counts."""
    report = json.loads((finished / "report.json").read_text())
    found = report["numbers"]["trained"]
    (ours, baseline), other = found["inversions"], found["others"]["elijah"]
    assert found["others"].keys() == {"elijah"}
    assert other["score"] == pytest.approx(-math.log10(baseline["uniformity"]))
    assert other["hypothesis"] == "ode" and "differ" in other["reason"]
    clean = clean_scores("elijah")
    bounds = Uniformity(clean=clean).bounds
    assert (other["doubt"], other["alarm"]) == pytest.approx(bounds)
    assert other["clean_models"] == len(clean)
    assert found["verdict"]["score"] == pytest.approx(ours["score"])
    (table,) = [
        x["table"] for x in report["sections"] if x["title"] == "Other defenses"
    ]
    assert table == [{"defense": "elijah", **other}]


def test_the_report_of_a_run_names_its_verdict_and_its_weights(finished) -> None:
    report = json.loads((finished / "report.json").read_text())
    (line,) = report["verdict"].splitlines()
    assert re.fullmatch(
        r"(clean|could not tell): trained \(score .*, clean up to .*, backdoored above "
        r".*; p = .* by \d+ clean models; not calibrated for this network and search\)",
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


@pytest.mark.usefixtures("standard_promotion")
def test_placebos_and_squares_are_part_of_an_audit(tmp_path) -> None:
    """Stored each by itself; what is stored is not sought again."""
    inversion = Inversion(
        DenoisingError(samples=1),
        Descent(steps=4, candidates=4, scout=2, finalists=2),
        Blocks(places=2, draws=1),
        Spectrum(draws=4),
        heldout=2,
    )
    kinds = (Fading(Ancestral()), Trojan())
    run = dataclasses.replace(
        get_config(),
        workdir=str(tmp_path),
        training=None,
        attack=None,
        amplification=None,
        audit=Audit(("clean",), kinds, inversion, ANY),
        model=SHIPPED,
    )
    first = perform(run)
    results = tmp_path / "results"
    names = {path.stem for path in results.glob("puredif_clean_*")}
    assert names == {
        "puredif_clean_sde",
        "puredif_clean_sde_placebo_0.7",
        "puredif_clean_sde_placebo_1.4",
        "puredif_clean_trojan",
        "puredif_clean_trojan_starts",
        "puredif_clean_sde_starts",
        "puredif_clean_sde_placebo_0.7_starts",
        "puredif_clean_sde_placebo_1.4_starts",
    }
    (results / "puredif_clean_sde_placebo_0.7.npz").unlink()
    (tmp_path / "report.json").unlink()
    again = perform(run)
    assert again.judgements == first.judgements
    assert (results / "puredif_clean_sde_placebo_0.7.npz").exists()


@pytest.mark.parametrize(
    "errors,falling,reached",
    [((0.5, 0.2), 0.1, 0.1), ((0.5, 0.2), -0.3, 0.2), ((0.5, 0.2), np.inf, -np.inf)],
)
def test_a_placebo_reaches_no_less_than_it_did(errors, falling, reached) -> None:
    """One that gets worse in its last quarter has reached what it has."""
    result = {"errors": np.array(errors), "falling": np.array(falling)}
    assert _reached(result) == pytest.approx(reached)
