"""The arrays in the files of some weights, named and described before they are read.

Files are safetensors or pickles of PyTorch. Nothing in a file is executed.
"""

from __future__ import annotations

import contextlib
import functools
import math
import pathlib
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import safetensors

from puredif_jax.files.whole import shortened
from puredif_jax.formats.diffusers_config import ConvertError
from puredif_jax.formats.opening import refuse_broken
from puredif_jax.formats.weight_sets import WEIGHTS, WeightSet

SAFE_TORCH = (2, 6)  # from there on weights-only loading executes nothing
MOST_COMPARED = 2**30  # numbers of an array
FLOATS = {
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
}  # bits of the kinds that are read
_TORCH = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}


class Entry(NamedTuple):
    """An array in a file, not read yet; `name` is its name in the file.

    dtype: of `FLOATS`, or another one by its name.
    read: returns it in float32, a wider one rounded.
    """

    file: pathlib.Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


@contextlib.contextmanager
def entries(chosen: WeightSet) -> Iterator[list[Entry]]:
    """The arrays of some weights, open.

    Raises:
      ConvertError: a file is missing, damaged, or not what its name says.
    """
    with contextlib.ExitStack() as files:
        found: list[Entry] = []
        for path in chosen.files():
            if chosen.pickled:
                found += _pickled(path)
            else:
                found += _stored(files.enter_context(_open(path)), path)
        yield found


def same(first: WeightSet, second: WeightSet) -> bool:
    """Whether two hold the same arrays, as far as the coarser of their dtypes tells.

    Raises:
      ConvertError: one cannot be read.
    """
    with entries(first) as one, entries(second) as other:
        theirs = {entry.name: entry for entry in other}
        if {entry.name for entry in one} != theirs.keys():
            return False
        return all(_equal(entry, theirs[entry.name]) for entry in one)


def _equal(one: Entry, other: Entry) -> bool:
    if math.prod(one.shape) > MOST_COMPARED:
        return False
    if one.shape != other.shape or not {one.dtype, other.dtype} <= FLOATS.keys():
        return False
    coarse = min(one.dtype, other.dtype, key=lambda kind: FLOATS[kind])
    if {one.dtype, other.dtype} == {"F16", "BF16"}:
        return False
    kind = {"F16": "float16", "BF16": "bfloat16"}.get(coarse, "float32")
    with np.errstate(over="ignore"):
        first, second = (x.read().astype(np.dtype(kind)) for x in (one, other))
    return bool(np.array_equal(first, second))


def _stored(file: Any, path: pathlib.Path) -> Iterable[Entry]:
    """The arrays of an open safetensors file."""

    def read(name: str) -> np.ndarray:
        with np.errstate(over="ignore"):  # infinity is named by who reads
            return np.asarray(file.get_tensor(name)).astype(np.float32)

    for name in file.keys():  # noqa: SIM118
        head = file.get_slice(name)
        shape = tuple(head.get_shape())
        yield Entry(path, name, head.get_dtype(), shape, functools.partial(read, name))


def _pickled(path: pathlib.Path) -> Iterable[Entry]:
    """The arrays of a pickle, if PyTorch finds nothing else in it."""
    return tensors(path, unpickled(path))


def unpickled(path: pathlib.Path) -> Any:
    """What PyTorch's weights-only loading makes of a pickle: nothing is executed.

    The result may hold tensors, scalars, text, and containers of these.

    Raises:
      ConvertError: it is damaged or packed, holds anything else, or there is no
        PyTorch, or one whose loader can be made to execute a file.
    """
    refuse_broken(path)
    instead = f"install the extra 'torch', or store it as {WEIGHTS}"
    try:
        import torch
    except ImportError as error:
        raise ConvertError(
            f"{path} is a pickle: to read its arrays and nothing else, {instead}"
        ) from error
    if tuple(map(int, torch.__version__.split(".")[:2])) < SAFE_TORCH:
        raise ConvertError(
            f"{path} is a pickle, and PyTorch {torch.__version__} may execute one "
            f"(CVE-2025-32434): {instead}"
        )
    _refuse_packed(path)
    try:
        with warnings.catch_warnings():  # about the version of a pickle
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds; what they advise is not passed on
        raise ConvertError(
            f"{path} is not a pickle of arrays alone{_other_parts(path)}, and is not "
            "read: nothing in it was executed"
        ) from error


def tensors(path: pathlib.Path, found: Any) -> Iterable[Entry]:
    """The arrays of a state dict that `unpickled` has found in a file.

    Raises:
      ConvertError: it is no state dict of named, dense arrays.
    """
    import torch

    if not isinstance(found, dict) or not all(
        isinstance(name, str)
        and isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
        for name, value in found.items()
    ):
        raise ConvertError(f"{path} is not a pickle of named, dense arrays")

    def read(value: Any) -> np.ndarray:
        whole = value.detach().resolve_conj().resolve_neg()
        found: np.ndarray = whole.to(torch.float32).numpy()
        return found

    for name, value in found.items():
        kind = str(value.dtype).removeprefix("torch.")
        shape = tuple(value.shape)
        yield Entry(
            path, name, _TORCH.get(kind, kind), shape, functools.partial(read, value)
        )


def _other_parts(path: pathlib.Path) -> str:
    """What a pickle would call, as far as PyTorch can tell without loading it."""
    import torch

    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a pickle at all, or one of an old kind
        return ""
    return f" (it would call {shortened(sorted(found))})" if found else ""


def _refuse_packed(path: pathlib.Path) -> None:
    """PyTorch stores arrays as they are; a packed file may unpack to any size."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as file:
            unpacked = sum(part.file_size for part in file.infolist())
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        raise ConvertError(f"{path} is not a whole pickle ({error})") from error
    if unpacked > path.stat().st_size:
        raise ConvertError(
            f"{path} is packed: its {path.stat().st_size} bytes unpack to {unpacked}, "
            "which PyTorch does not write, and it is not read"
        )


def _open(path: pathlib.Path) -> Any:
    refuse_broken(path)
    try:
        return safetensors.safe_open(path, "numpy")
    except (safetensors.SafetensorError, OSError) as error:
        reason = str(error)
        if "not fully covered" in reason:
            reason = "it is incomplete, or has been cut: fetch it again"
        raise ConvertError(f"{path} is not a safetensors file: {reason}") from error
