"""Ancestral sampling that keeps a backdoor on its path, at any stride."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from puredif_jax.diffusion import rows
from puredif_jax.diffusion.prediction import Estimates, lookup
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
class PathKeeping(Sampler):
    """Strides of an ancestral sampler under which a backdoor's shift H_t r is kept.

    H_t = psi (1 - s_t) + (1 - psi) v_t, as of VillanDiffusion; psi = 1 is BadDiffusion.
    On a process whose signal stays, H_t = v_t, as of VillanDiffusionVE. There the path
    is kept while v_t <= 3 v_n.

    Such a backdoor answers with the published C_t (`rows`), which is made for single
    steps, so longer strides of DDPM leave its path. The step from t to n that keeps it
    is, with the noise e that the model predicts,

      x_n = s_n x0hat + k e + sqrt(v_n^2 - k^2) z,
      k = s_n v_t / s_t + (H_n - s_n H_t / s_t) / C_t,

    k within [-v_n, v_n]. From x_t = s_t y + v_t eps + H_t r, answered by eps + C_t r,
    it leads to s_n y + H_n r and noise of variance v_n^2. Without a trigger it is an
    ancestral sampler with a share of noise of its own. With psi = 1, and where the
    signal stays, its single steps are DDPM's, so few of its steps stand in for all of
    them. Where the signal ends at 0, s_T is `NoiseSchedule.least_signal`.

    Attributes:
      steps: number of model evaluations, spaced by `grid`.
      clip: bound of |x0hat|, a `Threshold`, or None. A bound weakens or removes most
        backdoors.
      spacing, offset: of `grid`.
      variance: as in `DDPM`; "fixed_large" adds noise of v_t / v_n times the deviation.
      psi: of the shift that is kept; unused where the signal stays.
    """

    steps: int = 50
    clip: Clip = None
    spacing: Spacing = "leading"
    offset: int = 0
    variance: Variance = "fixed_small"
    psi: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.psi <= 1:
            raise ValueError(f"psi must lie in [0, 1], found {self.psi}")

    def keeping(self, psi: float | None) -> PathKeeping:
        return self if psi is None else dataclasses.replace(self, psi=psi)

    def path(self, schedule: NoiseSchedule) -> tuple[np.ndarray, np.ndarray]:
        """Each step leads to the next timestep of the grid, the last to clean.

        Raises:
          ValueError: as `grid`.
        """
        return to_next(grid(schedule, self.steps, self.spacing, self.offset))

    def share(self, schedule: NoiseSchedule) -> np.ndarray:
        """k of each step of `path`, float64 `[n]`."""
        t, n = self.path(schedule)
        fades = schedule.fades
        row = rows.fading(schedule, self.psi) if fades else rows.exploding(schedule)
        signal = np.concatenate([schedule.least_signal, [1.0]])
        noise, shift = (
            np.concatenate([table, [0.0]]) for table in (schedule.noise, row.shift)
        )
        ratio = signal[n] / signal[t]
        k = ratio * noise[t] + (shift[n] - ratio * shift[t]) / row.response[t]
        found: np.ndarray = np.clip(k, -noise[n], noise[n])
        return found

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
        _, v, s_n, v_n = endpoints(schedule, t, t_prev)
        table = np.zeros(schedule.steps)
        table[self.path(schedule)[0]] = self.share(schedule)
        k = lookup(table, t)
        x0 = bounded(found.x0, self.clip)
        std = jnp.sqrt(jnp.maximum(v_n**2 - k**2, 0))
        if self.variance == "fixed_large":
            std *= v / jnp.where(v_n > 0, v_n, 1.0)
        noise = jax.random.normal(key, x.shape, x.dtype)
        return s_n * x0 + k * found.eps + std * noise, memory
