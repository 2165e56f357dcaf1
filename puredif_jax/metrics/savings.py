"""How much training a stronger trigger saves, with an interval over seeds and draws."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Curve(NamedTuple):
    """Success along trainings that differ in their seed alone.

    costs: `[n]`, rising: steps of training, or network evaluations.
    rates: `[S, n]`, share of draws that fire, for each seed.
    draws: behind each rate.
    """

    costs: np.ndarray
    rates: np.ndarray
    draws: int


class Saving(NamedTuple):
    """A factor, and its 95 % interval.

    Infinite where only the cheaper curve reaches the level: then the factor has no
    upper bound. NaN where the cheaper one does not reach it.
    """

    factor: float
    low: float
    high: float


def cost_to(costs: ArrayLike, rates: ArrayLike, level: float) -> float:
    """The cost at which a curve first reaches a level; inf where it does not.

    Between two points the rate is linear in the logarithm of the cost. A curve that
    begins at the level or above has reached it at its first cost.

    Args:
      costs: `[n]`, rising and above 0.
      rates: `[n]`.
      level: of the rate.

    Raises:
      ValueError: the costs do not rise from above 0.
    """
    costs, rates = np.asarray(costs, np.float64), np.asarray(rates, np.float64)
    if costs[0] <= 0 or (np.diff(costs) <= 0).any():
        raise ValueError(f"costs must rise from above 0, found {costs.tolist()}")
    above = np.flatnonzero(rates >= level)
    if not len(above):
        return float("inf")
    at = int(above[0])
    if at == 0:
        return float(costs[0])
    share = (level - rates[at - 1]) / (rates[at] - rates[at - 1])
    return float(costs[at - 1] * (costs[at] / costs[at - 1]) ** share)


def saving(
    dear: Curve, cheap: Curve, level: float, resamples: int = 1000, seed: int = 0
) -> Saving:
    """How many times the cost of the cheap curve the dear one needs for a level.

    Of the mean over seeds. The interval is a bootstrap (Efron 1979). It resamples the
    seeds with replacement, the same of both curves where these have equally many. It
    draws each rate from its binomial distribution.

    Args:
      dear: with the true trigger, as a rule.
      cheap: with the reinforced one.
      level: of the rate.
      resamples: of the bootstrap.
      seed: of its random numbers.
    """

    def factor(rates: tuple[np.ndarray, np.ndarray]) -> float:
        first, second = (
            cost_to(curve.costs, found.mean(0), level)
            for curve, found in zip((dear, cheap), rates, strict=True)
        )
        return first / second if np.isfinite(second) else float("nan")

    rng = np.random.default_rng(seed)
    paired = len(dear.rates) == len(cheap.rates)
    found = []
    for _ in range(resamples):
        chosen = rng.integers(0, len(dear.rates), len(dear.rates))
        other = rng.integers(0, len(cheap.rates), len(cheap.rates))
        picked = (dear, chosen), (cheap, chosen if paired else other)
        first, second = (
            rng.binomial(curve.draws, np.clip(curve.rates[seeds], 0, 1)) / curve.draws
            for curve, seeds in picked
        )
        found.append(factor((first, second)))
    ranked = np.sort(np.where(np.isnan(found), 0.0, found))  # not reached: no saving
    low, high = (ranked[int(q * (resamples - 1))] for q in (0.025, 0.975))
    return Saving(factor((dear.rates, cheap.rates)), float(low), float(high))
