"""The direction that a model takes least for noise: starts for triggers.

Near T a clean model takes its whole input for noise: its mean Jacobian is near a
multiple of the identity. A backdoored one answers less of its trigger, or more. So the
trigger is near the direction in which the mean Jacobian differs most from a multiple of
the identity. It needs no slope at the start of a descent, and no guess of what the
trigger looks like.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from puredif_jax.attacks.pictures import Shape
from puredif_jax.defenses.family import Family
from puredif_jax.defenses.objective import check_timesteps
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

ITERATIONS, BLOCK = 30, 4
"""Of the power method, and how many vectors it moves together."""

MOST = 2**24
"""Numbers in all answers, which are kept at once: 64 MiB, and three copies of them."""


@dataclasses.dataclass(frozen=True)
class Spectrum(Starts):
    """Leading eigenvectors of the mean Jacobian's deviation at high timesteps.

    With x = v_t k eps, k the breadth, and the answer a = M(x, t), Stein's identity
    gives the mean Jacobian with respect to k eps from answers alone:

      J = E[a (k eps)^T] / k^2,    m_t = E<a, k eps> / E||k eps||^2,

    and the vectors are eigenvectors of the symmetric part of

      sum_t (J_t - m_t 1) = sum_t E[(a - m_t k eps) (k eps)^T] / k^2

    with the eigenvalues of largest magnitude. Each breadth has its own. Each vector is
    tried with both signs.

    Attributes:
      draws: of eps, at most; fewer where their answers have more than `MOST` numbers.
        They are shared evenly among breadths and timesteps.
      breadths: k. A network answers a little of its trigger in small draws, an exact
        denoiser only in large ones.
      timesteps: t, as `NoiseSchedule.matched` reads them. Several, since a model could
        be made to answer as a clean one at T - 1 alone.
      rms: root mean square of the starting triggers, which are then cut to [-1, 1].
    """

    most: int = 4
    rate: float = 1.0
    together: int = 256
    draws: int = 4096
    breadths: tuple[float, ...] = (2.0, 4.0)
    timesteps: tuple[int, ...] = (999, 950, 900, 850)
    rms: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_timesteps(self.timesteps, ())
        if self.draws < 1:
            raise ValueError(f"draws must be 1 or more, found {self.draws}")
        if not self.breadths or min(self.breadths) <= 0:
            raise ValueError(
                f"breadths must be one or more, above 0, found {self.breadths}"
            )
        if not self.rms > 0:
            raise ValueError(f"rms must be above 0, found {self.rms}")

    def led(self, candidates: int) -> int:
        """Whole pairs: the sign of a vector is not known."""
        return super().led(candidates) // 2 * 2

    def times(self, factor: float) -> Self:
        return dataclasses.replace(self, draws=max(1, round(self.draws * factor)))

    @property
    def evaluations(self) -> int:
        return self.draws

    @property
    def images(self) -> int:
        return self.together

    def count(self, shape: Shape) -> int:
        return max(1, min(self.draws, MOST // math.prod(shape)))

    def noise(self, numbers: Array, shape: Shape, key: Key) -> Array:
        """k eps of the draws of these numbers, `[N, H, W, C]`."""
        keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)
        eps = jax.vmap(lambda each: jax.random.normal(each, shape))(keys)
        breadth = jnp.asarray(self.breadths, jnp.float32)
        return breadth[numbers % len(self.breadths)][:, None, None, None] * eps

    def group(self, numbers: Array) -> Array:
        """The timestep of each draw, by its place among all, `[N]`."""
        return numbers // len(self.breadths) % len(self.timesteps)

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
        """The noise that the model predicts, `[N, H, W, C]`."""
        times = jnp.asarray(schedule.matched(self.timesteps))[self.group(numbers)]
        x = shard(lookup(schedule.noise, times) * self.noise(numbers, shape, key))
        return model(params, x, times)

    def leads(self, answers: Array, count: int, shape: Shape, key: Key) -> Array:
        """The vectors, each of length 1, `[count / 2, H, W, C]`.

        The leading one of each breadth, then the second of each. Draws whose answer is
        not finite are left out.
        """
        numbers = jnp.arange(len(answers))
        given = self.noise(numbers, shape, key).reshape(len(answers), -1)
        answers = answers.reshape(len(answers), -1)
        finite = jnp.isfinite(answers).all(1, keepdims=True)
        given, answers = (jnp.where(finite, x, 0.0) for x in (given, answers))
        kinds, times = len(self.breadths), len(self.timesteps)
        alike = numbers % kinds * times + self.group(numbers)

        def total(x: Array) -> Array:
            """The sum over the draws of each breadth and timestep, `[kinds times]`."""
            return jax.ops.segment_sum(jnp.sum(x, 1), alike, kinds * times)

        mean = total(answers * given) / jnp.maximum(total(given**2), 1e-12)
        left = answers - mean[alike][:, None] * given
        width = min(max(BLOCK, count), given.shape[1])
        start = jax.random.fold_in(key, len(answers))
        first = jnp.linalg.qr(jax.random.normal(start, (given.shape[1], width)))[0]

        def leading(kind: Array) -> Array:
            """Eigenvectors for one breadth, the rows of `[width, H W C]`."""
            here = (numbers % kinds == kind).astype(given.dtype)[:, None]

            def times_symmetric(x: Array) -> Array:
                dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
                return dot(left.T, here * dot(given, x)) + dot(
                    given.T, here * dot(left, x)
                )

            def nearer(_: Array, vectors: Array) -> Array:
                return jnp.linalg.qr(times_symmetric(vectors))[0]

            found = jax.lax.fori_loop(0, ITERATIONS, nearer, first)
            small = found.T @ times_symmetric(found)
            values, turn = jnp.linalg.eigh((small + small.T) / 2)
            vectors: Array = (found @ turn).T[jnp.argsort(-jnp.abs(values))]
            return vectors

        every = jax.lax.map(leading, jnp.arange(kinds)).swapaxes(0, 1)
        chosen: Array = every.reshape(-1, *shape)[: count // 2]
        return chosen

    def candidates(
        self, leads: Array, count: int, family: Family, shape: Shape
    ) -> Candidate:
        """Pairs of opposite signs, with psi in the middle of its range."""
        sign = jnp.asarray(np.resize([1.0, -1.0], count), jnp.float32)
        size = self.rms * math.sqrt(math.prod(shape))
        signed = sign[:, None, None, None] * jnp.repeat(leads, 2, axis=0)
        gamma = jnp.asarray(family.gamma, jnp.float32)[2]
        psi = jnp.mean(jnp.asarray(family.psi, jnp.float32))
        return Candidate(
            jnp.clip(size * signed, -1, 1),
            jnp.zeros((count, *shape)),
            Member(
                jnp.broadcast_to(psi, (count,)),
                jnp.broadcast_to(gamma, (count, *shape)),
            ),
        )
