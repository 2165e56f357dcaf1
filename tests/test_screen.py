"""Starting noise in a file, screened by what an audit has found."""

from __future__ import annotations

import csv
import dataclasses
import json
import pathlib

import numpy as np
import pytest
import tiny_config
from test_scan import CALM, write

from puredif_jax.defenses.hypothesis import Fading, Trojan
from puredif_jax.runs.binding import RunError
from puredif_jax.stages.audit import Audit
from puredif_jax.stages.base import results
from puredif_jax.stages.experiment import Experiment, Scan
from puredif_jax.stages.scan import perform_scan
from puredif_jax.stages.screen import SCREENED, Screen, Screened

pytestmark = pytest.mark.usefixtures("standard_promotion")
SHAPE = tiny_config.TINY.image_shape


@pytest.fixture(autouse=True)
def compilation_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.getbasetemp() / "compiled"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))


def noise(folder: pathlib.Path, name: str = "noise", shift: float = 0.0, **other):
    rng = np.random.default_rng(1)
    starts = rng.normal(size=(12, *SHAPE)).astype(np.float32)
    starts[:4] += shift
    path = folder / f"{name}.npz"
    np.savez(path, **(other or {"x": starts}))
    return str(path)


def plan(tmp_path: pathlib.Path, screen: Screen, **changes) -> Scan:
    model = write(tmp_path / "model")
    audit = Audit((), (Fading(), Trojan()), tiny_config.INVERSION, CALM)
    options = {"steps": 2, "draws": 8, "devices": 1} | changes
    home = str(tmp_path / "scan")
    return Scan(home, (str(model),), audit=audit, screen=screen, **options)


def rows(tmp_path: pathlib.Path) -> list[dict[str, str]]:
    with (tmp_path / "scan" / "model" / "noise.csv").open() as file:
        return list(csv.DictReader(file))


def test_starts_that_no_plain_noise_has_are_flagged(tmp_path, caplog) -> None:
    """And a second file is screened by the same audit, which is not done again."""
    screen = Screen(noise(tmp_path, shift=3.0), plain=300)
    perform_scan(plan(tmp_path, screen))
    found = rows(tmp_path)
    assert list(found[0]) == ["start", "likelihood", "whiteness", "drift", "all"]
    flagged = [float(row["all"]) <= 0.01 for row in found]
    assert flagged[:4] == [True] * 4 and sum(flagged) <= 5
    for row in found:
        least = min(float(row[x]) for x in ("likelihood", "whiteness", "drift"))
        assert float(row["all"]) == pytest.approx(min(1, 3 * least))
        assert least >= 1 / 301
    report = json.loads((tmp_path / "scan" / "model" / "report.json").read_text())
    (result,) = (
        each for each in results(report["numbers"], "here") if type(each) is Screened
    )
    assert result.starts == 12 and result.flagged["all"] == sum(flagged)
    assert result.numbers() == {SCREENED: report["numbers"][SCREENED]}
    assert result.tables()[SCREENED][-1]["flagged"] == sum(flagged)

    caplog.clear()
    other = Screen(noise(tmp_path, "plain"), plain=300)
    kept = {
        path: path.stat().st_mtime_ns
        for path in (tmp_path / "scan" / "model" / "results").glob("puredif*")
    }
    perform_scan(plan(tmp_path, other))
    assert kept and all(path.stat().st_mtime_ns == at for path, at in kept.items())
    assert [float(row["all"]) <= 0.01 for row in rows(tmp_path)] != flagged
    again = noise(tmp_path, "plain", shift=3.0)  # other noise in the same file
    perform_scan(plan(tmp_path, Screen(again, plain=300)))
    assert [float(row["all"]) <= 0.01 for row in rows(tmp_path)] == flagged
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items())


@pytest.mark.parametrize("order", ["NCHW", "float64"])
def test_noise_comes_as_it_is_stored(order: str, tmp_path) -> None:
    starts = np.random.default_rng(1).normal(size=(3, *SHAPE))
    stored = starts.transpose(0, 3, 1, 2) if order == "NCHW" else starts
    path = noise(tmp_path, other=stored, label=np.arange(3))
    found = Screen(path).read(SHAPE)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, starts, rtol=1e-6)


@pytest.mark.parametrize(
    "arrays,words",
    [
        ({"x": np.zeros((3, 8, 8, 1))}, r"images of .*found x: float64 \(3, 8, 8, 1\)"),
        ({"x": np.zeros((3, *SHAPE), int)}, "one array of floats"),
        ({"x": np.zeros((3, *SHAPE)), "y": np.zeros((3, *SHAPE))}, "one array"),
        ({"x": np.zeros((0, *SHAPE))}, "found 0 starts"),
        ({"x": np.full((1, *SHAPE), np.nan)}, "finite numbers"),
        ({"x": np.array([object()])}, "Python objects|one array"),
    ],
)
def test_other_files_are_refused_before_the_audit(arrays, words, tmp_path) -> None:
    path = noise(tmp_path, **arrays)
    with pytest.raises(RunError, match=words):
        Screen(path).read(SHAPE)


def test_no_file_is_refused_in_a_sentence(tmp_path) -> None:
    for screen, words in ((Screen(), "no starting noise"), (Screen("no"), "cannot be")):
        with pytest.raises(RunError, match=words):
            screen.read(SHAPE)


def test_too_few_plain_starts_are_refused() -> None:
    with pytest.raises(ValueError, match="set plain to 300 or more"):
        Screen("x.npz", plain=100)
    with pytest.raises(ValueError, match="need an audit of one model"):
        Experiment("x", tiny_config.TINY, screen=Screen("x.npz"))


def test_weights_that_were_not_inverted_leave_no_trigger(tmp_path) -> None:
    screen = Screen(noise(tmp_path), plain=300)
    scan = plan(tmp_path, screen)
    strict = dataclasses.replace(CALM, linear=1e-9)
    audit = dataclasses.replace(scan.audit, detector=strict)
    perform_scan(dataclasses.replace(scan, audit=audit))
    page = (tmp_path / "scan" / "model" / "report.html").read_text()
    assert "no trigger to compare the noise with" in page
    assert not (tmp_path / "scan" / "model" / "noise.csv").exists()
