"""The scores of clean models that ship: those of the records, for what they are of."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from puredif_jax.defenses.base import Defense, Inverted
from puredif_jax.defenses.descent import Descent
from puredif_jax.defenses.detector import Detector
from puredif_jax.defenses.distribution_shift import DistributionShift
from puredif_jax.defenses.elijah import Elijah, Uniformity
from puredif_jax.defenses.hypothesis import Fading, Hypothesis
from puredif_jax.defenses.inversion import Inversion
from puredif_jax.defenses.puredif import Puredif
from puredif_jax.diffusion.schedules import CosineBetas, LinearBetas
from puredif_jax.diffusion.solver import Ancestral, Deterministic
from puredif_jax.networks.unet import SHIPPED
from puredif_jax.runs import parallel
from puredif_jax.stages import calibration
from puredif_jax.stages.audit import Audit
from puredif_jax.stages.setup import Setup

RECORDS = pathlib.Path(__file__).parents[1] / "docs" / "results" / "claims.json"
CLEAN = RECORDS.with_name("clean_scores.json")
KINDS = (Fading(Ancestral()), Fading(Deterministic()))
CALIBRATING = 20  # of the records' clean models, in the order of their names


@pytest.fixture(scope="module")
def clean() -> dict[str, dict]:
    """The records of the clean models."""
    runs = json.loads(RECORDS.read_text())["claims"]
    return {name: run for name, run in runs.items() if name.startswith("clean/")}


def inversions(report: dict) -> dict[Hypothesis, Inverted]:
    """Elijah's of the trained model, by hypothesis."""
    rows = map(Inverted.read, report["numbers"]["trained"]["inversions"])
    kinds = {kind.name: kind for kind in KINDS}
    return {kinds[row.hypothesis]: row for row in rows if row.method == Elijah().name}


def test_the_scores_of_elijah_are_those_of_the_records(clean) -> None:
    runs = [inversions(clean[name]) for name in sorted(clean)[:CALIBRATING]]
    found = tuple(
        round(max(Uniformity().score(row.features) for row in rows.values()), 3)
        for rows in runs
    )
    assert len(found) == CALIBRATING < len(clean)
    assert calibration.clean_scores(Elijah().name) == found
    low, high = Uniformity().calibrated(found).bounds
    assert max(sorted(found)[:10]) < low < high
    for kind, row in runs[0].items():
        inversion = Elijah().inversions([kind])[kind]
        steps, each = inversion.descent.steps, inversion.loss.evaluations
        assert row.evaluations == 3 * steps * each  # the record counts its gradients


def test_the_scores_are_those_of_the_records() -> None:
    """Of all networks, by the default search: as many evaluations of the network."""
    rows = json.loads(CLEAN.read_text())["models"]
    known = tuple(row["score"] for row in rows)
    assert calibration.clean_scores(Puredif().name) == known
    assert len({row["network"] for row in rows}) == len(calibration.networks())
    low, high = Detector().calibrated(known).bounds
    assert np.median(known) < low < high
    kinds = {kind.name: kind for kind in Audit().hypotheses}
    for row in rows:
        for one in row["inversions"]:
            searches = 1 + len(kinds[one["hypothesis"]].placebos)
            evaluations = Inversion().evaluations(kinds[one["hypothesis"]])
            assert one["network evaluations"] == searches * evaluations


def setup(**changes) -> Setup:
    """The model that was calibrated with, or another."""
    mesh = parallel.make_mesh(1)
    known = Setup(SHIPPED, LinearBetas(), "epsilon", None, 64, mesh)
    return dataclasses.replace(known, **changes)


@pytest.mark.parametrize(
    "change",
    [
        {"network": dataclasses.replace(SHIPPED, in_channels=3)},
        {"network": dataclasses.replace(SHIPPED, norm_eps=1e-4)},
        {"process": LinearBetas(end=0.03)},
        {"process": CosineBetas()},
        {"prediction": "v_prediction"},
    ],
)
def test_they_are_of_models_of_one_kind(change) -> None:
    for defense in (Puredif(), Elijah()):
        assert calibration.covers(defense, setup())
        assert calibration.covers(defense, setup(batch=3, slices=2)), "no part of it"
        assert not calibration.covers(defense, setup(**change))


@pytest.mark.parametrize(
    "defense,covered",
    [
        (Puredif(detector=Detector(alarm=9.0)), True),
        (Elijah(detector=Uniformity(doubt=1.0)), True),
        (Puredif(Inversion(descent=Descent(9))), False),
        (Puredif(Inversion(loss=DistributionShift(samples=5))), False),
        (Puredif(Inversion(blocks=None)), False),
        (Puredif(Inversion(spectrum=None)), False),
        (Puredif(Inversion(heldout=8)), False),
        (Puredif(Inversion(leap=0)), False),
        (Elijah(budget=30_720), False),
    ],
)
def test_they_are_of_one_search(defense: Defense, covered: bool) -> None:
    assert calibration.covers(defense, setup()) == covered


def test_of_another_defense_none_are_known() -> None:
    assert calibration.clean_scores("trust") == ()
    assert calibration.clean_scores(Elijah(budget=30_720).name) == ()
