"""Losses of trigger inversion: pure functions (params, candidate, key) -> scalar.

All of them speak of the hypothesised path of a backdoor,

  x_t = s_t y + v_t eps + H_t delta,   answered by   M(x_t, t) = eps + C_t delta,

with H and C from a `Hypothesis` (the kind of sampler it is made for), never from the
attack itself. A `bind` method closes over what is static and returns the loss.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, Protocol

import chex
import jax
import jax.numpy as jnp
import numpy as np

from puredif_jax.attacks import Solver, published_response
from puredif_jax.diffusion import NoiseSchedule, grid, lookup
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
class Hypothesis:
    """What an inverter assumes of a backdoor: H_t = 1 - s_t, C_t = R_t or 2 R_t.

    Attributes:
      solver: "sde" for a backdoor of ancestral sampling, C = R; "ode" for one of
        deterministic sampling, C = 2 R.
    """

    solver: Solver = "sde"

    def __post_init__(self) -> None:
        if self.solver not in ("sde", "ode"):
            raise ValueError(f"solver must be 'sde' or 'ode', found {self.solver!r}")

    def shift(self, schedule: NoiseSchedule) -> np.ndarray:
        """H, float64 `[T]`."""
        return 1 - schedule.signal

    def response(self, schedule: NoiseSchedule) -> np.ndarray:
        """C, float64 `[T]`."""
        return published_response(schedule) * (2 if self.solver == "ode" else 1)


class Bindable(Protocol):
    """The configuration of a loss."""

    def bind(
        self,
        model: NoiseModel,
        schedule: NoiseSchedule,
        hypothesis: Hypothesis,
        shard: Shard = unsharded,
    ) -> Objective: ...


def on_path(
    schedule: NoiseSchedule,
    hypothesis: Hypothesis,
    candidate: Candidate,
    eps: Array,
    t: Array,
) -> Array:
    """x_t = s_t y + v_t eps + H_t delta, `[B, H, W, C]`; t a scalar."""
    return (
        lookup(schedule.signal, t) * candidate.target
        + lookup(schedule.noise, t) * eps
        + lookup(hypothesis.shift(schedule), t) * candidate.delta
    )


def path_rollout(
    model: NoiseModel,
    params: Params,
    schedule: NoiseSchedule,
    hypothesis: Hypothesis,
    delta: Array,
    eps: Array,
    timesteps: np.ndarray,
    shard: Shard = unsharded,
) -> Array:
    """Denoised images along the deterministic reverse process of the path.

    At each timestep the response C_t delta is taken out of the prediction, and the
    shift H_t delta out of the image, before a DDIM step (its last point is t itself):

      e = M(x_t, t) - C_t delta,   x0hat = (x_t - H_t delta - v_t e) / s_t,
      x_n = s_n x0hat + v_n e + H_n delta.

    For the true delta of a backdoor that keeps to the hypothesis this is exact at any
    stride, for ancestral backdoors too, which do not fire under plain DDIM.

    Args:
      model, params, schedule, hypothesis: as everywhere.
      delta: trigger `[H, W, C]`.
      eps: initial noise `[B, H, W, C]`; the start is v_T eps + H_T delta.
      timesteps: falling, int `[n]`; the first is where the rollout starts.
      shard: constraint on the batch.

    Returns:
      x0hat at each timestep, `[n, B, H, W, C]`. The body of the scan is
      rematerialised, so memory under a gradient is nearly flat in n.
    """
    shift, response = hypothesis.shift(schedule), hypothesis.response(schedule)
    t_all = jnp.asarray(timesteps, jnp.int32)
    n_all = jnp.concatenate([t_all[1:], t_all[-1:]])

    def body(x: Array, pair: tuple[Array, Array]) -> tuple[Array, Array]:
        t, n = pair
        prediction = model(params, x, jnp.full((x.shape[0],), t))
        e = prediction - lookup(response, t) * delta
        x0 = (x - lookup(shift, t) * delta - lookup(schedule.noise, t) * e) / lookup(
            schedule.signal, t
        )
        x = (
            lookup(schedule.signal, n) * x0
            + lookup(schedule.noise, n) * e
            + lookup(shift, n) * delta
        )
        return shard(x), x0

    first = t_all[0]
    start = lookup(schedule.noise, first) * eps + lookup(shift, first) * delta
    body = jax.checkpoint(body, prevent_cse=False)
    return jax.lax.scan(body, shard(start), (t_all, n_all))[1]


def _per_timestep(term, timesteps: tuple[int, ...], weights, params, candidate, key):
    """sum_t w_t term(params, candidate, t, key_t) / sum_t w_t by vmap over t."""
    keys = jax.random.split(key, len(timesteps))
    values = jax.vmap(term, in_axes=(None, None, 0, 0))(
        params, candidate, jnp.asarray(timesteps, jnp.int32), keys
    )
    weights = jnp.asarray(weights or (1.0,) * len(timesteps), jnp.float32)
    return jnp.sum(weights * values) / jnp.sum(weights)


def _check_timesteps(timesteps: tuple[int, ...], weights: tuple[float, ...]) -> None:
    if not timesteps or min(timesteps) < 0:
        raise ValueError(f"timesteps must be a set of indices >= 0, found {timesteps}")
    if weights and (len(weights) != len(timesteps) or min(weights) < 0):
        raise ValueError(
            f"weights must be empty or {len(timesteps)} numbers >= 0, found {weights}"
        )


@dataclasses.dataclass(frozen=True)
class Analytic:
    """lambda_t = C_t of the hypothesis."""

    def __call__(self, response: Array, shift: Array, delta: Array) -> Array:
        del shift, delta
        return response


@dataclasses.dataclass(frozen=True)
class LeastSquares:
    """lambda_t = <shift, delta> / <delta, delta>: no attack is assumed."""

    def __call__(self, response: Array, shift: Array, delta: Array) -> Array:
        del response
        return jnp.vdot(shift, delta) / jnp.maximum(jnp.vdot(delta, delta), 1e-12)


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """lambda_t = factor * C_t, the factor read off a surrogate by `calibrate`."""

    factor: float

    def __call__(self, response: Array, shift: Array, delta: Array) -> Array:
        del shift, delta
        return self.factor * response


Scale = Analytic | LeastSquares | Calibrated


@dataclasses.dataclass(frozen=True)
class DistributionShift:
    """Loss 1: the shift that the candidate causes in the prediction, at many t.

    sum_t w_t || mean_eps[M(x_t, t) - eps] - lambda_t delta ||^2 / ||lambda_t delta||^2

    with x_t on the hypothesised path. The division makes it scale-free: in absolute
    form delta = 0 would solve it on every model.

    Attributes:
      timesteps: the set S. High ones alone cannot see a backdoor of deterministic
        sampling: there every delta solves the equation on every model.
      weights: w_t, or () for equal ones.
      samples: noise draws at each timestep.
      scale: the rule for lambda_t.
      learn_target: let the gradient reach the target image; otherwise it only moves
        by refreshes.
    """

    timesteps: tuple[int, ...]
    weights: tuple[float, ...] = ()
    samples: int = 16
    scale: Scale = Analytic()
    learn_target: bool = True

    def __post_init__(self) -> None:
        _check_timesteps(self.timesteps, self.weights)

    def bind(
        self,
        model: NoiseModel,
        schedule: NoiseSchedule,
        hypothesis: Hypothesis,
        shard: Shard = unsharded,
    ) -> Objective:
        response = hypothesis.response(schedule)

        def term(params: Params, candidate: Candidate, t: Array, key: Key) -> Array:
            delta = candidate.delta
            eps = shard(jax.random.normal(key, (self.samples, *delta.shape)))
            x = on_path(schedule, hypothesis, candidate, eps, t)
            shift = jnp.mean(model(params, x, jnp.full((self.samples,), t)) - eps, 0)
            expected = self.scale(lookup(response, t), shift, delta) * delta
            error = jnp.sum((shift - expected) ** 2)
            return error / jnp.maximum(jnp.sum(expected**2), 1e-6)

        def loss(params: Params, candidate: Candidate, key: Key) -> Array:
            chex.assert_equal_shape([candidate.delta, candidate.target])
            if not self.learn_target:
                target = jax.lax.stop_gradient(candidate.target)
                candidate = candidate.replace(target=target)
            return _per_timestep(
                term, self.timesteps, self.weights, params, candidate, key
            )

        return loss


@dataclasses.dataclass(frozen=True)
class JointResidual:
    """The joint form: the residual of each sample, minimised over trigger and target.

    sum_t w_t E_eps || M(x_t, t) - eps - C_t delta ||^2 / (||C_t delta||^2 + F_t D)

    A clean model cannot go below its denoising error at middle t; a backdoored model
    at its own (r, y) can, since it has learnt that one point. The division, with
    F_t D the residual of the whole-noise floor, keeps delta = 0 from winning.

    Attributes:
      timesteps: high, middle and low ones.
      weights: w_t, or () for equal ones.
      samples: noise draws at each timestep.
    """

    timesteps: tuple[int, ...]
    weights: tuple[float, ...] = ()
    samples: int = 16

    def __post_init__(self) -> None:
        _check_timesteps(self.timesteps, self.weights)

    def bind(
        self,
        model: NoiseModel,
        schedule: NoiseSchedule,
        hypothesis: Hypothesis,
        shard: Shard = unsharded,
    ) -> Objective:
        response = hypothesis.response(schedule)

        def term(params: Params, candidate: Candidate, t: Array, key: Key) -> Array:
            delta = candidate.delta
            eps = shard(jax.random.normal(key, (self.samples, *delta.shape)))
            x = on_path(schedule, hypothesis, candidate, eps, t)
            expected = lookup(response, t) * delta
            residual = model(params, x, jnp.full((self.samples,), t)) - eps - expected
            error = jnp.mean(jnp.sum(residual**2, axis=(1, 2, 3)))
            return error / jnp.maximum(jnp.sum(expected**2), 1e-6)

        def loss(params: Params, candidate: Candidate, key: Key) -> Array:
            return _per_timestep(
                term, self.timesteps, self.weights, params, candidate, key
            )

        return loss


@dataclasses.dataclass(frozen=True)
class DenoisingConsistency:
    """Loss 2: where the backdoor fires, all noise and all t point at one image.

    Along the `path_rollout` from v_T eps + H_T delta, with x0hat_t the denoised image
    and xbar its mean over noise draws at the last timestep,

      sum_t a_t E_eps || x0hat_t - mean_eps x0hat_t ||^2
        + sum_t b_t || mean_eps x0hat_t - xbar ||^2,

    per pixel, a_t and b_t proportional to s_t^2 / (s_t^2 + v_t^2 / 10), which takes
    back the factor 1/s_t near T and leaves the middle and low timesteps alone.

    Attributes:
      steps: timesteps of the rollout.
      samples: noise draws.
      across_noise: factor of the first sum.
      across_time: factor of the second sum.
      aim: also draw the last images to the target of the candidate, for
        reinforcement, where it is known.
    """

    steps: int = 8
    samples: int = 16
    across_noise: float = 1.0
    across_time: float = 0.0
    aim: float = 0.0

    def bind(
        self,
        model: NoiseModel,
        schedule: NoiseSchedule,
        hypothesis: Hypothesis,
        shard: Shard = unsharded,
    ) -> Objective:
        timesteps = rollout_timesteps(schedule, self.steps)
        s2, v2 = schedule.signal[timesteps] ** 2, schedule.noise[timesteps] ** 2
        weights = s2 / (s2 + v2 / 10)
        weights = jnp.asarray(weights / weights.sum(), jnp.float32)

        def loss(params: Params, candidate: Candidate, key: Key) -> Array:
            delta = candidate.delta
            eps = shard(jax.random.normal(key, (self.samples, *delta.shape)))
            x0 = path_rollout(
                model, params, schedule, hypothesis, delta, eps, timesteps, shard
            )
            mean = jnp.mean(x0, axis=1)
            variance = jnp.mean(jnp.var(x0, axis=1), axis=(1, 2, 3))
            drift = jnp.mean((mean - mean[-1:]) ** 2, axis=(1, 2, 3))
            total = self.across_noise * jnp.sum(weights * variance)
            total += self.across_time * jnp.sum(weights * drift)
            if self.aim:
                target = jax.lax.stop_gradient(candidate.target)
                total += self.aim * jnp.mean((x0[-1] - target[None]) ** 2)
            return total

        return loss


def rollout_timesteps(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    """`steps` falling timesteps from T - 1 down to T / steps - 1, evenly spaced."""
    rising = (np.arange(1, steps + 1) * schedule.steps) // steps - 1
    return rising[::-1].astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Elijah:
    """The inversion loss of Elijah (An et al. 2024): one timestep, L1 of the mean.

    mean over pixels | lambda delta - mean_b M(eps_b + delta, T - 1) |, with one fixed
    noise batch; lambda = 0.5 for ancestral backdoors and 1 for deterministic ones.

    Attributes:
      samples: noise draws.
      seed: of the fixed batch.
    """

    samples: int = 100
    seed: int = 0

    def bind(
        self,
        model: NoiseModel,
        schedule: NoiseSchedule,
        hypothesis: Hypothesis,
        shard: Shard = unsharded,
    ) -> Objective:
        scale = 1.0 if hypothesis.solver == "ode" else 0.5
        last = schedule.steps - 1

        def loss(params: Params, candidate: Candidate, key: Key) -> Array:
            del key
            delta = candidate.delta
            fixed = jax.random.key(self.seed)
            eps = shard(jax.random.normal(fixed, (self.samples, *delta.shape)))
            t = jnp.full((self.samples,), last)
            mean = jnp.mean(model(params, eps + delta, t), axis=0)
            return jnp.mean(jnp.abs(scale * delta - mean))

        return loss


@dataclasses.dataclass(frozen=True)
class Sum:
    """first * first_weight + second * second_weight.

    Each part gets a key of its own.
    """

    first: Bindable
    second: Bindable
    first_weight: float = 1.0
    second_weight: float = 1.0

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
