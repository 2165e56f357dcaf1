"""Files that carry the SHA-256 of what they hold: a damaged one is named, not used."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from puredif_jax.files import npz
from puredif_jax.files.whole import write_whole
from puredif_jax.types import InputError

SEAL = "sha256"  # the key of the digest in a JSON object


class DamagedError(InputError):
    """A file of ours does not hold what was written into it."""


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """The SHA-256 of arrays: of their names, types, shapes and bytes, in hex."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        head = [name, str(array.dtype), list(np.shape(arrays[name]))]
        found.update(json.dumps(head).encode())
        found.update(array.reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, Any]) -> None:
    """Writes an npz file whole or not at all; its digest is the comment of the archive.

    Raises:
      WriteError: it cannot be written.
    """
    held = {name: np.asarray(value) for name, value in arrays.items()}
    file = io.BytesIO()
    np.savez(file, **held)  # type: ignore[arg-type]
    with zipfile.ZipFile(file, "a") as archive:
        archive.comment = digest(held).encode()
    write_whole(path, file.getvalue())


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays that `write_arrays` has written.

    Raises:
      DamagedError: it holds something else, or cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            told = archive.comment
        found = npz.read(path)
        if digest(found).encode() == told:
            return found
        reason = "its digest is another"
    except Exception as error:  # whatever damage leads zipfile and numpy to
        reason = f"{type(error).__name__}: {error}"
    raise DamagedError(f"{path} is damaged ({reason})")


def seal(document: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the digest of all that it has beside."""
    plain = {key: value for key, value in document.items() if key != SEAL}
    text = json.dumps(plain, sort_keys=True)
    return plain | {SEAL: hashlib.sha256(text.encode()).hexdigest()}


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object that was sealed and written to a file.

    Raises:
      DamagedError: it holds something else, or cannot be read.
    """
    try:
        found: dict[str, Any] = json.loads(pathlib.Path(path).read_text("utf-8"))
        if found == seal(found):
            return found
        reason = "its digest is another"
    except (OSError, AttributeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise DamagedError(f"{path} is damaged ({reason})")
