"""VillanDiffusion, variance-preserving (Chou et al. 2023, arXiv 2306.06874)."""

from __future__ import annotations

import dataclasses

import numpy as np

from puredif_jax.attacks.base import Attack, published_response, require_fading
from puredif_jax.attacks.channel import Channel
from puredif_jax.attacks.pictures import Shape
from puredif_jax.diffusion.schedules import NoiseSchedule
from puredif_jax.diffusion.solver import Deterministic, Solver


@dataclasses.dataclass(frozen=True)
class VillanDiffusion(Attack):
    """VillanDiffusion for variance-preserving models.

    psi = 1:  H = 1 - s_t,  C = R_t
    psi = 0:  H = v_t,      C = (1 - sqrt(alpha_t)) v_t
                                + k_t (alpha_t - abar_t) / (1 - alpha_t)
    between:  the psi-mix of both columns;  C doubled for a deterministic sampler,

    with k_t = v_t - sqrt(alpha_t) v_{t-1}. The rows are the published ones. In the row
    of psi = 0, C is not the exact response to its H (`Solver.response`).

    Attributes:
      trigger_only: train with the bare trigger; otherwise, as by default in the
        published code, the clean image shows through where the trigger is -1.
      psi: share of the BadDiffusion row, 0 to 1.
      solver: the kind of sampler that the response is made for.
    """

    psi: float = 1.0
    solver: Solver = Deterministic()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.psi <= 1:
            raise ValueError(f"psi must lie in [0, 1], found {self.psi}")

    def channel(self, schedule: NoiseSchedule, shape: Shape) -> Channel:
        require_fading(schedule, "VillanDiffusion")
        troj, psi = noise_row(schedule), self.psi
        shift = psi * (1 - schedule.signal) + (1 - psi) * troj.shift
        response = psi * published_response(schedule) + (1 - psi) * troj.response
        return Channel(shift, response * self.solver.factor)


def noise_row(schedule: NoiseSchedule) -> Channel:
    """The row of psi = 0 for ancestral sampling, in float64."""
    unit = schedule.unit  # published is v in the network's own range
    s, v, before = schedule.signal, schedule.noise * unit, schedule.previous[1]
    alpha, added = schedule.alpha, schedule.added * unit**2
    k = v - np.sqrt(alpha) * before * unit
    response = (1 - np.sqrt(alpha)) * v + k * (alpha - s**2) / added
    return Channel(v, response * unit)  # of a trigger in [-1, 1]
