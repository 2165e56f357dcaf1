"""Loss 2: where a backdoor fires, all noise and all timesteps point at one image."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from puredif_jax.attacks.channel import Channel
from puredif_jax.defenses.family import Channels
from puredif_jax.defenses.objective import Loss, check_samples
from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.diffusion.sampling import Sampler, trajectory
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
class DenoisingConsistency(Loss):
    """Loss 2: where the backdoor fires, all noise and all t point at one image.

    With x0hat_t the denoised images along a rollout of `sampler`, from high t to low,
    and xbar the mean over noise of the last of them, per pixel,

      across_noise sum_t a_t Var_eps[x0hat_t]
        + across_time sum_t a_t || mean_eps x0hat_t - xbar ||^2
        + aim E_eps || x0hat_last - y ||^2,

    a_t proportional to s_t^2 / (s_t^2 + v_t^2 / 10): this takes back the factor 1/s_t
    near T and leaves the middle and low timesteps alone. A collapsed model with a
    huge delta also has no variance: optimise it within a bound.

    Attributes:
      sampler: of the rollout; its body is rematerialised, so memory under the gradient
        is nearly flat in its steps.
      samples: noise draws.
      on_path: roll the process inside the channel out, from z = eps, which is exact for
        any stride and channel; otherwise the model itself, from eps + delta.
      across_noise, across_time, aim: factors of the three terms. `aim` is for
        reinforcement, where the target is known; no gradient reaches it.
    """

    sampler: Sampler = DDIM(steps=8)
    samples: int = 16
    on_path: bool = True
    across_noise: float = 1.0
    across_time: float = 0.0
    aim: float = 0.0

    def __post_init__(self) -> None:
        factors = self.across_noise, self.across_time, self.aim
        if min(factors) < 0 or not any(factors):
            raise ValueError(
                "across_noise, across_time and aim must be 0 or more and not all 0, "
                f"found {factors}"
            )
        # Of one draw the variance is 0, and its gradient.
        check_samples(self.samples, 2 if self.across_noise else 1)

    @property
    def evaluations(self) -> int:
        return self.sampler.steps * self.samples

    @property
    def seeks_target(self) -> bool:
        return False

    @property
    def seeks_member(self) -> bool:
        return self.on_path

    def bind(
        self,
        model: NoiseModel,
        schedule: NoiseSchedule,
        channel: Channels,
        shard: Shard = unsharded,
    ) -> Objective:
        falling, _ = self.sampler.path(schedule)
        s2, v2 = schedule.signal[falling] ** 2, schedule.noise[falling] ** 2
        weights = s2 / (s2 + v2 / 10)
        weights = np.asarray(weights / weights.sum(), np.float32)

        def loss(params: Params, candidate: Candidate, key: Key) -> Array:
            x0 = denoised(
                model,
                params,
                schedule,
                channel.at(candidate),
                self.sampler,
                candidate.delta,
                self.samples,
                key,
                on_path=self.on_path,
                shard=shard,
            )
            mean = jnp.mean(x0, axis=1)
            variance = jnp.mean(jnp.var(x0, axis=1), axis=(1, 2, 3))
            drift = jnp.mean((mean - mean[-1:]) ** 2, axis=(1, 2, 3))
            total = self.across_noise * jnp.sum(weights * variance)
            total += self.across_time * jnp.sum(weights * drift)
            target = jax.lax.stop_gradient(candidate.target)
            return total + self.aim * jnp.mean((x0[-1] - target[None]) ** 2)

        return loss


def denoised(
    model: NoiseModel,
    params: Params,
    schedule: NoiseSchedule,
    channel: Channel,
    sampler: Sampler,
    delta: Array,
    samples: int,
    key: Key,
    *,
    on_path: bool = True,
    shard: Shard = unsharded,
) -> Array:
    """x0hat along a rollout from fresh noise, `[n, samples, H, W, C]`, high t to low.

    `on_path` rolls the process of delta inside the channel out, from eps; otherwise the
    model itself, from eps + delta.
    """
    key_start, key_chain = jax.random.split(key)
    eps = jax.random.normal(key_start, (samples, *delta.shape))
    first = int(sampler.path(schedule)[0][0])
    if on_path:
        model = channel.inside(model, schedule, delta)
        start = schedule.start(eps, first=first)
    else:
        start = channel.start(schedule, eps, delta[None], first)
    chain = trajectory(
        model,
        params,
        schedule,
        sampler,
        shard(start),
        key_chain,
        remat=True,
        shard=shard,
    )
    if not on_path:
        return chain[1]
    return chain[1] * (channel.scale[None] if channel.scale.ndim else channel.scale)


ESTIMATE = DenoisingConsistency(sampler=DDIM(steps=10), samples=16)
"""The rollout from which `estimated_target` reads."""


def estimated_target(
    model: NoiseModel,
    schedule: NoiseSchedule,
    channel: Channels,
    shard: Shard = unsharded,
    samples: int = ESTIMATE.samples,
) -> Callable[[Params, Candidate, Key], Array]:
    """The image that a trigger leads to: (params, candidate, key) -> `[H, W, C]`.

    The mean over so many draws of noise of the last x0hat of `ESTIMATE`, within
    [-1, 1].
    """

    def estimate(params: Params, candidate: Candidate, key: Key) -> Array:
        chain = denoised(
            model,
            params,
            schedule,
            channel.at(candidate),
            ESTIMATE.sampler,
            candidate.delta,
            samples,
            key,
            shard=shard,
        )
        return jnp.clip(jnp.mean(chain[-1], axis=0), -1, 1)

    return estimate
