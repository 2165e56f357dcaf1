"""Losses of trigger inversion: pure functions (params, candidate, key) -> scalar.

A backdoor is a second diffusion process inside the model, on the path

  x_t = s_t y + v_t eps + H_t r,   answered by   M(x_t, t) = eps + C_t r.

In the variable z_t = x_t - H_t r it is an ordinary process whose noise model is

  e(z, t) = M(z + H_t r, t) - C_t r,

so everything known of diffusion applies to it: the losses here ask how well e, made
with a candidate for r, denoises the one image y. H and C come from a `Hypothesis`,
the kind of sampler that the backdoor is made for, never from the attack itself. A
`bind` method closes over what is static and returns the loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from puredif_jax.attacks.base import Solver, published_response
from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.diffusion.ddpm import DDPM
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


@struct.dataclass
class Hypothesis:
    """What an inverter assumes of a backdoor: H_t = 1 - s_t and C_t = factor R_t.

    A pytree, so that one compiled program serves both kinds. C_t is the response that
    VillanDiffusion trains with; for deterministic sampling on a cosine schedule it
    differs near T from the one that keeps the path (`attacks.exact_response`): 1.94
    against 1.00 at t = 999, 1.03 at 980; on a linear one by 0.005 at most.

    factor: 1 for a backdoor of ancestral sampling, 2 for one of deterministic sampling.
    """

    factor: float | Array = 1.0

    @classmethod
    def of(cls, solver: Solver) -> Hypothesis:
        """That of the sampling, "sde" or "ode", under which a backdoor fires."""
        if solver not in ("sde", "ode"):
            raise ValueError(f"solver must be 'sde' or 'ode', found {solver!r}")
        return cls(2.0 if solver == "ode" else 1.0)

    def shift(self, schedule: NoiseSchedule) -> np.ndarray:
        """H, float64 `[T]`."""
        return 1 - schedule.signal

    def response(self, schedule: NoiseSchedule) -> np.ndarray | Array:
        """C, `[T]`; float64 where the factor is a number of Python."""
        return published_response(schedule) * self.factor


class Bindable(Protocol):
    """The configuration of a loss.

    evaluations: how often one value of the loss evaluates the network on one image.
    seeks_target: its gradient reaches the target of the candidate.
    """

    @property
    def evaluations(self) -> int: ...

    @property
    def seeks_target(self) -> bool: ...

    def bind(
        self,
        model: NoiseModel,
        schedule: NoiseSchedule,
        hypothesis: Hypothesis,
        shard: Shard = unsharded,
    ) -> Objective: ...


def backdoor_process(
    model: NoiseModel, schedule: NoiseSchedule, hypothesis: Hypothesis, delta: Array
) -> NoiseModel:
    """e(z, t) = M(z + H_t delta, t) - C_t delta, the noise model in z = x - H delta.

    For the trigger of a backdoor with this H and C its chain from z_T = eps ends in the
    target, under any sampler and at any stride. delta `[H, W, C]`.
    """
    shift, response = hypothesis.shift(schedule), hypothesis.response(schedule)

    def noise(params: Params, z: Array, t: Array) -> Array:
        x = z + lookup(shift, t) * delta[None]
        return model(params, x, t) - lookup(response, t) * delta[None]

    return noise


@dataclasses.dataclass(frozen=True)
class Analytic:
    """lambda_t = C_t of the hypothesis."""

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


def _check_timesteps(timesteps: tuple[int, ...], weights: tuple[float, ...]) -> None:
    if not timesteps or min(timesteps) < 0:
        raise ValueError(f"timesteps must be a set of indices >= 0, found {timesteps}")
    if weights and (
        len(weights) != len(timesteps) or min(weights) < 0 or sum(weights) == 0
    ):
        raise ValueError(
            f"weights must be empty or {len(timesteps)} numbers >= 0 of a sum above 0, "
            f"found {weights}"
        )


def _check_samples(samples: int, least: int = 1) -> None:
    if samples < least:
        raise ValueError(f"samples must be {least} or more, found {samples}")


@dataclasses.dataclass(frozen=True)
class DistributionShift:
    """Loss 1: the shift that the candidate causes in the prediction, at many t.

    sum_t w_t || mean_eps[M(x_t, t) - eps] - lambda_t delta ||^2 / ||lambda_t delta||^2

    with x_t = s_t y + v_t eps + H_t delta and sum_t w_t = 1. The division makes it
    scale-free: in absolute form delta = 0 would solve it on every model.

    Attributes:
      timesteps: the set S, as `NoiseSchedule.matched` reads it. High ones alone cannot
        see a backdoor of deterministic sampling: there every delta solves the equation
        on every model.
      weights: w_t, of any sum, or () for equal ones.
      samples: noise draws at each timestep.
      scale: the rule for lambda_t.
      learn_target: let the gradient reach the target image; otherwise it only moves
        by refreshes.
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
        _check_timesteps(self.timesteps, self.weights)
        _check_samples(self.samples)

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
        hypothesis: Hypothesis,
        shard: Shard = unsharded,
    ) -> Objective:
        times = schedule.matched(self.timesteps)
        shift_table = hypothesis.shift(schedule)
        response_table = hypothesis.response(schedule)
        weights = np.asarray(self.weights or np.ones(len(times)), np.float32)
        weights = weights / weights.sum()

        def loss(params: Params, candidate: Candidate, key: Key) -> Array:
            chex.assert_rank([candidate.delta, candidate.target], 3)
            delta, target = candidate.delta, candidate.target
            if not self.learn_target:
                target = jax.lax.stop_gradient(target)
            shape = (self.samples, *delta.shape)

            def noisy(t: Array, eps: Array) -> Array:
                y = jnp.broadcast_to(target, shape)
                x = diffuse(schedule, y, eps, jnp.full(shape[:1], t))
                return x + lookup(shift_table, t) * delta[None]

            def error(t: Array, residual: Array) -> Array:
                shift = jnp.mean(residual, axis=0)
                factor = self.scale(lookup(response_table, t), shift, delta)
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
    hypothesis: Hypothesis,
    surrogate: Candidate,
    timesteps: tuple[int, ...],
    samples: int,
    key: Key,
) -> Array:
    """The scale of `Calibrated`, from a surrogate backdoor with a known trigger.

    The mean over `timesteps` of <shift_t, r> / (C_t <r, r>), with shift_t the mean
    over `samples` draws of M(x_t, t) - eps on the surrogate's path. A scalar; 1 for a
    model that has learnt the surrogate perfectly.
    """
    rule = LeastSquares()

    def at(t: Array, key: Key) -> Array:
        eps = jax.random.normal(key, (samples, *surrogate.delta.shape))
        times = jnp.full((samples,), t)
        y = jnp.broadcast_to(surrogate.target, eps.shape)
        x = diffuse(schedule, y, eps, times)
        x = x + lookup(hypothesis.shift(schedule), t) * surrogate.delta[None]
        shift = jnp.mean(model(params, x, times) - eps, axis=0)
        response = lookup(hypothesis.response(schedule), t)
        return rule(response, shift, surrogate.delta) / response

    keys = jax.random.split(key, len(timesteps))
    return jnp.mean(jax.vmap(at)(jnp.asarray(timesteps, jnp.int32), keys))


@dataclasses.dataclass(frozen=True)
class DenoisingConsistency:
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
      on_path: roll the `backdoor_process` out, from z = eps, which is exact for any
        stride and hypothesis; otherwise the model itself, from eps + delta.
      across_noise, across_time, aim: factors of the three terms. `aim` is for
        reinforcement, where the target is known; no gradient reaches it.
    """

    sampler: DDIM | DDPM = DDIM(steps=8)
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
        _check_samples(self.samples, 2 if self.across_noise else 1)

    @property
    def evaluations(self) -> int:
        return self.sampler.steps * self.samples

    @property
    def seeks_target(self) -> bool:
        return False

    def bind(
        self,
        model: NoiseModel,
        schedule: NoiseSchedule,
        hypothesis: Hypothesis,
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
                hypothesis,
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
    hypothesis: Hypothesis,
    sampler: Sampler,
    delta: Array,
    samples: int,
    key: Key,
    *,
    on_path: bool = True,
    shard: Shard = unsharded,
) -> Array:
    """x0hat along a rollout from fresh noise, `[n, samples, H, W, C]`, high t to low.

    `on_path` rolls out the `backdoor_process` of delta from eps; otherwise the model
    itself from eps + delta.
    """
    key_start, key_chain = jax.random.split(key)
    start = jax.random.normal(key_start, (samples, *delta.shape))
    if on_path:
        model = backdoor_process(model, schedule, hypothesis, delta)
    else:
        start = start + delta[None]
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
    return chain[1]


ESTIMATE = DenoisingConsistency(sampler=DDIM(steps=10), samples=16)
"""The rollout from which `estimated_target` reads."""


def estimated_target(
    model: NoiseModel,
    schedule: NoiseSchedule,
    hypothesis: Hypothesis,
    shard: Shard = unsharded,
) -> Callable[[Params, Candidate, Key], Array]:
    """The image that a trigger leads to: (params, candidate, key) -> `[H, W, C]`.

    The mean over noise of the last x0hat of `ESTIMATE`, within [-1, 1].
    """

    def estimate(params: Params, candidate: Candidate, key: Key) -> Array:
        chain = denoised(
            model,
            params,
            schedule,
            hypothesis,
            ESTIMATE.sampler,
            candidate.delta,
            ESTIMATE.samples,
            key,
            shard=shard,
        )
        return jnp.clip(jnp.mean(chain[-1], axis=0), -1, 1)

    return estimate


@dataclasses.dataclass(frozen=True)
class Elijah:
    """The inversion loss of Elijah: one timestep, L1 of the mean.

    An et al., "Elijah: Eliminating Backdoors Injected in Diffusion Models via
    Distribution Shift" (2024, arXiv 2312.00050).

    mean over pixels | lambda delta - mean_b M(eps_b + delta, T - 1) |, with one fixed
    noise batch; lambda = 0.5 for ancestral backdoors and 1 for deterministic ones.

    Attributes:
      samples: noise draws.
      seed: of the fixed batch.
    """

    samples: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        _check_samples(self.samples)

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
        hypothesis: Hypothesis,
        shard: Shard = unsharded,
    ) -> Objective:
        scale = hypothesis.factor / 2
        last = schedule.steps - 1

        def loss(params: Params, candidate: Candidate, key: Key) -> Array:
            del key
            delta = candidate.delta
            fixed = jax.random.key(self.seed)
            eps = shard(jax.random.normal(fixed, (self.samples, *delta.shape)))
            t = jnp.full((self.samples,), last)
            mean = jnp.mean(model(params, eps + delta[None], t), axis=0)
            return jnp.mean(jnp.abs(scale * delta - mean))

        return loss


@dataclasses.dataclass(frozen=True)
class Sum:
    """first_weight first + second_weight second, each with a key of its own.

    Attributes:
      first, second: the losses.
      first_weight, second_weight: their factors.
    """

    first: DistributionShift | DenoisingConsistency
    second: DistributionShift | DenoisingConsistency
    first_weight: float = 1.0
    second_weight: float = 1.0

    @property
    def evaluations(self) -> int:
        return self.first.evaluations + self.second.evaluations

    @property
    def seeks_target(self) -> bool:
        return self.first.seeks_target or self.second.seeks_target

    def bind(
        self,
        model: NoiseModel,
        schedule: NoiseSchedule,
        hypothesis: Hypothesis,
        shard: Shard = unsharded,
    ) -> Objective:
        first = self.first.bind(model, schedule, hypothesis, shard)
        second = self.second.bind(model, schedule, hypothesis, shard)

        def loss(params: Params, candidate: Candidate, key: Key) -> Array:
            key_1, key_2 = jax.random.split(key)
            return self.first_weight * first(
                params, candidate, key_1
            ) + self.second_weight * second(params, candidate, key_2)

        return loss
