"""Files of arrays: resumable states by Orbax, weights as safetensors, only here.

Nothing is unpickled; what does not fit is named in one sentence before it is used.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy

from puredif_jax.files import shortened, write_whole
from puredif_jax.types import InputError, Params

Path = str | os.PathLike


class CheckpointError(InputError):
    """A checkpoint is missing, damaged or does not fit; says which and how."""


class _Entry(NamedTuple):
    """A leaf, and where it lies in the pack; split over devices, it does not."""

    shape: list[int]
    dtype: str
    impl: str | None = None  # of a typed key, which is stored as its data
    span: list[int] | None = None  # start and stop, in bytes


def abstract(state: Any) -> Any:
    """Shape, dtype and sharding of every array: what `restore` is to return."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


class Checkpoints(contextlib.AbstractContextManager):
    """The numbered checkpoints in a directory; a context manager.

    All processes share the directory, which is made if need be. Only the latest `keep`
    checkpoints stay, None keeps all. Leaves that are the same on all devices are packed
    into one array of bytes, since Orbax takes a millisecond or two for every array,
    however small; a list of all leaves lies beside it.
    """

    def __init__(self, directory: Path, keep: int | None = 2) -> None:
        logging.getLogger("absl").addFilter(_not_orbax)
        self._path = os.path.abspath(directory)
        if os.path.isfile(self._path):
            raise CheckpointError(f"{self._path} is a file, not a directory")
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self._manager = ocp.CheckpointManager(self._path, options=options)

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Waits for the save under way; raises what went wrong with it."""
        self._manager.close()

    def steps(self) -> list[int]:
        """The steps that can be restored, in order."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The last of them; None without any."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Copies a tree of arrays and keys to the host; writes in the background.

        A step that is there already is left alone. Whenever the program dies, a
        checkpoint is there whole or not at all. `state` may be donated right after.
        """
        if step in self._manager.all_steps():
            return
        arrays = _leaves(state)
        layout, pack, stop = {}, [], 0
        for name, x in arrays.items():
            layout[name] = _Entry(list(x.shape), str(x.dtype))
            if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
                layout[name] = layout[name]._replace(impl=str(jax.random.key_impl(x)))
                arrays[name] = jax.random.key_data(x)
        whole = {name: x for name, x in arrays.items() if x.is_fully_replicated}
        for name, value in jax.device_get(whole).items():
            start, stop = stop, stop + value.nbytes
            layout[name] = layout[name]._replace(span=[start, stop])
            pack.append(value.reshape(-1).view(np.uint8))
            del arrays[name]
        arrays |= {"packed": np.concatenate(pack)} if pack else {}
        args = ocp.args.Composite(
            arrays=ocp.args.PyTreeSave(arrays), layout=ocp.args.JsonSave(layout)
        )
        self._manager.save(step, args=args, force=True)

    def restore(self, step: int, abstract: Any) -> Any:
        """Reads one of the `steps()` onto the devices that `abstract` names.

        That is a tree of `jax.ShapeDtypeStruct`, see the function `abstract`. Its
        shardings need not be those that were saved; a leaf without one comes as NumPy.
        Raises CheckpointError if it is missing, damaged or holds other leaves.
        """
        values = self._read(step, _leaves(abstract), prefix="")
        return jax.tree.unflatten(jax.tree.structure(abstract), values)

    def _read(self, step: int, leaves: Mapping[str, Any], prefix: str) -> list[Any]:
        """These leaves in their order; they must be all that lie below the prefix."""
        where = f"checkpoint {self._path}/{step}"
        if step not in self._manager.all_steps():
            raise CheckpointError(f"there is no {where}")
        rows = self._restore(where, step, layout=ocp.args.JsonRestore())["layout"]
        layout = {n: _Entry(*row) for n, row in rows.items() if n.startswith(prefix)}
        _compare(where, list(layout), layout.__getitem__, leaves)
        numpy = ocp.RestoreArgs(restore_type=np.ndarray)
        plan = {}
        for name, entry in layout.items():
            at = leaves[name].sharding
            if entry.span or at is None:
                plan["packed" if entry.span else name] = numpy
            else:
                plan[name] = ocp.ArrayRestoreArgs(sharding=at)
        args = ocp.args.PyTreeRestore(plan, restore_args=plan, partial_restore=True)
        arrays = self._restore(where, step, arrays=args)["arrays"]
        return [_leaf(name, layout[name], arrays, x) for name, x in leaves.items()]

    def _restore(self, where: str, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, OSError, KeyError) as error:
            raise CheckpointError(f"{where} is damaged or not ours") from error


def save_weights(path: Path, params: Params, metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, whole or not at all, over an earlier one.

    Names are those of the nested dict `params` joined by ".", in sorted order;
    `metadata` goes into the header. All processes may call this: number 0 writes.
    """
    if jax.process_index() != 0:
        return
    leaves = jax.device_get(_leaves(params))
    tensors = {name: np.asarray(leaves[name], order="C") for name in sorted(leaves)}
    write_whole(path, safetensors.numpy.save(tensors, dict(metadata)))


def load_weights(path: Path, abstract_params: Params) -> Params:
    """Reads a safetensors file, or the latest `ema_params` of a training run.

    `path` is a file or a directory of `Checkpoints`; `abstract_params` the nested dict
    expected, of anything with shape and dtype, which comes back as NumPy arrays.
    Raises CheckpointError if it is missing or damaged, holds other names, shapes or
    dtypes, or values that are not finite.
    """
    leaves = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype)
        for name, x in _leaves(abstract_params).items()
    }
    if os.path.isdir(path):
        with Checkpoints(path) as checkpoints:
            if (step := checkpoints.latest()) is None:
                raise CheckpointError(f"{path} holds no checkpoint")
            full = {f"ema_params.{name}": x for name, x in leaves.items()}
            values = checkpoints._read(step, full, prefix="ema_params.")
    else:
        with _open(path) as file:
            heads = functools.partial(_head, file)  # nothing of a wrong shape is read
            _compare(os.fspath(path), file.keys(), heads, leaves)
            values = [file.get_tensor(name) for name in leaves]
    bad = [n for n, x in zip(leaves, values, strict=True) if not np.isfinite(x).all()]
    if bad:
        raise CheckpointError(f"{path} has NaN or infinity in {shortened(bad)}")
    return jax.tree.unflatten(jax.tree.structure(abstract_params), values)


def read_metadata(path: Path) -> dict[str, str]:
    """What `save_weights` noted in the header of the file."""
    with _open(path) as file:
        return file.metadata() or {}


def _open(path: Path) -> Any:
    if not os.path.isfile(path):
        raise CheckpointError(f"there is no file {path}")
    try:
        return safetensors.safe_open(path, "numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error


class _Head(NamedTuple):
    dtype: str
    shape: tuple[int, ...]


def _head(file: Any, name: str) -> _Head:
    """What an open safetensors file says of an array, which is not read."""
    found = file.get_slice(name)
    kind = re.sub(r"^(B?)F(?=\d)", r"\1float", found.get_dtype())
    return _Head(kind.lower(), tuple(found.get_shape()))


def _not_orbax(record: logging.LogRecord) -> bool:
    """Keeps out what Orbax logs below an error; its failures are exceptions."""
    return record.levelno >= logging.ERROR or "/orbax/" not in record.pathname


def _leaves(tree: Any) -> dict[str, Any]:
    """Leaves by name, such as "ema_params.conv_in.kernel", in the tree's order."""
    named = jax.tree.leaves_with_path(tree)
    name = jax.tree_util.keystr
    return {name(path, simple=True, separator="."): leaf for path, leaf in named}


def _leaf(name: str, entry: _Entry, arrays: Mapping[str, Any], like: Any) -> Any:
    """The leaf of this entry, out of what was read, on the devices of `like`."""
    if entry.span is None:
        value = arrays[name]
    else:
        value = arrays["packed"][slice(*entry.span)]
        value = value.view(np.uint32 if entry.impl else like.dtype)
        value = value.reshape(entry.shape + ([-1] if entry.impl else []))
        if like.sharding:
            put = jax.make_array_from_callback
            value = put(value.shape, like.sharding, value.__getitem__)
    return jax.random.wrap_key_data(value, impl=entry.impl) if entry.impl else value


def _compare(
    where: str, names: list[str], found: Callable[[str], Any], wanted: Mapping[str, Any]
) -> None:
    """Raises unless names, shapes and dtypes agree; "-" is missing, "+" too many."""
    missing = [f"-{name}" for name in wanted if name not in names]
    surplus = [f"+{name}" for name in names if name not in wanted]
    if missing or surplus:
        both = "; ".join(shortened(names) for names in (missing, surplus) if names)
        raise CheckpointError(f"{where} does not have the names expected: {both}")
    for name, leaf in wanted.items():
        has, want = (f"{x.dtype}{list(x.shape)}" for x in (found(name), leaf))
        if has != want:
            raise CheckpointError(f"{where} has {name} as {has}, expected {want}")
