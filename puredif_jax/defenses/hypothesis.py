"""What an inverter assumes of a backdoor; never the attack itself."""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar

from puredif_jax.attacks.base import published_response
from puredif_jax.attacks.channel import Channel
from puredif_jax.attacks.pictures import Shape
from puredif_jax.diffusion.schedules import NoiseSchedule
from puredif_jax.diffusion.solver import Deterministic, Solver


@dataclasses.dataclass(frozen=True)
class Hypothesis(abc.ABC):
    """A kind of backdoor that is sought.

    Attributes:
      solver: the kind of sampler under which it fires.
      controlled: it fires inside its channel alone, for who controls the sampler.
    """

    solver: Solver = Deterministic()
    controlled: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Short and its own, for files and tables."""

    @property
    @abc.abstractmethod
    def title(self) -> str:
        """What it is, in a clause that follows "backdoors "."""

    @abc.abstractmethod
    def applies(self, schedule: NoiseSchedule) -> bool:
        """Whether there can be such a backdoor in a model of this process."""

    @abc.abstractmethod
    def channel(self, schedule: NoiseSchedule, shape: Shape) -> Channel:
        """H, C and gamma, in float64; shape is (H, W, C) of the images."""


class Fading(Hypothesis):
    """A trigger that comes as the signal fades: H_t = 1 - s_t, C_t = factor R_t.

    BadDiffusion, and VillanDiffusion with psi = 1. C_t is the response that
    VillanDiffusion trains with; for deterministic sampling on a cosine schedule it
    differs near T from the one that keeps the path (`Solver.response`): 1.94 against
    1.00 at t = 999, 1.03 at 980; on a linear one by 0.005 at most.
    """

    @property
    def name(self) -> str:
        return self.solver.name

    @property
    def title(self) -> str:
        return f"of {self.solver.title} sampling"

    def applies(self, schedule: NoiseSchedule) -> bool:
        return schedule.fades

    def channel(self, schedule: NoiseSchedule, shape: Shape) -> Channel:
        response = published_response(schedule) * self.solver.factor
        return Channel(1 - schedule.signal, response)


class Exploding(Hypothesis):
    """A trigger that comes with the noise of a variance-exploding model: H = sigma.

    C_t = factor sigma_t / (sigma_t + sigma_{t-1}): VillanDiffusion of such models.
    """

    @property
    def name(self) -> str:
        return f"ve {self.solver.name}"

    @property
    def title(self) -> str:
        return f"of {self.solver.title} sampling in variance-exploding models"

    def applies(self, schedule: NoiseSchedule) -> bool:
        return not schedule.fades

    def channel(self, schedule: NoiseSchedule, shape: Shape) -> Channel:
        sigma, before = schedule.noise, schedule.previous[1]
        return Channel(sigma, sigma / (sigma + before) * self.solver.factor)
