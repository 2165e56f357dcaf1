"""BadDiffusion (Chou, Chen and Ho 2023, arXiv 2212.05400)."""

from __future__ import annotations

import dataclasses

from puredif_jax.attacks.base import Attack, require_fading
from puredif_jax.attacks.channel import Channel
from puredif_jax.attacks.pictures import Shape
from puredif_jax.diffusion import rows
from puredif_jax.diffusion.schedules import NoiseSchedule
from puredif_jax.diffusion.solver import Ancestral, Solver


@dataclasses.dataclass(frozen=True)
class BadDiffusion(Attack):
    """BadDiffusion: H_t = 1 - s_t, C_t = R_t; ancestral sampling.

    Attributes:
      trigger_only: train with the bare trigger; otherwise (the published default) the
        clean image shows through where the trigger is -1.
    """

    trigger_only: bool = False

    @property
    def solver(self) -> Solver:
        return Ancestral()

    def channel(self, schedule: NoiseSchedule, shape: Shape) -> Channel:
        require_fading(schedule, "BadDiffusion")
        return Channel(*rows.fading(schedule))
