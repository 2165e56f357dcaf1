"""Factors of training, against closed forms."""

import numpy as np
import pytest

from puredif_jax.metrics.savings import Curve, cost_to, saving

COSTS = np.array([100.0, 200.0, 400.0, 800.0])


def test_a_level_lies_between_two_costs_by_their_logarithm() -> None:
    rates = np.array([0.0, 0.2, 0.6, 1.0])
    assert cost_to(COSTS, rates, 0.6) == pytest.approx(400)
    assert cost_to(COSTS, rates, 0.4) == pytest.approx(np.sqrt(200 * 400))
    assert cost_to(COSTS, rates, 0.0) == 100  # reached from the start
    assert cost_to(COSTS, rates, 1.1) == np.inf


def test_the_first_crossing_counts() -> None:
    assert cost_to(COSTS, np.array([0.0, 0.5, 0.3, 0.9]), 0.5) == pytest.approx(200)


def test_costs_must_rise() -> None:
    for costs in ([0, 1], [2, 2], [2, 1]):
        with pytest.raises(ValueError, match="must rise from above 0, found"):
            cost_to(costs, [0, 1], 0.5)


def curve(factor: float, seeds: int = 3, draws: int = 10**6) -> Curve:
    """Linear in the logarithm of the cost: 0 at 100 factor, 1 at 800 factor."""
    rates = np.log(COSTS / 100) / np.log(8)
    return Curve(factor * COSTS, np.tile(rates, (seeds, 1)), draws)


def test_a_curve_at_a_tenth_of_the_cost_saves_ten_times() -> None:
    for level in (0.1, 0.5, 0.9):
        found = saving(curve(10), curve(1), level)
        assert found == pytest.approx((10, 10, 10), rel=0.02)
        assert found.low <= 10 <= found.high


def test_few_draws_and_unequal_seeds_widen_the_interval() -> None:
    sure = saving(curve(10), curve(1), 0.5)
    few = saving(curve(10, draws=20), curve(1, draws=20), 0.5)
    assert few.high / few.low > 1.5 * sure.high / sure.low
    rates = curve(1).rates * np.array([[0.8], [1.0], [1.0]])
    unequal = saving(curve(10), Curve(COSTS, rates, 10**6), 0.7)
    assert unequal.high / unequal.low > 1.1
    # Both curves have the same seeds in a resample, so what seeds share drops out.
    shared = saving(Curve(10 * COSTS, rates, 10**6), Curve(COSTS, rates, 10**6), 0.7)
    assert shared == pytest.approx((10, 10, 10), rel=0.05)


def test_what_is_not_reached_is_no_number() -> None:
    low = Curve(COSTS, np.full((2, 4), 0.3), 100)
    bound = saving(low, curve(1), 0.5)
    assert bound.factor == bound.high == bound.low == np.inf
    none = saving(curve(1), low, 0.5)
    assert np.isnan(none.factor) and none.low == none.high == 0
