"""Elijah's two statistics of draws with a trigger, and what is made of them.

An et al., "Elijah: Eliminating Backdoors Injected in Diffusion Models via Distribution
Shift" (2024, arXiv 2312.00050), of 16 draws in [0, 1].
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

from puredif_jax.defenses.base import Outcome, Verdict
from puredif_jax.defenses.hypothesis import Hypothesis

DRAWS, TRIMMED = 16, 4


class Statistics(NamedTuple):
    """Both statistics of one set of draws.

    uniformity: the trimmed mean of their distances. Small where they agree.
    variation: sum of the absolute differences of neighbours, mean over the draws.
    """

    uniformity: float
    variation: float


class PairDistance(abc.ABC):
    """A distance between two images."""

    name: ClassVar[str]

    def check(self) -> None:
        """Refuses, in a sentence, where what it needs is not there (ValueError)."""
        return None

    @abc.abstractmethod
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """From each image to each, `[N, N]`, of `[N, H, W, C]` in [0, 1]."""


@dataclasses.dataclass(frozen=True)
class PixelDistance(PairDistance):
    """Mean squared difference of pixels: in place of LPIPS, where that is not there."""

    name = "pixels"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        flat = np.asarray(images, np.float64).reshape(len(images), -1)
        return np.stack([((flat - x) ** 2).mean(1) for x in flat])


def statistics(images: np.ndarray, distance: PairDistance) -> Statistics:
    """Both statistics of draws `[N, H, W, C]` in [-1, 1], clipped; 16 at most count.

    Each draw has a row of distances to all draws, itself among them. The quarter with
    the least and the quarter with the largest are left out, of 16 draws four each. The
    mean of the rest is taken, and then the same is done with these means.
    """
    shown = np.clip((np.asarray(images, np.float64)[:DRAWS] + 1) / 2, 0, 1)
    cut = len(shown) * TRIMMED // DRAWS

    def trimmed(values: np.ndarray) -> np.ndarray:
        ranked = np.sort(values, axis=-1)
        found: np.ndarray = ranked[..., cut : ranked.shape[-1] - cut].mean(-1)
        return found

    variation = sum(
        np.abs(np.diff(shown, axis=axis)).sum((1, 2, 3)).mean() for axis in (1, 2)
    )
    return Statistics(float(trimmed(trimmed(distance(shown)))), float(variation))


class Forest(Protocol):
    """Tells backdoored from clean models by both statistics, learnt from models."""

    def probability(self, found: Statistics) -> float:
        """The probability that a model with these statistics is backdoored."""
        ...

    def check(self) -> None:
        """Refuses, in a sentence, where what it needs is not there (ValueError)."""
        ...

    def clean(self) -> np.ndarray:
        """The same for each clean model it has learnt from, without that one, `[n]`."""
        ...


def judged(forest: Forest, found: Mapping[Hypothesis, Statistics]) -> Verdict:
    """The verdict by the hypothesis with the largest probability.

    Above one half the model is called backdoored.
    """
    scores = {kind: forest.probability(each) for kind, each in found.items()}
    best = max(scores, key=lambda kind: scores[kind])
    score, clean = scores[best], forest.clean()
    outcome: Outcome = "backdoored" if score > 0.5 else "clean"
    reason = (
        f"a random forest gives {score:.2g} to a backdoor, {best.title}, by the "
        "uniformity and the variation of the draws"
    )
    p = (1 + int((clean >= score).sum())) / (1 + len(clean))
    return Verdict(outcome, score, p, best.name, reason, 0.5, 0.5, len(clean))
