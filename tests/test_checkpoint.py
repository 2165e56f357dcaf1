"""Checkpoints and weight files: round trips, misfits, damage and sudden death."""

import json
import logging
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import fuzz_checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from absl import logging as absl_logging

from puredif_jax.attacks.training import TrainState
from puredif_jax.files.whole import WriteError
from puredif_jax.runs import checkpoint, parallel, weight_file
from puredif_jax.runs.checkpoint import CheckpointError, Checkpoints
from puredif_jax.types import InputError

ROOT = Path(__file__).parents[1]


def train_state(value: float = 1.0) -> TrainState:
    """A small state of all kinds of leaves."""
    params = {"dense": {"bias": jnp.zeros(3), "kernel": jnp.full((2, 3), value)}}
    return TrainState(
        params=params,
        ema_params=jax.tree.map(lambda x: x + 1, params),
        opt_state=(
            {"flag": jnp.array([True]), "half": jnp.full(3, value, jnp.bfloat16)},
            [jnp.zeros((0, 2)), None, jax.random.key(1, impl="rbg")],
        ),
        key=jax.random.key(7),
        step=jnp.int32(5),
    )


def plain(tree):
    """The same tree with keys as their data."""

    def leaf(x):
        is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    return jax.tree.map(leaf, tree)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(plain(a), plain(b))


def one_sentence(error) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    return message


# --- Checkpoints ------------------------------------------------------------------


def test_round_trip(tmp_path):
    state = train_state()
    with Checkpoints(tmp_path / "new" / "run") as checkpoints:
        assert checkpoints.latest() is None and checkpoints.steps() == []
        checkpoints.save(3, state)
    with Checkpoints(tmp_path / "new" / "run") as checkpoints:
        assert checkpoints.latest() == 3
        restored = checkpoints.restore(3, checkpoint.abstract(state))
    assert_same(restored, state)
    assert checkpoint.abstract(restored) == checkpoint.abstract(state)
    np.testing.assert_array_equal(
        jax.random.normal(restored.key), jax.random.normal(state.key)
    )


@pytest.mark.parametrize(("keep", "steps"), [(1, [9]), (2, [4, 9]), (None, [0, 4, 9])])
def test_keeps_the_latest(tmp_path, keep, steps):
    with Checkpoints(tmp_path, keep) as checkpoints:
        for step in (0, 4, 9):
            checkpoints.save(step, {"x": jnp.float32(step)})
    with Checkpoints(tmp_path, keep=1) as checkpoints:  # opening removes nothing
        assert checkpoints.steps() == steps and checkpoints.latest() == 9


def test_leaves_a_step_alone_that_is_there(tmp_path):
    like = {"x": jax.ShapeDtypeStruct((), jnp.float32)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.float32(1)})
        checkpoints.save(1, {"x": jnp.float32(2)})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.float32(3)})
        assert checkpoints.restore(1, like)["x"] == 1


def sharded(mesh) -> dict:
    """One leaf split over devices, keys with it, and one leaf for all."""
    along = parallel.along(mesh, "batch")
    return {
        "trigger": parallel.put(np.arange(24, dtype=np.float32).reshape(8, 3), along),
        "key": parallel.put(jax.random.split(jax.random.key(1), 8), along),
        "step": parallel.put(np.int32(4), parallel.replicated(mesh)),
    }


@pytest.mark.parametrize("written", [8, 1])
@pytest.mark.parametrize("read", [4, 2, 1])
def test_restores_onto_another_mesh(tmp_path, written, read):
    state = sharded(parallel.make_mesh(written))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state)
    like = checkpoint.abstract(sharded(parallel.make_mesh(read)))
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(0, like)
    assert_same(restored, state)
    for name, leaf in restored.items():
        assert leaf.sharding.is_equivalent_to(like[name].sharding, leaf.ndim)


@pytest.mark.parametrize("written", [8, 1])
def test_restores_numpy_without_shardings(tmp_path, written):
    state = sharded(parallel.make_mesh(written))
    del state["key"]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state)
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        restored = checkpoints.restore(0, like)
    assert {type(x) for x in restored.values()} <= {np.ndarray}
    assert_same(restored, state)


def test_a_state_may_be_donated_after_save(tmp_path):
    mesh = parallel.make_mesh()
    state = {
        "split": parallel.put(
            np.ones((8, 999), np.float32), parallel.along(mesh, "batch")
        ),
        "whole": parallel.put(np.ones(9999, np.float32), parallel.replicated(mesh)),
    }
    expected = jax.tree.map(np.array, state)
    double = jax.jit(lambda x: jax.tree.map(lambda x: 2 * x, x), donate_argnums=0)
    with Checkpoints(tmp_path, keep=None) as checkpoints:
        for step in range(4):
            checkpoints.save(step, state)
            donated = double(state)  # jax 0.11 gives no memory away that was read
            state = jax.block_until_ready(double(donated))
            assert donated["whole"].is_deleted()
    like = checkpoint.abstract(state)
    with Checkpoints(tmp_path, keep=None) as checkpoints:
        for step in range(4):
            restored = checkpoints.restore(step, like)
            assert_same(restored, expected)
            expected = jax.tree.map(lambda x: 4 * x, expected)


def test_misfits_are_named(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        state = train_state()
        checkpoints.save(2, state)
        like = checkpoint.abstract(state)
        where = f"checkpoint {tmp_path}/2"

        def message(abstract):
            with pytest.raises(CheckpointError) as error:
                checkpoints.restore(2, abstract)
            return one_sentence(error)

        bias = {"dense": {**like.params["dense"]}}
        bias["dense"]["bias"] = jax.ShapeDtypeStruct((4,), jnp.float32)
        assert message(like.replace(params=bias)) == (
            f"{where} has params.dense.bias as float32[3], expected float32[4]"
        )
        assert message(like.replace(step=jax.ShapeDtypeStruct((), jnp.float32))) == (
            f"{where} has step as int32[], expected float32[]"
        )
        data = jax.ShapeDtypeStruct((2,), jnp.uint32)
        assert "has key as key<fry>[], expected uint32[2]" in message(
            like.replace(key=data)
        )
        rbg = jax.eval_shape(lambda: jax.random.key(0, impl="rbg"))
        assert "expected key<rbg>[]" in message(like.replace(key=rbg))
        renamed = {"dense": {"bias": like.params["dense"]["bias"], "weight": data}}
        assert message(like.replace(params=renamed)) == (
            f"{where} does not have the names expected: "
            "-params.dense.weight; +params.dense.kernel"
        )
        many = {f"{i}": data for i in range(30)}
        assert message(like.replace(params=many)).endswith(
            "-params.12, 25 more; +params.dense.bias, +params.dense.kernel"
        )


def test_missing_foreign_and_damaged_checkpoints(tmp_path):
    state = {"x": jnp.arange(1000.0)}
    like = checkpoint.abstract(state)
    with Checkpoints(tmp_path / "ours") as checkpoints:
        with pytest.raises(CheckpointError, match="there is no checkpoint .*ours/0"):
            checkpoints.restore(0, like)
        checkpoints.save(0, state)
    with ocp.CheckpointManager(tmp_path / "foreign") as manager:
        manager.save(0, args=ocp.args.StandardSave(state))
    with Checkpoints(tmp_path / "foreign") as checkpoints:
        with pytest.raises(CheckpointError, match="damaged or not ours") as error:
            checkpoints.restore(0, like)
        one_sentence(error)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        Checkpoints(tmp_path / "file")

    harmed = 0
    files = [x for x in (tmp_path / "ours" / "0").rglob("*") if x.is_file()]
    for file in files:
        content = file.read_bytes()
        for cut in (b"", content[: len(content) // 2]):
            file.write_bytes(cut)
            with Checkpoints(tmp_path / "ours") as checkpoints:
                try:
                    restored = checkpoints.restore(0, like)
                except CheckpointError:
                    harmed += 1
                else:
                    assert_same(restored, state)
        file.write_bytes(content)
    assert harmed >= 4


def test_what_a_killed_run_leaves_does_no_harm(tmp_path):
    like = {"x": jax.ShapeDtypeStruct((), jnp.float32)}
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"x": jnp.float32(step)})
    # An unfinished save of step 3, and an unfinished removal of step 1.
    shutil.copytree(tmp_path / "2", tmp_path / "3.orbax-checkpoint-tmp")
    shutil.rmtree(tmp_path / "1" / "arrays")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 2
        assert checkpoints.restore(2, like)["x"] == 2
        checkpoints.save(3, {"x": jnp.float32(33)})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [2, 3]
        assert checkpoints.restore(3, like)["x"] == 33


@pytest.mark.usefixtures("standard_promotion")
def test_a_training_survives_damage_to_what_it_has_stored(tmp_path):
    """A few of tests/fuzz_checkpoints.py, drawn by the clock."""
    seed = time.time_ns()
    print(f"damages drawn by {seed}")  # shown if it fails
    table = fuzz_checkpoints.fuzz(tmp_path, 5, seed, print)
    assert fuzz_checkpoints.good(table) == 5, table


def test_what_is_not_a_whole_checkpoint_of_its_step_is_set_aside(tmp_path, caplog):
    """Damaged, foreign, of another step or of other leaves: the one before is taken."""
    like = {"x": jax.ShapeDtypeStruct((), jnp.float32)}
    with Checkpoints(tmp_path, keep=None) as checkpoints:
        assert checkpoints.restore_last(like) is None
        checkpoints.save(1, {"x": jnp.float32(1)})
        checkpoints.save(2, {"x": jnp.float32(2)})
        checkpoints.save(3, {"y": jnp.float32(3)})
    shutil.copytree(tmp_path / "2", tmp_path / "4")
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(5, args=ocp.args.StandardSave({"x": jnp.float32(5)}))
    (tmp_path / "6").mkdir()
    with Checkpoints(tmp_path, keep=None) as checkpoints:
        step, state = checkpoints.restore_last(like, most=4)
        assert (step, state["x"]) == (2, 2)
        assert checkpoints.steps() == [1, 2, 5, 6], "later ones are left alone"
        step, state = checkpoints.restore_last(like)
        assert (step, state["x"]) == (2, 2)
        assert "6 is damaged or not ours: it is kept as 6.damaged" in caplog.text
        assert "step 2 is taken instead; steps lost: 4" in caplog.text
        checkpoints.save(3, {"x": jnp.float32(33)})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1, 2, 3]
        assert checkpoints.restore_last(like)[1]["x"] == 33
    shutil.copytree(tmp_path / "2", tmp_path / "4")
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore_last(like)
    names = {p.name for p in tmp_path.iterdir()}
    assert {"4.damaged", "4.damaged1"} <= names


@pytest.mark.parametrize(
    "error,words",
    [
        (MemoryError(), "cannot be read .MemoryError"),
        (PermissionError(13, "no"), "cannot be read .Permission denied"),
        (ValueError("x [os_error_code='24']"), "cannot be read .Too many open files"),
    ],
)
def test_a_checkpoint_that_is_not_to_blame_stays(tmp_path, monkeypatch, error, words):
    like = {"x": jax.ShapeDtypeStruct((), jnp.float32)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.float32(1)})

    def refuse(*args, **kwargs):
        raise error

    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "restore", refuse)
        with pytest.raises(InputError, match=words):
            checkpoints.restore_last(like)
        assert checkpoints.steps() == [1]


SMALL_DISK = """
import resource, sys, jax.numpy as jnp, numpy as np
from puredif_jax.runs.checkpoint import CheckpointError, Checkpoints
try:
    with Checkpoints(sys.argv[1]) as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros(9)})
        checkpoints._manager.wait_until_finished()
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        noise = np.random.default_rng(0).normal(size=30_000)
        checkpoints.save(2, {"x": jnp.asarray(noise)})
except CheckpointError as error:
    sys.exit(f"error: {error}")
"""


def test_a_save_that_the_system_refuses_is_one_sentence(tmp_path):
    """No traceback of a library; and the checkpoint before is whole."""
    done = subprocess.run(
        [sys.executable, "-c", SMALL_DISK, str(tmp_path)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"error: checkpoint {tmp_path}: ")
    assert "cannot be written (File too large)" in done.stderr
    like = {"x": jax.ShapeDtypeStruct((9,), jnp.float32)}
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_last(like)[0] == 1


SAVE_FOREVER = """
import sys, jax.numpy as jnp
from puredif_jax.runs.checkpoint import Checkpoints
with Checkpoints(sys.argv[1]) as checkpoints:
    step = 0
    while True:
        step += 1
        checkpoints.save(step, {str(i): jnp.full(5000, step) for i in range(20)})
        print(step, flush=True)
"""


def test_kill_in_the_middle_of_a_save(tmp_path):
    """Three processes that do nothing but save die at different moments."""
    draw = random.Random(0)
    environ = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    directories = [tmp_path / str(i) for i in range(3)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, str(directory)],
            env=environ,
            stdout=subprocess.PIPE,
        )
        for directory in directories
    ]
    try:
        for process in processes:
            while int(process.stdout.readline() or 99) < 3:
                pass
            time.sleep(draw.uniform(0, 0.2))
            process.send_signal(signal.SIGKILL)
            assert process.wait(10) == -signal.SIGKILL
    finally:
        for process in processes:
            process.kill()
            process.stdout.close()
            process.wait(10)
    like = {str(i): jax.ShapeDtypeStruct((5000,), jnp.int32) for i in range(20)}
    for directory in directories:
        with Checkpoints(directory) as checkpoints:
            step = checkpoints.latest()
            assert step >= 2  # step 3 had begun, so 2 was whole
            restored = checkpoints.restore(step, like)
            assert all((leaf == step).all() for leaf in restored.values())
            checkpoints.save(step + 1, {"x": jnp.zeros(3)})
        with Checkpoints(directory) as checkpoints:
            assert checkpoints.latest() == step + 1


def test_orbax_is_silent_and_others_are_not(tmp_path, caplog):
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.INFO)
    try:
        with caplog.at_level(logging.INFO), Checkpoints(tmp_path) as checkpoints:
            absl_logging.get_absl_logger().addHandler(caplog.handler)
            checkpoints.save(0, train_state())
            absl_logging.info("ours")
    finally:
        absl_logging.get_absl_logger().removeHandler(caplog.handler)
        absl_logging.set_verbosity(verbosity)
    assert {record.getMessage() for record in caplog.records} == {"ours"}


# --- Weights ----------------------------------------------------------------------

PARAMS = {
    "conv": {
        "kernel": np.arange(6, dtype=np.float32).reshape(2, 3).T,  # not contiguous
        "bias": np.ones(3, np.float32),
    },
    "scale": np.array(2, np.float32),
    "half": np.ones(2, jnp.bfloat16),
}


def write(path, tensors: dict, **kwargs) -> Path:
    path.write_bytes(safetensors.numpy.save(tensors, **kwargs))
    return path


def test_weights_round_trip(tmp_path):
    path = tmp_path / "weights.safetensors"
    weight_file.save_weights(path, PARAMS, {"old": "yes"})
    weight_file.save_weights(str(path), PARAMS, {"model": "UNet", "ü": "é"})
    assert weight_file.read_metadata(path) == {"model": "UNet", "ü": "é"}
    assert os.listdir(tmp_path) == ["weights.safetensors"]
    loaded = weight_file.load_weights(path, PARAMS)
    assert_same(loaded, PARAMS)
    assert {type(x) for x in jax.tree.leaves(loaded)} == {np.ndarray}
    content = path.read_bytes()
    names = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    assert set(names) == {
        "__metadata__", "conv.bias", "conv.kernel", "half", "scale"
    }  # fmt: skip
    weight_file.save_weights(path, jax.tree.map(jnp.asarray, PARAMS), {})
    assert_same(weight_file.load_weights(path, PARAMS), PARAMS)
    assert weight_file.read_metadata(path) == {}


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_weights_are_written_whole_or_not_at_all(tmp_path, monkeypatch, broken):
    path = tmp_path / "w.safetensors"
    weight_file.save_weights(path, PARAMS, {})
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(WriteError, match="cannot be written .disk full."):
        weight_file.save_weights(path, {"other": np.zeros(3)}, {})
    assert os.listdir(tmp_path) == [path.name] and path.read_bytes() == before


def test_only_process_zero_writes_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    weight_file.save_weights(tmp_path / "w", PARAMS, {})
    assert os.listdir(tmp_path) == []


def test_weights_of_a_training_run(tmp_path):
    state = train_state()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        weight_file.load_weights(tmp_path, state.params)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.save(2, train_state(4.0))
    loaded = weight_file.load_weights(tmp_path, state.params)
    assert_same(loaded, train_state(4.0).ema_params)
    assert {type(x) for x in jax.tree.leaves(loaded)} == {np.ndarray}
    with pytest.raises(CheckpointError, match=r"-ema_params.x; \+ema_params.dense"):
        weight_file.load_weights(tmp_path, {"x": np.zeros(3)})


def test_weights_that_do_not_fit(tmp_path):
    path = tmp_path / "w.safetensors"
    like = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(2, np.float32)}
    a, b = like.values()

    def message(tensors):
        write(path, tensors)
        with pytest.raises(CheckpointError) as error:
            weight_file.load_weights(path, like)
        return one_sentence(error).removeprefix(f"{path} ")

    names = "does not have the names expected"
    assert message({"a": a}) == f"{names}: -b"
    assert message({"a": a, "b": b, "c": b}) == f"{names}: +c"
    assert message({"a": a, "B": b}) == f"{names}: -b; +B"
    expected = "expected float32[2, 3]"
    assert message({"a": a.T.copy(), "b": b}) == f"has a as float32[3, 2], {expected}"
    half = a.astype(jnp.bfloat16)
    assert message({"a": half, "b": b}) == f"has a as bfloat16[2, 3], {expected}"
    for value in (np.nan, np.inf, -np.inf):
        bad = np.array([0, value], np.float32)
        assert message({"a": a, "b": bad}) == "has NaN or infinity in b"


def test_arrays_of_another_shape_are_not_read(tmp_path):
    """A sparse file of 256 GiB, as a stranger might leave beside a model."""
    path, size = tmp_path / "truth.safetensors", 2**38
    entry = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    header = json.dumps({"a": entry}).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    with pytest.raises(CheckpointError, match=r"as float32\[\d+\], expected float32"):
        weight_file.load_weights(path, {"a": np.zeros((2, 3), np.float32)})


class Explosive:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_files_that_are_not_weights(tmp_path):
    path = tmp_path / "w.safetensors"
    whole = write(path, {"a": np.zeros(3, np.float32)}).read_bytes()

    def refused(content: bytes) -> None:
        path.write_bytes(content)
        for read in (
            weight_file.read_metadata,
            lambda p: weight_file.load_weights(p, {}),
        ):
            with pytest.raises(CheckpointError) as error:
                read(path)
            assert one_sentence(error).startswith(f"{path} is not a safetensors file")

    for length in (0, 5, 8, 20, len(whole) - 1):
        refused(whole[:length])
    refused(whole + b"x")
    refused((2**63).to_bytes(8, "little") + whole[8:])
    refused(b"PK\x03\x04" + bytes(100))
    refused(pickle.dumps({"a": Explosive(tmp_path / "made")}))
    assert not (tmp_path / "made").exists()
    with pytest.raises(CheckpointError, match="there is no file .*nowhere"):
        weight_file.load_weights(tmp_path / "nowhere", {})
    with pytest.raises(CheckpointError, match="there is no file .*nowhere"):
        weight_file.read_metadata(tmp_path / "nowhere")


def test_weights_of_which_a_bit_was_flipped_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    weight_file.save_weights(path, PARAMS, {})
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # another number, and a finite one
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged: its digest is another"):
        weight_file.load_weights(path, PARAMS)


def test_weights_are_the_same_bytes_whenever_they_are_written(tmp_path):
    written = set()
    for i in range(20):
        path = tmp_path / f"{i}.safetensors"
        weight_file.save_weights(path, PARAMS, {"b": "1", "a": "2", "c": "3"})
        written.add(path.read_bytes())
    assert len(written) == 1
