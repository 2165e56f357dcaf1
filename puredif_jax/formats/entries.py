"""The arrays in the files of some weights, named and described before they are read.

Files are safetensors or pickles of PyTorch. Nothing in a file is executed.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import pathlib
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any, NamedTuple

import numpy as np
import safetensors

from puredif_jax.files.whole import shortened
from puredif_jax.formats.diffusers_config import ConvertError
from puredif_jax.formats.opening import refuse_broken
from puredif_jax.formats.weight_sets import WEIGHTS, WeightSet

SAFE_TORCH = (2, 6)  # from there on weights-only loading executes nothing
MOST_COMPARED = 2**26  # numbers of an array
LONGEST_PICKLE = 2**25  # bytes, without the arrays
MOST_HASHED = 2**20  # parts of a tuple
FLOATS = {
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
}  # bits of the kinds that are read
_TORCH = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}


_ZIP = b"PK\x03\x04"
_PICKLES = 5  # at the start of a file that PyTorch wrote before it took to zip
_OF_ARRAYS = re.compile(
    r"collections\.OrderedDict|torch\.(Size|\w*Storage)|"
    r"torch\._utils\._rebuild_(tensor|tensor_v2|parameter)|torch\.nn\.parameter\."
    r"Parameter"
)


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

    The result may hold tensors, scalars, text, and containers of these. What else that
    loading would make, such as an array of bytes of any size, is refused before.

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
    _refuse_others(path)
    try:
        with warnings.catch_warnings():  # about the version of a pickle
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds; what they advise is not passed on
        raise _not_alone(path) from error


def tensors(path: pathlib.Path, found: Any) -> Iterable[Entry]:
    """The arrays of a state dict that `unpickled` has found in a file.

    Raises:
      ConvertError: it is no state dict of named, dense arrays.
    """
    import torch

    if not isinstance(found, dict) or not all(
        isinstance(name, str)
        and isinstance(value, torch.Tensor)
        and not vars(value)  # which might stand before what it is asked
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
        for name, value in dict.items(found)
    ):
        names = dict.keys(found) if isinstance(found, dict) else ()
        have = shortened([f"{name}"[:80] for name in names])
        has = f": it has {have}" if have else ""
        raise ConvertError(f"{path} is not a pickle of named, dense arrays{has}")

    def read(value: Any) -> np.ndarray:
        whole = value.detach().resolve_conj().resolve_neg()
        found: np.ndarray = whole.to(torch.float32).numpy()
        return found

    for name, value in dict.items(found):
        kind = str(value.dtype).removeprefix("torch.")
        shape = tuple(value.shape)
        yield Entry(
            path, name, _TORCH.get(kind, kind), shape, functools.partial(read, value)
        )


def _not_alone(path: pathlib.Path, calls: Sequence[str] = ()) -> ConvertError:
    """The error for a pickle that holds more than arrays."""
    more = f" (it would call {shortened(calls)})" if calls else ""
    return ConvertError(
        f"{path} is not a pickle of arrays alone{more}, and is not read: nothing in it "
        "was executed"
    )


def _refuse_others(path: pathlib.Path) -> None:
    """Raises ConvertError where a pickle names anything but what arrays are made of.

    Only the names of its instructions are read.
    """
    import torch

    calls: set[str] = set()
    try:
        with path.open("rb") as plain:
            if plain.peek(4)[:4] == _ZIP:  # by which PyTorch tells, too
                # PyTorch's own reader, which finds the part that will be loaded.
                reader = torch._C.PyTorchFileReader(str(path))
                if reader.get_record_size("data.pkl") > LONGEST_PICKLE:
                    raise ValueError("the pickle is too long")
                calls |= _globals(io.BytesIO(reader.get_record("data.pkl")))
            else:
                for _ in range(_PICKLES):
                    if plain.peek(1):
                        calls |= _globals(plain)
    except Exception as error:  # of many kinds: then it is no pickle
        raise _not_alone(path, _others(calls)) from error
    if others := _others(calls):
        raise _not_alone(path, others)


def _others(calls: Iterable[str]) -> list[str]:
    return sorted(each for each in calls if not _OF_ARRAYS.fullmatch(each))


def _globals(stream: IO[bytes]) -> set[str]:
    """What the next pickle in a stream would import, as "module.name".

    Raises:
      ValueError: it is no pickle, is longer than `LONGEST_PICKLE`, or has tuples within
        tuples whose hash would take hours: of few bytes, by their memo.
    """
    found, stack, memo = set(), list[int | None](), dict[int, int]()  # None is a mark
    for op, argument, at in pickletools.genops(stream):
        if at is not None and at > LONGEST_PICKLE:
            raise ValueError("the pickle is too long")
        if op.name in ("GLOBAL", "INST"):
            found.add(str(argument).replace(" ", "."))
        elif op.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            found.add(op.name)  # which PyTorch does not read
        number: Any = len(memo) if op.name == "MEMOIZE" else argument
        if "PUT" in op.name or op.name == "MEMOIZE":
            memo[int(number)] = stack[-1] or 1
            continue
        taken: list[int] = []
        count = len(op.stack_before)
        if pickletools.markobject in op.stack_before:
            count = op.stack_before.index(pickletools.markobject)
            while (top := stack.pop()) is not None:
                taken.append(top)
        for _ in range(count):
            taken.append(stack.pop() or 0)
        size = sum(taken) + 1 if op.name.startswith("TUPLE") else 1
        if size > MOST_HASHED:
            raise ValueError("it has tuples within tuples")
        if "GET" in op.name:
            stack.append(memo[int(number)])
        else:
            marks = (x is pickletools.markobject for x in op.stack_after)
            stack += [None if mark else size for mark in marks]
    return found


def _refuse_packed(path: pathlib.Path) -> None:
    """PyTorch stores arrays as they are; a packed file may unpack to any size.

    The archive is what Python and PyTorch both read: it begins with the file, and its
    directory lies where its end says.
    """
    with path.open("rb") as file:
        begins = file.read(4) == _ZIP
    ends = zipfile.is_zipfile(path)
    if not begins and not ends:
        return
    unpacked, plain = 0, begins and ends
    if plain:
        try:
            with zipfile.ZipFile(path) as archive:
                parts = archive.infolist()
                plain = archive.start_dir == _directory(path)
        except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
            raise ConvertError(f"{path} is not a whole pickle ({error})") from error
        unpacked = sum(part.file_size for part in parts)
        plain = plain and all(x.compress_type == zipfile.ZIP_STORED for x in parts)
    if unpacked > path.stat().st_size or not plain:
        raise ConvertError(
            f"{path} is packed: its {path.stat().st_size} bytes unpack to {unpacked}, "
            "or in a way that PyTorch does not write, and it is not read"
        )


def _directory(path: pathlib.Path) -> int | None:
    """Where the end of a zip file says that its directory begins; None without one."""
    with path.open("rb") as file:
        start = max(0, file.seek(0, os.SEEK_END) - 2**16 - 42)
        file.seek(start)
        tail = file.read()
        end = tail.rfind(b"PK\x05\x06")
        if end < 0 or len(tail) < end + 22:
            return None
        (found,) = struct.unpack_from("<I", tail, end + 16)
        locator = end - 20
        if locator >= 0 and tail[locator : locator + 4] == b"PK\x06\x07":
            file.seek(struct.unpack_from("<Q", tail, locator + 8)[0])
            record = file.read(56)
            if len(record) < 56 or record[:4] != b"PK\x06\x06":
                return None
            (found,) = struct.unpack_from("<Q", record, 48)
    return int(found)


def _open(path: pathlib.Path) -> Any:
    refuse_broken(path)
    try:
        return safetensors.safe_open(path, "numpy")
    except (safetensors.SafetensorError, OSError) as error:
        reason = str(error)
        if "not fully covered" in reason:
            reason = "its length is not what its header says: fetch it again"
        raise ConvertError(f"{path} is not a safetensors file: {reason}") from error
