"""Factors of training, against closed forms."""

import math

import numpy as np
import pytest
from savings import Curve, cost_to, saving

COSTS = np.array([100.0, 200.0, 400.0, 800.0])
MANY = 10**6


def test_a_level_lies_between_two_costs_by_their_logarithm() -> None:
    rates = np.array([0.0, 0.2, 0.6, 1.0])
    assert cost_to(COSTS, rates, 0.6) == pytest.approx(400)
    assert cost_to(COSTS, rates, 0.4) == pytest.approx(np.sqrt(200 * 400))
    assert cost_to(COSTS, rates, 0.0) == 100  # reached from the start
    assert cost_to(COSTS, rates, 1.1) == math.inf


def test_a_single_point_above_its_neighbours_is_no_crossing() -> None:
    """By isotonic regression: 0.5 and 0.3 are 0.4 each."""
    rates = np.array([0.0, 0.5, 0.3, 0.9])
    assert cost_to(COSTS, rates, 0.4) == pytest.approx(200)
    assert cost_to(COSTS, rates, 0.65) == pytest.approx(np.sqrt(400 * 800))


def test_costs_must_rise() -> None:
    for costs in ([0, 1], [2, 2], [2, 1]):
        with pytest.raises(ValueError, match="must rise from above 0, found"):
            cost_to(costs, [0, 1], 0.5)


def curve(factor: float, seeds: int = 3, draws: int = MANY) -> Curve:
    """Linear in the logarithm of the cost: 0 at 100 factor, 1 at 800 factor."""
    rates = np.log(COSTS / 100) / np.log(8)
    return Curve(factor * COSTS, np.tile(rates, (seeds, 1)), draws)


def test_a_curve_at_a_tenth_of_the_cost_saves_ten_times() -> None:
    for level in (0.1, 0.5, 0.9):
        found = saving([curve(10)], [curve(1)], level)
        assert found[:3] == pytest.approx((10, 10, 10), rel=0.02)
        assert found.low <= 10 <= found.high and found.reached and not found.begun


def test_of_several_curves_the_first_at_the_level_counts() -> None:
    found = saving([curve(10), curve(6)], [curve(1), curve(2)], 0.5)
    assert found.factor == pytest.approx(6)


def test_few_draws_and_unequal_seeds_widen_the_interval() -> None:
    sure = saving([curve(10)], [curve(1)], 0.5)
    few = saving([curve(10, draws=20)], [curve(1, draws=20)], 0.5)
    assert few.high / few.low > 1.3 * sure.high / sure.low
    rates = curve(1).rates * np.array([[0.8], [1.0], [1.0]])
    unequal = saving([curve(10)], [Curve(COSTS, rates, MANY)], 0.7)
    assert unequal.high / unequal.low > 1.1
    # Both curves have the same seeds in a resample, so what seeds share drops out.
    pair = [Curve(10 * COSTS, rates, MANY)], [Curve(COSTS, rates, MANY)]
    assert saving(*pair, 0.7)[:3] == pytest.approx((10, 10, 10), rel=0.05)


def test_a_plateau_below_the_level_is_no_crossing_by_luck() -> None:
    plateau = np.array([[0.5, 0.88, 0.89, 0.89, 0.89, 0.95]] * 3)
    dear = Curve(100 * 2.0 ** np.arange(6), plateau, 256)
    found = saving([dear], [curve(0.5)], 0.92)
    assert found.low > 0.7 * found.factor


def test_what_is_not_reached_is_a_bound_or_nothing() -> None:
    low = Curve(COSTS, np.full((3, 4), 0.3), MANY)
    bound = saving([low], [curve(1)], 0.5)
    assert not bound.reached and bound.high == math.inf
    assert bound.factor == pytest.approx(
        800 / cost_to(*curve(1)[:1], curve(1).rates[0], 0.5)
    )
    assert bound.low == pytest.approx(bound.factor, rel=0.02)
    assert saving([curve(1)], [low], 0.5)[:3] == (0, 0, 0)
    assert saving([low], [low], 0.5)[:4] == (0, 0, 0, False)


def test_a_curve_that_begins_at_the_level_bounds_the_factor() -> None:
    high = Curve(COSTS, np.full((3, 4), 0.9), MANY)
    found = saving([curve(10)], [high], 0.5)
    assert found.begun and found.factor == pytest.approx(
        cost_to(*curve(10)[:1], curve(10).rates[0], 0.5) / 100
    )
    assert saving([high], [curve(1)], 0.5).factor == math.inf


def test_curves_are_of_equally_many_seeds() -> None:
    with pytest.raises(ValueError, match=r"equally many seeds, found \[2, 3\]"):
        saving([curve(1, seeds=2)], [curve(1)], 0.5)
