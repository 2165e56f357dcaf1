"""Files written whole or not at all, and lists of names in messages."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence

from puredif_jax.types import InputError


class WriteError(InputError):
    """A file cannot be written; says which and why."""


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns what the system refuses while a file is written into a sentence.

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


LONGEST_NAME = 80  # characters of a folder that is named after something
KINDS = {"Experiment": "run", "Sweep": "sweep", "Scan": "scan"}
"""What a folder of ours may hold, by the "type" in its config.json, in a word."""


def safe_name(name: str) -> str:
    """A folder's name for a stranger's text: ASCII letters, digits, ".", "_" and "-".

    Of a long one the start and the end stay, with a part of its SHA-256 between them.
    """
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "model"
    if len(plain) <= LONGEST_NAME:
        return plain
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:8]
    start = LONGEST_NAME // 2
    return f"{plain[:start]}-{digest}-{plain[start + 10 - LONGEST_NAME :]}".strip(".-")


def expanded(name: str) -> pathlib.Path:
    """The path of a name; "~" at its start is a home, "./~" a folder of that name.

    Raises:
      RuntimeError: there is no such user.
    """
    path = pathlib.Path(name)
    return path.expanduser() if name.startswith("~") else path


def listed(names: Iterable[str]) -> str:
    """The names with commas, and "and" before the last."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def shortened(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    rest = len(names) - 5
    return ", ".join([*names[:5], *([f"{rest} more"] if rest > 0 else [])])
