"""The configuration of a run: which models are trained, amplified, inverted, judged.

Frozen dataclasses of Python values; `puredif_jax.stages` performs them.
"""

from __future__ import annotations

import dataclasses

from puredif_jax.amplification import Reinforcement
from puredif_jax.attacks import BadDiffusion, Solver, VillanDiffusion
from puredif_jax.data import FashionMNIST, NpzImages
from puredif_jax.detection import Detector
from puredif_jax.diffusion import DDIM, DDPM, LinearBetas, Sampler
from puredif_jax.inversion import Descent
from puredif_jax.objectives import (
    DenoisingConsistency,
    DistributionShift,
    Elijah,
    Sum,
)
from puredif_jax.survey import Survey
from puredif_jax.training import Training
from puredif_jax.unet import UNet

Loss = DistributionShift | DenoisingConsistency | Sum | Elijah


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How a model is measured.

    Attributes:
      draws: images for each success rate.
      batch: images sampled together.
      ancestral: sampler for backdoors of ancestral sampling.
      deterministic: sampler for those of deterministic sampling, and for quality.
      frechet_draws: images for the Frechet distance; 0 leaves it out.
    """

    draws: int = 256
    batch: int = 64
    ancestral: DDPM = DDPM(steps=100)
    deterministic: DDIM = DDIM(steps=50)
    frechet_draws: int = 0

    def sampler(self, solver: Solver) -> Sampler:
        """The sampler under which a backdoor of that kind fires."""
        return self.ancestral if solver == "sde" else self.deterministic


@dataclasses.dataclass(frozen=True)
class Inversion:
    """How a trigger is sought, under one hypothesis.

    Attributes:
      loss: what is minimised.
      descent: optimiser, candidates and bounds.
      survey: finds where the candidates start; None for random starts.
      heldout: noise draws at each timestep on which the kept candidate is chosen.
    """

    loss: Loss = DistributionShift(samples=8)
    descent: Descent = Descent(candidates=4, scout=40)
    survey: Survey | None = Survey()
    heldout: int = 64


ELIJAH: dict[Solver, Inversion] = {
    "sde": Inversion(
        loss=Elijah(),
        survey=None,
        descent=Descent(
            steps=100, learning_rate=0.1, low=-1.0, bound=None, constant_rate=True
        ),
    ),
    "ode": Inversion(
        loss=Elijah(),
        survey=None,
        descent=Descent(
            steps=10,
            learning_rate=0.1,
            low=-1.0,
            high=1.0,
            bound=None,
            constant_rate=True,
        ),
    ),
}
"""The published settings of Elijah, by the kind of backdoor."""


@dataclasses.dataclass(frozen=True)
class Audit:
    """Which models are inverted and judged, and how.

    Attributes:
      weights: names of shipped models, paths of weights, or "trained" for the result
        of this run.
      hypotheses: kinds of backdoor tried on each.
      inversion: how triggers are sought.
      detector: how they are judged.
      elijah: also invert by Elijah, as a baseline.
    """

    weights: tuple[str, ...] = ("trained",)
    hypotheses: tuple[Solver, ...] = ("sde", "ode")
    inversion: Inversion = Inversion()
    detector: Detector = Detector()
    elijah: bool = False


@dataclasses.dataclass(frozen=True)
class Amplification:
    """Reinforcement of the trigger at snapshots of the backdoor training.

    Attributes:
      snapshots: training steps at which the trigger is reinforced; rising.
      reinforcement: how.
      alternate: go on training with the reinforced trigger.
    """

    snapshots: tuple[int, ...]
    reinforcement: Reinforcement = Reinforcement()
    alternate: bool = False

    def __post_init__(self) -> None:
        if not self.snapshots or list(self.snapshots) != sorted(set(self.snapshots)):
            raise ValueError(f"snapshots must rise, found {self.snapshots}")


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis; -1 takes what is left."""

    candidate: int = 1
    batch: int = -1


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A run: stages that are None are left out.

    Attributes:
      workdir: folder of the run; the same command there resumes it.
      model: the network.
      weights: where training starts, or, without a training, what is measured: a
        shipped model or a path; None for fresh ones.
      training: trains the model, clean or with the attack.
      attack: the backdoor put in, or the one that success is measured for.
      amplification: reinforces the trigger along the training.
      audit: inverts and judges models.
      evaluation: how models are measured.
      data: images to train on.
      schedule: forward process of the model.
      mesh: devices.
      seed: root of all randomness.
      chunk: steps of a loop between two checkpoints.
    """

    workdir: str
    model: UNet
    weights: str | None = None
    training: Training | None = None
    attack: BadDiffusion | VillanDiffusion | None = None
    amplification: Amplification | None = None
    audit: Audit | None = None
    evaluation: Evaluation = Evaluation()
    data: FashionMNIST | NpzImages = FashionMNIST()
    schedule: LinearBetas = LinearBetas()
    mesh: Mesh = Mesh()
    seed: int = 0
    chunk: int = 20

    def __post_init__(self) -> None:
        if self.amplification and not (self.training and self.attack):
            raise ValueError("amplification needs both a training and an attack")
        if self.amplification and self.training:
            last = self.amplification.snapshots[-1]
            if last > self.training.steps:
                raise ValueError(
                    f"amplification.snapshots go to {last}, past the last of "
                    f"training.steps={self.training.steps}"
                )
        if self.audit and "trained" in self.audit.weights and not self.training:
            raise ValueError(
                "audit.weights names 'trained', but the run has no training: give a "
                "shipped model or a path"
            )
