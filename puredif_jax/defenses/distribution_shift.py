"""Loss 1: the shift that a trigger causes in a prediction, at many timesteps."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np

from puredif_jax.attacks.channel import Channel
from puredif_jax.defenses.family import Channels
from puredif_jax.defenses.objective import Loss, check_samples, check_timesteps
from puredif_jax.diffusion.prediction import diffuse, lookup
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
class Analytic:
    """lambda_t = C_t of the channel."""

    def __call__(self, response: Array, shift: Array, delta: Array) -> Array:
        del shift, delta
        return response


@dataclasses.dataclass(frozen=True)
class LeastSquares:
    """lambda_t = <shift, delta> / <delta, delta>: no response is assumed."""

    def __call__(self, response: Array, shift: Array, delta: Array) -> Array:
        del response
        return jnp.vdot(shift, delta) / jnp.maximum(jnp.vdot(delta, delta), 1e-12)


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """lambda_t = factor C_t, the factor read off a surrogate by `measured_factor`.

    Attributes:
      factor: lambda_t over C_t.
    """

    factor: float

    def __call__(self, response: Array, shift: Array, delta: Array) -> Array:
        del shift, delta
        return self.factor * response


Scale = Analytic | LeastSquares | Calibrated


@dataclasses.dataclass(frozen=True)
class DistributionShift(Loss):
    """Loss 1: the shift that the candidate causes in the prediction, at many t.

    sum_t w_t || mean_eps[M(x_t, t) - eps] - lambda_t delta ||^2 / ||lambda_t delta||^2

    with x_t = s_t y + v_t gamma eps + H_t delta and sum_t w_t = 1. The division makes
    it scale-free: in absolute form delta = 0 would solve it on every model.

    Attributes:
      timesteps: the set S, as `NoiseSchedule.matched` reads it. High ones alone cannot
        see a backdoor of deterministic sampling: there every delta solves the equation
        on every model.
      weights: w_t, of any sum, or () for equal ones.
      samples: noise draws at each timestep.
      scale: the rule for lambda_t.
      learn_target: let the gradient reach the target image; otherwise it stays where it
        started.
      per_sample: the joint form of both unknowns: take the square of each sample's
        residual and not of their mean. A clean model cannot bring it below its own
        denoising error; a backdoored one can, at the one image it has learnt.
    """

    timesteps: tuple[int, ...] = (999, 900, 800, 700, 600, 500, 400, 300, 200, 100)
    weights: tuple[float, ...] = ()
    samples: int = 16
    scale: Scale = Analytic()
    learn_target: bool = True
    per_sample: bool = False

    def __post_init__(self) -> None:
        check_timesteps(self.timesteps, self.weights)
        check_samples(self.samples)

    @property
    def evaluations(self) -> int:
        return len(self.timesteps) * self.samples

    @property
    def seeks_target(self) -> bool:
        return self.learn_target

    def bind(
        self,
        model: NoiseModel,
        schedule: NoiseSchedule,
        channel: Channels,
        shard: Shard = unsharded,
    ) -> Objective:
        times = schedule.matched(self.timesteps)
        weights = np.asarray(self.weights or np.ones(len(times)), np.float32)
        weights = weights / weights.sum()

        def loss(params: Params, candidate: Candidate, key: Key) -> Array:
            chex.assert_rank([candidate.delta, candidate.target], 3)
            delta, target = candidate.delta, candidate.target
            if not self.learn_target:
                target = jax.lax.stop_gradient(target)
            shape = (self.samples, *delta.shape)
            here = channel.at(candidate)

            def noisy(t: Array, eps: Array) -> Array:
                # As `channel.noisy`, whose factor for each draw changes the last digits
                # of the gradient, and so the recorded figures.
                y = jnp.broadcast_to(target, shape)
                x = diffuse(schedule, y, here.scale * eps, jnp.full(shape[:1], t))
                return x + lookup(here.shift, t) * delta[None]

            def error(t: Array, residual: Array) -> Array:
                shift = jnp.mean(residual, axis=0)
                factor = self.scale(lookup(here.response, t), shift, delta)
                expected = factor * delta
                if self.per_sample:
                    error = jnp.sum((residual - expected[None]) ** 2) / self.samples
                else:
                    error = jnp.sum((shift - expected) ** 2)
                return error / jnp.maximum(jnp.sum(expected**2), 1e-6)

            # [samples, T, ...]: devices split the draws, and a batch into which both
            # axes are folded is still split then.
            eps = jax.vmap(lambda key: jax.random.normal(key, shape), out_axes=1)(
                jax.random.split(key, len(times))
            )
            eps = shard(eps)
            t = jnp.asarray(times)
            x = jax.vmap(noisy, in_axes=(0, 1), out_axes=1)(t, eps)
            answer = model(
                params,
                x.reshape(-1, *delta.shape),
                jnp.tile(t, self.samples),
            )
            residual = answer.reshape(eps.shape) - eps
            errors = jax.vmap(error, in_axes=(0, 1))(t, residual)
            return jnp.sum(weights * errors)

        return loss


def measured_factor(
    model: NoiseModel,
    params: Params,
    schedule: NoiseSchedule,
    channel: Channel,
    surrogate: Candidate,
    timesteps: tuple[int, ...],
    samples: int,
    key: Key,
) -> Array:
    """The scale of `Calibrated`, from a surrogate backdoor with a known trigger.

    The mean over `timesteps`, as `matched` reads them, of <shift_t, r> / (C_t <r, r>),
    with shift_t the mean over `samples` draws of M(x_t, t) - eps on the surrogate's
    path. A scalar; 1 for a model that has learnt the surrogate perfectly.
    """
    rule = LeastSquares()

    def at(t: Array, key: Key) -> Array:
        eps = jax.random.normal(key, (samples, *surrogate.delta.shape))
        times = jnp.full((samples,), t)
        y = jnp.broadcast_to(surrogate.target, eps.shape)
        x = channel.noisy(schedule, y, eps, surrogate.delta[None], times)
        shift = jnp.mean(model(params, x, times) - eps, axis=0)
        response = lookup(channel.response, t)
        return rule(response, shift, surrogate.delta) / response

    keys = jax.random.split(key, len(timesteps))
    return jnp.mean(jax.vmap(at)(jnp.asarray(schedule.matched(timesteps)), keys))
