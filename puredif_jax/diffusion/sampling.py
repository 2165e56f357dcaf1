"""The forward process, what networks predict, and samplers as one `lax.scan`.

Sources: DDPM (Ho et al. 2020, arXiv 2006.11239), DDIM (Song et al. 2021, 2010.02502),
v prediction (Salimans and Ho 2022, 2202.00512), dynamic thresholding (Saharia et al.
2022, 2205.11487), DPM-Solver++ (Lu et al. 2022, 2211.01095), UniPC (Zhao et al. 2023,
2302.04867), spacings (Lin et al. 2024, 2305.08891).
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any, Literal, NamedTuple, Protocol, cast, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np

from puredif_jax.diffusion.schedules import NoiseSchedule
from puredif_jax.types import Array, Key, NoiseModel, Params, Shard, unsharded


def lookup(table: np.ndarray | Array, t: Array) -> Array:
    """table[t] in float32, shaped `[B, 1, 1, 1]` for t `[B]` and `[]` for a scalar."""
    values = jnp.asarray(table, jnp.float32)[t]
    return values.reshape(t.shape + (1, 1, 1)) if t.ndim else values


def diffuse(schedule: NoiseSchedule, x0: Array, eps: Array, t: Array) -> Array:
    """q(x_t | x_0): s_t x_0 + v_t eps. x0, eps `[B, H, W, C]`, t `[B]`."""
    chex.assert_equal_shape([x0, eps])
    return lookup(schedule.signal, t) * x0 + lookup(schedule.noise, t) * eps


def predict_x0(schedule: NoiseSchedule, x: Array, eps: Array, t: Array) -> Array:
    """x0hat = (x_t - v_t eps) / s_t. x, eps `[B, H, W, C]`, t `[B]` or `[]`.

    s_t counts as 1e-5 or more, so that a schedule without terminal signal stays finite.
    """
    signal = np.maximum(schedule.signal, 1e-5)
    return (x - lookup(schedule.noise, t) * eps) / lookup(signal, t)


Prediction = Literal["epsilon", "v_prediction", "sample"]


class Estimates(NamedTuple):
    """What a network makes of x_t: the noise in it and the clean image, of its shape.

    eps: the noise.
    x0: x0hat, not bounded; x_t = s_t x0 + v_t eps.
    """

    eps: Array
    x0: Array

    @classmethod
    def of(cls, schedule: NoiseSchedule, eps: Array, x: Array, t: Array) -> Estimates:
        """From the noise alone, by `predict_x0`."""
        return cls(eps, predict_x0(schedule, x, eps, t))


@dataclasses.dataclass(frozen=True)
class _Converted(abc.ABC):
    """The noise model of a network that predicts something else.

    Attributes:
      model: the network.
      schedule: its forward process.
    """

    model: NoiseModel
    schedule: NoiseSchedule

    def estimates(self, params: Params, x: Array, t: Array) -> Estimates:
        """The noise and the image, from one evaluation: x `[B, H, W, C]`, t `[B]`."""
        signal, noise = (
            lookup(table, t) for table in (self.schedule.signal, self.schedule.noise)
        )
        return self._estimates(self.model(params, x, t), x, signal, noise)

    @abc.abstractmethod
    def _estimates(
        self, out: Array, x: Array, signal: Array, noise: Array
    ) -> Estimates:
        """The same from what the network says, `out`, with s_t and v_t."""

    def __call__(self, params: Params, x: Array, t: Array) -> Array:
        return self.estimates(params, x, t).eps


class VPrediction(_Converted):
    """The noise model of a network that predicts v = s_t eps - v_t x_0.

    eps = s_t v(x, t) + v_t x and x0hat = s_t x - v_t v(x, t) (Salimans & Ho 2022), of a
    variance-preserving schedule. x0hat by way of eps would lose its digits where s_t is
    small.
    """

    def _estimates(
        self, out: Array, x: Array, signal: Array, noise: Array
    ) -> Estimates:
        return Estimates(signal * out + noise * x, signal * x - noise * out)


class SamplePrediction(_Converted):
    """The noise model of a network that predicts the clean image x_0.

    eps = (x - s_t x0(x, t)) / v_t and x0hat = x0(x, t); "sample" in diffusers.
    """

    def _estimates(
        self, out: Array, x: Array, signal: Array, noise: Array
    ) -> Estimates:
        return Estimates((x - signal * out) / noise, out)


@dataclasses.dataclass(frozen=True, eq=False)
class Retimed:
    """A network that is given `NoiseSchedule.times` in place of the timestep.

    Attributes:
      model: the network.
      times: what it is given at each timestep, `[T]`.
    """

    model: NoiseModel
    times: np.ndarray

    def __call__(self, params: Params, x: Array, t: Array) -> Array:
        return self.model(params, x, jnp.asarray(self.times, jnp.float32)[t])


def predicting(
    model: NoiseModel, schedule: NoiseSchedule, prediction: Prediction
) -> NoiseModel:
    """The noise model of a network, by what it is given and what it predicts."""
    if schedule.times is not None:
        model = Retimed(model, schedule.times)
    if prediction == "v_prediction":
        return VPrediction(model, schedule)
    if prediction == "sample":
        return SamplePrediction(model, schedule)
    return model


def estimates(
    model: NoiseModel, params: Params, schedule: NoiseSchedule, x: Array, t: Array
) -> Estimates:
    """eps and x0hat of a model at x `[B, H, W, C]`, all at t `[]`."""
    times = jnp.full((x.shape[0],), t)
    if isinstance(model, _Converted):
        return model.estimates(params, x, times)
    return Estimates.of(schedule, model(params, x, times), x, t)


class Sampler(Protocol):
    """A reverse process on a grid of timesteps.

    A multistep sampler remembers something of the steps before, a tree of arrays; the
    memory of the others is ().
    """

    @property
    def steps(self) -> int: ...

    def path(self, schedule: NoiseSchedule) -> tuple[np.ndarray, np.ndarray]:
        """(t, t_prev) of each step, from high t to low, int32 `[n]`; -1 is clean."""
        ...

    def begin(self, x: Array) -> Any:
        """The memory before the first step, from images like x."""
        ...

    def step(
        self,
        schedule: NoiseSchedule,
        found: Estimates,
        x: Array,
        t: Array,
        t_prev: Array,
        key: Key,
        memory: Any,
    ) -> tuple[Array, Any]:
        """x at t_prev, and the memory, from x at t, what the network makes of it and
        the memory; t, t_prev scalars."""
        ...


Spacing = Literal["leading", "linspace", "trailing"]
Variance = Literal["fixed_small", "fixed_large"]


def grid(
    schedule: NoiseSchedule, steps: int, spacing: Spacing = "leading", offset: int = 0
) -> np.ndarray:
    """The timesteps of a strided sampler, rising, int32 `[steps]`.

    The three spacings of diffusers (Lin et al. 2024, table 2), for n steps out of T:
    leading: 0, k, 2k, ... with k = T // n, plus offset; linspace: n from 0 to T - 1,
    rounded; trailing: down from T - 1 by T / n, rounded, where that makes n of them.

    Raises:
      ValueError: steps is not in 1..T, or a timestep is not in 0..T-1.
    """
    total = schedule.steps
    if not 1 <= steps <= total:
        raise ValueError(f"a sampler needs 1 to {total} steps, found {steps}")
    found: np.ndarray
    if spacing == "leading":
        found = np.arange(steps) * (total // steps) + offset
    elif spacing == "linspace":
        found = np.linspace(0, total - 1, steps).round()
    elif spacing == "trailing":
        found = np.round(np.arange(total, 0, -total / steps))[::-1] - 1
        if len(found) != steps:
            raise ValueError(
                f"trailing spacing of {total} timesteps by {total}/{steps} rounds to "
                f"{len(found)}, as in diffusers: {steps} steps cannot be had"
            )
    else:
        valid = ", ".join(get_args(Spacing))
        raise ValueError(f"spacing must be one of {valid}, found {spacing!r}")
    if not 0 <= found[0] <= found[-1] < total:
        raise ValueError(
            f"timesteps must lie in 0..{total - 1}, found {found[0]:g} to "
            f"{found[-1]:g} by steps={steps}, spacing={spacing!r}, offset={offset}"
        )
    return found.astype(np.int32)


def _to_next(rising: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The path on which each timestep leads to the one below, the last to clean."""
    before = np.concatenate([[-1], rising[:-1]]).astype(np.int32)
    return rising[::-1], before[::-1]


def _endpoints(
    schedule: NoiseSchedule, t: Array, t_prev: Array
) -> tuple[Array, Array, Array, Array]:
    """(s_t, v_t, s_prev, v_prev) with s_{-1} = 1, v_{-1} = 0."""
    signal = np.concatenate([schedule.signal, [1.0]])
    noise = np.concatenate([schedule.noise, [0.0]])
    return (
        lookup(signal, t),
        lookup(noise, t),
        lookup(signal, t_prev),
        lookup(noise, t_prev),
    )


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Dynamic thresholding of x0hat (Saharia et al. 2022, section 2.3).

    With q the quantile of |x0hat| over all pixels of an image, and b = q within
    1..most: x0hat is clipped to [-b, b] and divided by b. "thresholding" in diffusers.

    Attributes:
      ratio: which quantile.
      most: the largest b.
    """

    ratio: float = 0.995
    most: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.ratio <= 1 <= self.most < math.inf):
            raise ValueError(
                "a threshold needs 0 <= ratio <= 1 <= most, found "
                f"ratio={self.ratio} and most={self.most}"
            )

    def __call__(self, x0: Array) -> Array:
        """x0hat `[B, H, W, C]`, bounded."""
        q = jnp.quantile(jnp.abs(x0), self.ratio, axis=(1, 2, 3), keepdims=True)
        bound = jnp.clip(q, 1.0, self.most)
        return jnp.clip(x0, -bound, bound) / bound


Clip = float | Threshold | None


def _bounded(x0: Array, clip: Clip) -> Array:
    if isinstance(clip, Threshold):
        return clip(x0)
    return x0 if clip is None else jnp.clip(x0, -clip, clip)


def unclipped(sampler: Sampler) -> Sampler | None:
    """The same sampler without a bound on x0hat; None if it has none."""
    if getattr(sampler, "clip", None) is None:
        return None
    return dataclasses.replace(cast(Any, sampler), clip=None)


class Estimate(NamedTuple):
    """An estimate of the clean image, which multistep samplers remember.

    x0: x0hat, `[B, H, W, C]`.
    t: its timestep, a scalar; -1 if there is none.
    """

    x0: Array
    t: Array


def _log_ratio(schedule: NoiseSchedule, t: Array, n: Array, valid: Array) -> Array:
    """l_n - l_t with l = log(s / v), from timestep t down to n; 1 if not valid."""
    level = np.log(schedule.signal / schedule.noise)
    return jnp.where(valid, lookup(level, n) - lookup(level, t), 1.0)


@dataclasses.dataclass(frozen=True)
class DDPM:
    """Ancestral sampling (Ho et al. 2020), on all T timesteps or strided.

    With a = (s_t / s_n)^2 and w = v_t^2 - a v_n^2 for the step from t to n:
    x_n = [s_n w x0hat + sqrt(a) v_n^2 x_t] / v_t^2 + sqrt(v_n^2 w) / v_t z.
    That is the variance of the true posterior, "fixed_small"; "fixed_large" has w. (w
    is 1 - a, but for the digits that 1 - a loses in float32 where little is added.)

    Attributes:
      steps: number of model evaluations, spaced by `grid`.
      clip: bound of |x0hat|, a `Threshold`, or None. A bound weakens or removes most
        backdoors.
      spacing, offset: of `grid`.
      variance: one of the two.
    """

    steps: int = 1000
    clip: Clip = None
    spacing: Spacing = "leading"
    offset: int = 0
    variance: Variance = "fixed_small"

    def path(self, schedule: NoiseSchedule) -> tuple[np.ndarray, np.ndarray]:
        """Each step leads to the next timestep of the grid, the last to clean."""
        return _to_next(grid(schedule, self.steps, self.spacing, self.offset))

    def begin(self, x: Array) -> tuple[()]:
        """Nothing."""
        return ()

    def step(
        self,
        schedule: NoiseSchedule,
        found: Estimates,
        x: Array,
        t: Array,
        t_prev: Array,
        key: Key,
        memory: tuple[()] = (),
    ) -> tuple[Array, tuple[()]]:
        s, v, s_n, v_n = _endpoints(schedule, t, t_prev)
        x0 = _bounded(found.x0, self.clip)
        a = (s / s_n) ** 2
        w = v**2 - a * v_n**2
        mean = (s_n * w * x0 + jnp.sqrt(a) * v_n**2 * x) / v**2
        if self.variance == "fixed_small":
            std = v_n * jnp.sqrt(w) / v
        else:
            std = jnp.where(t > 0, jnp.sqrt(w), 0.0)
        return mean + std * jax.random.normal(key, x.shape, x.dtype), memory


@dataclasses.dataclass(frozen=True)
class DDIM:
    """Deterministic sampling (Song et al. 2021), with an optional share of noise.

    x_n = s_n x0hat + sqrt(v_n^2 - c^2) eps + c z,
    c = eta sqrt(v_n^2 w) / v_t, w = v_t^2 - (s_t / s_n)^2 v_n^2.

    Attributes:
      steps: number of model evaluations, spaced by `grid`.
      eta: 0 for a deterministic map, 1 for the variance of DDPM.
      clip: bound of |x0hat|, a `Threshold`, or None. A bound weakens or removes most
        backdoors.
      spacing, offset: of `grid`.
      to_clean: steps below 0 lead to the clean image; otherwise to t = 0
        ("set_alpha_to_one" in diffusers).
    """

    steps: int = 50
    eta: float = 0.0
    clip: Clip = None
    spacing: Spacing = "leading"
    offset: int = 0
    to_clean: bool = True

    def path(self, schedule: NoiseSchedule) -> tuple[np.ndarray, np.ndarray]:
        """Each step leads T // n timesteps down, as in diffusers."""
        falling = grid(schedule, self.steps, self.spacing, self.offset)[::-1]
        before = falling - schedule.steps // self.steps
        end = -1 if self.to_clean else 0
        return falling, np.where(before < 0, end, before).astype(np.int32)

    def begin(self, x: Array) -> tuple[()]:
        """Nothing."""
        return ()

    def step(
        self,
        schedule: NoiseSchedule,
        found: Estimates,
        x: Array,
        t: Array,
        t_prev: Array,
        key: Key,
        memory: tuple[()] = (),
    ) -> tuple[Array, tuple[()]]:
        s, v, s_n, v_n = _endpoints(schedule, t, t_prev)
        x0 = _bounded(found.x0, self.clip)
        if self.eta == 0.0:
            del key
            return s_n * x0 + v_n * found.eps, memory
        c = self.eta * v_n * jnp.sqrt(v**2 - (s / s_n) ** 2 * v_n**2) / v
        noise = jax.random.normal(key, x.shape, x.dtype)
        rest = jnp.sqrt(jnp.maximum(v_n**2 - c**2, 0))
        return s_n * x0 + rest * found.eps + c * noise, memory


@dataclasses.dataclass(frozen=True)
class _Multistep:
    """What `DPMSolver` and `UniPC` share: their grid, and the step of the former."""

    steps: int = 20
    spacing: Spacing = "linspace"
    offset: int = 0

    def path(self, schedule: NoiseSchedule) -> tuple[np.ndarray, np.ndarray]:
        """Each step leads to the next timestep of the grid, the last to clean."""
        if self.spacing == "trailing":
            return _to_next(grid(schedule, self.steps, self.spacing))
        more = self.steps + 1
        if more > schedule.steps:
            raise ValueError(
                f"{type(self).__name__} with {self.spacing} spacing needs 1 to "
                f"{schedule.steps - 1} steps, found {self.steps}"
            )
        return _to_next(grid(schedule, more, self.spacing, self.offset)[1:])

    def _predicted(
        self,
        schedule: NoiseSchedule,
        x: Array,
        now: Estimate,
        last: Estimate,
        t_prev: Array,
    ) -> Array:
        """x at t_prev, from x where the estimate is that of now."""
        s, v, s_n, v_n = _endpoints(schedule, now.t, t_prev)
        decay = (v_n * s) / (v * s_n)  # e^-h, 0 at the clean end
        second = (t_prev >= 0) & (last.t >= 0)
        h = _log_ratio(schedule, now.t, t_prev, second)
        h_b = _log_ratio(schedule, last.t, now.t, second)
        change = jnp.where(second, h / (2 * h_b), 0.0) * (now.x0 - last.x0)
        return v_n / v * x + s_n * (1 - decay) * (now.x0 + change)


@dataclasses.dataclass(frozen=True)
class DPMSolver(_Multistep):
    """Deterministic sampling by DPM-Solver++(2M) (Lu et al. 2022), with midpoints.

    With l_t = log(s_t / v_t), h = l_n - l_t for the step from t to n, and the x0hat of
    this step and of the one before, which came from timestep b:
      x_n = (v_n / v_t) x_t + s_n (1 - e^-h) D,
      D = x0hat + h / (2 (l_t - l_b)) (x0hat - x0hat_b).
    The first step and the last, to the clean image, take D = x0hat.

    Attributes:
      steps: number of model evaluations.
      spacing, offset: as in `grid`; but leading and linspace, as in diffusers'
        multistep solvers, take n + 1 timesteps and leave the lowest out.
    """

    def begin(self, x: Array) -> Estimate:
        """No estimate yet."""
        return Estimate(jnp.zeros_like(x), jnp.int32(-1))

    def step(
        self,
        schedule: NoiseSchedule,
        found: Estimates,
        x: Array,
        t: Array,
        t_prev: Array,
        key: Key,
        memory: Estimate,
    ) -> tuple[Array, Estimate]:
        del key
        now = Estimate(found.x0, t)
        return self._predicted(schedule, x, now, memory, t_prev), now


class Correction(NamedTuple):
    """What UniPC remembers: the state that it stepped from, as corrected, with its
    estimate, and the estimate of the step before that."""

    x: Array
    last: Estimate
    earlier: Estimate


@dataclasses.dataclass(frozen=True)
class UniPC(_Multistep):
    """Deterministic sampling by UniPC (Zhao et al. 2023), B_2(h), of order 2.

    A predictor as of `DPMSolver`, and, with the x0hat found where it leads, a
    correction of that step, which costs no evaluation. For the step from m to t, with
    l_t = log(s_t / v_t), h = l_t - l_m, phi = e^-h - 1, the x0hat_e of the step before,
    r = (l_e - l_m) / h and D = (x0hat_e - x0hat_m) / r:
      predicted:  x_t = (v_t / v_m) x_m - s_t phi (x0hat_m + D / 2),
      corrected:  x_t = (v_t / v_m) x_m
                        - s_t phi (x0hat_m + a D + b (x0hat_t - x0hat_m)),
    where a + b = p / phi, a r + b = 2 q / phi, p = -phi / h - 1, q = -p / h - 1 / 2.
    The first step and the last leave D out of the prediction, and the first correction
    has a = 0, b = 1/2.

    Attributes:
      steps: number of model evaluations.
      spacing, offset: as of `DPMSolver`.
    """

    def begin(self, x: Array) -> Correction:
        """No step to be corrected yet."""
        none = Estimate(jnp.zeros_like(x), jnp.int32(-1))
        return Correction(jnp.zeros_like(x), none, none)

    def step(
        self,
        schedule: NoiseSchedule,
        found: Estimates,
        x: Array,
        t: Array,
        t_prev: Array,
        key: Key,
        memory: Correction,
    ) -> tuple[Array, Correction]:
        del key
        now, last = Estimate(found.x0, t), memory.last
        x = jnp.where(last.t < 0, x, self._corrected(schedule, memory, now))
        x_n = self._predicted(schedule, x, now, last, t_prev)
        return x_n, Correction(x, now, last)

    def _corrected(
        self, schedule: NoiseSchedule, memory: Correction, now: Estimate
    ) -> Array:
        """Where the step before should have led, now that x0hat is known there."""
        (x, last, earlier), (x0, t) = memory, now
        begun, second = last.t >= 0, earlier.t >= 0
        _, v_m, s, v = _endpoints(schedule, jnp.where(begun, last.t, t), t)
        h = _log_ratio(schedule, last.t, t, begun)
        r = -_log_ratio(schedule, earlier.t, last.t, second) / h
        phi = jnp.expm1(-h)
        # Short steps by the series, sum_k (-h)^k / (k + 1)! and / (k + 2)!.
        terms = [
            [1 / math.factorial(k + more) for k in range(7, 0, -1)] + [0.0]
            for more in (1, 2)
        ]
        p, q = (jnp.polyval(jnp.asarray(each, jnp.float32), -h) for each in terms)
        p = jnp.where(h < 0.5, p, -phi / h - 1)
        q = jnp.where(h < 0.5, q, -p / h - 1 / 2)
        a = jnp.where(second, (2 * q - p) / (phi * (r - 1)), 0.0)
        b = jnp.where(second, p / phi - a, 0.5)
        slope = a / jnp.where(second, r, 1.0) * (earlier.x0 - last.x0)
        return v / v_m * x - s * phi * (last.x0 + slope + b * (x0 - last.x0))


def trajectory(
    model: NoiseModel,
    params: Params,
    schedule: NoiseSchedule,
    sampler: Sampler,
    start: Array,
    key: Key,
    *,
    remat: bool = False,
    shard: Shard = unsharded,
) -> tuple[Array, Array]:
    """Runs the reverse process from `start` as one `lax.scan`.

    Args:
      model: predicts the noise.
      params: its parameters.
      schedule: the forward process that the model was trained on.
      sampler: the rule of one step and the number n of steps.
      start: x_T, `[B, H, W, C]`; add a trigger here.
      key: randomness of stochastic samplers.
      remat: recompute the network in the backward pass, so that memory stays
        nearly flat in the number of steps when the chain is differentiated.
      shard: constraint put on the batch at each step.

    Returns:
      The images `[B, H, W, C]`, unclipped, and the estimate x0hat (unbounded) at each
      step, `[n, B, H, W, C]`, from high t to low.
    """
    t_all, n_all = map(jnp.asarray, sampler.path(schedule))

    def body(carry: tuple[Array, Any], pair: tuple[Array, Array]):
        (x, memory), (t, t_prev) = carry, pair
        found = estimates(model, params, schedule, x, t)
        step_key = jax.random.fold_in(key, t)
        x_prev, memory = sampler.step(schedule, found, x, t, t_prev, step_key, memory)
        return (shard(x_prev), memory), found.x0

    if remat:
        body = jax.checkpoint(body, prevent_cse=False)
    first = (shard(start), sampler.begin(start))
    (images, _), x0 = jax.lax.scan(body, first, (t_all, n_all))
    return images, x0


def sample(
    model: NoiseModel,
    params: Params,
    schedule: NoiseSchedule,
    sampler: Sampler,
    start: Array,
    key: Key,
    *,
    shard: Shard = unsharded,
) -> Array:
    """The images of `trajectory`: `[B, H, W, C]`, unclipped. Arguments as there.

    Call it in a compiled program: eagerly, the estimates of all steps are kept, too.
    """
    return trajectory(model, params, schedule, sampler, start, key, shard=shard)[0]
