"""Loops of a run: when they store, where they go on, who decides."""

import pathlib
import threading
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puredif_jax.runs import parallel, run
from puredif_jax.runs.binding import RunError
from puredif_jax.runs.checkpoint import Checkpoints
from puredif_jax.runs.run import Run


class Info(NamedTuple):
    loss: jax.Array


class Broken(Exception):
    """What a power cut would be."""


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


def test_a_first_call_that_takes_long_is_said_to_compile(monkeypatch) -> None:
    monkeypatch.setattr(run, "QUIET", 0.0)
    said = threading.Event()
    monkeypatch.setattr(run.logging, "info", lambda text, what: said.set())
    with run.compiling("train", first=True):
        assert said.wait(10)
    said.clear()
    with run.compiling("train", first=False):
        assert not said.wait(0.05)


def harm(path: pathlib.Path) -> None:
    """Flips a bit in the middle of a file, or of every file of a folder."""
    for file in (path, *path.rglob("*")):
        if file.is_file():
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, caplog) -> None:
    """Named, with the steps lost; and an empty folder of a later step is in no way."""
    with pytest.raises(Broken):
        count(tmp_path, 0.0, fail_at=6)
    folder = tmp_path / "checkpoints" / "count"
    harm(folder / "6")
    (folder / "7").mkdir()
    assert count(tmp_path, 0.0) == ([4, 5, 6, 8], 45)
    assert f"checkpoint {folder}/6 is damaged" in caplog.text
    assert "step 4 is taken instead; steps lost: 3" in caplog.text
    assert (folder / "6.damaged").is_dir() and (folder / "7.damaged").is_dir()
    rows = run.Metrics(tmp_path).read("count")
    np.testing.assert_array_equal(rows["step"], [1, 2, 4, 5, 6, 8, 10])


def test_a_loop_without_a_whole_checkpoint_begins_again(tmp_path, caplog) -> None:
    with pytest.raises(Broken):
        count(tmp_path, 0.0, fail_at=4)
    folder = tmp_path / "checkpoints" / "count"
    for step in folder.iterdir():
        harm(step)
    assert count(tmp_path, 1e9) == ([0, 1, 2, 4, 6, 8], 45)
    assert "no step is whole; steps lost: 4" in caplog.text


def test_a_result_that_is_damaged_is_named_and_made_again(tmp_path, caplog) -> None:
    here = Run(str(tmp_path), {}, parallel.make_mesh(1), 0.0)
    here.once("one", lambda: {"x": np.arange(3)})
    harm(tmp_path / "results" / "one.npz")
    again = here.once("one", lambda: {"x": np.arange(4)})
    np.testing.assert_array_equal(again["x"], np.arange(4))
    assert "one.npz is damaged" in caplog.text
    np.testing.assert_array_equal(here.once("one", dict)["x"], np.arange(4))


def test_a_result_of_another_version_is_named_and_kept(tmp_path) -> None:
    """What it lacks is said; what is stored is not lost."""
    here = Run(str(tmp_path), {}, parallel.make_mesh(1), 0.0)
    here.once("found", lambda: {"x": np.zeros(2)})
    path = here.folder / "results" / "found.npz"
    with pytest.raises(RunError, match="has no y: it is of another version"):
        here.once("found", lambda: {"x": np.ones(2), "y": np.ones(1)}, ("x", "y"))
    assert path.exists()
    path.unlink()
    found = here.once("found", lambda: {"x": np.ones(2), "y": np.ones(1)}, ("x", "y"))
    assert set(found) == {"x", "y"} and found["x"].sum() == 2


def test_scalars_that_are_damaged_are_named_and_left_out(tmp_path, caplog) -> None:
    metrics = run.Metrics(tmp_path)
    for step in (1, 2, 3):
        metrics.write("x", step, seconds=float(step))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    for harmed in (lines[1].replace("2.0", "9.0"), "7", "[]", "{", '{"a": 1}'):
        path.write_text("\n".join([lines[0], harmed, lines[2], '{"torn']))
        caplog.clear()
        assert metrics.seconds("x") == 4
        np.testing.assert_array_equal(metrics.read("x")["step"], [1, 3])
        assert "line 2 is damaged" in caplog.text and "line 4" not in caplog.text
    metrics.rewind("x", 3)
    assert path.read_text().splitlines() == [lines[0], lines[2]]


def test_process_0_decides_what_is_done(tmp_path, monkeypatch) -> None:
    here = Run(str(tmp_path), {}, parallel.make_mesh(1), 0.0)
    first = here.once("three", lambda: {"x": np.arange(3)})
    np.testing.assert_array_equal(first["x"], [0, 1, 2])
    np.testing.assert_array_equal(here.once("three", dict)["x"], [0, 1, 2])
    monkeypatch.setattr(parallel, "agreed", lambda number: 1)
    monkeypatch.setattr(run, "PATIENCE", 0.0)
    with pytest.raises(RunError, match="four.npz is there for process 0, but not for"):
        here.once("four", dict)
