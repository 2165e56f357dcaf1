"""The pictures of a sweep."""

from __future__ import annotations

import json
import pathlib
import shutil

import numpy as np
from tiny_config import get_config

from puredif_jax.files.sealed import read_arrays
from puredif_jax.runs.report import Report
from puredif_jax.stages.finding import Finding
from puredif_jax.stages.gallery import Shown, gallery


def run(folder: pathlib.Path) -> Shown:
    numbers = json.loads((folder / "report.json").read_text())["numbers"]
    findings = Finding.read(numbers, "the report")
    return Shown("mine", folder, get_config().attack, findings)


def test_triggers_stand_beside_the_true_one(finished: pathlib.Path) -> None:
    shown = run(finished)
    section = gallery([shown, Shown("clean", finished, None, ())])
    assert section is not None
    (one,) = section.sections
    ((caption, grid),) = one.pictures
    parts = caption.split("), ")
    assert one.title == "mine" and caption.startswith("true trigger, puredif (")
    assert np.shape(grid) == (len(parts) + 1, 16, 16, 1)
    attack = shown.attack
    assert attack is not None
    np.testing.assert_array_equal(grid[0], attack.images((16, 16, 1))[0])
    nearest = min(
        (each for each in shown.findings[0].inversions if each.method == "puredif"),
        key=lambda each: each.relative_l2,
    )
    name = f"puredif_{shown.findings[0].label}_{nearest.hypothesis}"
    kept = read_arrays(finished / "results" / f"{name}.npz")["delta"]
    np.testing.assert_array_equal(grid[1], np.clip(kept, -1, 1))
    assert f"relative L2 {nearest.relative_l2:.2g}" in parts[0]
    Report(title="all", sections=(section,))


def test_what_is_damaged_or_was_not_inverted_is_left_out(
    finished: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    shutil.copytree(finished / "results", tmp_path / "results")
    for path in (tmp_path / "results").glob("puredif_*.npz"):
        path.write_bytes(b"damaged")
    section = gallery([run(finished)._replace(folder=tmp_path)])
    assert section is not None
    assert "puredif" not in section.sections[0].pictures[0][0]
    assert gallery([run(finished)._replace(folder=tmp_path / "none")]) is None
    assert gallery([]) is None
