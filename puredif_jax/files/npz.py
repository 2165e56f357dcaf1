"""Arrays of .npz files that anyone may have made: of a stated size, never unpickled.

What a file claims to hold is read first, from its directory and the headers of its
arrays. An array is unpacked only if both agree and its size is allowed.
"""

from __future__ import annotations

import collections
import contextlib
import io
import math
import os
import zipfile
from collections.abc import Iterable, Iterator
from typing import IO, NamedTuple

import numpy as np
from numpy.lib import format as npy

from puredif_jax.files.whole import shortened

LIMIT = 8 * 2**30  # bytes of the arrays that are unpacked together
_HEADER = 2**16  # bytes in which the header of an array must lie; numpy writes 128
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # those that numpy writes


class NpzError(ValueError):
    """Why an .npz file is not read: what follows its name in a sentence."""


class Header(NamedTuple):
    """What an archive says of one of its arrays."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


def headers(path: str | os.PathLike[str]) -> dict[str, Header]:
    """What the arrays of an .npz file are, by name; none of them is unpacked.

    Raises:
      NpzError: the file is missing, damaged, or not as numpy writes it.
    """
    with _opened(path) as archive:
        return _headers(archive)


def read(
    path: str | os.PathLike[str],
    names: Iterable[str] | None = None,
    limit: float = LIMIT,
) -> dict[str, np.ndarray]:
    """Arrays of an .npz file.

    Args:
      path: the file.
      names: of the arrays to read; None for all.
      limit: bytes that these may take together.

    Raises:
      NpzError: as `headers`; or an array is not there, holds Python objects, takes more
        than is allowed, or is not what the file said.
    """
    with _opened(path) as archive:
        found = _headers(archive)
        wanted = list(found if names is None else names)
        for name in wanted:
            if name not in found:
                raise NpzError(f"has no array `{name}`, but {shortened(list(found))}")
            if found[name].dtype.hasobject:
                raise NpzError(
                    f"holds Python objects in `{name}`, a pickle, which could run any "
                    "code and is never opened"
                )
        size = sum(found[name].size for name in wanted)
        if size > limit:
            raise NpzError(
                f"would unpack to {size / 2**30:.3g} GiB, and {limit / 2**30:.3g} are "
                "allowed"
            )
        arrays = {}
        for name in wanted:
            with archive.open(f"{name}.npy") as stream:
                arrays[name] = npy.read_array(stream, allow_pickle=False)
        return arrays


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[zipfile.ZipFile]:
    """The archive; whatever goes wrong with it is an NpzError."""
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would wait
        raise NpzError("is no regular file")
    try:
        file = open(path, "rb")
    except OSError as error:
        raise NpzError(f"cannot be read ({error.strerror})") from error
    try:
        with file, zipfile.ZipFile(file) as archive:
            yield archive
    except NpzError:
        raise
    except MemoryError as error:
        raise NpzError("does not fit into the memory that is free") from error
    except Exception as error:  # zipfile, zlib, ast and numpy have a dozen kinds
        raise NpzError("is not an .npz file, or a damaged one") from error


def _headers(archive: zipfile.ZipFile) -> dict[str, Header]:
    entries = archive.infolist()
    counts = collections.Counter(entry.filename for entry in entries)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise NpzError(f"holds two files of one name: {shortened(twice)}")
    if others := [name for name in counts if not name.endswith(".npy")]:
        raise NpzError(f"holds files that are no arrays: {shortened(others)}")
    found = {}
    for entry in entries:
        if entry.compress_type not in _METHODS:
            raise NpzError(f"is compressed as numpy never does: {entry.filename}")
        with archive.open(entry) as stream:
            header, start = _header(stream)
        if header.size + start != entry.file_size and not header.dtype.hasobject:
            raise NpzError(
                f"is damaged: {entry.filename} has {entry.file_size} bytes, and its "
                f"header tells of {header.size + start}"
            )
        found[entry.filename.removesuffix(".npy")] = header
    return found


def _header(stream: IO[bytes]) -> tuple[Header, int]:
    """The header of an array, and the number of bytes before its data."""
    head = io.BytesIO(stream.read(_HEADER))
    version = npy.read_magic(head)
    read_header = {
        (1, 0): npy.read_array_header_1_0,
        (2, 0): npy.read_array_header_2_0,
    }[version]
    shape, _, dtype = read_header(head)
    if min(shape, default=0) < 0:
        raise ValueError(f"a side of {shape} is negative")
    return Header(shape, dtype), head.tell()
