"""Names of models: a path, a name of the Hub with a revision, or an address there."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from absl import logging

from puredif_jax.files.whole import expanded, shortened
from puredif_jax.formats.diffusers_config import ConvertError
from puredif_jax.formats.diffusers_layout import FIRST_STAGE, SCHEDULER
from puredif_jax.formats.known import format_of
from puredif_jax.formats.weight_sets import (
    INDEX,
    PICKLE,
    STEM,
    SUFFIXES,
    WEIGHTS,
    weight_sets,
)
from puredif_jax.types import shown

HOSTS = ("huggingface.co", "hf.co", "www.huggingface.co")
WAYS = (
    "a folder in diffusers' format, owner/name or owner/name@revision of the Hub, or "
    "its address there"
)
_REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", re.ASCII)


# Folders of a model that lies at the top of a repository.
_PARTS = ("unet", FIRST_STAGE, "scheduler")


class Repository(NamedTuple):
    """A model of the Hub; None is its main revision."""

    name: str
    revision: str | None

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


def find_folder(
    name: str, offline: bool = False, variant: str | None = None
) -> pathlib.Path:
    """A local path, or the folder of a model of the Hub, downloaded if need be.

    If a model's configuration is refused, nothing but configurations is fetched.

    Args:
      name: a path; where there is none, "owner/name", "owner/name@revision" or an
        address such as https://huggingface.co/owner/name/tree/main.
      offline: take what has been downloaded before.
      variant: of the weights to fetch.

    Raises:
      ConvertError: there is neither, huggingface_hub is not installed, or the Hub
        cannot be reached.
    """
    try:
        path = expanded(name)
        here = path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise ConvertError(
            f"{name[:80]!r} is no path ({type(error).__name__})"
        ) from error
    if here:
        return _named(path)
    repository = parsed(name)
    if repository is None:
        return path
    if "://" not in name and os.path.isdir(path.parent):
        raise ConvertError(
            f"there is no {name}, and {path.parent} is a folder here, with "
            f"{shortened(sorted(os.listdir(path.parent))) or 'nothing'}: for the model "
            f"of the Hub give https://{HOSTS[0]}/{name}"
        )
    return _fetched(repository, offline, variant)


def _named(path: pathlib.Path) -> pathlib.Path:
    """The folder that a configuration stands for; any other path itself.

    Raises:
      ConvertError: it is the configuration of a scheduler.
    """
    if not path.is_file():
        return path
    if path.name in ("model_index.json", "config.json"):
        return path.parent
    if path.name == SCHEDULER:
        raise ConvertError(
            f"{path} is the configuration of a scheduler: give the folder of the model"
        )
    return path


def parsed(name: str) -> Repository | None:
    """The model of the Hub that is meant; None if it is no such name.

    Raises:
      ConvertError: it is an address elsewhere, or of no model.
    """
    if "://" not in name:
        match = _REPOSITORY.fullmatch(name)
        if match is None or name.startswith(("./", "../")):
            return None
        return Repository(match[1], match[2])
    try:
        address = urlsplit(name)
        host = address.hostname
    except ValueError as error:
        raise ConvertError(f"{name[:200]} is no address: give {WAYS}") from error
    parts = [unquote(part) for part in address.path.split("/") if part]
    if host not in HOSTS:
        raise ConvertError(f"{name[:200]} is not an address of the Hub: give {WAYS}")
    if parts[:1] in (["datasets"], ["spaces"]) or len(parts) < 2:
        raise ConvertError(f"{name[:200]} is the address of no model: give {WAYS}")
    revision = None
    if len(parts) > 3 and parts[2] in ("tree", "blob", "resolve", "commit"):
        length = 3 if parts[3] == "refs" else 1  # such as refs/pr/1
        revision, inside = "/".join(parts[3 : 3 + length]), parts[3 + length :]
        file = parts[2] != "tree" and len(inside) == 1
        if inside and not file and inside[0] not in _PARTS:
            raise ConvertError(
                f"{name[:200]} is a part of a repository, which is read from its top "
                "alone: download that part, and give its folder"
            )
    whole = "/".join(parts[:2]) + (f"@{revision}" if revision else "")
    match = _REPOSITORY.fullmatch(whole)
    if match is None:
        raise ConvertError(f"{name[:200]} is the address of no model: give {WAYS}")
    return Repository(match[1], match[2])


def _fetched(
    repository: Repository, offline: bool, variant: str | None
) -> pathlib.Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ConvertError(
            f"there is no {repository}; to get it from the Hub, install the extra 'hub'"
        ) from error
    logging.info("asking the Hub for %s", repository)
    configs = ["model_index.json"]
    files = {part: "config" for part in ("unet", FIRST_STAGE)}
    for part, file in (files | {"scheduler": "scheduler_config"}).items():
        configs += [f"{part}/{file}.json", f"{file}.json"]
    try:
        get = functools.partial(
            snapshot_download,
            repository.name,
            revision=repository.revision,
            local_files_only=offline,
        )
        folder = pathlib.Path(get(allow_patterns=configs))
        with contextlib.suppress(ConvertError):  # who reads the folder finds it
            kind = format_of(folder)
            for home in [] if kind is None else kind.homes(folder):
                at = f"{home.name}/" if home != folder else ""
                for patterns in _patterns(at, variant):
                    get(allow_patterns=patterns)
                    if any(each.variant == variant for each in weight_sets(home)):
                        break
    except Exception as error:  # of many kinds, by what is wrong with the network
        first = str(error).strip().partition("\n")[0]
        reason = ": ".join(filter(None, (type(error).__name__, first)))
        raise ConvertError(
            f"there is no {repository} here, and the Hub does not give it ({reason})"
        ) from error
    if not offline:
        _name_others(repository, folder)
    return folder


def _patterns(at: str, variant: str | None) -> Iterator[list[str]]:
    """What to ask for, in turn: safetensors, then pickles."""
    if variant is None:
        yield [f"{at}{WEIGHTS}", f"{at}{INDEX}", f"{at}{STEM}-*.safetensors"]
        yield [f"{at}{PICKLE}", f"{at}{PICKLE}.index.json", f"{at}{STEM}-*.bin"]
    else:
        for kind in ("safetensors", "bin"):
            yield [
                f"{at}{STEM}.{variant}.{kind}",
                f"{at}{STEM}.{variant}-*.{kind}",
                f"{at}{STEM}-*.{variant}.{kind}",
                f"{at}{STEM}.{kind}.index.{variant}.json",
                f"{at}{STEM}.{kind}.{variant}.index.json",
            ]


def _name_others(repository: Repository, folder: pathlib.Path) -> None:
    """Names in the log what may hold weights in a repository and was not fetched."""
    try:
        from huggingface_hub import list_repo_files

        files = list_repo_files(repository.name, revision=repository.revision)
    except Exception as error:  # of many kinds, by what is wrong with the network
        logging.warning(
            "%s: what else it holds is not known (%s)", repository, type(error).__name__
        )
        return
    ends = tuple(SUFFIXES)
    left = [f for f in files if f.endswith(ends) and not (folder / f).exists()]
    if left:
        logging.warning(
            "%s has more that may be weights and is not scanned: %s",
            repository,
            shown(shortened(left)),
        )
