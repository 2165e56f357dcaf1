"""PureDiffusion as a defense (Truong and Le, arXiv 2502.19047)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from puredif_jax.defenses.base import Bench, Defense, Inspection
from puredif_jax.defenses.detector import Detector
from puredif_jax.defenses.hypothesis import Hypothesis
from puredif_jax.defenses.inversion import Inversion


@dataclasses.dataclass(frozen=True)
class Puredif(Defense):
    """Inverts a trigger under each hypothesis, and judges what it unlocks.

    Weights that denoise nothing are not judged: the verdict is "could not tell", before
    any inversion.

    Attributes:
      inversion: how triggers are sought.
      detector: how they are judged.
    """

    inversion: Inversion = Inversion()
    detector: Detector = Detector()

    kind: ClassVar[str] = "puredif"

    def inspect(self, bench: Bench) -> Inspection:
        detector = self.detector.calibrated(bench.clean_scores(self.kind))
        if detector.linear < np.inf:
            ratios = {each: bench.denoising(each) for each in bench.hypotheses}
            if (refused := detector.refusal(ratios)) is not None:
                return Inspection(refused)
        found = {
            each: bench.invert(self.name, each, inversion, self.placebos(each))
            for each, inversion in self.inversions(bench.hypotheses).items()
        }
        verdict = detector.judge({k: v.features for k, v in found.items()})
        return Inspection(verdict, tuple(found.values()))

    def settings(self, hypothesis: Hypothesis) -> Inversion:
        return self.inversion

    def placebos(self, hypothesis: Hypothesis) -> tuple[Hypothesis, ...]:
        return hypothesis.placebos
