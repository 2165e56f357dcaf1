"""Opening a stranger's files and folders: an error says in a sentence what is wrong."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

from puredif_jax.formats.diffusers_config import ConvertError

LARGEST_JSON = 10_000_000  # bytes
_SYSTEM = ("/proc", "/sys", "/dev")
_MEMORY = "/dev/shm"  # a folder as any other


def unreadable(path: object, error: OSError) -> ConvertError:
    """The error for a file or folder that the system does not let us read."""
    reason = error.strerror or type(error).__name__
    return ConvertError(f"{path} cannot be read ({reason})")


def listed(folder: pathlib.Path) -> list[pathlib.Path]:
    """What lies in a folder, sorted; raises ConvertError where it cannot be read."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise unreadable(folder, error) from error


def of_system(path: pathlib.Path) -> bool:
    """Whether a path leads to where the system shows itself as files."""
    real = pathlib.Path(os.path.realpath(path))
    return any(map(real.is_relative_to, _SYSTEM)) and not real.is_relative_to(_MEMORY)


def refuse_broken(path: pathlib.Path) -> None:
    """Says what a broken download has left in the place of a file.

    Raises:
      ConvertError: there is no file, or one that the system makes up; it is empty, a
        pointer of Git LFS or a web page.
    """
    if not os.path.isfile(path):  # which is False for pipes and sockets
        kind = "is no regular file" if os.path.exists(path) else ""
        raise ConvertError(f"{path} {kind}" if kind else f"there is no file {path}")
    if of_system(path):
        raise ConvertError(f"{path} leads to {os.path.realpath(path)}, a system file")
    try:
        with path.open("rb") as file:
            start = file.read(200)
    except OSError as error:
        raise unreadable(path, error) from error
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        raise ConvertError(f"{path} is empty: fetch it again")
    if text.startswith(b"version https://git-lfs"):
        raise ConvertError(
            f"{path} is a pointer of Git LFS, not the file: run 'git lfs pull' there"
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise ConvertError(f"{path} is a web page (HTML), not the file: fetch it again")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      ConvertError: it cannot be read, is larger than `LARGEST_JSON`, or is no object.
    """
    refuse_broken(path)
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_JSON + 1)
        if len(text) > LARGEST_JSON:
            raise ConvertError(f"{path} is larger than {LARGEST_JSON} bytes")
        found = json.loads(text.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ConvertError):
            raise
        raise ConvertError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConvertError(f"{path} holds no JSON object")
    return found
