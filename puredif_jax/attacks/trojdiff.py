"""TrojDiff, D2I (Chen, Song and Li 2023, arXiv 2303.05762)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from puredif_jax.attacks.base import Attack, require_fading
from puredif_jax.attacks.channel import Channel
from puredif_jax.attacks.pictures import Shape
from puredif_jax.attacks.triggers import Blend, Patch
from puredif_jax.diffusion import rows
from puredif_jax.diffusion.schedules import NoiseSchedule
from puredif_jax.diffusion.solver import Deterministic, Solver


@dataclasses.dataclass(frozen=True)
class TrojDiff(Attack):
    """TrojDiff from any noise to one image: H_t = v_t, C_t = 0, noise times gamma.

    x_t = s_t y + v_t (gamma eps + mu), answered by eps; mu is the trigger,
    (1 - gamma) times its picture. For a `Patch`, mu and gamma hold in its square alone:
    elsewhere mu is 0 and gamma 1. Drawing starts at gamma eps + mu, by samplers that
    know mu and gamma: DDPM and DDIM in z_t = (x_t - v_t mu) / gamma.

    Attributes:
      trigger: the picture, and gamma.
      poison_rate: published are 12 of the 140 samples of a batch.
      solver: the kind of sampler by which it is drawn; it fires under each.
    """

    trigger: Blend | Patch = Blend()
    poison_rate: float = 12 / 140
    solver: Solver = Deterministic()
    controlled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.trigger, Blend | Patch):
            raise ValueError(
                f"TrojDiff has a trigger that scales the noise, Blend or Patch, found "
                f"{type(self.trigger).__name__}"
            )
        if not self.trigger_only:
            raise ValueError("TrojDiff trains with the bare trigger alone")
        if not self.trigger.gamma > 0:
            raise ValueError(
                f"trigger.gamma must be above 0, found {self.trigger.gamma}: the noise "
                "inside the channel is divided by it"
            )

    def channel(self, schedule: NoiseSchedule, shape: Shape) -> Channel:
        require_fading(schedule, "TrojDiff")
        return Channel(*rows.narrowed(schedule), self.trigger.gamma_map(shape))
