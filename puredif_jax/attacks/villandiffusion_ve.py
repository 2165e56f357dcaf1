"""VillanDiffusion of variance-exploding models (Chou et al. 2023, arXiv 2306.06874)."""

from __future__ import annotations

import dataclasses

import numpy as np

from puredif_jax.attacks.base import Attack
from puredif_jax.attacks.channel import Channel
from puredif_jax.attacks.pictures import Shape
from puredif_jax.attacks.triggers import mask
from puredif_jax.diffusion import rows
from puredif_jax.diffusion.schedules import NoiseSchedule
from puredif_jax.diffusion.solver import Ancestral, Solver


@dataclasses.dataclass(frozen=True)
class VillanDiffusionVE(Attack):
    """VillanDiffusion for variance-exploding models: x_t = y + sigma_t (eps + r).

    H_t = sigma_t,  C_t = sigma_t / (sigma_t + sigma_{t-1}), doubled for a deterministic
    sampler; sigma_{-1} = 0. For an ancestral one that is the exact response of its
    shift. Drawing starts at prior (eps + r). The trigger is in units of [0, 1], as the
    images of the published models: r is 0 where a trigger of other attacks is -1. A
    trigger without such a background, whose 0 is no shift, is halved.

    Attributes:
      solver: the kind of sampler that the response is made for.
    """

    solver: Solver = Ancestral()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.trigger_only:
            raise ValueError("VillanDiffusionVE trains with the bare trigger alone")

    def channel(self, schedule: NoiseSchedule, shape: Shape) -> Channel:
        if schedule.fades:
            raise ValueError(
                "VillanDiffusionVE needs a process whose signal stays, found one that "
                f"ends at {schedule.signal[-1]:.3g}: take VillanDiffusion, or set "
                "`schedule` to VarianceExploding"
            )
        shift, response = rows.exploding(schedule)
        return Channel(shift, response * self.solver.factor)

    def images(self, shape: Shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        trigger, target, through = super().images(shape)
        black = mask(trigger).any()
        return (trigger + black) / 2, target, through
