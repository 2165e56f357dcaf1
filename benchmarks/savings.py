"""How much training a stronger trigger saves, with an interval over seeds and draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import isotonic_regression


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

    reached: whether the dear curve reaches the level. If not, its last cost stands in,
      and the factor is a lower bound.
    begun: whether the cheap curve is at the level from its first point on. Then its
      cost is less, and the factor a lower bound.

    The factor is 0 where the cheap curve does not reach the level. It is inf where the
    dear one is there from its first point on: then there is nothing to save.
    """

    factor: float
    low: float
    high: float
    reached: bool
    begun: bool


def cost_to(costs: ArrayLike, rates: ArrayLike, level: float) -> float:
    """The cost at which a curve reaches a level; inf where it does not.

    The rates are made to rise by isotonic regression, so that a single lucky point is
    no crossing. Between two points the rate is linear in the logarithm of the cost. A
    curve that begins at the level or above has reached it at its first cost.

    Args:
      costs: `[n]`, rising and above 0.
      rates: `[n]`.
      level: of the rate.

    Raises:
      ValueError: the costs do not rise from above 0.
    """
    costs = np.asarray(costs, np.float64)
    if costs[0] <= 0 or (np.diff(costs) <= 0).any():
        raise ValueError(f"costs must rise from above 0, found {costs.tolist()}")
    rising = isotonic_regression(np.asarray(rates, np.float64)).x
    above = np.flatnonzero(rising >= level - 1e-12)
    if not len(above):
        return math.inf
    at = int(above[0])
    if at == 0:
        return float(costs[0])
    share = (level - rising[at - 1]) / (rising[at] - rising[at - 1])
    return float(costs[at - 1] * (costs[at] / costs[at - 1]) ** share)


def saving(
    dear: Sequence[Curve],
    cheap: Sequence[Curve],
    level: float,
    resamples: int = 1000,
    seed: int = 0,
) -> Saving:
    """How many times the cost of the cheap way the dear one needs for a level.

    Of the mean over seeds. Where there are several curves of a way, such as on raw and
    on averaged weights, the one counts that reaches the level first.

    The interval is a bootstrap (Efron 1979). It resamples the seeds with replacement,
    the same for all curves, and draws each rate from its binomial distribution, with
    half a success and half a failure added. Of three seeds there are ten resamples, so
    the interval says little about further seeds.

    Args:
      dear: with the true trigger, as a rule.
      cheap: with the reinforced one.
      level: of the rate.
      resamples: of the bootstrap.
      seed: of its random numbers.

    Raises:
      ValueError: the curves are not of equally many seeds.
    """
    seeds = {len(curve.rates) for curve in (*dear, *cheap)}
    if len(seeds) != 1:
        raise ValueError(f"curves must have equally many seeds, found {sorted(seeds)}")
    (count,) = seeds

    def least(curves: Sequence[Curve], rates: Sequence[np.ndarray]) -> float:
        pairs = zip(curves, rates, strict=True)
        return min(cost_to(curve.costs, x.mean(0), level) for curve, x in pairs)

    last = max(float(curve.costs[-1]) for curve in dear)

    def factor(first: float, second: float) -> float:
        return min(first, last) / second

    rng = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        chosen = rng.integers(0, count, count)
        first, second = (
            least(curves, [_redrawn(rng, curve, chosen) for curve in curves])
            for curves in (dear, cheap)
        )
        if math.isfinite(first) or math.isfinite(second):
            found.append((factor(first, second), math.isfinite(first)))
    cost, own = (least(curves, [x.rates for x in curves]) for curves in (dear, cheap))
    begins = [min(float(x.costs[0]) for x in curves) for curves in (dear, cheap)]
    if cost <= begins[0]:
        return Saving(math.inf, math.inf, math.inf, True, own <= begins[1])
    if not found:
        return Saving(0.0, 0.0, 0.0, False, False)
    low, high = np.quantile([x for x, _ in found], (0.025, 0.975))
    if math.isfinite(own) and np.mean([reached for _, reached in found]) < 0.975:
        high = math.inf
    reached, begun = math.isfinite(cost), own <= begins[1]
    return Saving(factor(cost, own), float(low), float(high), reached, begun)


def _redrawn(rng: np.random.Generator, curve: Curve, seeds: np.ndarray) -> np.ndarray:
    """Rates of these seeds, each drawn from its binomial distribution."""
    rates = (curve.rates[seeds] * curve.draws + 0.5) / (curve.draws + 1)
    found: np.ndarray = rng.binomial(curve.draws, rates) / curve.draws
    return found
