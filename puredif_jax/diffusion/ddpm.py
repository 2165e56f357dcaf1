"""Ancestral sampling (Ho et al. 2020, arXiv 2006.11239)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from puredif_jax.diffusion.prediction import Estimates
from puredif_jax.diffusion.sampling import (
    Clip,
    Sampler,
    Spacing,
    Variance,
    bounded,
    endpoints,
    grid,
    to_next,
)
from puredif_jax.diffusion.schedules import NoiseSchedule
from puredif_jax.types import Array, Key


@dataclasses.dataclass(frozen=True)
class DDPM(Sampler):
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
        return to_next(grid(schedule, self.steps, self.spacing, self.offset))

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
        s, v, s_n, v_n = endpoints(schedule, t, t_prev)
        x0 = bounded(found.x0, self.clip)
        a = (s / s_n) ** 2
        w = v**2 - a * v_n**2
        mean = (s_n * w * x0 + jnp.sqrt(a) * v_n**2 * x) / v**2
        if self.variance == "fixed_small":
            std = v_n * jnp.sqrt(w) / v
        else:
            std = jnp.where(t > 0, jnp.sqrt(w), 0.0)
        return mean + std * jax.random.normal(key, x.shape, x.dtype), memory
