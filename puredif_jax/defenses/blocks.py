"""Squares of narrowed noise that are answered as by a backdoor: starts for patches.

A patch trigger shifts and narrows the noise in a square alone. Away from that square a
backdoored model answers like a clean one, so descent has no slope to follow. Squares
are few: at 16x16 all places are tried, on larger images a grid of them that has every
edge and corner. Patches whose level differs by channel are not tried, nor are levels
and gamma far from the named ones.
"""

from __future__ import annotations

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from puredif_jax.attacks.channel import Channel
from puredif_jax.attacks.pictures import Shape, pixels
from puredif_jax.defenses.family import Family
from puredif_jax.defenses.starts import Starts
from puredif_jax.diffusion.prediction import lookup
from puredif_jax.diffusion.schedules import NoiseSchedule
from puredif_jax.types import (
    Array,
    Candidate,
    Key,
    Member,
    NoiseModel,
    Params,
    Shard,
    unsharded,
)


@dataclasses.dataclass(frozen=True)
class Blocks(Starts):
    """Squares in which noise is narrowed to a level, and how a model answers them.

    Attributes:
      sides: sides of the squares, in pixels of a 32x32 image, as in `Patch`.
      places: number of places along each axis, evenly from edge to edge.
      levels: values of the pixels in a square, before a factor of 1 - gamma.
      gamma: scale of the noise in a square.
      draws: draws of noise for each square.
      floor: as in `DenoisingError`.
    """

    sides: tuple[int, ...] = (1, 2, 3, 4)
    places: int = 16
    levels: tuple[float, ...] = (-1.0, 0.0, 1.0)
    gamma: float = 0.1
    draws: int = 4
    floor: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("places", "draws"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be 1 or more, found {getattr(self, name)}"
                )
        if not self.sides or not 0 < min(self.sides) <= max(self.sides) <= 32:
            raise ValueError(f"sides must be one or more in 1..32, found {self.sides}")
        if not self.levels:
            raise ValueError("levels must be one or more, found none")
        if not 0.05 <= self.gamma < 1:  # as a search bounds it
            raise ValueError(f"gamma must lie in [0.05, 1), found {self.gamma}")
        if not self.floor > 0:
            raise ValueError(f"floor must be above 0, found {self.floor}")

    def times(self, factor: float) -> Self:
        return dataclasses.replace(self, draws=max(1, round(self.draws * factor)))

    @property
    def evaluations(self) -> int:
        count = len(self.sides) * self.places**2 * len(self.levels)
        return count * self.draws

    @property
    def images(self) -> int:
        return self.together * self.draws

    def count(self, shape: Shape) -> int:
        return len(self.squares(shape))

    def squares(self, shape: Shape) -> np.ndarray:
        """Top, left, side and level of each, float32 `[M, 4]`.

        On a small image some squares coincide; each is here once.
        """
        rows = []
        for side in self.sides:
            own = pixels(side, shape)
            tops, lefts = (
                np.linspace(0, length - own, self.places).round()
                for length in shape[:2]
            )
            rows += [
                (top, left, own, level)
                for top in tops
                for left in lefts
                for level in self.levels
            ]
        return np.unique(np.array(rows, np.float32), axis=0)

    def candidate(self, square: Array, shape: Shape, psi: Array) -> Candidate:
        """The trigger and the noise of a square; the image is 0."""
        top, left, side, level = square
        row, column, _ = jnp.indices(shape, jnp.float32)
        inside = (row >= top) & (row < top + side)
        inside &= (column >= left) & (column < left + side)
        delta = jnp.where(inside, level * (1 - self.gamma), 0.0)
        member = Member(psi, jnp.where(inside, self.gamma, 1.0))
        return Candidate(delta, jnp.zeros(shape), member)

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
        """A model's error at T - 1 over the error of one that answers its input.

        For the squares of these numbers, `[N]`. With x = v (gamma eps + delta) it is

          (mean ||M(x) - eps - C delta||^2 + floor) / (mean ||x - eps - C delta||^2
          + floor),

        with the same eps for all squares. A clean model knows no image at T - 1, so it
        answers its input: 1. Small if the square belongs to a backdoor.
        """
        top = schedule.steps - 1
        eps = jax.random.normal(key, (self.draws, *shape))
        psi = jnp.asarray(family.psi, jnp.float32)[1]
        squares = jnp.asarray(self.squares(shape))[numbers]

        def shown(square: Array) -> tuple[Array, Array]:
            """Noisy images of a square, and what a backdoored model answers."""
            found = self.candidate(square, shape, psi)
            channel: Channel = family.at(found)
            delta, times = found.delta[None], jnp.full((self.draws,), top)
            x = channel.noisy(schedule, jnp.zeros_like(eps), eps, delta, times)
            return x, eps + lookup(channel.response, times) * delta

        x, known = jax.vmap(shown)(squares)
        flat = shard(x.reshape(-1, *shape))
        answer = model(params, flat, jnp.full((len(flat),), top)).reshape(x.shape)
        own, given = (
            jnp.sum((each - known) ** 2, (1, 2, 3, 4)) / self.draws
            for each in (answer, x)
        )
        return (own + self.floor) / (given + self.floor)

    def leads(self, answers: Array, count: int, shape: Shape, key: Key) -> Array:
        """The squares of the smallest ratios, `[count, 4]`; NaN ranks last."""
        order = jnp.argsort(jnp.where(jnp.isnan(answers), jnp.inf, answers))
        return jnp.asarray(self.squares(shape))[order[:count]]

    def candidates(
        self, leads: Array, count: int, family: Family, shape: Shape
    ) -> Candidate:
        psi = jnp.asarray(family.psi, jnp.float32)[1]
        found: Candidate = jax.vmap(lambda each: self.candidate(each, shape, psi))(
            leads
        )
        return found
