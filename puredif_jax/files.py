"""Files written whole or not at all, and lists of names in messages."""

from __future__ import annotations

import contextlib
import os
import pathlib
import uuid
from collections.abc import Iterator, Sequence

from puredif_jax.types import InputError


class WriteError(InputError):
    """A file cannot be written; says which and why."""


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Makes what the system refuses while a file is written a sentence about it.

    Raises:
      WriteError: the disk is full, the folder read-only, or the like.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise WriteError(
            f"{path} cannot be written ({reason}): what is stored already stays, and "
            "the same command goes on once that is mended"
        ) from error


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file so that a reader sees all of it, or the one before.

    Processes that write the same file at once do not disturb each other; the last one
    stays. The folder must exist.

    Raises:
      WriteError: it cannot be written; an earlier one is still there.
    """
    path = pathlib.Path(path)
    # Processes of several hosts may have the same number, so it is no name.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    with writing(path):
        try:
            with partial.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def shortened(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    rest = len(names) - 5
    return ", ".join([*names[:5], *([f"{rest} more"] if rest > 0 else [])])
