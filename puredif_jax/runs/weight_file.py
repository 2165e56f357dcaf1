"""Weights as safetensors files: written whole, compared before they are read."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy

from puredif_jax.files.sealed import SEAL, digest
from puredif_jax.files.whole import shortened, write_whole
from puredif_jax.runs.checkpoint import (
    CheckpointError,
    Checkpoints,
    Path,
    compare,
    named_leaves,
)
from puredif_jax.types import Params

WEIGHTS_SEAL = f"puredif_jax {SEAL}"  # in the header of a safetensors file


def save_weights(path: Path, params: Params, metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, whole or not at all, over an earlier one.

    Names are the keys of the nested dict `params` joined by ".", in sorted order;
    `metadata` goes into the header, with the digest of the arrays. All processes may
    call this: number 0 writes. Raises WriteError where the file cannot be written.
    """
    if jax.process_index() != 0:
        return
    leaves = jax.device_get(named_leaves(params))
    tensors = {name: np.asarray(leaves[name], order="C") for name in sorted(leaves)}
    sealed = {**metadata, WEIGHTS_SEAL: digest(tensors)}
    write_whole(path, _with_metadata(safetensors.numpy.save(tensors), sealed))


def _with_metadata(content: bytes, metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with these metadata; the same bytes whenever it is made.

    The library orders several of them at random.
    """
    start = 8 + int.from_bytes(content[:8], "little")
    header = {"__metadata__": dict(sorted(metadata.items()))}
    header |= json.loads(content[8:start])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned
    return len(text).to_bytes(8, "little") + text + content[start:]


def load_weights(path: Path, abstract_params: Params) -> Params:
    """Reads a safetensors file, or the latest `ema_params` of a training run.

    `path` is a file or a directory of `Checkpoints`; `abstract_params` the nested dict
    expected, of anything with shape and dtype, which comes back as NumPy arrays.
    Raises CheckpointError if it is missing or damaged, holds other names, shapes or
    dtypes, or values that are not finite.
    """
    leaves = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype)
        for name, x in named_leaves(abstract_params).items()
    }
    if os.path.isdir(path):
        with Checkpoints(path) as checkpoints:
            if (step := checkpoints.latest()) is None:
                raise CheckpointError(f"{path} holds no checkpoint")
            full = {f"ema_params.{name}": x for name, x in leaves.items()}
            values = checkpoints.read(step, full, prefix="ema_params.")
    else:
        with _open(path) as file:
            heads = functools.partial(_head, file)  # nothing of a wrong shape is read
            compare(os.fspath(path), file.keys(), heads, leaves)
            values = [file.get_tensor(name) for name in leaves]
            told = (file.metadata() or {}).get(WEIGHTS_SEAL)
        if told not in (None, digest(dict(zip(leaves, values, strict=True)))):
            raise CheckpointError(f"{path} is damaged: its digest is another")
    bad = [n for n, x in zip(leaves, values, strict=True) if not np.isfinite(x).all()]
    if bad:
        raise CheckpointError(f"{path} has NaN or infinity in {shortened(bad)}")
    return jax.tree.unflatten(jax.tree.structure(abstract_params), values)


def read_metadata(path: Path) -> dict[str, str]:
    """What `save_weights` noted in the header of the file."""
    with _open(path) as file:
        found = file.metadata() or {}
    found.pop(WEIGHTS_SEAL, None)
    return found


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
