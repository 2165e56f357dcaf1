"""What an inverter assumes of a backdoor; never the attack itself."""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar

import numpy as np

from puredif_jax.attacks.channel import Channel
from puredif_jax.attacks.pictures import Shape
from puredif_jax.defenses.family import Family
from puredif_jax.diffusion import rows
from puredif_jax.diffusion.schedules import NoiseSchedule
from puredif_jax.diffusion.solver import Deterministic, Solver


@dataclasses.dataclass(frozen=True)
class Hypothesis(abc.ABC):
    """A kind of backdoor that is sought.

    Attributes:
      solver: the kind of sampler under which it fires.
      controlled: it fires inside its channel alone, for whoever controls the sampler.
      narrows: its gamma may differ from pixel to pixel.
    """

    solver: Solver = Deterministic()
    controlled: ClassVar[bool] = False
    narrows: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """A short name of its own, for files and tables."""

    @property
    @abc.abstractmethod
    def title(self) -> str:
        """What it is, in a clause that follows "backdoors "."""

    @property
    def attacks(self) -> str:
        """The known attacks that make such backdoors, if there are any."""
        return ""

    @property
    def sought(self) -> str:
        """The title, with the attacks."""
        return f"{self.title} ({self.attacks})" if self.attacks else self.title

    @abc.abstractmethod
    def applies(self, schedule: NoiseSchedule) -> bool:
        """Whether there can be such a backdoor in a model of this process."""

    @abc.abstractmethod
    def channel(self, schedule: NoiseSchedule, shape: Shape) -> Channel:
        """H, C and gamma, in float64; shape is (H, W, C) of the images."""

    def family(self, schedule: NoiseSchedule, shape: Shape) -> Family:
        """The channels among which a search may choose: `channel` alone."""
        found = Family.only(self.channel(schedule, shape))
        return dataclasses.replace(found, power=self.power)

    @property
    def power(self) -> float:
        """As in `Family`: 1/2 for ancestral sampling, otherwise 1.

        A linear denoiser's error N grows with ||delta||^2. Near T it is large for
        ancestral sampling alone. There a power of 1 would reward large triggers that
        merely bend a network, and a power of 0 would reward delta = 0. The root lies
        between.
        """
        return self.solver.pick(0.5, 1.0)

    @property
    def lone(self) -> bool:
        """Whether H_t = v_t C_t: the path is one image under noise of another mean.

        A model that takes it for that image answers as on the path of a backdoor.
        """
        return False

    @property
    def placebos(self) -> tuple[Hypothesis, ...]:
        """Channels of no attack, on both sides of this one in the logarithm of C.

        A clean model allows what a search reaches in them. Under deterministic
        sampling every model satisfies C near T, but no larger or smaller C. So there
        are no placebos, and other explanations decide (`path_errors.Errors`).
        """
        factors: tuple[float, ...] = self.solver.pick((0.7, 1 / 0.7), ())
        return tuple(Placebo(self.solver, of=self, factor=factor) for factor in factors)


@dataclasses.dataclass(frozen=True)
class Placebo(Hypothesis):
    """Another hypothesis with a response that no attack trains: C times a factor.

    Attributes:
      of: the other hypothesis.
      factor: of C, above 0.
    """

    of: Hypothesis = dataclasses.field(kw_only=True)
    factor: float = dataclasses.field(kw_only=True)

    @property
    def name(self) -> str:
        return f"{self.of.name} placebo {self.factor:.2g}"

    @property
    def title(self) -> str:
        return f"{self.of.title}, with {self.factor:.2g} times the response"

    @property
    def lone(self) -> bool:
        return self.of.lone

    @property
    def power(self) -> float:
        return self.of.power

    @property
    def placebos(self) -> tuple[Hypothesis, ...]:
        return ()

    def applies(self, schedule: NoiseSchedule) -> bool:
        return self.of.applies(schedule)

    def channel(self, schedule: NoiseSchedule, shape: Shape) -> Channel:
        found = self.of.channel(schedule, shape)
        return dataclasses.replace(found, response=found.response * self.factor)

    def family(self, schedule: NoiseSchedule, shape: Shape) -> Family:
        found = self.of.family(schedule, shape)
        return dataclasses.replace(found, responses=found.responses * self.factor)


class Fading(Hypothesis):
    """A trigger that comes as the signal fades: BadDiffusion and VillanDiffusion.

    psi = 1:  H = 1 - s_t,  C = R_t;    psi = 0:  H = v_t,  C = the published row.

    A search may move psi from 0 to 1; `channel` has psi = 1, as BadDiffusion does. C is
    doubled for deterministic sampling, as VillanDiffusion trains it. On a cosine
    schedule 2 R differs near T from the response that keeps the path
    (`Solver.response`): 1.94 against 1.00 at t = 999, 1.03 at 980. On a linear schedule
    it differs by 0.005 at most.
    """

    @property
    def name(self) -> str:
        return self.solver.name

    @property
    def title(self) -> str:
        return f"of {self.solver.title} sampling"

    @property
    def attacks(self) -> str:
        villan = "VillanDiffusion, psi from 0 to 1"
        return self.solver.pick(f"BadDiffusion; {villan}", villan)

    def applies(self, schedule: NoiseSchedule) -> bool:
        return schedule.fades

    def channel(self, schedule: NoiseSchedule, shape: Shape) -> Channel:
        return self._row(schedule, 1.0)

    def _row(self, schedule: NoiseSchedule, psi: float) -> Channel:
        shift, response = rows.fading(schedule, psi)
        return Channel(shift, response * self.solver.factor)

    def family(self, schedule: NoiseSchedule, shape: Shape) -> Family:
        ends = [self._row(schedule, psi) for psi in (1.0, 0.0)]
        return Family(
            np.stack([end.shift for end in ends]),
            np.stack([end.response for end in ends]),
            np.array([0.0, 1.0]),
            np.ones(3),
            self.power,
        )


@dataclasses.dataclass(frozen=True)
class Trojan(Hypothesis):
    """A trigger that shifts and narrows the noise: TrojDiff. H_t = v_t, C_t = 0.

    The noise is scaled by gamma, a number for each pixel. A search may move gamma. It
    begins at `first` everywhere, the gamma of `channel`, or at a square (`Blocks`).
    Such a backdoor fires where sampling starts from gamma eps + r, and is drawn inside
    its channel.

    Attributes:
      least: the smallest gamma.
      first: where a search begins.
    """

    controlled: ClassVar[bool] = True
    narrows: ClassVar[bool] = True
    least: float = 0.05
    first: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.least <= self.first <= 1:
            raise ValueError(
                "gamma needs 0 < least <= first <= 1, found "
                f"least={self.least} and first={self.first}"
            )

    @property
    def power(self) -> float:
        """1: N is large at all t."""
        return 1.0

    @property
    def placebos(self) -> tuple[Hypothesis, ...]:
        """None: there is no response to change."""
        return ()

    @property
    def name(self) -> str:
        return "trojan"

    @property
    def title(self) -> str:
        return "of shifted and narrowed noise"

    @property
    def attacks(self) -> str:
        return "TrojDiff, blended or by a patch"

    def applies(self, schedule: NoiseSchedule) -> bool:
        return schedule.fades

    def channel(self, schedule: NoiseSchedule, shape: Shape) -> Channel:
        return Channel(*rows.narrowed(schedule), self.first)

    def family(self, schedule: NoiseSchedule, shape: Shape) -> Family:
        found = super().family(schedule, shape)
        return dataclasses.replace(found, gamma=np.array([self.least, 1.0, self.first]))


class Exploding(Hypothesis):
    """A trigger that comes with the noise of a variance-exploding model: H = sigma.

    C_t = factor sigma_t / (sigma_t + sigma_{t-1}), as VillanDiffusion has it.
    """

    @property
    def name(self) -> str:
        return f"ve {self.solver.name}"

    @property
    def title(self) -> str:
        return f"of {self.solver.title} sampling in variance-exploding models"

    @property
    def attacks(self) -> str:
        return "VillanDiffusion"

    def applies(self, schedule: NoiseSchedule) -> bool:
        return not schedule.fades

    def channel(self, schedule: NoiseSchedule, shape: Shape) -> Channel:
        shift, response = rows.exploding(schedule)
        return Channel(shift, response * self.solver.factor)

    @property
    def lone(self) -> bool:
        """True for deterministic sampling, up to the steps of sigma."""
        return self.solver.pick(False, True)

    @property
    def power(self) -> float:
        """1/2 for ancestral sampling, otherwise 0.

        There N rewards nothing but large triggers.
        """
        return self.solver.pick(0.5, 0.0)
