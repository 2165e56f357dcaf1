"""A run folder: resumable loops, results computed once, scalars and progress.

config.json        the configuration; another one is refused in the same folder
inputs.json        digests of the weights that were read; others are refused, too
metrics.jsonl      scalars of every loop
checkpoints/LOOP/  states; a loop goes on from the latest
results/NAME.npz   what `once` has computed
"""

from __future__ import annotations

import errno
import io
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from puredif_jax import npz, parallel
from puredif_jax.checkpoint import Checkpoints
from puredif_jax.files import write_whole
from puredif_jax.report import Metrics, progress
from puredif_jax.types import InputError

PLACE = ("workdir", "devices", "save_every")  # that do not change what a run finds
BEGUN = ("checkpoints", "results", "report.json")
PATIENCE = 60.0  # seconds in which a shared folder shows a file to every host


class RunError(InputError):
    """A run folder that cannot be used; says why."""


Advance = Callable[[Any, int, int], tuple[Any, Any]]


class Run:
    """The folder of one run. Whatever was done is found again after any interruption.

    Attributes:
      folder: where everything goes.
      mesh: the devices.
      save_every: seconds, at least, between two checkpoints of a loop.
    """

    def __init__(
        self, folder: str, config: Mapping[str, Any], mesh: Mesh, save_every: float
    ) -> None:
        """Opens or makes the folder.

        Raises:
          RunError: the folder holds a run with another configuration.
        """
        self.folder = pathlib.Path(folder)
        self.mesh = mesh
        self.save_every = save_every
        is_run(self.folder, config)
        if parallel.is_host_zero():
            make_folder(self.folder)
            path, text = self.folder / "config.json", json.dumps(config, indent=2)
            if not path.exists() or path.read_text() != text:
                write_whole(path, text.encode())
        self.metrics = Metrics(self.folder)

    def loop(
        self,
        stage: str,
        advance: Advance,
        begin: Callable[[], Any],
        shapes: Any,
        total: int,
        chunk: int,
    ) -> Any:
        """Advances a state to step `total`, from the latest checkpoint on.

        Args:
          stage: name of the loop, of its checkpoints and its scalars.
          advance: (state, start, stop) -> (state, info): steps start..stop-1; info is
            a NamedTuple of scalars with a leading axis of steps. The state's arrays
            may be donated.
          begin: makes the state at step 0; not called where there is a checkpoint.
          shapes: that state as a tree of `jax.ShapeDtypeStruct`.
          total: steps to reach.
          chunk: steps of a call of `advance`. Calls begin at multiples of it, so that
            a resumed run dispatches the same programs.

        Returns:
          The state at step `total`.

        Raises:
          Stopped: a SIGTERM came; what was done is stored.
        """
        with Checkpoints(self.folder / "checkpoints" / stage) as checkpoints:
            start = parallel.agreed(checkpoints.latest() or 0)
            saved = time.monotonic()
            if start:
                state = checkpoints.restore(start, self.place(shapes))
            else:
                state = self.replicate(begin())
            if parallel.is_host_zero():
                self.metrics.rewind(stage, start)
            with progress(total, start, stage, parallel.is_host_zero()) as bar:
                while start < total:
                    stop = min((start // chunk + 1) * chunk, total)
                    began = time.perf_counter()
                    state, info = advance(state, start, stop)
                    columns = {k: parallel.gather(v) for k, v in info._asdict().items()}
                    seconds = time.perf_counter() - began
                    told = parallel.must_stop()
                    late = time.monotonic() - saved >= self.save_every
                    if told or stop == total or parallel.agreed(late):
                        checkpoints.save(stop, state)
                        saved = time.monotonic()
                    if parallel.is_host_zero():
                        means = {k: np.asarray(v).mean(0) for k, v in columns.items()}
                        self.metrics.write(stage, stop, seconds=seconds, **means)
                        bar.set_postfix(loss=f"{float(np.min(means['loss'])):.4g}")
                    bar.update(stop - start)
                    start = stop
                    parallel.safe_point(told)
        return state

    def once(
        self, name: str, compute: Callable[[], Mapping[str, Any]]
    ) -> dict[str, np.ndarray]:
        """The arrays of `compute`, or those it gave in an earlier, interrupted call.

        Raises:
          RunError: process 0 sees those and this one does not, for a minute; or their
            file is damaged.
        """
        path = self.folder / "results" / f"{name}.npz"
        if not parallel.agreed(path.exists()):
            arrays = {k: np.asarray(v) for k, v in compute().items()}
            if not parallel.is_host_zero():
                return arrays
            path.parent.mkdir(exist_ok=True)
            file = io.BytesIO()
            np.savez(file, **arrays)  # type: ignore[arg-type]
            write_whole(path, file.getvalue())
        _wait_for(path)
        try:
            return npz.read(path)
        except npz.NpzError as error:
            raise RunError(
                f"{path} {error}: remove it, and the same command computes it again"
            ) from error

    def place(self, shapes: Any) -> Any:
        """A tree of shapes on all devices, as `Checkpoints.restore` takes it."""
        everywhere = parallel.replicated(self.mesh)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
            shapes,
        )

    def replicate(self, tree: Any) -> Any:
        """Puts a tree of host arrays on all devices."""
        return parallel.put(tree, parallel.replicated(self.mesh))


def make_folder(folder: pathlib.Path) -> None:
    """Makes a folder, unless there is one.

    Raises:
      RunError: it cannot be made, or cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise RunError(
            f"{folder} is no folder that can be written to ({error.strerror}): give "
            "another --config.workdir"
        ) from error


def is_run(folder: pathlib.Path, config: Mapping[str, Any]) -> bool:
    """Whether a folder holds a run of this configuration; False if it holds none.

    Where the run lies and how many devices it has may change while it goes on, and by
    which detector it is judged. A configuration under which nothing was begun, for
    what it names was wrong, binds nothing.

    Raises:
      RunError: it holds a run of another one, or a file that is no configuration.
    """
    path = folder / "config.json"
    if not path.exists():
        return False
    try:
        found = dict(json.loads(path.read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise RunError(
            f"{path} is not the configuration of a run: give another --config.workdir"
        ) from error
    changed = _changed(_binding(found), _binding(config))
    if changed and not any((folder / part).exists() for part in BEGUN):
        return False
    if changed:
        raise RunError(
            f"{folder} holds a run with another {changed}: give another "
            "--config.workdir, or remove the folder to start again"
        )
    return True


def report_of(folder: pathlib.Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The report of a run, if it has one by the detector of this configuration."""
    path = folder / "report.json"
    if not path.exists():
        return None
    report: dict[str, Any] = json.loads(path.read_text())
    return report if _detector(report["config"]) == _detector(config) else None


def _detector(config: Mapping[str, Any]) -> Any:
    return (config.get("audit") or {}).get("detector")


def _binding(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration decides what is computed."""
    kept = {k: v for k, v in config.items() if k not in PLACE}
    if isinstance(audit := kept.get("audit"), dict):
        kept["audit"] = {k: v for k, v in audit.items() if k != "detector"}
    return kept


def pin(folder: pathlib.Path, digests: Mapping[str, str]) -> None:
    """Notes which inputs, by name, a run is of, or sees that they are still the same.

    Raises:
      RunError: the run has begun with others.
    """
    path = folder / "inputs.json"
    begun = any((folder / part).exists() for part in BEGUN)
    if not (begun and path.exists()):
        if parallel.is_host_zero():
            write_whole(path, json.dumps(dict(digests), indent=2).encode())
        return
    old = json.loads(path.read_text())
    for name, digest in digests.items():
        if old.get(name, digest) != digest:
            raise RunError(
                f"{folder} holds a run of another version of {name}: give another "
                "--config.workdir, or remove the folder to start again"
            )


def _wait_for(path: pathlib.Path) -> None:
    """A shared folder may show a file to one host later than to another."""
    end = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() >= end:
            raise RunError(
                f"{path} is there for process 0, but not for process "
                f"{jax.process_index()}: all need the same --config.workdir"
            )
        time.sleep(0.1)


def _changed(old: Any, new: Any, where: str = "configuration") -> str:
    """The dotted path of the first difference, or ''."""
    new = json.loads(json.dumps(new))
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            path = key if where == "configuration" else f"{where}.{key}"
            if key not in old or key not in new:
                return path
            found = _changed(old[key], new[key], path)
            if found:
                return found
        return ""
    return "" if old == new else where
