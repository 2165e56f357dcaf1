"""The direction that a model takes least for noise: starts for triggers.

Near T a clean model takes its whole input for noise: its mean Jacobian is a multiple of
the identity. A backdoored one answers less of its trigger, or more. So the trigger is
the direction in which the mean Jacobian differs most from a multiple of the identity.
It needs no slope at the start of a descent, and no guess of what the trigger looks
like.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from puredif_jax.attacks.pictures import Shape
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

ITERATIONS = 30
"""Of the power method; the leading directions are far above the others."""

MOST = 2**24
"""Numbers in all answers, which are kept at once: 64 MiB."""


@dataclasses.dataclass(frozen=True)
class Spectrum(Starts):
    """Leading right singular vectors of the mean Jacobian's deviation at T - 1.

    With x = v k eps, k the breadth, and the answer a = M(x, T - 1), Stein's identity
    gives the mean Jacobian with respect to k eps from answers alone:

      J = E[a (k eps)^T] / k^2,    m = E<a, k eps> / E||k eps||^2,

    and the vectors are those of J - m 1 = E[(a - m k eps) (k eps)^T] / k^2. Each is
    tried with both signs.

    Attributes:
      draws: of eps, at most; fewer where their answers have more than `MOST` numbers.
      breadth: k. Beyond 1 the draws reach the size at which a trigger is answered.
      rms: root mean square of the starting triggers, which are then cut to [-1, 1].
    """

    starts: int = 4
    rate: float = 0.25
    together: int = 256
    draws: int = 4096
    breadth: float = 2.0
    rms: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.draws < 1:
            raise ValueError(f"draws must be 1 or more, found {self.draws}")
        for name in ("breadth", "rms"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, found {getattr(self, name)}")

    def led(self, candidates: int) -> int:
        """Whole pairs: the sign of a vector is not known."""
        return super().led(candidates) // 2 * 2

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
        return self.breadth * eps

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
        """The noise that the model predicts at T - 1, `[N, H, W, C]`."""
        times = jnp.full((len(numbers),), schedule.steps - 1)
        x = shard(lookup(schedule.noise, times) * self.noise(numbers, shape, key))
        return model(params, x, times)

    def leads(self, answers: Array, count: int, shape: Shape, key: Key) -> Array:
        """The vectors, each of length 1, `[count / 2, H, W, C]`, the first leading.

        Draws whose answer is not finite are left out.
        """
        product = jax.lax.Precision.HIGHEST
        given = self.noise(jnp.arange(len(answers)), shape, key)
        given, answers = (x.reshape(len(x), -1) for x in (given, answers))
        finite = jnp.isfinite(answers).all(1, keepdims=True)
        given, answers = (jnp.where(finite, x, 0.0) for x in (given, answers))
        mean = jnp.sum(answers * given) / jnp.maximum(jnp.sum(given**2), 1e-12)
        left = answers - mean * given

        def through(first: Array, then: Array, x: Array) -> Array:
            """then^T first x: of given and left it is J x, of left and given J^T x."""
            inner = jnp.matmul(first, x, precision=product)
            return jnp.matmul(then.T, inner, precision=product)

        def nearer(_: Array, vectors: Array) -> Array:
            image = through(given, left, vectors)
            return jnp.linalg.qr(through(left, given, image))[0]

        start = jax.random.fold_in(key, len(answers))
        first = jax.random.normal(start, (given.shape[1], count // 2))
        found = jax.lax.fori_loop(0, ITERATIONS, nearer, jnp.linalg.qr(first)[0])
        vectors: Array = found.T.reshape(-1, *shape)
        return vectors

    def candidates(
        self, leads: Array, count: int, family: Family, shape: Shape
    ) -> Candidate:
        """Pairs of opposite signs.

        Where psi may move, all are of the leading vector and psi falls from its most to
        its least from pair to pair; otherwise each pair is of the next vector.
        """
        least, most = jnp.asarray(family.psi, jnp.float32)
        pair = jnp.arange(count) // 2
        vectors = leads[jnp.where(most > least, 0, pair)]
        sign = jnp.where(jnp.arange(count) % 2 == 0, 1.0, -1.0)[:, None, None, None]
        size = self.rms * math.sqrt(math.prod(shape))
        share = 1 - pair / jnp.maximum(pair.max(), 1)
        gamma = jnp.asarray(family.gamma, jnp.float32)[2]
        return Candidate(
            jnp.clip(size * sign * vectors, -1, 1),
            jnp.zeros((count, *shape)),
            Member(
                least + share * (most - least),
                jnp.broadcast_to(gamma, (count, *shape)),
            ),
        )
