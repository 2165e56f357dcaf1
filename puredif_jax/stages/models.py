"""Models by name or path: whatever is read of one is read once."""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib

from puredif_jax.formats.base import Shown, Spec
from puredif_jax.formats.known import format_of
from puredif_jax.runs.binding import RunError
from puredif_jax.stages.weights import find_weights
from puredif_jax.types import Params


class Source:
    """Where the weights of a model lie; what is read there is kept.

    Args:
      path: a path.
      scheduler: a folder or file, for a network without a scheduler of its own.

    Attributes:
      path: as given.
      format: the format in which a model lies there; None for weights alone.
    """

    def __init__(self, path: pathlib.Path, scheduler: str | None = None) -> None:
        self.path, self._scheduler = path, scheduler
        self.format = format_of(path)

    @functools.cached_property
    def spec(self) -> Spec | None:
        """What the model is; None for weights alone.

        Raises:
          InputError: as `Format.spec`.
        """
        if self.format is None:
            return None
        return self.format.spec(self.path, self._scheduler)

    @functools.cached_property
    def remarks(self) -> tuple[str, ...]:
        """On how the model is read; its weights are compared with the network.

        Raises:
          InputError: as `Format.spec` and `Format.check`.
        """
        if self.format is None or self.spec is None:
            return ()
        return (*self.spec.remarks, *self.format.check(self.path, self.spec))

    @functools.cached_property
    def params(self) -> Params | None:
        """The parameters, in the memory of this host; None for weights alone.

        Raises:
          InputError: as `Format.spec` and `Format.read`.
        """
        if self.format is None or self.spec is None:
            return None
        return self.format.read(self.path, self.spec)

    @functools.cached_property
    def shown(self) -> Shown | None:
        """What makes images of what the model draws; None where it draws images.

        Raises:
          InputError: as `Format.shown`.
        """
        if self.format is None or self.spec is None:
            return None
        return self.format.shown(self.path, self.spec)

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """The SHA-256 of each file that the weights lie in.

        By the place of the file in the folder, in hexadecimal digits as of `sha256sum`.

        Raises:
          InputError: they cannot be read.
        """
        path = self.path
        if self.format is not None:
            files = self.format.files(path)
        else:
            files = sorted(p for p in (path, *path.rglob("*")) if p.is_file())
        home = path if path.is_dir() else path.parent
        digests = {}
        for file in files:
            place = str(file.relative_to(home))
            try:
                with file.open("rb") as opened:
                    digests[place] = hashlib.file_digest(opened, "sha256").hexdigest()
            except OSError as error:
                raise RunError(f"{file} cannot be read: {error}") from error
        return digests

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the digests, one after another.

        Raises:
          InputError: as `digests`.
        """
        digest = hashlib.sha256()
        for file in self.digests.values():
            digest.update(bytes.fromhex(file))
        return digest.hexdigest()

    def let_go(self) -> None:
        """Frees the memory of the parameters; they are read again where needed."""
        self.__dict__.pop("params", None)
        self.__dict__.pop("shown", None)


class Models:
    """The sources of models, each looked up once; one at a time is in memory.

    Args:
      scheduler: a folder or file, for networks without a scheduler of their own.
    """

    def __init__(self, scheduler: str | None = None) -> None:
        self._scheduler = scheduler
        self._sources: dict[str, Source] = {}
        self._last: Source | None = None

    def __getitem__(self, name: str | os.PathLike[str]) -> Source:
        """The source of a shipped model's name, or of a path.

        Raises:
          InputError: there is neither, or two formats know it.
        """
        path = find_weights(os.fspath(name))
        key = os.path.abspath(path)
        if key not in self._sources:
            self._sources[key] = Source(path, self._scheduler)
        source = self._sources[key]
        if self._last is not None and self._last is not source:
            self._last.let_go()
        self._last = source
        return source
