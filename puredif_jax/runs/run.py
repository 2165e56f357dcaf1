"""A run folder: resumable loops, results computed once, scalars and progress.

config.json        the configuration; another one is refused in the same folder
inputs.json        digests of the weights that were read; others are refused, too
numerics.json      platform, precision and versions; some others are refused, too
metrics.jsonl      scalars of every loop
checkpoints/LOOP/  states; a loop goes on from the latest that is whole
results/NAME.npz   what `once` has computed; computed again where it is damaged
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from puredif_jax.files.sealed import DamagedError, read_arrays, write_arrays
from puredif_jax.files.whole import write_whole, writing
from puredif_jax.runs import numerics, parallel
from puredif_jax.runs.binding import RunError, begun, is_run, make_folder
from puredif_jax.runs.checkpoint import Checkpoints
from puredif_jax.runs.report import Metrics, progress

PATIENCE = 60.0  # seconds in which a shared folder shows a file to every host
LONGEST = 3.0  # seconds of a dispatch, about, in which no signal is heard
QUIET = 5.0  # seconds after which a first call is said to compile

Advance = Callable[[Any, int, int], tuple[Any, Any]]


class Run:
    """The folder of one run. Whatever was done is found again after any interruption.

    Attributes:
      folder: where everything goes.
      about: the configuration, without the place.
      mesh: the devices.
      save_every: seconds, at least, between two checkpoints of a loop.
      metrics: the scalars of its loops.
    """

    def __init__(
        self, folder: str, config: Mapping[str, Any], mesh: Mesh, save_every: float
    ) -> None:
        """Opens or makes the folder.

        Raises:
          RunError: the folder holds a run with another configuration.
          NumericsError: it holds one made under settings that give other numbers.
        """
        self.folder = pathlib.Path(folder)
        self.about = {**config, "workdir": self.folder.name}
        self.mesh = mesh
        self.save_every = save_every
        is_run(self.folder, config)
        first = parallel.is_host_zero()
        if first:
            make_folder(self.folder)
        here = numerics.Numerics.here(mesh.size)
        numerics.record(self.folder, here, begun(self.folder), first)
        if first:
            path, text = self.folder / "config.json", json.dumps(config, indent=2)
            if not path.exists() or path.read_bytes() != text.encode():
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
        first: int = 0,
        remedy: str = "",
    ) -> Any:
        """Advances a state to step `total`, from the latest whole checkpoint on.

        A call of `advance` takes as many steps as last about `LONGEST` seconds, so that
        a signal is heard soon; results must not depend on where calls end.

        Args:
          stage: name of the loop, of its checkpoints and its scalars.
          advance: (state, start, stop) -> (state, info): steps start..stop-1; info is
            a NamedTuple of scalars with a leading axis of steps. Steps past
            stop - start mean nothing. The state's arrays may be donated.
          begin: makes the state at step `first`; not called where there is a later one.
          shapes: that state as a tree of `jax.ShapeDtypeStruct`.
          total: steps to reach.
          chunk: most steps of a call of `advance`, and the steps of a row of scalars.
          first: the step that the loop begins at.
          remedy: what to do where a loss is no finite number; "" goes on.

        Returns:
          The state at step `total`.

        Raises:
          Stopped: a SIGTERM came; what was done is stored.
          CheckpointError: a checkpoint cannot be written.
          RunError: a loss is no finite number, and there is a `remedy`.
        """
        with Checkpoints(self.folder / "checkpoints" / stage) as checkpoints:
            found = checkpoints.restore_last(self.place(shapes), total)
            if found is not None and found[0] >= first:
                start, state = found
            else:
                start, state = first, self.replicate(begin())
            saved = time.monotonic()
            host_zero = parallel.is_host_zero()
            if host_zero:
                self.metrics.rewind(stage, start)
            row = _Row()
            steps = 1  # of the next call
            with progress(total, start, stage, host_zero) as bar:
                while start < total:
                    stop = min(start + steps, (start // chunk + 1) * chunk, total)
                    began = time.perf_counter()
                    with compiling(stage, not row.calls):
                        state, info = advance(state, start, stop)
                        columns = parallel.gather(info._asdict())
                    seconds = time.perf_counter() - began
                    if remedy:
                        _require_finite(columns["loss"][: stop - start], start, remedy)
                    row.add(stop - start, seconds, columns)
                    steps = _fitting(seconds / (stop - start), chunk)
                    told = parallel.must_stop()
                    late = time.monotonic() - saved >= self.save_every
                    save = told or stop == total or parallel.agreed(late)
                    if save:
                        checkpoints.save(stop, state)
                        saved = time.monotonic()
                    if save or stop % chunk == 0:
                        scalars = row.take()
                        if host_zero:
                            self.metrics.write(stage, stop, **scalars)
                            loss = float(np.min(scalars["loss"]))
                            bar.set_postfix(loss=f"{loss:.4g}")
                    bar.update(stop - start)
                    start = stop
                    if told:
                        checkpoints.wait()  # a failure is named before the end is
                    parallel.safe_point(told)
        return state

    def once(
        self,
        name: str,
        compute: Callable[[], Mapping[str, Any]],
        fields: tuple[str, ...] = (),
    ) -> dict[str, np.ndarray]:
        """The arrays of `compute`, which an earlier, interrupted call may have stored.

        A damaged file of them is named in the log and made again.

        Args:
          name: of the file.
          compute: what it holds.
          fields: arrays that it must hold.

        Raises:
          RunError: process 0 sees them and this one does not, for a minute; or they are
            of a version of the program that had other fields.
          WriteError: they cannot be written.
        """
        path = self.folder / "results" / f"{name}.npz"
        if parallel.agreed(path.exists()):
            wait_for(path)
            found, why = None, ""
            try:
                found = read_arrays(path)
            except DamagedError as error:
                why = str(error)
            if parallel.agreed(found is not None):
                if found is None:
                    raise RunError(f"{why}, but not for process 0")
                if missing := [field for field in fields if field not in found]:
                    raise RunError(
                        f"{path} has no {' and no '.join(missing)}: it is of another "
                        "version of the program. Remove it, and it is made again"
                    )
                return {name: found[name] for name in fields or found}
            logging.warning("%s: it is computed again", why or path)
        arrays = {k: np.asarray(v) for k, v in compute().items()}
        if parallel.is_host_zero():
            with writing(path.parent):
                path.parent.mkdir(exist_ok=True)
            write_arrays(path, arrays)
        return arrays

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


class _Row:
    """Scalars of the steps since the last row that was written."""

    def __init__(self) -> None:
        self.calls = 0
        self._seconds = 0.0
        self._columns: list[dict[str, np.ndarray]] = []

    def add(self, steps: int, seconds: float, columns: Mapping[str, Any]) -> None:
        """Adds the scalars of a call: of each the first `steps` values."""
        self.calls += 1
        self._seconds += seconds
        self._columns.append({k: np.asarray(v)[:steps] for k, v in columns.items()})

    def take(self) -> dict[str, Any]:
        """Returns their means, and the seconds, and empties the row."""
        means = {
            name: np.concatenate([columns[name] for columns in self._columns]).mean(0)
            for name in self._columns[0]
        }
        scalars = {"seconds": self._seconds, **means}
        self._seconds, self._columns = 0.0, []
        return scalars


def _fitting(seconds: float, most: int) -> int:
    """How many steps of so many seconds a call takes; the same on every process."""
    return parallel.agreed(max(1, min(most, int(LONGEST / max(seconds, 1e-9)))))


@contextlib.contextmanager
def compiling(what: str, first: bool) -> Iterator[None]:
    """Says in the log that a first call compiles, where it takes some seconds."""
    text = "%s: its first call compiles, which can take minutes, or its steps are long"
    timer = threading.Timer(QUIET, logging.info, (text, what))
    timer.daemon = True
    if first:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _require_finite(losses: np.ndarray, start: int, remedy: str) -> None:
    """Raises RunError where a loss of the steps from `start` on is no finite number."""
    if not (finite := np.isfinite(losses)).all():
        step = start + int(np.argmin(finite)) + 1
        raise RunError(f"the loss of step {step} is no finite number: {remedy}")


def wait_for(path: pathlib.Path) -> None:
    """Waits for a file, which a shared folder may show to one host later.

    Raises:
      RunError: it is not there after a minute.
    """
    end = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() >= end:
            raise RunError(
                f"{path} is there for process 0, but not for process "
                f"{jax.process_index()}: all need the same --config.workdir"
            )
        time.sleep(0.1)
