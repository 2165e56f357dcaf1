"""Two processes with two CPU devices each, over loopback: the edge as on a pod."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from test_scan import write

ROOT = Path(__file__).parents[1]
SECONDS = 300

PROGRAM = """
import os, pathlib, signal, sys, time
import jax, numpy as np
from puredif_jax.runs import checkpoint, weight_file
from puredif_jax.runs import parallel

parallel.initialize(os.environ)
me, directory = jax.process_index(), sys.argv[1]
assert jax.process_count() == 2 and jax.device_count() == 4
assert parallel.is_host_zero() == (me == 0)
types = (jax.sharding.AxisType.Auto,) * 2
mesh = jax.make_mesh((2, 2), ("candidate", "batch"), types)
assert parallel.make_mesh().size == 4
try:
    parallel.make_mesh(1)
except ValueError as error:
    assert "4 devices" in str(error)
else:
    raise AssertionError("a mesh of one device on two processes")

# Put: this process has its own candidate only, and every device half of its batch.
x = np.arange(24, dtype=np.float32).reshape(4, 6)
split = parallel.put(x, parallel.along(mesh, "candidate", "batch"))
assert not split.is_fully_addressable and len(split.addressable_shards) == 2
for shard in split.addressable_shards:
    assert shard.data.shape == (2, 3)
    np.testing.assert_array_equal(shard.data, x[shard.index])
whole = parallel.put({"w": x}, parallel.replicated(mesh))
np.testing.assert_array_equal(whole["w"].addressable_data(0), x)
keys = jax.random.split(jax.random.key(2), 4)
placed = parallel.put(keys, parallel.along(mesh, "candidate"))
assert placed.shape == (4,) and not placed.is_fully_addressable

# Gather: all of it, as NumPy, on both.
found = parallel.gather({"split": split, "whole": whole["w"], "local": x})
for value in found.values():
    assert type(value) is np.ndarray
    np.testing.assert_array_equal(value, x)

# Memory: the least of all processes, so that all make the same programs.
parallel._free_memory = lambda: (9 - me) * 2**40
assert parallel.free_memory() == 8 * 2**40

# What one process sees is what all go by.
assert parallel.agreed(7 + me) == 7 and not parallel.agreed(me == 1)

# A mean over all devices, and draws that do not depend on the mesh.
mean = jax.jit(lambda x: (x**2).mean(), out_shardings=parallel.replicated(mesh))
np.testing.assert_allclose(parallel.gather(mean(split)), (x**2).mean(), rtol=1e-6)
shard = parallel.constrain(mesh, "candidate")
draw = lambda keys: jax.vmap(lambda k: jax.random.normal(k, (3,)))(keys)
drawn = jax.jit(lambda keys: shard(draw(keys)))(placed)
np.testing.assert_array_equal(parallel.gather(drawn), draw(keys))

# Save on this mesh, restore on another; a local array counts as everybody's.
local = jax.numpy.ones(2)
state = {"split": split, "key": placed, "ema_params": whole, "local": local}
with checkpoint.Checkpoints(directory) as checkpoints:
    for step in (1, 2, 3):
        checkpoints.save(step, state)
other = parallel.make_mesh()
like = checkpoint.abstract(state)
like["split"] = jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=parallel.along(other, "batch")
)
with checkpoint.Checkpoints(directory) as checkpoints:
    assert checkpoints.steps() == [2, 3]
    restored = checkpoints.restore(checkpoints.latest(), like)
assert {s.data.shape for s in restored["split"].addressable_shards} == {(1, 6)}
values = parallel.gather(
    {"split": restored["split"], "w": restored["ema_params"]["w"], "drawn": drawn}
)
np.testing.assert_array_equal(values["split"], x)
np.testing.assert_array_equal(values["w"], x)
again = jax.jit(lambda keys: shard(draw(keys)))(restored["key"])
np.testing.assert_array_equal(parallel.gather(again), values["drawn"])

# A damaged one is set aside by one process, for both.
if me == 0:
    for file in pathlib.Path(directory, "3", "layout").iterdir():
        file.write_bytes(b"")
jax.experimental.multihost_utils.sync_global_devices("damaged")
with checkpoint.Checkpoints(directory) as checkpoints:
    step, restored = checkpoints.restore_last(like)
    assert step == 2 and checkpoints.steps() == [2]
np.testing.assert_array_equal(parallel.gather(restored["split"]), x)

# Weights: one process writes, both read, also out of the checkpoint.
np.testing.assert_array_equal(weight_file.load_weights(directory, {"w": x})["w"], x)
weight_file.save_weights(os.path.join(directory, "w.safetensors"), whole, {})
jax.experimental.multihost_utils.sync_global_devices("written")
file = os.path.join(directory, "w.safetensors")
np.testing.assert_array_equal(weight_file.load_weights(file, {"w": x})["w"], x)

# A SIGTERM to one process stops both, at the same safe point.
parallel.stop_on_sigterm()
for _ in range(3):
    parallel.safe_point()
if me == 1:
    os.kill(os.getpid(), signal.SIGTERM)
passed = 3
try:
    while passed < 600:
        time.sleep(0.05)
        parallel.safe_point()
        passed += 1
except parallel.Stopped:
    print("process", me, "stopped after", passed)
print("process", me, "is done")
"""


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


FAILING = """
import os, sys
from puredif_jax.runs import parallel
from puredif_jax.stages import scan
from puredif_jax.stages.experiment import Scan
from puredif_jax.types import InputError

parallel.LOST = parallel.APART = 5
parallel.initialize(os.environ)
import jax

def perform_once(experiment, label, models):
    name = os.path.basename(experiment.workdir)
    if name == "both" or name == "one" and jax.process_index() == 1:
        raise (ZeroDivisionError if sys.argv[2] == "bug" else InputError)("as wanted")
    print("process", jax.process_index(), "agrees on", parallel.agreed(7), flush=True)
    return True

scan.perform_once = perform_once
folders = tuple(f"{sys.argv[1]}/{name}" for name in sys.argv[3:])
report, status = scan.perform_scan(Scan(f"{sys.argv[1]}/home", folders))
print("process", jax.process_index(), "ends with", status, flush=True)
"""


def run_two(tmp_path: Path, program: str, *arguments: str) -> tuple[list[int], str]:
    """The exit codes of two processes, and what both have said."""
    environ = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        "PYTHONPATH": str(ROOT),
        "PUREDIF_COORDINATOR": f"127.0.0.1:{free_port()}",
        "PUREDIF_NUM_PROCESSES": "2",
    }
    logs = [tmp_path / f"log{i}" for i in range(2)]
    processes = []
    for i, log in enumerate(logs):
        with log.open("w") as file:
            processes.append(
                subprocess.Popen(
                    [
                        sys.executable,
                        "-W",
                        "error",
                        "-c",
                        program,
                        *arguments,
                    ],
                    env={**environ, "PUREDIF_PROCESS_ID": str(i)},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
    timed_out = False
    try:
        for process in processes:
            process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        timed_out = True
    finally:
        for process in processes:
            process.kill()
            process.wait(10)
    codes = [process.returncode for process in processes]
    both = "\n".join(
        f"--- process {i}\n{log.read_text()}" for i, log in enumerate(logs)
    )
    assert not timed_out, both
    return codes, both


def test_two_processes(tmp_path):
    codes, both = run_two(tmp_path, PROGRAM, str(tmp_path / "run"))
    assert codes == [0, 0], both
    for i in range(2):
        assert f"process {i} is done" in both
    stops = re.findall(r"stopped after (\d+)", both)
    assert len(stops) == 2 and stops[0] == stops[1], both


@pytest.mark.parametrize("kind", ["bug", "input"])
def test_what_fails_on_both_is_the_model_s_and_the_scan_goes_on(tmp_path, kind):
    names = ("both", "whole")
    for seed, name in enumerate(names):
        write(tmp_path / name, seed)
    codes, said = run_two(tmp_path, FAILING, str(tmp_path), kind, *names)
    assert codes == [0, 0], said
    for i in range(2):
        assert f"process {i} agrees on 7" in said
        assert re.search(rf"process {i} ends with [^0]", said), said
    assert (tmp_path / "home" / "report.json").exists()


def test_what_fails_on_one_ends_both(tmp_path):
    """The other one would wait for it forever."""
    write(tmp_path / "one")
    codes, said = run_two(tmp_path, FAILING, str(tmp_path), "input", "one")
    assert 0 not in codes and "InputError: as wanted" in said, said
