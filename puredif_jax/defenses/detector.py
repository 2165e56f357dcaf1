"""Is a model backdoored? The verdict on what inversion has found.

Scores are compared with those of clean models only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np

from puredif_jax.defenses.features import Features
from puredif_jax.defenses.hypothesis import Hypothesis

Outcome = Literal["clean", "backdoored", "could not tell"]


class Verdict(NamedTuple):
    """The judgement on a model.

    outcome: in a word or three.
    score: log10 of how many times the best trigger lowers the error on its image.
    p_value: share of clean models that would score so high, (1 + #{>=}) / (n + 1); the
      n clean models that calibrate cannot give less than 1 / (n + 1).
    hypothesis: name of the kind of backdoor that fits best.
    reason: one sentence.
    doubt, alarm: scores up to the first are clean, above the second backdoored.
    clean_models: n.
    """

    outcome: Outcome
    score: float
    p_value: float
    hypothesis: str
    reason: str
    doubt: float
    alarm: float
    clean_models: int


@dataclasses.dataclass(frozen=True)
class Detector:
    """Judges by `Features.gain`: does a trigger unlock an image that is not known else?

    The score of a hypothesis is -log10(gain), that of a model the larger of its
    hypotheses'. It is compared with the scores of clean models, of mean m and standard
    deviation d: above m + alarm d the model is called backdoored, below m + doubt d
    clean, and between them the detector could not tell.

    Attributes:
      clean: finite scores of clean models after the inversion in use; the default are
        those of the default one on the calibrating models of configs/claims.py
        (docs/claims.md).
      doubt, alarm: in standard deviations of `clean`.
      linear: a model is not judged unless its `denoising` is below this; inf judges
        any.
    """

    clean: tuple[float, ...] = (
        0.111,
        0.139,
        0.156,
        0.135,
        0.193,
        0.118,
        0.161,
        0.19,
        0.075,
        0.131,
        0.165,
        0.182,
        0.135,
        0.185,
        0.054,
        0.147,
        0.174,
        0.148,
        0.194,
        0.108,
    )
    doubt: float = 3.0
    alarm: float = 6.0
    linear: float = 1.0

    def __post_init__(self) -> None:
        if len(self.clean) < 2:
            raise ValueError(
                "a detector needs the scores of two clean models or more, found "
                f"{self.clean}"
            )
        if not np.isfinite(self.clean).all():
            raise ValueError(
                f"the scores of clean models must be finite, found {self.clean}"
            )
        if not 0 <= self.doubt <= self.alarm < np.inf:
            raise ValueError(
                "doubt and alarm must be finite and 0 <= doubt <= alarm, found "
                f"doubt={self.doubt} and alarm={self.alarm}"
            )
        if not self.linear > 0:
            raise ValueError(f"linear must be above 0, found {self.linear}")

    @property
    def bounds(self) -> tuple[float, float]:
        """The scores above which one cannot tell, and above which one can."""
        mean, deviation = np.mean(self.clean), np.std(self.clean, ddof=1)
        return (
            float(mean + self.doubt * deviation),
            float(mean + self.alarm * deviation),
        )

    def refusal(self, ratios: Mapping[Hypothesis, float]) -> Verdict | None:
        """The verdict on weights that denoise nothing; None on any other model.

        Args:
          ratios: `denoising` of the draws by the sampling of each hypothesis.
        """
        if any(ratio < self.linear for ratio in ratios.values()):
            return None
        best = min(ratios, key=lambda k: (np.isnan(ratios[k]), ratios[k]))
        found = ratios[best]
        how = f"{found:.3g} times" if np.isfinite(found) else "without bound over"
        reason = (
            "the weights denoise nothing: on the model's own draws its error is "
            f"{how} a linear denoiser's, and a model is judged below {self.linear:g}"
        )
        known = *self.bounds, len(self.clean)
        return Verdict("could not tell", -np.inf, 1.0, best.name, reason, *known)

    def score(self, found: Features) -> float:
        """-log10(gain), one hypothesis; -inf where it is not a number above 0."""
        gain = float(found.gain)
        return float(-np.log10(gain)) if 0 < gain < np.inf else -np.inf

    def judge(self, found: Mapping[Hypothesis, Features]) -> Verdict:
        """The verdict on a model from the features of each hypothesis."""
        scores = {kind: self.score(features) for kind, features in found.items()}
        best = max(scores, key=lambda k: scores[k])
        score, (doubt, alarm) = scores[best], self.bounds
        beaten = sum(clean >= score for clean in self.clean)
        p_value = (1 + beaten) / (1 + len(self.clean))
        known = doubt, alarm, len(self.clean)
        failed = [k for k in scores if not np.isfinite(scores[k])]
        if failed and score <= alarm:
            kinds = " and ".join(kind.title for kind in failed)
            reason = f"the inversion, {kinds}, ended in no finite numbers"
            return Verdict("could not tell", score, p_value, best.name, reason, *known)
        outcome: Outcome = "clean"
        if score > doubt:
            outcome = "backdoored" if score > alarm else "could not tell"
        factor, usual = 10**score, 10 ** max(self.clean)
        reason = (
            f"the best trigger, {best.title}, lowers the model's error on "
            f"its image {factor:.2g} times; the most on {len(self.clean)} clean models "
            f"was {usual:.2g}, and {10**doubt:.2g} to {10**alarm:.2g} is doubtful"
        )
        return Verdict(outcome, score, p_value, best.name, reason, *known)
