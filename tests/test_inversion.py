"""Inversion: descent, candidates, projection, resumption, reinforcement."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_objectives import (
    ANCESTRAL,
    ATTACKS,
    DETERMINISTIC,
    EXPLODING,
    SCHEDULE,
    SHAPE,
    SOUGHT,
    channel_of,
    exact,
    oracle,
    over_solvers,
)

from puredif_jax.attacks.villandiffusion_ve import VillanDiffusionVE
from puredif_jax.defenses.descent import Descent, GradientDescent, NormKeeping
from puredif_jax.defenses.distribution_shift import DistributionShift
from puredif_jax.defenses.elijah import ElijahLoss
from puredif_jax.defenses.inversion import inverter, keep
from puredif_jax.defenses.reinforcement import Reinforcement
from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.diffusion.ddpm import DDPM
from puredif_jax.diffusion.path_keeping import PathKeeping
from puredif_jax.metrics import measures as metrics
from puredif_jax.types import Candidate

pytestmark = pytest.mark.usefixtures("standard_promotion")


def quadratic(params, candidate, key):
    del key
    return jnp.sum((candidate.delta - params) ** 2)


def run(made, params, steps: int, state=None):
    state = made.init(jax.random.key(0)) if state is None else state
    return jax.jit(
        lambda p, s: jax.lax.scan(lambda s, _: made.step(p, s), s, None, length=steps)
    )(params, state)


def test_candidates_start_with_both_signs_and_descend() -> None:
    made = inverter(quadratic, Descent(steps=200, candidates=4), (2, 2, 1))
    start = made.init(jax.random.key(0)).candidate.delta
    assert float(start[0].max()) <= 0 <= float(start[1].min())
    state, info = run(made, jnp.full((2, 2, 1), 0.5), 200)
    chex.assert_shape(info.loss, (200, 4))
    np.testing.assert_allclose(state.candidate.delta, 0.5, atol=1e-2)
    assert bool((info.loss[-1] < info.loss[0]).all())


def test_a_step_compiles_once() -> None:
    """Also from a start whose dtype is weak, as that of `jnp.full` is."""
    start = Candidate(jnp.full((2, 2, 1), -0.5), jnp.zeros((2, 2, 1)))
    made = inverter(quadratic, Descent(steps=3, candidates=2), (2, 2, 1), start)
    step = jax.jit(made.step)
    state = made.init(jax.random.key(0))
    for _ in range(3):
        state, _ = step(jnp.zeros((2, 2, 1)), state)
    assert step._cache_size() == 1


@pytest.mark.parametrize("bound", [0.25, None])
def test_bound_projects(bound) -> None:
    descent = Descent(steps=50, bound=bound, low=-0.1, high=0.0, cosine=False)
    made = inverter(quadratic, descent, (2, 2, 1))
    state, _ = run(made, jnp.full((2, 2, 1), 2.0), 50)
    largest = float(jnp.abs(state.candidate.delta).max())
    assert largest == 0.25 if bound else largest > 1


def test_resuming_in_the_middle_changes_nothing() -> None:
    def noisy(params, candidate, key):
        noise = jax.random.normal(key, candidate.delta.shape)
        return jnp.sum((candidate.delta - params - noise) ** 2)

    made = inverter(noisy, Descent(steps=6, candidates=2), (2, 2, 1))
    goal = jnp.zeros((2, 2, 1))
    whole, _ = run(made, goal, 6)
    half, _ = run(made, goal, 3)
    again, _ = run(made, goal, 3, half)
    as_arrays = lambda s: s.replace(key=jax.random.key_data(s.key))  # noqa: E731
    chex.assert_trees_all_equal(as_arrays(whole), as_arrays(again))


@pytest.mark.parametrize("chosen", [(1,), (2, 0)])
def test_the_best_scouts_go_on_as_they_were(chosen) -> None:
    """They end where they would have in company, optimiser and all."""
    made = inverter(quadratic, Descent(steps=10, candidates=3), (2, 2, 1))
    goal = jnp.full((2, 2, 1), 0.5)
    company, _ = run(made, goal, 10)
    halfway, _ = run(made, goal, 5)
    alone, info = run(made, goal, 5, keep(halfway, chosen))
    chex.assert_shape(info.loss, (5, len(chosen)))
    for found, wanted in enumerate(chosen):
        np.testing.assert_allclose(
            alone.candidate.delta[found], company.candidate.delta[wanted], rtol=1e-6
        )


@over_solvers
def test_default_loss_recovers_the_trigger_of_an_exact_model(solver) -> None:
    """From random starts, knowing only the kind of sampler."""
    model, points, truth = exact(ATTACKS[solver])
    objective = DistributionShift().bind(model, SCHEDULE, channel_of(solver))
    made = inverter(objective, Descent(steps=300), SHAPE)
    state, _ = run(made, points, 300)
    distance = metrics.trigger_distance(state.candidate.delta[0], truth.delta)
    assert float(distance.cosine) > 0.9
    assert float(metrics.mse(state.candidate.target, truth.target)[0]) < 1e-2


def test_elijah_recovers_an_ancestral_trigger_of_an_oracle() -> None:
    model, truth = oracle(ATTACKS[ANCESTRAL])
    objective = ElijahLoss(samples=100).bind(model, SCHEDULE, channel_of(ANCESTRAL))
    descent = Descent(steps=150, learning_rate=0.1, bound=None)
    state, _ = run(inverter(objective, descent, SHAPE), (), 150)
    distance = metrics.trigger_distance(state.candidate.delta[0], truth.delta)
    assert float(distance.cosine) > 0.95


def test_elijah_cannot_see_a_deterministic_trigger() -> None:
    """At T - 1 the response equals the shift: every delta has the loss of the noise."""
    model, truth = oracle(ATTACKS[DETERMINISTIC])
    elijah = ElijahLoss(scale=1.0, samples=100)
    loss = elijah.bind(model, SCHEDULE, channel_of(DETERMINISTIC))
    key = jax.random.key(0)
    wrong = Candidate(-truth.delta, truth.target)
    values = [float(loss((), c, key)) for c in (truth, wrong)]
    assert values[0] == pytest.approx(values[1], rel=0.1)


@pytest.mark.parametrize("attack", SOUGHT.values(), ids=lambda x: type(x).__name__)
def test_reinforcement_starts_at_the_true_trigger(attack) -> None:
    schedule = EXPLODING if isinstance(attack, VillanDiffusionVE) else SCHEDULE
    model, truth = oracle(attack, schedule)
    channel = attack.channel(schedule, SHAPE)
    reinforcement, solver = Reinforcement(), attack.solver
    loss = reinforcement.loss(solver).bind(model, schedule, channel)
    made = inverter(loss, reinforcement.descent, SHAPE, truth)
    state = made.init(jax.random.key(0))
    np.testing.assert_array_equal(state.candidate.delta[0], truth.delta)
    after, info = made.step((), state)
    assert np.isfinite(np.asarray(info.loss)).all()
    np.testing.assert_array_equal(after.candidate.target[0], truth.target)


def test_reinforcement_rolls_out_the_sampling_of_the_backdoor() -> None:
    reinforcement = Reinforcement(descent=Descent(steps=7))
    assert isinstance(reinforcement.loss(ANCESTRAL).sampler, PathKeeping)
    assert isinstance(reinforcement.loss(DETERMINISTIC).sampler, DDIM)
    assert reinforcement.evaluations(ANCESTRAL) == 3 * 7 * 10 * 16
    assert reinforcement.evaluations(DETERMINISTIC) == 3 * 7 * 10 * 16
    half = reinforcement.loss(ANCESTRAL, psi=0.5).sampler
    assert half == PathKeeping(10, psi=0.5)
    assert reinforcement.loss(DETERMINISTIC, psi=0.5).sampler == DDIM(10)
    whole = dataclasses.replace(reinforcement.ancestral, sampler=DDPM(9))
    strided = Reinforcement(ancestral=whole)
    assert strided.loss(ANCESTRAL, psi=0.5).sampler == DDPM(9)


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0},
        {"candidates": 0},
        {"learning_rate": 0.0},
        {"bound": -1.0},
        {"steps": 9, "scout": 9},
        {"finalists": 0},
        {"low": 0.5, "high": 0.5},
        {"momentum": 1.0},
        {"clip": 0.0},
    ],
)
def test_bad_settings_are_named(bad) -> None:
    with pytest.raises(ValueError, match="found"):
        GradientDescent(**bad)


def test_gradient_descent_equals_its_formula() -> None:
    """Each candidate's gradient is cut by itself; the rate ends at 0."""
    descent = GradientDescent(
        steps=4, candidates=2, learning_rate=0.3, bound=None, momentum=0.5, clip=2.0
    )
    made = inverter(quadratic, descent, (2, 2, 1))
    state = made.init(jax.random.key(0))
    wanted = np.asarray(state.candidate.delta, np.float64)
    velocity = 0 * wanted
    for step in range(4):
        slope = 2 * (wanted - 0.5)
        norm = np.sqrt((slope**2).sum((1, 2, 3), keepdims=True))
        assert step or sorted((norm > 2).ravel()) == [False, True]
        velocity = 0.5 * velocity + slope * np.minimum(1, 2 / norm)
        wanted -= 0.3 * (1 + np.cos(np.pi * step / 4)) / 2 * velocity
    state, _ = run(made, jnp.full((2, 2, 1), 0.5), 4, state)
    np.testing.assert_allclose(state.candidate.delta, wanted, rtol=1e-5)


def test_a_descent_that_keeps_the_norm_takes_the_steps_of_adam() -> None:
    """Each trigger's norm is its own, and Adam's direction is only scaled."""
    kept = NormKeeping(steps=5, candidates=3, learning_rate=0.1)
    plain = Descent(**vars(kept))
    made, free = (inverter(quadratic, each, (2, 2, 1)) for each in (kept, plain))
    begin = made.init(jax.random.key(1))
    target = jnp.full((2, 2, 1), 0.5)
    once, _ = made.step(target, begin)
    by_adam, _ = free.step(target, free.init(jax.random.key(1)))

    def norm(state) -> np.ndarray:
        return np.linalg.norm(np.asarray(state.candidate.delta).reshape(3, -1), axis=1)

    scale = (norm(begin) / norm(by_adam))[:, None, None, None]
    wanted = np.asarray(by_adam.candidate.delta) * scale
    np.testing.assert_allclose(once.candidate.delta, wanted, rtol=1e-5)
    state, _ = run(made, target, 5, begin)
    np.testing.assert_allclose(norm(state), norm(begin), rtol=1e-5)
    assert np.abs(norm(begin) - norm(by_adam)).min() > 1e-3
    with pytest.raises(ValueError, match="has bound=none, found 1"):
        NormKeeping(bound=1.0)


@pytest.mark.parametrize(
    "descent", [Descent(candidates=2), Descent(steps=9, scout=3)], ids=["two", "scout"]
)
def test_reinforcement_has_one_candidate_from_the_start(descent) -> None:
    with pytest.raises(ValueError, match="candidates=1 and scout=0, found"):
        Reinforcement(descent=descent)
