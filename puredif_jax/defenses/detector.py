"""Is a model backdoored? The verdict on what inversion has found.

A model's score is compared with the scores of clean models only.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Self

import numpy as np
from jax.scipy.special import betainc

from puredif_jax.defenses.base import Outcome, Verdict
from puredif_jax.defenses.features import Features
from puredif_jax.defenses.hypothesis import Hypothesis


@dataclasses.dataclass(frozen=True)
class Scores(abc.ABC):
    """Judges by one of `Features`, against the scores of clean models.

    The score of a hypothesis is -log10 of the measure. A model's score is the largest
    of its hypotheses' scores. It is compared with the scores of clean models, of mean m
    and standard deviation d. Above m + alarm d the model is called backdoored, below
    m + doubt d clean, and between them the detector could not tell.

    Attributes:
      clean: finite scores of clean models after the inversion in use, two or more; ()
        for the scores that the package knows (docs/verdict.md).
      doubt, alarm: in standard deviations of `clean`.
      measure: which of the features.
    """

    clean: tuple[float, ...] = ()
    doubt: float = 3.0
    alarm: float = 6.0
    measure: ClassVar[str]

    def __post_init__(self) -> None:
        if len(self.clean) == 1:
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

    def calibrated(self, clean: tuple[float, ...]) -> Self:
        """This detector with these scores of clean models, unless it was given some.

        Raises:
          ValueError: there are none, or one.
        """
        if self.clean:
            return self
        if len(clean) < 2:
            raise ValueError(
                "a detector needs the scores of two clean models or more, found "
                f"{clean}"
            )
        return dataclasses.replace(self, clean=clean)

    @property
    def bounds(self) -> tuple[float, float]:
        """Two scores: above the first a model is in doubt, above the second backdoored.

        Raises:
          ValueError: no scores of clean models are known.
        """
        if not self.clean:
            raise ValueError(
                "the scores of clean models are not known: give `clean`, or take "
                "`calibrated`"
            )
        mean, deviation = np.mean(self.clean), np.std(self.clean, ddof=1)
        return (
            float(mean + self.doubt * deviation),
            float(mean + self.alarm * deviation),
        )

    def score(self, found: Features) -> float:
        """-log10 of the measure, one hypothesis; -inf where it is no number above 0."""
        value = float(getattr(found, self.measure))
        return float(-np.log10(value)) if 0 < value < np.inf else -np.inf

    def p_value(self, score: float) -> float:
        """How likely a further clean model scores so high, if scores are normal.

        The n clean scores have mean m and standard deviation d. The result is the upper
        tail of Student's t at (score - m) / (d sqrt(1 + 1 / n)), with n - 1 degrees of
        freedom.
        """
        mean, deviation = np.mean(self.clean), np.std(self.clean, ddof=1)
        count = len(self.clean)
        away = (score - mean) / max(deviation * np.sqrt(1 + 1 / count), 1e-12)
        free = float(count - 1)
        share = free / (free + away**2)
        tail = float(betainc(*map(np.float32, (free / 2, 0.5, share)))) / 2
        return tail if away > 0 else 1 - tail

    @abc.abstractmethod
    def says(self, best: Hypothesis, factor: float) -> str:
        """What a score of log10(factor) under the best hypothesis means."""

    def judge(self, found: Mapping[Hypothesis, Features]) -> Verdict:
        """The verdict on a model from the features of each hypothesis."""
        scores = {kind: self.score(features) for kind, features in found.items()}
        best = max(scores, key=lambda k: scores[k])
        score, (doubt, alarm) = scores[best], self.bounds
        p_value = self.p_value(score)
        known = doubt, alarm, len(self.clean)
        failed = [k for k in scores if not np.isfinite(scores[k])]
        if failed and score <= alarm:
            kinds = " and ".join(kind.title for kind in failed)
            reason = f"the inversion, {kinds}, ended in no finite numbers"
            return Verdict("could not tell", score, p_value, best.name, reason, *known)
        outcome: Outcome = "clean"
        if score > doubt:
            outcome = "backdoored" if score > alarm else "could not tell"
        reason = (
            f"{self.says(best, 10**score)}; the most on {len(self.clean)} clean models "
            f"was {10 ** max(self.clean):.2g}, and {10**doubt:.2g} to {10**alarm:.2g} "
            "is doubtful"
        )
        return Verdict(outcome, score, p_value, best.name, reason, *known)


@dataclasses.dataclass(frozen=True)
class Detector(Scores):
    """Judges by `Features.gain`: does the model answer a trigger as no clean one does?

    Attributes:
      linear: a model is not judged unless its `denoising` is below this; inf judges
        any.
      settled: a model is not called clean unless the held-out loss fell by less than
        this, in natural logarithms, in the last quarter of each search (`Features`);
        inf calls any.
      foreign: a model is not called clean if `Features.placebo` is above this under any
        hypothesis. Then a channel of no known attack fits far better, as on a backdoor
        of its own kind. Clean models have 1.2 or less; inf calls any.
      repeating: a model is not called clean if `Features.repeats` is above this. Then
        plain draws show one image again and again, as on a backdoor that leaks. Clean
        models have 0.12 or less; models of one class, of few images or with one image
        in a quarter of their data have up to 0.3. 1 calls any.
    """

    alarm: float = 4.0
    linear: float = 1.0
    settled: float = 0.1
    foreign: float = 2.0
    repeating: float = 0.15
    measure: ClassVar[str] = "gain"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("linear", "settled", "foreign", "repeating"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, found {getattr(self, name)}")

    def judge(self, found: Mapping[Hypothesis, Features]) -> Verdict:
        verdict = super().judge(found)
        fell = {kind: float(features.falling) for kind, features in found.items()}
        worst = max(fell, key=lambda kind: (np.isnan(fell[kind]), fell[kind]))
        falling = fell[worst]
        if verdict.outcome != "clean":
            return verdict
        strangest = max(found, key=lambda kind: float(found[kind].placebo))
        placebo = float(found[strangest].placebo)
        if placebo > self.foreign:
            reason = (
                f"backdoors {strangest.title} fit {placebo:.2g} times better with a "
                "response that no known attack trains: there may be one of its own kind"
            )
            return verdict._replace(outcome="could not tell", reason=reason)
        repeats = max(float(features.repeats) for features in found.values())
        if repeats > self.repeating:
            reason = (
                f"{repeats:.0%} of the draws from plain noise are one image: of a "
                "backdoor that leaks, or one that the data have many times"
            )
            return verdict._replace(outcome="could not tell", reason=reason)
        if falling < self.settled:
            return verdict
        reason = (
            f"the search, {worst.title}, was too short: in its last quarter the loss "
            f"still fell by {falling:.2g}, and a model is called clean below "
            f"{self.settled:g}"
        )
        return verdict._replace(outcome="could not tell", reason=reason)

    def says(self, best: Hypothesis, factor: float) -> str:
        return (
            f"with the best trigger, {best.title}, the model's error is {factor:.2g} "
            "times below what a clean model could reach"
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
