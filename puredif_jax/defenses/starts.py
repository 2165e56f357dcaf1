"""What a model answers to many inputs, and the candidates that a search starts at."""

from __future__ import annotations

import abc
import dataclasses
from typing import Self

from puredif_jax.attacks.pictures import Shape
from puredif_jax.defenses.family import Family
from puredif_jax.diffusion.schedules import NoiseSchedule
from puredif_jax.types import (
    Array,
    Candidate,
    Key,
    NoiseModel,
    Params,
    Shard,
    unsharded,
)


@dataclasses.dataclass(frozen=True)
class Starts(abc.ABC):
    """Inputs, numbered from 0, and what follows from the answers to all of them.

    Attributes:
      most: candidates of a search that start here, at most, and at most half of all;
        the others start at random.
      rate: of the descent from there, over the rate of the others.
      together: inputs that are answered at once.
    """

    most: int = 2
    rate: float = 0.1
    together: int = 64

    def __post_init__(self) -> None:
        for name in ("most", "together"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be 1 or more, found {getattr(self, name)}"
                )
        if not self.rate > 0:
            raise ValueError(f"rate must be above 0, found {self.rate}")

    def led(self, candidates: int) -> int:
        """How many of so many candidates start here."""
        return min(self.most, candidates // 2)

    @abc.abstractmethod
    def times(self, factor: float) -> Self:
        """The same with `factor` of the noise draws, one or more."""

    @property
    @abc.abstractmethod
    def evaluations(self) -> int:
        """How often the network is evaluated on one image, at most."""

    @property
    @abc.abstractmethod
    def images(self) -> int:
        """Images that the network sees at once."""

    @abc.abstractmethod
    def count(self, shape: Shape) -> int:
        """How many inputs there are for images of a shape."""

    @abc.abstractmethod
    def answers(
        self,
        model: NoiseModel,
        params: Params,
        schedule: NoiseSchedule,
        family: Family,
        numbers: Array,
        shape: Shape,
        key: Key,
        *,
        shard: Shard = unsharded,
    ) -> Array:
        """What is kept of the answers to the inputs of these numbers, `[N, ...]`."""

    @abc.abstractmethod
    def leads(self, answers: Array, count: int, shape: Shape, key: Key) -> Array:
        """What `count` candidates are made of, from the answers to all inputs.

        Args:
          answers: `[count(shape), ...]`.
          count: of candidates.
          shape: (H, W, C).
          key: the one that the answers had.
        """

    @abc.abstractmethod
    def candidates(
        self, leads: Array, count: int, family: Family, shape: Shape
    ) -> Candidate:
        """The candidates, with leading axis `[count]`; their image is 0."""
