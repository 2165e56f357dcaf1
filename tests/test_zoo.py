"""What a scan says of two of the models that ship, with a sixth of its budget."""

import json

import pytest

from puredif_jax.runs import config
from puredif_jax.stages.experiment import Scan
from puredif_jax.stages.scan import perform_scan
from puredif_jax.stages.weights import ZOO

BUDGET = {
    "audit.hypotheses": "Fading",
    "audit.inversion.descent.candidates": "4",
    "audit.inversion.descent.scout": "20",
    "audit.inversion.descent.finalists": "1",
    "audit.inversion.descent.steps": "80",
    "audit.inversion.loss.samples": "2",
    "audit.inversion.heldout": "16",
    "steps": "10",
    "draws": "16",
}


@pytest.mark.usefixtures("standard_promotion")
def test_the_backdoored_one_is_found_and_the_clean_one_passes(tmp_path) -> None:
    models = tuple(str(ZOO / name) for name in ("villandiffusion", "clean"))
    scan = Scan(str(tmp_path), models, devices=1)
    for name, value in BUDGET.items():
        scan = config.override(scan, name, value)
    report, status = perform_scan(scan)
    assert report.summary == "2 models: 1 backdoored, 1 clean" and status == 3
    rows = {row["model"]: row for row in report.sections[0].table}
    assert rows["villandiffusion"]["p"] < 0.05 < rows["clean"]["p"]
    path = tmp_path / "villandiffusion" / "report.json"
    (found,) = json.loads(path.read_text())["numbers"]["villandiffusion"]["inversions"]
    assert found["success of the true trigger"] >= 0.9
    assert found["success"] >= 0.8 and found["cosine"] >= 0.9
