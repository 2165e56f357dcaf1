"""VillanDiffusion, variance-preserving (Chou et al. 2023, arXiv 2306.06874)."""

from __future__ import annotations

import dataclasses

from puredif_jax.attacks.base import Attack, require_fading
from puredif_jax.attacks.channel import Channel
from puredif_jax.attacks.pictures import Shape
from puredif_jax.diffusion import rows
from puredif_jax.diffusion.schedules import NoiseSchedule
from puredif_jax.diffusion.solver import Deterministic, Solver


@dataclasses.dataclass(frozen=True)
class VillanDiffusion(Attack):
    """VillanDiffusion for variance-preserving models.

    H and C are `rows.fading` of psi, C doubled for a deterministic sampler. They are
    the published rows. In the row of psi = 0, C is not the exact response to its H
    (`Solver.response`).

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
        shift, response = rows.fading(schedule, self.psi)
        return Channel(shift, response * self.solver.factor)
