"""Meshes, shardings and the start of several processes, on eight fake devices."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from puredif_jax import parallel

COMPLETE = {
    "PUREDIF_COORDINATOR": "127.0.0.1:1234",
    "PUREDIF_NUM_PROCESSES": "2",
    "PUREDIF_PROCESS_ID": "1",
}


@pytest.fixture
def calls(monkeypatch):
    """Arguments given to jax.distributed.initialize, which does nothing."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: calls.append(args))
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
    def fail():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(ValueError, match="set PUREDIF_COORDINATOR"):
        parallel.initialize({"PUREDIF_DISTRIBUTED": "1"})


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (None, (1, 8)),
        ({"candidate": 4, "batch": 2}, (4, 2)),
        ({"batch": 2, "candidate": 4}, (4, 2)),
        ({"candidate": -1, "batch": 2}, (4, 2)),
        ({"candidate": -1}, (8, 1)),
        ({"candidate": 8, "batch": -1}, (8, 1)),
        ({}, (1, 1)),
        ({"candidate": 1, "batch": 1}, (1, 1)),
    ],
)
def test_make_mesh(shape, expected):
    mesh = parallel.make_mesh(shape)
    assert mesh.axis_names == ("candidate", "batch")
    assert mesh.devices.shape == expected
    assert len(set(mesh.devices.flat)) == np.prod(expected)
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"candidate": 4}, "multiply to the 8 devices, found {'candidate': 4"),
        ({"candidate": 3, "batch": -1}, "multiply to the 8 devices"),
        ({"candidate": 16, "batch": -1}, "multiply to the 8 devices"),
        ({"candidate": 0, "batch": -1}, "above 0"),
        ({"candidate": -2, "batch": -4}, "above 0"),
        ({"candidate": -1, "batch": -1}, "one of them -1"),
        ({"model": 8}, "the axes of a mesh are candidate and batch, found model"),
    ],
)
def test_make_mesh_refuses(shape, message):
    with pytest.raises(ValueError, match=message):
        parallel.make_mesh(shape)


def test_put_gives_each_device_its_rows():
    mesh = parallel.make_mesh({"candidate": 4, "batch": 2})
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
    mesh = parallel.make_mesh({"candidate": 4, "batch": 2})
    keys = jax.random.split(jax.random.key(3), 4)
    placed = parallel.put(keys, parallel.along(mesh, "candidate"))
    assert placed.dtype == keys.dtype and placed.shape == (4,)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(1,)}
    draw = jax.vmap(lambda key: jax.random.normal(key, (3,)))
    np.testing.assert_array_equal(draw(placed), draw(keys))
    rbg = jax.random.key(1, impl="rbg")
    assert parallel.put(rbg, parallel.replicated(mesh)).dtype == rbg.dtype


def test_gather_returns_numpy():
    mesh = parallel.make_mesh({"candidate": 4, "batch": 2})
    x = np.arange(8, dtype=np.float32)
    tree = {"a": parallel.put(x, parallel.along(mesh, ("candidate", "batch"))), "b": x}
    for leaf in parallel.gather(tree).values():
        assert type(leaf) is np.ndarray
        np.testing.assert_array_equal(leaf, x)


def test_constrain_splits_a_batch_inside_jit():
    mesh = parallel.make_mesh({"candidate": 2, "batch": 4})
    shard = parallel.constrain(mesh, "batch")
    x = np.ones((8, 2, 2, 3), np.float32)
    y = jax.jit(lambda x: shard(x * 2))(x)
    assert {s.data.shape for s in y.addressable_shards} == {(2, 2, 2, 3)}
    np.testing.assert_array_equal(y, 2 * x)


def test_one_process_is_host_zero():
    assert parallel.is_host_zero()
