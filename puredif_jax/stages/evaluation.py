"""How a model is measured."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from puredif_jax.attacks.pictures import Shape
from puredif_jax.defenses.hypothesis import Hypothesis
from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.diffusion.path_keeping import PathKeeping
from puredif_jax.diffusion.sampling import Sampler
from puredif_jax.diffusion.solver import Solver
from puredif_jax.stages.embedding import Embedding, embedding_for
from puredif_jax.types import Candidate


def at_least(node: Any, **bounds: int) -> None:
    """Raises ValueError where a field is below its bound."""
    for name, least in bounds.items():
        if getattr(node, name) < least:
            raise ValueError(
                f"{name} must be {least} or more, found {getattr(node, name)}"
            )


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How a model is measured.

    Attributes:
      draws: images for each success rate.
      batch: images sampled together.
      ancestral: sampler for backdoors of ancestral sampling.
      deterministic: sampler for backdoors of deterministic sampling, and for quality.
      frechet_draws: images for the Frechet distance, two of each noise; 0 for none.
      embedding: features over which it is taken; None for garment-net, or pixels where
        that does not fit.
      reference: an .npz with the moments of the training images over the embedding, as
        `mu` and `sigma`, which is how pytorch-fid stores them. It is made where there
        is none, and read where there is one. None takes them in each run.
      png: also write those images as PNG files, for other tools.

    Raises:
      ValueError: `frechet_draws` is odd or negative, or 2, too few for a covariance;
        another is below 1.
    """

    draws: int = 256
    batch: int = 64
    ancestral: Sampler = PathKeeping()
    deterministic: Sampler = DDIM(steps=50)
    frechet_draws: int = 0
    embedding: Embedding | None = None
    reference: str | None = None
    png: bool = False

    def __post_init__(self) -> None:
        at_least(self, draws=1, batch=1)
        if self.frechet_draws % 2 or self.frechet_draws < 0 or self.frechet_draws == 2:
            raise ValueError(
                "frechet_draws must be 0 or an even number of at least 4, found "
                f"{self.frechet_draws}"
            )
        if (self.reference or self.png) and not self.frechet_draws:
            raise ValueError(
                "reference and png are about the images of the Frechet distance: set "
                "frechet_draws, found 0"
            )

    def features(self, shape: Shape) -> Embedding:
        """The embedding, of images of a shape."""
        return self.embedding or embedding_for(shape)

    def sampler(self, solver: Solver, psi: float | None = None) -> Sampler:
        """The sampler under which a backdoor of that kind fires.

        `PathKeeping` keeps the path of `psi`, where that is given.
        """
        return solver.pick(self.ancestral, self.deterministic).keeping(psi)

    def sampler_for(self, hypothesis: Hypothesis, candidate: Candidate) -> Sampler:
        """The sampler under which a backdoor fires that a search has found.

        It keeps the path of its psi, to two decimals, if that is a number.
        """
        psi, member = None, candidate.member
        if member is not None and not hypothesis.controlled:
            psi = round(float(np.mean(member.psi)), 2)
            psi = psi if np.isfinite(psi) else None
        return self.sampler(hypothesis.solver, psi)
