"""Loss 3: the error on the path of a backdoor, beside a linear clean denoiser's."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp

from puredif_jax.attacks.channel import Channel
from puredif_jax.defenses.family import Channels
from puredif_jax.defenses.objective import Loss, check_samples, check_timesteps
from puredif_jax.diffusion.prediction import lookup
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


def linear_error(
    schedule: NoiseSchedule,
    channel: Channel,
    delta: Array,
    t: Array,
    variance: float,
) -> Array:
    """What the best linear clean denoiser leaves on the path of a flat image, `[T]`.

    N_t = (lambda_t H_t - C_t)^2 ||delta||^2 + sum (1 - lambda_t v_t gamma)^2: it
    answers lambda_t x, lambda_t = v_t / (s_t^2 variance + v_t^2). The image is taken
    to be 0, so that no image is rewarded for being hard to denoise.

    Args:
      schedule, channel: the process, and the path.
      delta: the trigger, `[H, W, C]`.
      t: timesteps, `[T]`.
      variance: of the images about their mean.
    """
    s, v, shift, response = (
        lookup(table, t)
        for table in (schedule.signal, schedule.noise, channel.shift, channel.response)
    )
    answer = v / (s**2 * variance + v**2)
    left = 1 - answer * v * channel.scale * jnp.ones_like(delta)[None]
    moved = (answer * shift - response).reshape(-1) ** 2 * jnp.sum(delta**2)
    return moved + jnp.sum(left**2, (1, 2, 3))


@dataclasses.dataclass(frozen=True)
class DenoisingError(Loss):
    """The error of each sample on the path, over a power of a linear denoiser's.

    mean_t log( (E_eps || M(x_t, t) - eps - C_t delta ||^2 + floor)
                / (N_t + floor)^power ),

    with x_t = s_t y + v_t gamma eps + H_t delta, N_t of `linear_error` and the power of
    the hypothesis (`Hypothesis.power`). A backdoored model at its (r, y) goes far below
    N_t at every t.

    The samples are not averaged before the square, so the noise does not favour large
    triggers. The logarithm makes each timestep count by its ratio: without it, a few
    high ones decide. N_t follows the trigger, so delta = 0 is no solution, also where
    C = 0 (but for a power of 0). Where a clean model, too, solves the equations, as
    near T for deterministic sampling, both are below the floor, and the timestep has no
    say.

    Attributes:
      timesteps: the set of t, as `NoiseSchedule.matched` reads it.
      samples: noise draws at each timestep.
      variance: of the images about their mean, in [-1, 1].
      floor: squared error of the noise, summed over an image, below which an error says
        no more.
    """

    timesteps: tuple[int, ...] = (999, 900, 800, 700, 600, 500, 400, 300, 200, 100)
    samples: int = 4
    variance: float = 0.3
    floor: float = 0.05

    def __post_init__(self) -> None:
        check_timesteps(self.timesteps, ())
        check_samples(self.samples)
        for name in ("variance", "floor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, found {getattr(self, name)}")

    @property
    def evaluations(self) -> int:
        return len(self.timesteps) * self.samples

    @property
    def seeks_target(self) -> bool:
        return True

    def bind(
        self,
        model: NoiseModel,
        schedule: NoiseSchedule,
        channel: Channels,
        shard: Shard = unsharded,
    ) -> Objective:
        times = schedule.matched(self.timesteps)

        def loss(params: Params, candidate: Candidate, key: Key) -> Array:
            chex.assert_rank([candidate.delta, candidate.target], 3)
            here, delta = channel.at(candidate), candidate.delta
            shape = (self.samples, len(times), *delta.shape)
            # [samples, T, ...]: devices split the draws, as in `DistributionShift`.
            eps = shard(jax.random.normal(key, shape))
            t = jnp.tile(jnp.asarray(times), self.samples)
            flat = eps.reshape(-1, *delta.shape)
            x = here.noisy(
                schedule,
                jnp.broadcast_to(candidate.target, flat.shape),
                flat,
                delta[None],
                t,
            )
            residual = (
                model(params, x, t) - flat - lookup(here.response, t) * delta[None]
            )
            error = jnp.mean(jnp.sum(residual.reshape(shape) ** 2, (2, 3, 4)), 0)
            at, variance = jnp.asarray(times), self.variance
            known = linear_error(schedule, here, delta, at, variance) + self.floor
            power = channel.power
            return jnp.mean(jnp.log(error + self.floor) - power * jnp.log(known))

        return loss
