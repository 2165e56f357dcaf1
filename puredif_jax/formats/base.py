"""What a file format of models is: a model comes in by one `Format`.

A format is a class. Whoever defines a concrete one, in this package or in a
configuration file, makes its models known to discovery and to scans.
"""

from __future__ import annotations

import abc
import dataclasses
import inspect
import pathlib
from collections.abc import Callable, Iterator
from typing import ClassVar, NamedTuple

import numpy as np

from puredif_jax.formats.scheduling import Scheduling
from puredif_jax.networks.base import ImageNetwork
from puredif_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a model's files say, before its weights are read.

    Attributes:
      network: the network.
      scheduling: the noise schedule and how to sample; None where there is none.
      own: the scheduler is the model's own, not one that was found above it or given.
      remarks: sentences on what has no effect, or another effect than it seems.
    """

    network: ImageNetwork
    scheduling: Scheduling | None
    own: bool = True
    remarks: tuple[str, ...] = ()


class Model(NamedTuple):
    """A model, whole: what its files say, and its parameters (nested dict of NumPy)."""

    spec: Spec
    params: Params


Shown = Callable[[np.ndarray], np.ndarray]
"""Images `[B, H, W, C]` in [-1, 1] of what a model draws, `[B, h, w, c]`."""


class Format(abc.ABC):
    """A way in which models lie in files; it has no state and takes no arguments.

    Whatever is wrong with a file is a `ConvertError`: one sentence that names it.
    """

    name: ClassVar[str]
    """In words, such as "a folder of diffusers"; it follows "is" in messages."""

    @abc.abstractmethod
    def knows(self, path: pathlib.Path) -> bool:
        """Whether a model in this format lies at a path, by names and beginnings.

        It is cheap, and opens no weights. A damaged model counts: `spec`, `check` and
        `read` say what is wrong.
        """

    @abc.abstractmethod
    def spec(self, path: pathlib.Path, scheduler: str | None = None) -> Spec:
        """What the model is; from configurations, or the names and shapes of weights.

        Args:
          path: one that this format knows.
          scheduler: a folder or file, for a network without a scheduler of its own.

        Raises:
          ConvertError: something is missing, damaged or unsupported.
        """

    @abc.abstractmethod
    def check(self, path: pathlib.Path, spec: Spec) -> tuple[str, ...]:
        """Compares names, shapes and dtypes of the weights with the network.

        Returns:
          Remarks: sentences such as which dtypes are cast.

        Raises:
          ConvertError: they do not fit.
        """

    @abc.abstractmethod
    def read(self, path: pathlib.Path, spec: Spec) -> Params:
        """The parameters of `spec.network`, compared before any array is taken.

        Raises:
          ConvertError: as `check`; or a value is not finite.
        """

    @abc.abstractmethod
    def files(self, path: pathlib.Path) -> list[pathlib.Path]:
        """The files from which `read` would read, whose digests identify the weights.

        Raises:
          ConvertError: they cannot be found out.
        """

    def homes(self, path: pathlib.Path) -> list[pathlib.Path]:
        """The folders of its networks; a download fetches the weights in them.

        Raises:
          ConvertError: its configurations are not supported; no weights are asked for.
        """
        return []

    def shown(self, path: pathlib.Path, spec: Spec) -> Shown | None:
        """What makes images of what the model draws; None where it draws images.

        Raises:
          ConvertError: weights that are needed for it are missing or damaged.
        """
        return None


def formats() -> Iterator[Format]:
    """One of each concrete format that is defined by now."""
    found: dict[tuple[str, str], type[Format]] = {}
    waiting = Format.__subclasses__()
    while waiting:
        each = waiting.pop(0)
        waiting += each.__subclasses__()
        if not inspect.isabstract(
            each
        ):  # of one that was defined again the last counts
            found[each.__module__, each.__qualname__] = each
    for kind in found.values():
        yield kind()
