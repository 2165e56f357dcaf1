"""TERD's reversed loss: the unknown response drops out between two noise draws."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from puredif_jax.attacks.channel import Channel
from puredif_jax.defenses.family import Channels
from puredif_jax.defenses.objective import Loss, check_samples
from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.diffusion.prediction import diffuse, lookup
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

HIGH, LOW = tuple(range(990, 1000)), tuple(range(10))


@dataclasses.dataclass(frozen=True)
class Reversed(Loss):
    """The reversed loss of TERD, for its first stage or its second.

    Mo et al., "TERD: A Unified Framework for Safeguarding Diffusion Models Against
    Backdoors" (2024, arXiv 2409.05294). With two draws of noise for one image,

      x_i = s_t x0 + v_t gamma eps_i + l_t delta,    l_t = 1 (sigma_t if exploding),
      L(S) = 1/2 mean_b || (eps_1 - M(x_1, t)) - (eps_2 - M(x_2, t)) ||^2,  t from S:

    the response C_t delta of a backdoor is in both, and drops out.

    First stage: L(HIGH) with x0 standard noise in place of data. Second stage, with a
    `rollout`: [L(HIGH) + L(LOW)] / 2 with x0 drawn from noise and delta by it, with
    gradients through it, and no delta in the x_i at low t. l1 ||delta||_1 is subtracted
    from both.

    Attributes:
      samples: images, each with two draws.
      l1: reward of the trigger's L1 norm, summed over the image.
      narrows: gamma is sought, `[H, W, C]`, and the rollout runs inside the channel.
      rollout: draws x0; None for the first stage.
    """

    samples: int = 16
    l1: float = 5e-5
    narrows: bool = False
    rollout: DDIM | None = None

    def __post_init__(self) -> None:
        check_samples(self.samples)
        if self.l1 < 0:
            raise ValueError(f"l1 must be 0 or more, found {self.l1}")

    @property
    def evaluations(self) -> int:
        if self.rollout is None:
            return 2 * self.samples
        return (self.rollout.steps + 4) * self.samples

    @property
    def seeks_target(self) -> bool:
        return False

    @property
    def seeks_member(self) -> bool:
        return self.narrows

    def bind(
        self,
        model: NoiseModel,
        schedule: NoiseSchedule,
        channel: Channels,
        shard: Shard = unsharded,
    ) -> Objective:
        high, low = map(schedule.matched, (HIGH, LOW))
        lift = np.ones(schedule.steps) if schedule.fades else schedule.noise
        rollout = self.rollout
        if rollout is not None:
            rollout.path(schedule)  # refuses a grid that there is not

        def difference(
            params: Params, x0: Array, scale: Array, r: Array, times: Array, key: Key
        ) -> Array:
            key_t, *keys = jax.random.split(key, 3)
            t = jax.random.choice(key_t, times, (self.samples,))

            def residual(key: Key) -> Array:
                eps = shard(jax.random.normal(key, x0.shape))
                x = diffuse(schedule, x0, scale * eps, t) + lookup(lift, t) * r
                return eps - model(params, x, t)

            first, second = map(residual, keys)
            return jnp.sum((first - second) ** 2) / (2 * self.samples)

        def loss(params: Params, candidate: Candidate, key: Key) -> Array:
            key_x, key_high, key_low = jax.random.split(key, 3)
            here, r = channel.at(candidate), candidate.delta[None]
            scale = here.scale if self.narrows else jnp.ones(())
            noise = shard(jax.random.normal(key_x, (self.samples, *r.shape[1:])))
            size = self.l1 * jnp.sum(jnp.abs(r))
            x0 = noise
            if rollout is not None:
                x0 = self._drawn(model, params, schedule, here, noise, r, rollout)
            found = difference(params, x0, scale, r, jnp.asarray(high), key_high)
            if rollout is not None:
                still = jnp.zeros_like(r)
                end = difference(params, x0, scale, still, jnp.asarray(low), key_low)
                found = (found + end) / 2
            return found - size

        return loss

    def _drawn(
        self,
        model: NoiseModel,
        params: Params,
        schedule: NoiseSchedule,
        here: Channel,
        noise: Array,
        r: Array,
        rollout: Sampler,
    ) -> Array:
        """Images from noise and trigger, `[B, H, W, C]`, by the rollout.

        Inside the channel it starts from z = (x - H_t r) / gamma, at its first t.
        """
        first = int(rollout.path(schedule)[0][0])
        start, key = schedule.start(noise, r, first), jax.random.key(0)
        if self.narrows:
            outside = here.start(schedule, noise, r, first)
            shift = lookup(here.shift, jnp.asarray(first)) * r
            start = (outside - shift) / here.scale
            model = here.inside(model, schedule, r[0])
        images, _ = trajectory(model, params, schedule, rollout, start, key, remat=True)
        return images * here.scale if self.narrows else images
