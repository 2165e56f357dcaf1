"""Processes, devices and shardings: the only module that knows of them.

One program runs on every host. Values are made whole on each host by the same
seeds; `put` keeps the rows that belong to it and `gather` brings results back.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import pathlib
import resource
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import multihost

from puredif_jax.runs import signals
from puredif_jax.types import Array, InputError, Shard, unsharded

LOST = 30  # seconds without a sign of life after which a process counts as dead
APART = 60  # seconds that one may end before the others, which it else ends as well
EXPLICIT = ("PUREDIF_COORDINATOR", "PUREDIF_NUM_PROCESSES", "PUREDIF_PROCESS_ID")


class Stopped(Exception):
    """A SIGTERM has ended the program, and all that was done is stored."""


class _Asked:
    """How often `must_stop` was called."""

    times = 0


def stop_on_sigterm() -> None:
    """From now on a SIGTERM lets the program reach its next safe point first.

    With several processes JAX itself listens, and tells all of them.
    """
    signals.work(sigterm=jax.process_count() == 1)


def must_stop() -> bool:
    """Whether a SIGTERM came, to any of the processes; all must ask as often."""
    _Asked.times += 1
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point(_Asked.times)
    return signals.must_stop()


def safe_point(stop: bool | None = None) -> None:
    """Where a run may end without loss; all processes pass the same ones.

    Args:
      stop: what `must_stop` has said, where that was asked before.

    Raises:
      Stopped: a SIGTERM came, to any of the processes.
    """
    if must_stop() if stop is None else stop:
        raise Stopped("stopped by SIGTERM; the same command goes on from here")


def agreed(number: int) -> int:
    """What process 0 says: a collective, the same on every process.

    It is for what each process might see differently, such as a clock or a shared
    folder, where that decides which programs run.
    """
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def all_fail(what: str) -> bool:
    """Whether each process comes here within `LOST` seconds; asked where one failed.

    It is no collective of devices, since the others may be in the midst of one. Where
    they are not here, they wait for this process, and it must end. Then JAX ends them.

    Args:
      what: failed, the same on every process, and no other time.
    """
    barrier = multihost.get_barrier_sync_fn()  # nothing to wait for alone
    try:
        barrier(key=f"failed {what}", timeout_ms=1000 * LOST)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def initialize(environ: Mapping[str, str]) -> None:
    """Joins the other processes, if the environment says that there are any.

    Must come before anything that touches a device. Plain processes set the three
    variables of `EXPLICIT` (address:port of process 0, count, own number from 0);
    TPU pods, SLURM, Open MPI and Kubernetes set PUREDIF_DISTRIBUTED=1 and are
    detected. Without either, this does nothing. If a process dies, or fails alone, JAX
    ends all others within two minutes, with "another task died"; the same command goes
    on from what is stored.

    Raises:
      ValueError: a variable is missing or has no meaning, or no cluster is found.
    """
    given = {name: environ[name] for name in EXPLICIT if environ.get(name)}
    detect = environ.get("PUREDIF_DISTRIBUTED") or "0"
    if detect not in ("0", "1"):
        raise InputError(f"PUREDIF_DISTRIBUTED must be 0 or 1, found {detect!r}")
    if given and detect == "1":
        raise InputError(
            f"PUREDIF_DISTRIBUTED=1 detects the processes, so leave {', '.join(given)} "
            "unset, or the other way round"
        )
    if given:
        if missing := [name for name in EXPLICIT if name not in given]:
            raise InputError(
                f"{', '.join(given)} needs {', '.join(missing)} to be set as well"
            )
        address, count, number = given.values()
        if not (count.isdecimal() and number.isdecimal() and int(number) < int(count)):
            raise InputError(
                "PUREDIF_PROCESS_ID must lie in 0..PUREDIF_NUM_PROCESSES-1, "
                f"found {number!r} of {count!r}"
            )
        jax.distributed.initialize(
            address,
            int(count),
            int(number),
            heartbeat_timeout_seconds=LOST,
            shutdown_timeout_seconds=APART,
        )
    elif detect == "1":
        try:
            jax.distributed.initialize(
                heartbeat_timeout_seconds=LOST, shutdown_timeout_seconds=APART
            )
        except ValueError as error:
            raise InputError(
                "PUREDIF_DISTRIBUTED=1, but no TPU pod, SLURM, Open MPI or Kubernetes "
                f"job was detected; set {', '.join(EXPLICIT)} instead"
            ) from error


def use_cores() -> None:
    """Makes a CPU as many devices as this process may use cores: a power of two, to 8.

    XLA spreads only some operations over cores, devices share everything (docs/speed.md
    has figures). Does nothing where JAX_NUM_CPU_DEVICES or jax.config say how many, or
    where several processes may share the cores. Comes after `initialize` and before
    anything that touches a device.
    """
    chosen = getattr(jax.config, "jax_num_cpu_devices", -1)
    if chosen > 0 or jax.distributed.is_initialized():
        return
    affinity = getattr(os, "sched_getaffinity", None)  # what `taskset` leaves; Linux
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    devices = 2 ** int(math.log2(min(cores, 8)))
    jax.config.update("jax_num_cpu_devices", devices)


def describe_devices() -> str:
    """The number of devices and their kind; the first call that touches one.

    Raises:
      InputError: JAX finds none, or not the one that JAX_PLATFORMS names.
    """
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)  # what is absent
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:  # of a CUDA that is not installed
        asked = getattr(jax.config, "jax_platforms", None)
        said = str(error).partition("\n")[0] or "it is not installed"
        remedy = (
            f"JAX_PLATFORMS={asked} asks for it: unset that, or set it to cpu"
            if asked
            else "JAX_PLATFORMS=cpu does without"
        )
        raise InputError(f"JAX can use no device ({said}); {remedy}") from error
    kind = devices[0].device_kind
    named = "" if kind == devices[0].platform else f" ({kind})"
    return f"{len(devices)} x {devices[0].platform}{named}"


def make_mesh(count: int = 0) -> Mesh:
    """A mesh of the first `count` devices along the axis "batch"; 0 takes all.

    Raises:
      InputError: there are not so many, or several processes leave some out.
    """
    devices = jax.devices()
    if not 0 <= count <= len(devices):
        raise InputError(
            f"devices must lie in 0..{len(devices)}, those at hand, found {count}"
        )
    if jax.process_count() > 1 and count not in (0, len(devices)):
        raise InputError(
            f"several processes use all of their {len(devices)} devices: leave devices "
            f"at 0, found {count}"
        )
    devices = devices[: count or len(devices)]
    return jax.make_mesh(
        (len(devices),), ("batch",), axis_types=(AxisType.Auto,), devices=devices
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, P())


def along(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """Split over the named mesh axes, one for each leading array axis."""
    return NamedSharding(mesh, P(*axes))


def constrain(mesh: Mesh, *axes: str | None) -> Shard:
    """A function that holds an array to `along(mesh, *axes)` inside of jit.

    A length need not be a multiple of the devices.
    """
    sharding = along(mesh, *axes)
    return lambda x: jax.lax.with_sharding_constraint(x, sharding)


class Spread(NamedTuple):
    """How the candidates of an inversion, and the noise of each, lie on the devices.

    noise: constraint on the noise of one candidate, `[samples, ...]`.
    candidates: constraint on arrays with a row for each candidate, `[K, ...]`.
    axis: mesh axis of the candidates, the `spmd_axis_name` of a vmap over them.
    groups: of devices; each holds as many consecutive candidates.
    """

    noise: Shard = unsharded
    candidates: Shard = unsharded
    axis: str | None = None
    groups: int = 1


def spread(mesh: Mesh, count: int) -> Spread:
    """As many groups of devices as divide the candidates; in each, the noise is split.

    Candidates of one group are folded into one batch with their noise, so a group of
    several devices can split it for one candidate only: where a group gets more, each
    of its devices does all. Where both counts are powers of two it never comes to that.
    """
    groups = math.gcd(mesh.size, count)
    devices = mesh.devices.reshape(groups, -1)
    table = Mesh(devices, ("candidate", "batch"), axis_types=(AxisType.Auto,) * 2)
    splits = groups == count or devices.shape[1] == 1
    return Spread(
        constrain(table, "batch") if splits else unsharded,
        constrain(table, "candidate"),
        "candidate",
        groups,
    )


def put(tree: Any, sharding: NamedSharding) -> Any:
    """Global arrays out of values that every process holds whole.

    The tree holds NumPy arrays, JAX arrays of this process or typed keys, the same
    on every process; each device receives its part only, as `sharding` says.
    """

    def leaf(x: Any) -> Array:
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = leaf(jax.random.key_data(x))
            key: Array = jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
            return key
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(leaf, tree)


def gather(tree: Any) -> Any:
    """Every array whole, as NumPy, on every process; a collective operation."""

    def leaf(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            whole: np.ndarray = multihost_utils.process_allgather(x, tiled=True)
            return whole
        return np.asarray(x)

    return jax.tree.map(leaf, tree)


def free_memory() -> int:
    """Bytes that are free on any device: a collective, the same on every process.

    Programs are made by it, and processes that run different ones wait forever.
    """
    here = _free_memory()
    if jax.process_count() == 1:
        return here
    everywhere = multihost_utils.process_allgather(np.int32(here // 2**20))  # MiB
    return int(np.min(everywhere)) * 2**20


def _free_memory() -> int:
    """Free bytes on a device of this process; a CPU has its host's, or its cgroup's."""
    device = jax.local_devices()[0]
    if stats := device.memory_stats():
        return int(stats["bytes_limit"]) - int(stats["bytes_in_use"])
    groups = {  # a limit, what is used of it, and what of that are files, given up
        "/sys/fs/cgroup": ("max", "current", "inactive_file"),
        "/sys/fs/cgroup/memory": (
            "limit_in_bytes",
            "usage_in_bytes",
            "total_inactive_file",
        ),
    }
    free = [2**32]  # where the system does not tell
    with contextlib.suppress(OSError, ValueError):
        free = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, StopIteration):
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable"))
        free = [1024 * int(available.split()[1])]
    for folder, (limit, usage, cached) in groups.items():
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            most, used, stat = (
                pathlib.Path(f"{folder}/memory.{name}").read_text()
                for name in (limit, usage, "stat")
            )
            counts = dict(line.split() for line in stat.splitlines())
            free.append(int(most) - int(used) + int(counts.get(cached, 0)))
    return min(free) // len(jax.local_devices())


def peak_memory() -> tuple[int, int | None]:
    """Most bytes so far of this process on the host, and on a device of its own."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    host = peak if sys.platform == "darwin" else 1024 * peak
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    most = max(found.get("peak_bytes_in_use", 0) for found in stats)
    return host, most or None


def is_host_zero() -> bool:
    """Whether this process is the one that writes files and progress."""
    return jax.process_index() == 0
