"""Deterministic sampling (Song et al. 2021, arXiv 2010.02502)."""

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
    bounded,
    endpoints,
    grid,
    to_next,
)
from puredif_jax.diffusion.schedules import NoiseSchedule
from puredif_jax.types import Array, Key


@dataclasses.dataclass(frozen=True)
class DDIM(Sampler):
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
        if self.eta == 0.0:
            del key
            return s_n * x0 + v_n * found.eps, memory
        c = self.eta * v_n * jnp.sqrt(v**2 - (s / s_n) ** 2 * v_n**2) / v
        noise = jax.random.normal(key, x.shape, x.dtype)
        rest = jnp.sqrt(jnp.maximum(v_n**2 - c**2, 0))
        return s_n * x0 + rest * found.eps + c * noise, memory


@dataclasses.dataclass(frozen=True)
class QuadraticDDIM(DDIM):
    """DDIM on the squares of `steps` evenly spaced numbers from 0 to sqrt(0.8 T).

    They are cut to integers; each step leads to the next timestep. It is the grid of
    DDIM's authors for CIFAR-10, and TrojDiff's. `spacing` and `offset` have no effect.
    """

    def path(self, schedule: NoiseSchedule) -> tuple[np.ndarray, np.ndarray]:
        last = (0.8 * schedule.steps) ** 0.5
        rising = np.floor(np.linspace(0, last, self.steps) ** 2).astype(np.int32)
        if not (np.diff(rising) > 0).all():
            raise ValueError(
                f"{self.steps} steps are too many for a quadratic grid of "
                f"{schedule.steps} timesteps, found some of them twice"
            )
        falling, before = to_next(rising)
        before[-1] = -1 if self.to_clean else 0
        return falling, before
