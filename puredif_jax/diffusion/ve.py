"""Variance-exploding processes, and their predictor-corrector sampler.

Source: Song et al. 2021, "Score-Based Generative Modeling through Stochastic
Differential Equations" (arXiv 2011.13456), as in diffusers' ScoreSdeVeScheduler.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from puredif_jax.diffusion.prediction import Estimates
from puredif_jax.diffusion.sampling import Sampler, endpoints, grid, to_next
from puredif_jax.diffusion.schedules import LinearBetas, NoiseSchedule, Process
from puredif_jax.types import Array, Key


@dataclasses.dataclass(frozen=True)
class VarianceExploding(Process):
    """x_t = x_0 + sigma_t eps, sigma_t = sigma_min (sigma_max / sigma_min)^(t/(T-1)).

    Sampling starts from noise of sigma_max. Here sigma is in the unit of images in
    `values`; the tables are for images in [-1, 1], as everywhere.

    Attributes:
      steps: T.
      sigma_min, sigma_max: the least and the largest standard deviation of the noise.
      values: the range of the images that the network knows.
      given_sigma: the network is given sigma_t, as NCSN++ is; otherwise t.
    """

    steps: int = 1000
    sigma_min: float = 0.01
    sigma_max: float = 380.0
    values: tuple[float, float] = (0.0, 1.0)
    given_sigma: bool = True

    def __post_init__(self) -> None:
        low, high = self.values
        if self.steps < 2 or not 0 < self.sigma_min < self.sigma_max < np.inf:
            raise ValueError(
                "VarianceExploding needs steps >= 2 and 0 < sigma_min < sigma_max, "
                f"found steps={self.steps}, sigma_min={self.sigma_min}, "
                f"sigma_max={self.sigma_max}"
            )
        if not -np.inf < low < high < np.inf:
            raise ValueError(f"values must rise, found {self.values}")

    def tables(self) -> NoiseSchedule:
        power = np.arange(self.steps) / (self.steps - 1)
        sigma = self.sigma_min * (self.sigma_max / self.sigma_min) ** power
        low, high = self.values
        unit = 2 / (high - low)
        return NoiseSchedule(
            signal=np.ones(self.steps),
            noise=unit * sigma,
            times=sigma if self.given_sigma else None,
            prior=unit * self.sigma_max,
            values=(float(low), float(high)),
        )


@dataclasses.dataclass(frozen=True)
class Preconditioned(Process):
    """A variance-exploding process for a network of a variance-preserving one.

    The network is given x_t / sqrt(1 + v_t^2): the root is the deviation of x_0 and
    noise together. It is also given the timestep, between whole ones, at which the
    other process has this signal-to-noise ratio. So a noise model of the other process
    is a noise model of this one. These are c_in and c_noise of Karras et al. 2022
    (arXiv 2206.00364).

    Attributes:
      process: the variance-exploding process.
      like: the other one.
    """

    process: VarianceExploding
    like: Process = LinearBetas()

    @property
    def steps(self) -> int:
        """T."""
        return self.process.steps

    def tables(self) -> NoiseSchedule:
        found, other = self.process.tables(), self.like.tables()
        # Both fall in t; np.interp wants them to rise.
        times = np.interp(-found.log_snr, -other.log_snr, other.given)
        scale = 1 / np.sqrt(1 + found.noise**2)
        return dataclasses.replace(found, times=times, scale=scale)


@dataclasses.dataclass(frozen=True)
class PredictorCorrector(Sampler):
    """Ancestral sampling of a variance-exploding process (Song et al. 2021, alg. 2).

    At each noise level, corrections by Langevin dynamics and one reverse step. With the
    score S = -eps / v_t and fresh z:
      corrected:  x + e S + sqrt(2 e) z,  e = 2 (snr ||z|| / ||S||)^2,
      reversed:   x + w S + sqrt(w) z,    w = v_t^2 - v_n^2 for the step from t to n.
    Norms are means over the batch. The last reverse step adds no noise.

    Attributes:
      levels: number of noise levels, evenly spaced in t.
      corrections: at each of them; each is an evaluation of the network.
      snr: signal-to-noise ratio of a correction.
    """

    levels: int = 1000
    corrections: int = 1
    snr: float = 0.075

    def __post_init__(self) -> None:
        if self.levels < 1 or self.corrections < 0 or not 0 < self.snr < np.inf:
            raise ValueError(
                "a predictor-corrector needs levels >= 1, corrections >= 0 and snr > "
                f"0, found levels={self.levels}, corrections={self.corrections}, "
                f"snr={self.snr}"
            )

    @property
    def steps(self) -> int:
        """Model evaluations."""
        return self.levels * (1 + self.corrections)

    def path(self, schedule: NoiseSchedule) -> tuple[np.ndarray, np.ndarray]:
        """Each level leads to itself in a correction, and then to the one below.

        Raises:
          ValueError: the process is not variance-exploding.
        """
        if schedule.fades:
            raise ValueError(
                "a predictor-corrector needs a process whose signal stays, found one "
                f"that ends at {schedule.signal[-1]:.3g}: take PathKeeping, DDPM or "
                "DDIM"
            )
        falling, before = to_next(grid(schedule, self.levels, "linspace"))
        times = np.repeat(falling, 1 + self.corrections)
        goals = np.repeat(before, 1 + self.corrections)
        corrects = np.arange(len(times)) % (1 + self.corrections) < self.corrections
        return times, np.where(corrects, times, goals).astype(np.int32)

    def begin(self, x: Array) -> Array:
        """The number of steps taken, by which each draws noise of its own."""
        return jnp.zeros((), jnp.int32)

    def step(
        self,
        schedule: NoiseSchedule,
        found: Estimates,
        x: Array,
        t: Array,
        t_prev: Array,
        key: Key,
        memory: Array,
    ) -> tuple[Array, Array]:
        _, v, _, v_n = endpoints(schedule, t, t_prev)
        score = -found.eps / v
        z = jax.random.normal(jax.random.fold_in(key, memory), x.shape, x.dtype)

        def norm(y: Array) -> Array:
            return jnp.mean(jnp.linalg.norm(y.reshape(y.shape[0], -1), axis=-1))

        small = 2 * (self.snr * norm(z) / norm(score)) ** 2
        corrected = x + small * score + jnp.sqrt(2 * small) * z
        added = jnp.maximum(v**2 - v_n**2, 0.0)
        noise = jnp.where(t_prev >= 0, jnp.sqrt(added), 0.0) * z
        reversed_ = x + added * score + noise
        return jnp.where(t == t_prev, corrected, reversed_), memory + 1
