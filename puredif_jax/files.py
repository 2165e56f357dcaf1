"""Files written whole or not at all, and lists of names in messages."""

from __future__ import annotations

import os
import pathlib
import uuid
from collections.abc import Sequence


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file so that a reader sees all of it, or the one before.

    Processes that write the same file at once do not disturb each other; the last one
    stays. The folder must exist.
    """
    path = pathlib.Path(path)
    # Processes of several hosts may have the same number, so it is no name.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def shortened(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    rest = len(names) - 5
    return ", ".join([*names[:5], *([f"{rest} more"] if rest > 0 else [])])
