"""Meshes, shardings and the start of several processes, on eight fake devices."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from puredif_jax.runs import parallel
from puredif_jax.types import InputError

COMPLETE = {
    "PUREDIF_COORDINATOR": "127.0.0.1:1234",
    "PUREDIF_NUM_PROCESSES": "2",
    "PUREDIF_PROCESS_ID": "1",
}


def two_axes():
    """Eight devices as a mesh of four groups of two."""
    return jax.make_mesh((4, 2), ("candidate", "batch"), (AxisType.Auto,) * 2)


@pytest.fixture
def calls(monkeypatch):
    """Places given to jax.distributed.initialize, which does nothing."""
    calls = []
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *args, **_: calls.append(args)
    )
    return calls


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, []),
        ({"PUREDIF_DISTRIBUTED": "0", "PUREDIF_COORDINATOR": ""}, []),
        ({"PUREDIF_DISTRIBUTED": "1"}, [()]),
        (COMPLETE, [("127.0.0.1:1234", 2, 1)]),
    ],
)
def test_initialize_follows_the_environment(calls, environ, expected):
    parallel.initialize(environ)
    assert calls == expected


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            {"PUREDIF_COORDINATOR": "a:1"},
            "PUREDIF_COORDINATOR needs PUREDIF_NUM_PROCESSES, PUREDIF_PROCESS_ID",
        ),
        (
            {"PUREDIF_PROCESS_ID": "0", "PUREDIF_NUM_PROCESSES": "2"},
            "needs PUREDIF_COORDINATOR to be set",
        ),
        ({"PUREDIF_DISTRIBUTED": "yes"}, "must be 0 or 1, found 'yes'"),
        (COMPLETE | {"PUREDIF_DISTRIBUTED": "1"}, "unset"),
        (COMPLETE | {"PUREDIF_PROCESS_ID": "2"}, "found '2' of '2'"),
        (COMPLETE | {"PUREDIF_PROCESS_ID": "-1"}, "found '-1' of '2'"),
        (COMPLETE | {"PUREDIF_NUM_PROCESSES": "two"}, "found '1' of 'two'"),
    ],
)
def test_initialize_fails_loudly(calls, environ, message):
    with pytest.raises(ValueError, match=message):
        parallel.initialize(environ)
    assert not calls


def test_initialize_without_a_cluster_says_what_to_set(monkeypatch):
    def fail(**options):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(ValueError, match="set PUREDIF_COORDINATOR"):
        parallel.initialize({"PUREDIF_DISTRIBUTED": "1"})


@pytest.mark.parametrize(
    ("environ", "expected"),
    [({}, 2), ({"JAX_NUM_CPU_DEVICES": "3"}, 3), ({"JAX_NUM_CPU_DEVICES": "1"}, 1)],
)
def test_a_cpu_is_a_device_for_every_core(environ, expected):
    """Of three cores two: batches are halved more often than parted by three."""
    program = """
import os
os.sched_getaffinity = lambda _: {0, 2, 5}
import jax
from puredif_jax.runs import parallel
parallel.initialize(os.environ)
parallel.use_cores()
print(jax.local_device_count())
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environ,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) == expected


def test_devices_that_were_chosen_stay():
    parallel.use_cores()
    assert jax.local_device_count() == 8


@pytest.mark.parametrize(
    "error,words",
    [
        (RuntimeError("Unable to initialize backend 'tpu'\nmore"), "backend 'tpu'"),
        (AssertionError(), "it is not installed"),
    ],
)
def test_a_device_that_is_not_there_is_a_sentence(monkeypatch, error, words):
    assert parallel.describe_devices() == "8 x cpu"

    def absent():
        raise error

    monkeypatch.setattr(jax, "devices", absent)
    with pytest.raises(InputError, match=f"no device .*{words}.*JAX_PLATFORMS") as told:
        parallel.describe_devices()
    assert "\n" not in str(told.value)


def test_the_peak_of_memory_is_that_of_the_process():
    before, device = parallel.peak_memory()
    assert device is None, "a CPU has none of its own"
    block = np.ones(before + 2**26, np.uint8)  # touched, above the peak so far
    after, _ = parallel.peak_memory()
    assert len(block) <= after <= before + len(block) + 2**28


@pytest.mark.parametrize(("count", "expected"), [(0, 8), (8, 8), (3, 3), (1, 1)])
def test_make_mesh(count, expected):
    mesh = parallel.make_mesh(count)
    assert mesh.axis_names == ("batch",)
    assert mesh.devices.shape == (expected,)
    assert len(set(mesh.devices.flat)) == expected
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize("count", [-1, 9])
def test_make_mesh_refuses(count):
    with pytest.raises(ValueError, match=rf"0\.\.8, those at hand, found {count}"):
        parallel.make_mesh(count)


@pytest.mark.parametrize(
    ("count", "candidates", "samples"),
    [
        (1, 1, 1),  # all devices on the noise of one candidate
        (2, 1, 2),
        (8, 1, 8),
        (16, 2, 8),
        (12, 3, 8),  # two candidates to a device cannot share its batch: no split
    ],
)
def test_spread(count, candidates, samples):
    """What each of eight devices holds of [count, 8 samples, 3]."""
    mesh = parallel.make_mesh()
    spread = parallel.spread(mesh, count)

    def double(x):
        each = jax.vmap(lambda x: spread.noise(2 * x), spmd_axis_name=spread.axis)
        return each(spread.candidates(x))

    x = np.ones((count, 8, 3), np.float32)
    out = jax.jit(double)(x)
    assert {s.data.shape for s in out.addressable_shards} == {(candidates, samples, 3)}
    rows = jax.jit(lambda x: spread.candidates(2 * x))(x)
    assert {s.data.shape[0] for s in rows.addressable_shards} == {candidates}
    np.testing.assert_array_equal(out, 2 * x)


def test_put_gives_each_device_its_rows():
    mesh = two_axes()
    tree = {"x": np.arange(16, dtype=np.float32).reshape(8, 2), "n": np.int32(3)}
    rows = parallel.put(tree["x"], parallel.along(mesh, "candidate"))
    assert rows.sharding.spec == P("candidate")
    assert len(rows.addressable_shards) == 8
    for shard in rows.addressable_shards:
        assert shard.data.shape == (2, 2)
        np.testing.assert_array_equal(shard.data, tree["x"][shard.index])
    everywhere = parallel.put(tree, parallel.replicated(mesh))
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(everywhere))
    assert everywhere["n"].dtype == np.int32 and everywhere["n"].shape == ()


def test_put_of_keys_keeps_their_draws():
    mesh = two_axes()
    keys = jax.random.split(jax.random.key(3), 4)
    placed = parallel.put(keys, parallel.along(mesh, "candidate"))
    assert placed.dtype == keys.dtype and placed.shape == (4,)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(1,)}
    draw = jax.vmap(lambda key: jax.random.normal(key, (3,)))
    np.testing.assert_array_equal(draw(placed), draw(keys))
    rbg = jax.random.key(1, impl="rbg")
    assert parallel.put(rbg, parallel.replicated(mesh)).dtype == rbg.dtype


def test_gather_returns_numpy():
    mesh = two_axes()
    x = np.arange(8, dtype=np.float32)
    tree = {"a": parallel.put(x, parallel.along(mesh, ("candidate", "batch"))), "b": x}
    for leaf in parallel.gather(tree).values():
        assert type(leaf) is np.ndarray
        np.testing.assert_array_equal(leaf, x)


def test_constrain_splits_a_batch_inside_jit():
    mesh = parallel.make_mesh(4)
    shard = parallel.constrain(mesh, "batch")
    x = np.ones((8, 2, 2, 3), np.float32)
    y = jax.jit(lambda x: shard(x * 2))(x)
    assert {s.data.shape for s in y.addressable_shards} == {(2, 2, 2, 3)}
    np.testing.assert_array_equal(y, 2 * x)


def test_one_process_is_host_zero():
    assert parallel.is_host_zero()
