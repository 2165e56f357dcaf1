"""TERD (Mo et al. 2024, arXiv 2409.05294): its two stages and its settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from puredif_jax.defenses.base import Bench, Defense, Inspection
from puredif_jax.defenses.descent import GradientDescent
from puredif_jax.defenses.detector import Scores
from puredif_jax.defenses.features import Features
from puredif_jax.defenses.hypothesis import Hypothesis, Trojan
from puredif_jax.defenses.inversion import Inversion
from puredif_jax.defenses.reversed_loss import Reversed
from puredif_jax.diffusion.ddim import DDIM, QuadraticDDIM

FLOOR = 0.01
"""Of gamma, and where it starts: at the published 0 the divergence is infinite."""


def published(hypothesis: Hypothesis) -> Inversion:
    """TERD's inversion with its published settings for 32x32 images.

    3,000 steps of the first stage and 1,000 of the second, by gradient descent at 0.5,
    for gamma 0.001. The kind of sampling makes no difference to it.
    """
    narrows = hypothesis.narrows

    def phase(loss: Reversed, refined: Inversion | None, **how: float) -> Inversion:
        descent = GradientDescent(
            learning_rate=0.5,
            low=-1.0,
            high=0.0,
            bound=None,
            member_rate=0.002,
            **how,  # type: ignore[arg-type]
        )
        return Inversion(loss, descent, None, None, refined=refined)

    rollout = QuadraticDDIM(steps=10) if narrows else DDIM(steps=10, clip=1.0)
    second = phase(
        Reversed(narrows=narrows, rollout=rollout),
        None,
        steps=1000,
        momentum=0.9 if narrows else 0.0,
        clip=1.0 if narrows else 0.01,
    )
    return phase(Reversed(narrows=narrows), second, steps=3000)


class Divergence(Scores):
    """Judges by the mean of the divergence, TERD's M_r: log10(`Features.kl_mean`).

    TERD names no threshold; here it comes from clean models.
    """

    measure: ClassVar[str] = "kl_mean"
    statistic: ClassVar[str] = "mean"

    def score(self, found: Features) -> float:
        """log10 of the measure; -inf where it is no number above 0."""
        return -super().score(found) if np.isfinite(super().score(found)) else -np.inf

    def says(self, best: Hypothesis, factor: float) -> str:
        return (
            f"the noise with the best trigger, {best.title}, differs from plain noise "
            f"by a divergence of {self.statistic} {factor:.2g}"
        )


class DivergenceVariance(Divergence):
    """Judges by its variance over pixels, TERD's V_r: log10(`Features.kl_variance`)."""

    measure: ClassVar[str] = "kl_variance"
    statistic: ClassVar[str] = "variance"


@dataclasses.dataclass(frozen=True)
class Divergences:
    """Judges both statistics.

    Attributes:
      mean, variance: each by itself.
    """

    mean: Divergence = Divergence()
    variance: DivergenceVariance = DivergenceVariance()


@dataclasses.dataclass(frozen=True)
class Terd(Defense):
    """TERD: its inversion with and without gamma, judged by the divergence it finds.

    Attributes:
      detector: how both statistics are judged; the graver verdict counts.
    """

    detector: Divergences = Divergences()
    kind: ClassVar[str] = "terd"

    def apart(self, hypotheses: Sequence[Hypothesis]) -> tuple[Hypothesis, ...]:
        """The first that narrows the noise, and the first that does not.

        The response and the kind of sampling are in no term of its losses.
        """
        first = {each.narrows: each for each in reversed(hypotheses)}
        return tuple(each for each in hypotheses if each in first.values())

    def settings(self, hypothesis: Hypothesis) -> Inversion:
        return published(hypothesis)

    def inspect(self, bench: Bench) -> Inspection:
        found = {
            each: bench.invert(self.name, _floored(each), inversion)
            for each, inversion in self.inversions(bench.hypotheses).items()
        }
        features = {kind: each.features for kind, each in found.items()}
        verdicts = []
        for detector in (self.detector.mean, self.detector.variance):
            clean = bench.clean_scores(f"{self.name} {detector.statistic}")
            if detector.clean or clean:
                verdicts.append(detector.calibrated(clean).judge(features))
        order = ("backdoored", "could not tell", "clean")
        gravest = min(
            verdicts, key=lambda x: (order.index(x.outcome), x.p_value), default=None
        )
        return Inspection(gravest, tuple(found.values()))


def _floored(hypothesis: Hypothesis) -> Hypothesis:
    """The hypothesis with gamma from `FLOOR` on, where gamma is sought."""
    if isinstance(hypothesis, Trojan):
        return dataclasses.replace(hypothesis, least=FLOOR, first=FLOOR)
    return hypothesis
