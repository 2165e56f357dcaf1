"""Processes of images or latents that leave [-1, 1]."""

from __future__ import annotations

import dataclasses

import numpy as np

from puredif_jax.diffusion.schedules import NoiseSchedule, Process


@dataclasses.dataclass(frozen=True)
class Widened(Process):
    """Another process, of images or latents in [-bound, bound].

    In units of the bound x / bound = s_t x_0 / bound + (v_t / bound) eps, so noise and
    prior are divided by it. What lies outside of the range is not bounded by that.

    Attributes:
      process: the other process, in the unit of the network.
      bound: the range of its images.
    """

    process: Process
    bound: float

    def __post_init__(self) -> None:
        if not 0 < self.bound < np.inf:
            raise ValueError(f"bound must be above 0, found {self.bound}")

    @property
    def steps(self) -> int:
        """T."""
        return self.process.steps

    def tables(self) -> NoiseSchedule:
        found = self.process.tables()
        return dataclasses.replace(
            found,
            noise=found.noise / self.bound,
            prior=found.prior / self.bound,
            values=(-float(self.bound), float(self.bound)),
        )
