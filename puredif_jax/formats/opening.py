"""Opening a stranger's files and folders: an error says in a sentence what is wrong."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from puredif_jax.formats.diffusers_config import ConvertError

LARGEST_JSON = 10_000_000  # bytes


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


def refuse_broken(path: pathlib.Path) -> None:
    """Says what a broken download has left in the place of a file.

    Raises:
      ConvertError: there is no file; it is empty, a pointer of Git LFS or a web page.
    """
    if not path.is_file():
        raise ConvertError(f"there is no file {path}")
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
        if path.stat().st_size > LARGEST_JSON:
            raise ConvertError(f"{path} is larger than {LARGEST_JSON} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ConvertError):
            raise
        raise ConvertError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConvertError(f"{path} holds no JSON object")
    return found
