"""Elijah's statistics by loops; LPIPS and a forest, where their packages are there."""

from __future__ import annotations

import numpy as np
import pytest

from puredif_jax.defenses.hypothesis import Fading
from puredif_jax.defenses.uniformity import (
    Forest,
    PairDistance,
    PixelDistance,
    Statistics,
    judged,
    statistics,
)
from puredif_jax.diffusion.solver import Ancestral, Deterministic
from puredif_jax.runs.binding import RunError
from puredif_jax.stages.perceptual import LPIPS, RandomForest

DISTANCES: list[PairDistance] = [PixelDistance(), LPIPS(pretrained=False)]


def images(count: int, seed: int = 0, spread: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (spread * rng.uniform(-1.3, 1.3, (count, 6, 5, 2))).astype(np.float32)


@pytest.mark.parametrize("count,cut", [(16, 4), (20, 4), (8, 2), (3, 0)])
def test_statistics_equal_their_definition(count: int, cut: int) -> None:
    """Term by term; of more than 16 draws the first count."""
    drawn = images(count)
    x = np.clip((drawn[:16].astype(np.float64) + 1) / 2, 0, 1)
    rows = []
    for a in x:
        ranked = sorted(np.mean((a - b) ** 2) for b in x)
        rows.append(np.mean(ranked[cut : len(ranked) - cut]))
    rows = sorted(rows)
    wanted = np.mean(rows[cut : len(rows) - cut])
    down = [np.abs(a[1:] - a[:-1]).sum() for a in x]
    right = [np.abs(a[:, 1:] - a[:, :-1]).sum() for a in x]
    found = statistics(drawn, PixelDistance())
    assert found.uniformity == pytest.approx(wanted)
    assert found.variation == pytest.approx(np.mean(down) + np.mean(right))


@pytest.mark.parametrize("distance", DISTANCES, ids=lambda x: x.name)
def test_a_distance_is_one(distance: PairDistance) -> None:
    """0 to itself, the same both ways, more where images differ more; grey or not."""
    if isinstance(distance, LPIPS):
        try:
            distance(np.zeros((2, 16, 16, 1)))
        except RunError as error:
            pytest.skip(str(error))
    rng = np.random.default_rng(1)
    for channels in (1, 3):
        base = rng.uniform(0.3, 0.7, (16, 16, channels))
        away = rng.normal(size=base.shape)
        x = np.stack([base, base, base + 0.02 * away, base + 0.2 * away])
        found = distance(np.clip(x, 0, 1))
        assert found.shape == (4, 4)
        np.testing.assert_allclose(found, found.T, rtol=1e-4, atol=1e-7)
        assert abs(found[0, 1]) < 1e-6 and abs(np.diag(found)).max() < 1e-6
        assert found[0, 3] > found[0, 2] > 0
    assert distance.name not in [x.name for x in DISTANCES if x is not distance]


CLEAN = tuple((0.2 + 0.01 * i, 60.0 + i) for i in range(8))
BAD = tuple((0.001 + 0.002 * i, 20.0 + i) for i in range(8))


def test_a_forest_tells_models_apart_and_does_not_trust_itself() -> None:
    """Of a clean model that it knows, the trees speak that have not seen it."""
    forest: Forest = RandomForest(CLEAN, BAD, trees=50)
    assert forest.probability(Statistics(0.005, 25.0)) > 0.9
    assert forest.probability(Statistics(0.23, 64.0)) < 0.1
    assert forest.clean().shape == (8,) and forest.clean().max() < 0.5
    odd = ((0.004, 24.0), *CLEAN[1:])  # a clean model like the backdoored ones
    assert RandomForest(odd, BAD, trees=50).clean()[0] > 0.5
    kinds = Fading(Ancestral()), Fading(Deterministic())
    seen = Statistics(0.23, 64.0), Statistics(0.005, 25.0)
    found = dict(zip(kinds, seen, strict=True))
    verdict = judged(forest, found)
    assert verdict.outcome == "backdoored" and verdict.hypothesis == "ode"
    assert verdict.p_value == pytest.approx(1 / 9)


def test_a_forest_needs_models_of_both_kinds() -> None:
    with pytest.raises(ValueError, match="found 8 clean and 2 backdoored"):
        RandomForest(CLEAN, BAD[:2])
