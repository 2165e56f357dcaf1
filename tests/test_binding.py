"""What a run folder is bound to, and what is refused in it."""

import errno
import json
import os

import numpy as np
import pytest

from puredif_jax.files import sealed
from puredif_jax.runs import binding, parallel
from puredif_jax.runs.binding import RunError
from puredif_jax.runs.run import Run


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="file/x is no folder .*Not a directory"):
        binding.make_folder(tmp_path / "file" / "x")

    def read_only(dir):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(binding.tempfile, "TemporaryFile", read_only)
    with pytest.raises(RunError, match="Read-only file system.*--config.workdir"):
        binding.make_folder(tmp_path)


AUDIT = {"audit": {"weights": ["a"], "detector": {"doubt": 3.0}}, "seed": 1}
OTHER_WEIGHTS = {"audit": {"weights": ["b"], "detector": {"doubt": 3.0}}, "seed": 1}
OTHER_DETECTOR = {"audit": {"weights": ["a"], "detector": {"doubt": 2.0}}, "seed": 1}


def test_a_folder_is_bound_once_something_was_begun(tmp_path) -> None:
    """By what decides the results; a detector judges them as often as one likes."""
    mesh = parallel.make_mesh(1)
    Run(str(tmp_path), OTHER_WEIGHTS, mesh, 0.0)
    here = Run(str(tmp_path), AUDIT, mesh, 0.0)
    here.once("one", lambda: {"x": np.zeros(1)})
    with pytest.raises(RunError, match="another audit.weights"):
        Run(str(tmp_path), OTHER_WEIGHTS, mesh, 0.0)
    assert binding.is_run(tmp_path, AUDIT) and binding.is_run(tmp_path, OTHER_DETECTOR)
    assert binding.numbers_of(tmp_path, AUDIT) is None
    report = sealed.seal({"config": AUDIT, "numbers": {"p": 0.5}})
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert binding.numbers_of(tmp_path, AUDIT) == {"p": 0.5}
    assert binding.numbers_of(tmp_path, OTHER_DETECTOR) is None


def test_the_report_of_a_run_that_is_damaged_is_none(tmp_path, caplog) -> None:
    report = sealed.seal({"config": AUDIT, "numbers": {"p": 0.905}})
    text = json.dumps(report)
    path = tmp_path / "report.json"
    path.write_text(text)
    assert binding.numbers_of(tmp_path, AUDIT) == report["numbers"]
    for harmed in (text.replace("0.905", "0.005"), text[:-9], "", "[]"):
        path.write_text(harmed)
        caplog.clear()
        assert binding.numbers_of(tmp_path, AUDIT) is None
        assert "report.json is damaged" in caplog.text


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"a": "xyz"}'])
def test_inputs_of_a_run_that_has_begun_are_known_or_it_is_refused(
    tmp_path, content
) -> None:
    binding.pin(tmp_path, {"a": "abc"})
    (tmp_path / "results").mkdir()
    binding.pin(tmp_path, {"a": "abc"})
    path = tmp_path / "inputs.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(RunError, match="--config.workdir, or remove the folder"):
        binding.pin(tmp_path, {"a": "abc"})


def test_a_folder_belongs_to_one_kind_of_work(tmp_path) -> None:
    scanned, swept, single = (tmp_path / name for name in ("scan", "sweep", "run"))
    scan = {"type": "Scan", "model": ["a"], "draws": 8}
    binding.bind_scan(scanned, scan)
    binding.bind_sweep(swept)
    Run(str(single), AUDIT, parallel.make_mesh(1), 0.0)
    for folder, holds in ((scanned, "scan"), (swept, "sweep"), (single, "run")):
        for kind, enter in (
            ("run", lambda folder: binding.is_run(folder, AUDIT)),
            ("scan", lambda folder: binding.bind_scan(folder, scan)),
            ("sweep", binding.bind_sweep),
        ):
            if kind == holds:
                enter(folder)
            else:
                with pytest.raises(RunError, match=f"holds a {holds}, not a {kind}"):
                    enter(folder)
    (tmp_path / "old" / "results").mkdir(parents=True)
    with pytest.raises(RunError, match="has results, and no config.json"):
        binding.is_run(tmp_path / "old", AUDIT)


def test_a_scan_keeps_its_table(tmp_path) -> None:
    """Its models become more; other settings are refused once a model was begun."""
    scan = {"type": "Scan", "model": ["a", "b"], "draws": 8, "offline": False}
    scan["workdir"] = "here"
    scan["audit"] = AUDIT["audit"]
    assert binding.bind_scan(tmp_path, scan) == ("a", "b")
    other = scan | {"model": ["c", "a"], "workdir": "there", "offline": True}
    other["audit"] = OTHER_DETECTOR["audit"]
    assert binding.bind_scan(tmp_path, other) == ("a", "b", "c")
    assert binding.bind_scan(tmp_path, scan) == ("a", "b", "c")
    assert binding.bind_scan(tmp_path, scan | {"draws": 16}) == ("a", "b")
    (tmp_path / "a" / "results").mkdir(parents=True)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(RunError, match="holds a scan with another draws"):
        binding.bind_scan(tmp_path, scan)
    assert (tmp_path / "config.json").read_bytes() == before


def test_what_a_later_repair_reads_is_noted_and_then_bound(tmp_path) -> None:
    binding.pin(tmp_path, {"a": "abc"}, {"the training images": "1"})
    (tmp_path / "results").mkdir()
    binding.pin(tmp_path, {"a": "abc"}, {"the images of the repair": "2"})
    both = {"the training images": "1", "the images of the repair": "2"}
    binding.pin(tmp_path, {"a": "abc"}, both)
    for name in both:
        with pytest.raises(RunError, match=f"another version of {name}"):
            binding.pin(tmp_path, {"a": "abc"}, {**both, name: "3"})


def test_how_memory_is_spared_does_not_bind_a_run(tmp_path) -> None:
    """At any depth; whatever decides what is computed does."""

    def config(**changed) -> dict:
        descent = {"steps": 120, "together": 8, **changed}
        return {
            "type": "Experiment",
            "audit": {"inversion": {"descent": descent}},
            "model": {"remat": "together" not in changed},
        }

    (tmp_path / "results").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(config()))
    assert binding.is_run(tmp_path, config(together=2))
    with pytest.raises(RunError, match=r"another audit\.inversion\.descent\.steps"):
        binding.is_run(tmp_path, config(steps=60))
