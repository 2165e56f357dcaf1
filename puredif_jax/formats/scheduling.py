"""The forward process of a model, what its network predicts, and how it is sampled."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.diffusion.multistep import DPMSolver
from puredif_jax.diffusion.path_keeping import PathKeeping
from puredif_jax.diffusion.prediction import Prediction
from puredif_jax.diffusion.sampling import Clip, Sampler, Spacing, Variance
from puredif_jax.diffusion.schedules import LinearBetas, Process
from puredif_jax.diffusion.ve import PredictorCorrector, VarianceExploding


class Samplers(NamedTuple):
    """How a model is drawn from, by each kind of sampling."""

    ancestral: Sampler
    deterministic: Sampler


@dataclasses.dataclass(frozen=True)
class Scheduling:
    """What a model's files say of the forward process and of sampling.

    Attributes:
      betas: the noise schedule.
      prediction_type: what the network predicts, by the name that diffusers has for it.
      variance_type: of ancestral sampling, "fixed_small" (the posterior's variance) or
        "fixed_large" (beta_t).
      clip: bound on x0hat while sampling, None without one.
      timestep_spacing: "leading", "linspace" or "trailing".
      steps_offset: added to leading timesteps.
      to_clean: the last step of DDIM leads to the clean image, not to t = 0
        ("set_alpha_to_one").
      kind: the class of diffusers that draws.
      learned: the network's output has a half for the variance, which is left out.
    """

    betas: Process = LinearBetas()
    prediction_type: Prediction = "epsilon"
    variance_type: Variance = "fixed_small"
    clip: Clip = 1.0
    timestep_spacing: Spacing = "leading"
    steps_offset: int = 0
    to_clean: bool = True
    kind: str = dataclasses.field(default="DDPMScheduler", compare=False)
    learned: bool = False

    def samplers(self, steps: int) -> Samplers:
        """Path-keeping DDPM, and DDIM, in as many steps as are asked for or there are.

        Raises:
          ValueError: the schedule has no such timesteps.
        """
        ancestral = PathKeeping(
            min(steps, self.betas.steps),
            clip=self.clip,
            spacing=self.timestep_spacing,
            offset=self.steps_offset,
            variance=self.variance_type,
        )
        deterministic = DDIM(
            ancestral.steps,
            clip=self.clip,
            spacing=self.timestep_spacing,
            offset=self.steps_offset,
            to_clean=self.to_clean,
        )
        return self._checked(Samplers(ancestral, deterministic))

    def _checked(self, samplers: Samplers) -> Samplers:
        """The samplers; raises ValueError where one has no path on the schedule."""
        for sampler in samplers:
            sampler.path(self.betas.tables())
        return samplers


@dataclasses.dataclass(frozen=True)
class ScoreScheduling(Scheduling):
    """The scheduling of a variance-exploding model whose network predicts the score.

    Attributes:
      corrections: steps of Langevin dynamics at each noise level ("correct_steps").
      snr: signal-to-noise ratio of a correction.
    """

    betas: Process = VarianceExploding(steps=2000, sigma_max=1348.0)
    prediction_type: Prediction = "score"
    clip: Clip = None
    kind: str = dataclasses.field(default="ScoreSdeVeScheduler", compare=False)
    corrections: int = 1
    snr: float = 0.15

    def samplers(self, steps: int) -> Samplers:
        """A predictor-corrector of as many levels, and DPM-Solver of as many steps.

        DDIM is left out. It leads T // n timesteps down, which is not the next timestep
        of the grid, and the noise of these levels lies far apart.
        """
        return self._checked(
            Samplers(
                PredictorCorrector(
                    min(steps, self.betas.steps), self.corrections, self.snr
                ),
                DPMSolver(min(steps, self.betas.steps - 1), spacing="linspace"),
            )
        )
