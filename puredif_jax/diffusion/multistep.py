"""Deterministic samplers that remember their last estimates.

Sources: DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095), UniPC (Zhao et al. 2023,
2302.04867).
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from puredif_jax.diffusion.prediction import Estimates, lookup
from puredif_jax.diffusion.sampling import Sampler, Spacing, endpoints, grid, to_next
from puredif_jax.diffusion.schedules import NoiseSchedule
from puredif_jax.types import Array, Key


class Estimate(NamedTuple):
    """An estimate of the clean image, which multistep samplers remember.

    x0: x0hat, `[B, H, W, C]`.
    t: its timestep, a scalar; -1 if there is none.
    """

    x0: Array
    t: Array


def _log_ratio(schedule: NoiseSchedule, t: Array, n: Array, valid: Array) -> Array:
    """l_n - l_t with l = log(s / v), from timestep t down to n; 1 if not valid."""
    with np.errstate(divide="ignore"):  # without terminal signal it is -inf there
        level = np.log(schedule.signal / schedule.noise)
    return jnp.where(valid, lookup(level, n) - lookup(level, t), 1.0)


@dataclasses.dataclass(frozen=True)
class _Multistep(Sampler):
    """What `DPMSolver` and `UniPC` share: their grid, and the step of `DPMSolver`."""

    steps: int = 20
    spacing: Spacing = "linspace"
    offset: int = 0

    def path(self, schedule: NoiseSchedule) -> tuple[np.ndarray, np.ndarray]:
        """Each step leads to the next timestep of the grid, the last to clean."""
        if self.spacing == "trailing":
            return to_next(grid(schedule, self.steps, self.spacing))
        more = self.steps + 1
        if more > schedule.steps:
            raise ValueError(
                f"{type(self).__name__} with {self.spacing} spacing needs 1 to "
                f"{schedule.steps - 1} steps, found {self.steps}"
            )
        return to_next(grid(schedule, more, self.spacing, self.offset)[1:])

    def _predicted(
        self,
        schedule: NoiseSchedule,
        x: Array,
        now: Estimate,
        last: Estimate,
        t_prev: Array,
    ) -> Array:
        """x at t_prev, from x at the timestep of the estimate `now`."""
        s, v, s_n, v_n = endpoints(schedule, now.t, t_prev)
        decay = (v_n * s) / (v * s_n)  # e^-h, 0 at the clean end
        second = (t_prev >= 0) & (last.t >= 0)
        h = _log_ratio(schedule, now.t, t_prev, second)
        h_b = _log_ratio(schedule, last.t, now.t, second)
        change = jnp.where(second, h / (2 * h_b), 0.0) * (now.x0 - last.x0)
        return v_n / v * x + s_n * (1 - decay) * (now.x0 + change)


@dataclasses.dataclass(frozen=True)
class DPMSolver(_Multistep):
    """Deterministic sampling by DPM-Solver++(2M) (Lu et al. 2022), with midpoints.

    The step from t to n has x0hat, and x0hat_b of the step before, which came from
    timestep b. With l_t = log(s_t / v_t) and h = l_n - l_t:

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

    A step is predicted as by `DPMSolver`. The x0hat found where it leads then corrects
    it, which costs no evaluation. For the step from m to t let l_t = log(s_t / v_t),
    h = l_t - l_m and phi = e^-h - 1. The step before came from timestep e. With
    r = (l_e - l_m) / h and D = (x0hat_e - x0hat_m) / r:

      predicted:  x_t = (v_t / v_m) x_m - s_t phi (x0hat_m + D / 2),
      corrected:  x_t = (v_t / v_m) x_m
                        - s_t phi (x0hat_m + a D + b (x0hat_t - x0hat_m)).

    Here a + b = p / phi and a r + b = 2 q / phi, with p = -phi / h - 1 and
    q = -p / h - 1 / 2. The first step and the last leave D out of the prediction. The
    first correction has a = 0, b = 1/2.

    Attributes:
      steps: number of model evaluations.
      spacing, offset: as in `DPMSolver`.
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
        _, v_m, s, v = endpoints(schedule, jnp.where(begun, last.t, t), t)
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
