"""Resumable states of arrays and keys, stored by Orbax; nothing else stores by it.

Nothing is unpickled; what does not fit is named in one sentence before it is used.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from jax.experimental import multihost_utils

from puredif_jax.files.sealed import SEAL, digest
from puredif_jax.files.whole import shortened
from puredif_jax.types import InputError

Path = str | os.PathLike[str]

# Of these a checkpoint is as whole as it was: it is not to be set aside.
PASSING = (errno.EACCES, errno.EPERM, errno.ENOMEM, errno.EMFILE, errno.ENFILE)


class CheckpointError(InputError):
    """A checkpoint is missing, damaged or does not fit; says which and how."""


class _Entry(NamedTuple):
    """A leaf, and where it lies in the pack."""

    shape: list[int]
    dtype: str
    span: list[int]  # start and stop, in bytes
    impl: str | None  # of a typed key, which is stored as its data


def abstract(state: Any) -> Any:
    """Shape, dtype and sharding of every array: what `restore` is to return."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


class Checkpoints(contextlib.AbstractContextManager["Checkpoints"]):
    """The numbered checkpoints in a directory; a context manager.

    All processes share the directory, which is made if need be. Only the latest `keep`
    checkpoints stay, None keeps all. All leaves are packed into one array of bytes,
    since Orbax takes a millisecond or two for every array, however small. A list of the
    leaves lies beside it, with the SHA-256 of both. Leaves that are split over
    processes are gathered: the states of this package are whole on every device.

    Milliseconds for the train state of the package's network (620 arrays, 10 MB) on two
    CPU cores, by `benchmarks/checkpoints.py`: a save blocks the loop for 41 and is on
    the disk after 108, a restore takes 44. As Orbax lays out the same arrays of NumPy
    it is 75, 333 and 187; of JAX 194, 796 and 514.
    """

    def __init__(self, directory: Path, keep: int | None = 2) -> None:
        logging.getLogger("absl").addFilter(_not_orbax)
        self._path = os.path.abspath(directory)
        if os.path.isfile(self._path):
            raise CheckpointError(f"{self._path} is a file, not a directory")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            # Else a save whose directory cannot be made waits for it for minutes.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        with self._writing("the directory"):
            self._manager = ocp.CheckpointManager(self._path, options=options)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        with contextlib.suppress(*([CheckpointError] if error else [])):
            self.close()

    def wait(self) -> None:
        """Waits for the save under way; raises CheckpointError where it has failed."""
        with self._writing("the latest step"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the save under way; raises CheckpointError where it has failed."""
        with self._writing("the latest step"):
            self._manager.close()

    def steps(self) -> list[int]:
        """The steps that lie there, in order; one of them may be damaged."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The last of them; None without any."""
        latest: int | None = self._manager.latest_step()
        return latest

    def save(self, step: int, state: Any) -> None:
        """Copies a tree of arrays and keys to the host; writes in the background.

        A step that is there already is left alone. Whenever the program dies, a
        checkpoint is there whole or not at all. `state` may be donated right after.
        Raises CheckpointError where this save or the one before cannot be written.
        """
        if step in self._manager.all_steps():
            return
        arrays = named_leaves(state)
        leaves, pack, stop = {}, [np.zeros(0, np.uint8)], 0
        for name, x in arrays.items():
            impl = None
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                impl = str(jax.random.key_impl(x))
                arrays[name] = jax.random.key_data(x)
            leaves[name] = _Entry(list(x.shape), str(x.dtype), [0, 0], impl)
        for name, value in _gather(arrays).items():
            start, stop = stop, stop + value.nbytes
            leaves[name] = leaves[name]._replace(span=[start, stop])
            pack.append(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
        packed = np.concatenate(pack)
        layout = {"step": step, "leaves": leaves}
        args = ocp.args.Composite(
            arrays=ocp.args.PyTreeSave({"packed": packed}),
            layout=ocp.args.JsonSave(layout | {SEAL: _seal(layout, packed)}),
        )
        with self._writing(f"step {step}"):
            self._manager.save(step, args=args, force=True)

    def restore(self, step: int, abstract: Any) -> Any:
        """Reads one of the `steps()` onto the devices that `abstract` names.

        That is a tree of `jax.ShapeDtypeStruct`, see the function `abstract`. Its
        shardings need not be those that were saved; a leaf without one comes as NumPy.
        Raises CheckpointError if it is missing, damaged or holds other leaves, and
        InputError if memory or a permission is missing.
        """
        values = self.read(step, named_leaves(abstract), prefix="")
        return jax.tree.unflatten(jax.tree.structure(abstract), values)

    def read(self, step: int, wanted: Mapping[str, Any], prefix: str) -> list[Any]:
        """These leaves by name, in their order.

        They must be all whose names begin with the prefix. Raises as `restore`.
        """
        where = f"checkpoint {self._path}/{step}"
        if step not in self._manager.all_steps():
            raise CheckpointError(f"there is no {where}")
        numpy = {"packed": ocp.RestoreArgs(restore_type=np.ndarray)}
        args = ocp.args.Composite(
            layout=ocp.args.JsonRestore(),
            arrays=ocp.args.PyTreeRestore(numpy, restore_args=numpy),
        )
        try:
            read = self._manager.restore(step, args=args)
            layout, packed = read["layout"], read["arrays"]["packed"]
            told = layout.pop(SEAL)
            whole = layout["step"] == step and _seal(layout, packed) == told
            leaves = {name: _Entry(*row) for name, row in layout["leaves"].items()}
        except Exception as error:  # whatever damage leads Orbax to
            if isinstance(error, MemoryError) or _errno(error) in PASSING:
                raise InputError(f"{where} cannot be read ({_why(error)})") from error
            raise CheckpointError(f"{where} is damaged or not ours") from error
        if not whole:
            raise CheckpointError(f"{where} is damaged: its digest is another")
        leaves = {n: entry for n, entry in leaves.items() if n.startswith(prefix)}
        compare(where, list(leaves), leaves.__getitem__, wanted)
        return [_leaf(leaves[name], packed, x) for name, x in wanted.items()]

    def restore_last(
        self, abstract: Any, most: int | None = None
    ) -> tuple[int, Any] | None:
        """The last step that is whole, and its state; None without any.

        One that is damaged, or not ours, is named in the log and set aside, so that its
        step can be saved again.

        Args:
          abstract: as in `restore`.
          most: no later step counts.
        """
        steps = [s for s in self.steps() if most is None or s <= most]
        found = None
        bad: list[int] = []
        while found is None and (step := _first(steps[-1] if steps else -1)) >= 0:
            if step not in steps:
                raise InputError(
                    f"step {step} in {self._path} is there for process 0, but not for "
                    f"process {jax.process_index()}: all need the same folder"
                )
            steps = steps[: steps.index(step)]
            try:
                state = self.restore(step, abstract)
                why = ""
            except CheckpointError as error:
                why = str(error)
            if _everywhere(not why):
                found = step, state
            else:
                bad.append(step)
                aside = self._set_aside(step)
                absl_logging.warning("%s: it is kept as %s", why, aside)
        if bad:
            absl_logging.warning(
                "%s: %s",
                self._path,
                f"step {found[0]} is taken instead; steps lost: {bad[0] - found[0]}"
                if found
                else f"no step is whole; steps lost: {bad[0]}",
            )
        return found

    def _set_aside(self, step: int) -> str:
        """Gives a checkpoint a name that is none of a step; returns that."""
        names = (f"{step}.damaged{i or ''}" for i in itertools.count())
        name = next(n for n in names if not os.path.lexists(f"{self._path}/{n}"))
        if jax.process_index() == 0:
            with self._writing(f"step {step}"):
                os.replace(f"{self._path}/{step}", f"{self._path}/{name}")
        _everywhere(True)
        self._manager.reload()
        return name

    @contextlib.contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """Makes what goes wrong with a save a sentence about it."""
        try:
            yield
        except Exception as error:  # whatever Orbax and TensorStore make of it
            raise CheckpointError(
                f"checkpoint {self._path}: {what} cannot be written ({_why(error)}): "
                "those before it stay, and the same command goes on once that is mended"
            ) from error


def _not_orbax(record: logging.LogRecord) -> bool:
    """Keeps out what Orbax logs: its failures are exceptions, and become sentences."""
    return "/orbax/" not in record.pathname


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by name, such as "ema_params.conv_in.kernel", in the tree's order."""
    named = jax.tree.leaves_with_path(tree)
    name = jax.tree_util.keystr
    return {name(path, simple=True, separator="."): leaf for path, leaf in named}


def _leaf(entry: _Entry, packed: np.ndarray, like: Any) -> Any:
    """The leaf of this entry, on the devices of `like`."""
    value: Any = packed[slice(*entry.span)].view(
        np.uint32 if entry.impl else like.dtype
    )
    value = value.reshape(entry.shape + ([-1] if entry.impl else []))
    if like.sharding:
        put = jax.make_array_from_callback
        value = put(value.shape, like.sharding, value.__getitem__)
    return jax.random.wrap_key_data(value, impl=entry.impl) if entry.impl else value


def _gather(arrays: dict[str, Any]) -> dict[str, np.ndarray]:
    """All of them whole on this host; a collective where processes share some."""
    split = [
        name
        for name, x in arrays.items()
        if not (x.is_fully_addressable or x.is_fully_replicated)
    ]
    found = jax.device_get({n: x for n, x in arrays.items() if n not in split})
    gather = functools.partial(multihost_utils.process_allgather, tiled=True)
    return {n: gather(x) if n in split else found[n] for n, x in arrays.items()}


def _everywhere(true: bool) -> bool:
    """Whether it is true on every process; a collective."""
    if jax.process_count() == 1:
        return true
    return bool(multihost_utils.process_allgather(np.bool(true)).all())


def _first(number: int) -> int:
    """What process 0 says; a collective."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def _seal(layout: Mapping[str, Any], packed: np.ndarray) -> str:
    """The digest of a checkpoint; the layout as JSON has it."""
    text = json.dumps(layout, sort_keys=True).encode()
    return digest({"layout": np.frombuffer(text, np.uint8), "packed": packed})


def _errno(error: BaseException) -> int | None:
    """The system's number in an error, also in one of TensorStore."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"os_error_code='(\d+)'", str(error))
    return int(told[1]) if told else None


def _why(error: BaseException) -> str:
    """What the system has said, or the first line of the error."""
    if (number := _errno(error)) is not None:
        return os.strerror(number)
    return (str(error) or type(error).__name__).splitlines()[0]


def compare(
    where: str, names: list[str], found: Callable[[str], Any], wanted: Mapping[str, Any]
) -> None:
    """Raises CheckpointError unless names, shapes and dtypes agree.

    In its message "-" is what is missing, "+" what is too many.
    """
    missing = [f"-{name}" for name in wanted if name not in names]
    surplus = [f"+{name}" for name in names if name not in wanted]
    if missing or surplus:
        both = "; ".join(shortened(names) for names in (missing, surplus) if names)
        raise CheckpointError(f"{where} does not have the names expected: {both}")
    for name, leaf in wanted.items():
        has, want = (f"{x.dtype}{list(x.shape)}" for x in (found(name), leaf))
        if has != want:
            raise CheckpointError(f"{where} has {name} as {has}, expected {want}")
