"""Elijah (An et al. 2024, arXiv 2312.00050): its inversion loss and its settings."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from puredif_jax.attacks.channel import Channel
from puredif_jax.defenses.objective import Loss, check_samples
from puredif_jax.diffusion.schedules import NoiseSchedule
from puredif_jax.types import (
    Array,
    Candidate,
    Key,
    NoiseModel,
    Objective,
    Params,
    Shard,
    unsharded,
)


@dataclasses.dataclass(frozen=True)
class ElijahLoss(Loss):
    """The inversion loss of Elijah: one timestep, L1 of the mean.

    An et al., "Elijah: Eliminating Backdoors Injected in Diffusion Models via
    Distribution Shift" (2024, arXiv 2312.00050).

    mean over pixels | lambda delta - mean_b M(x_T(eps_b), T - 1) |, x_T
    the triggered start of a noise batch that stays the same.

    Attributes:
      scale: lambda, 0.5 for ancestral backdoors and 1 for deterministic ones.
      samples: noise draws.
      seed: of the fixed batch.
    """

    scale: float = 0.5
    samples: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        check_samples(self.samples)

    @property
    def evaluations(self) -> int:
        return self.samples

    @property
    def seeks_target(self) -> bool:
        return False

    def bind(
        self,
        model: NoiseModel,
        schedule: NoiseSchedule,
        channel: Channel,
        shard: Shard = unsharded,
    ) -> Objective:
        last = schedule.steps - 1

        def loss(params: Params, candidate: Candidate, key: Key) -> Array:
            del key
            delta = candidate.delta
            fixed = jax.random.key(self.seed)
            eps = shard(jax.random.normal(fixed, (self.samples, *delta.shape)))
            t = jnp.full((self.samples,), last)
            x = channel.start(schedule, eps, delta[None])
            mean = jnp.mean(model(params, x, t), axis=0)
            return jnp.mean(jnp.abs(self.scale * delta - mean))

        return loss
