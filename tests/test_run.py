"""Loops of a run: when they store, where they go on, who decides."""

import errno
import json
import os
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puredif_jax import parallel, run, sealed
from puredif_jax.checkpoint import Checkpoints
from puredif_jax.run import Run, RunError


class Info(NamedTuple):
    loss: jax.Array


class Broken(Exception):
    """What a power cut would be."""


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="file/x is no folder .*Not a directory"):
        run.make_folder(tmp_path / "file" / "x")

    def read_only(dir):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(run.tempfile, "TemporaryFile", read_only)
    with pytest.raises(RunError, match="Read-only file system.*--config.workdir"):
        run.make_folder(tmp_path)


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
    assert run.is_run(tmp_path, AUDIT) and run.is_run(tmp_path, OTHER_DETECTOR)
    assert run.report_of(tmp_path, AUDIT) is None
    (tmp_path / "report.json").write_text(json.dumps(sealed.seal({"config": AUDIT})))
    found = run.report_of(tmp_path, AUDIT)
    assert found is not None and found["config"] == AUDIT
    assert run.report_of(tmp_path, OTHER_DETECTOR) is None


def count(
    folder: pathlib.Path, save_every: float, fail_at: int | None = None, total: int = 10
) -> tuple[list[int], int]:
    """Adds up 0..total - 1, two steps a call; where each began, and the sum."""
    began = []

    def advance(state, start, stop):
        if start == fail_at:
            raise Broken
        began.append(start)
        steps = jnp.arange(start, stop, dtype=jnp.int32)
        return state + steps.sum(), Info(steps.astype(jnp.float32))

    here = Run(str(folder), {}, parallel.make_mesh(1), save_every)
    zero = jax.ShapeDtypeStruct((), np.int32)
    found = here.loop("count", advance, lambda: np.int32(0), zero, total, 2)
    return began, int(found)


@pytest.mark.parametrize(
    "save_every,again", [(0.0, [6, 7, 8]), (1e9, [0, 1, 2, 4, 6, 8])]
)
def test_a_loop_goes_on_from_what_was_due_to_be_stored(tmp_path, save_every, again):
    """Its first call is of one step, for nobody knows how long that takes."""
    with pytest.raises(Broken):
        count(tmp_path, save_every, fail_at=6)
    assert count(tmp_path, save_every) == (again, 45)
    assert count(tmp_path, save_every) == ([], 45), "the last step is always stored"


def test_a_call_lasts_some_seconds_and_the_scalars_are_those_of_whole_chunks(
    tmp_path, monkeypatch
) -> None:
    for longest, began in ((1e9, [0, 1, 2, 4, 6, 8]), (0.0, list(range(10)))):
        monkeypatch.setattr(run, "LONGEST", longest)
        folder = tmp_path / str(longest)
        assert count(folder, 1e9) == (began, 45)
        rows = run.Metrics(folder).read("count")
        np.testing.assert_array_equal(rows["step"], [2, 4, 6, 8, 10])
        np.testing.assert_array_equal(rows["loss"], [0.5, 2.5, 4.5, 6.5, 8.5])


def test_calls_end_at_multiples_of_a_chunk_wherever_a_loop_goes_on(tmp_path) -> None:
    """So that the scalars are those of a run that was not interrupted."""
    assert count(tmp_path, 1e9, total=5) == ([0, 1, 2, 4], 10)
    assert count(tmp_path, 1e9) == ([5, 6, 8], 45)


def test_a_stop_stores_whatever_the_time(tmp_path, monkeypatch) -> None:
    asked = iter([False, False, True])
    monkeypatch.setattr(parallel, "must_stop", lambda: next(asked))
    with pytest.raises(parallel.Stopped):
        count(tmp_path, 1e9)
    with Checkpoints(tmp_path / "checkpoints" / "count") as checkpoints:
        assert checkpoints.steps() == [4]
    monkeypatch.undo()
    assert count(tmp_path, 1e9) == ([4, 5, 6, 8], 45)


def test_process_0_decides_what_is_done(tmp_path, monkeypatch) -> None:
    here = Run(str(tmp_path), {}, parallel.make_mesh(1), 0.0)
    first = here.once("three", lambda: {"x": np.arange(3)})
    np.testing.assert_array_equal(first["x"], [0, 1, 2])
    np.testing.assert_array_equal(here.once("three", dict)["x"], [0, 1, 2])
    monkeypatch.setattr(parallel, "agreed", lambda number: 1)
    monkeypatch.setattr(run, "PATIENCE", 0.0)
    with pytest.raises(RunError, match="four.npz is there for process 0, but not for"):
        here.once("four", dict)
