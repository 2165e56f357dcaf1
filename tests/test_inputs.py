"""Tests of starting noise, against closed forms and their own false alarms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from test_objectives import ATTACKS, EXPLODING, SCHEDULE, SHAPE, exact, oracle

from puredif_jax.defenses.inputs import (
    Drift,
    InputTest,
    Likelihood,
    Suspect,
    Whiteness,
    deviations,
    p_values,
)
from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.diffusion.path_keeping import PathKeeping
from puredif_jax.diffusion.solver import Ancestral
from puredif_jax.metrics.measures import auc

pytestmark = pytest.mark.usefixtures("standard_promotion")
TESTS: list[InputTest] = [
    Likelihood(),
    Whiteness(),
    Drift(),
    Drift(PathKeeping(steps=20)),
]
KEY = jax.random.key(0)


def plain(count: int, seed: int = 1) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (count, *SHAPE))


def suspected(delta, gamma=1.0, schedule=SCHEDULE) -> Suspect:
    model = lambda params, x, t: 0.9 * x  # noqa: E731
    return Suspect(model, (), schedule, jnp.asarray(delta), jnp.asarray(gamma))


@pytest.mark.parametrize("gamma", [1.0, np.linspace(0.1, 0.9, 256).reshape(SHAPE)])
def test_likelihood_is_the_ratio_of_two_densities(gamma) -> None:
    rng = np.random.default_rng(0)
    delta = rng.uniform(-1, 1, SHAPE)
    z = np.asarray(plain(5), np.float64)
    found = Likelihood()(suspected(delta, gamma), jnp.asarray(z), KEY)
    wanted = stats.norm(delta, gamma).logpdf(z) - stats.norm(0, 1).logpdf(z)
    np.testing.assert_allclose(found, wanted.sum((1, 2, 3)), rtol=1e-4)


def test_likelihood_knows_the_unit_of_an_exploding_process() -> None:
    """sigma_max (eps + r): r is in deviations of the noise there."""
    delta = 0.3 * jnp.ones(SHAPE)
    suspect = suspected(delta, schedule=EXPLODING)
    np.testing.assert_allclose(suspect.mean, 0.3, rtol=1e-6)
    eps = plain(3)
    x = EXPLODING.start(eps, delta[None])
    np.testing.assert_allclose(deviations(EXPLODING, x), eps + 0.3, rtol=1e-4)


def test_whiteness_is_the_least_of_its_scores() -> None:
    """One square that is too bright: sum / side, of so many; each channel twice."""
    z = np.array(plain(1), np.float64)
    z[0, 8:12, 4:8, 0] += 2.0
    mean = z[0, 8:12, 4:8].sum() / 4
    kinds = 3 + 2 * 5  # energy, two neighbours, squares of 1 to 16 pixels
    wanted = -stats.norm.logsf(mean) - np.log(2 * 16) - np.log(kinds)
    found = float(Whiteness()(suspected(jnp.zeros(SHAPE)), jnp.asarray(z), KEY)[0])
    assert mean > 5 and found == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("scale", [0.7, 1.4])
def test_whiteness_sees_too_much_energy_and_too_little(scale: float) -> None:
    suspect, test = suspected(jnp.zeros(SHAPE)), Whiteness()
    found = test(suspect, scale * plain(50), KEY)
    assert float(jnp.median(found)) > -np.log(1e-3)


def test_whiteness_has_no_more_false_alarms_than_it_says() -> None:
    found = np.asarray(Whiteness()(suspected(jnp.zeros(SHAPE)), plain(4000), KEY))
    for level in (0.1, 0.01):
        share = np.mean(np.exp(-found) < level)
        assert 0.3 * level < share < level + 3 * (level / 4000) ** 0.5


@pytest.mark.parametrize("solver", ATTACKS, ids=lambda x: x.name)
def test_every_test_sees_a_triggered_start(solver) -> None:
    """Of an exact denoiser's own backdoor; plain noise of another key is plain."""
    model, points, truth = exact(ATTACKS[solver])
    suspect = Suspect(model, points, SCHEDULE, truth.delta, jnp.ones(()))
    own = solver.pick(PathKeeping(steps=20), DDIM(steps=20))
    for test in (Likelihood(), Whiteness(), Drift(own)):
        statistic = jax.jit(lambda z, test=test: test(suspect, z, KEY))
        triggered = statistic(plain(64, 2) + truth.delta[None])
        assert triggered.shape == (64,)
        assert auc(triggered, statistic(plain(64, 3))) > 0.95, test.name
        assert 0.35 < auc(statistic(plain(64, 4)), statistic(plain(64, 3))) < 0.65


ALONE: list[InputTest] = [Likelihood(), Whiteness(), Drift()]


@pytest.mark.parametrize("test", ALONE, ids=lambda x: x.name)
def test_a_statistic_is_of_each_start_alone(test: InputTest) -> None:
    """Whatever stands beside it, where the sampling adds no noise of its own."""
    model, truth = oracle(ATTACKS[Ancestral()])
    suspect = Suspect(model, (), SCHEDULE, truth.delta, jnp.ones(()))
    z = plain(6)
    whole = test(suspect, z, KEY)
    np.testing.assert_allclose(test(suspect, z[2:4], KEY), whole[2:4], rtol=1e-3)


def test_p_values_are_ranks_among_plain_starts() -> None:
    ranked = np.arange(99.0)
    found = p_values(np.array([1e9, 98.0, 97.5, -1.0, np.nan]), ranked)
    np.testing.assert_allclose(found, [0.01, 0.02, 0.02, 1.0, 0.01])


def test_p_values_of_plain_starts_are_uniform() -> None:
    rng = np.random.default_rng(0)
    found = [p_values(rng.normal(size=1), rng.normal(size=19))[0] for _ in range(4000)]
    counts = np.bincount(np.round(np.array(found) * 20).astype(int))[1:]
    assert counts.shape == (20,) and abs(counts - 200).max() < 60
