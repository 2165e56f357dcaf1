"""The family of channels, and the loss that is minimised over it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puredif_jax.attacks.baddiffusion import BadDiffusion
from puredif_jax.attacks.base import Attack
from puredif_jax.attacks.channel import Channel
from puredif_jax.attacks.exact import ExactDenoiser, Points
from puredif_jax.attacks.targets import Hat
from puredif_jax.attacks.triggers import Blend, Patch, StopSign
from puredif_jax.attacks.trojdiff import TrojDiff
from puredif_jax.attacks.villandiffusion import VillanDiffusion
from puredif_jax.data import images as data
from puredif_jax.defenses.denoising_error import DenoisingError
from puredif_jax.defenses.descent import Descent
from puredif_jax.defenses.family import Family
from puredif_jax.defenses.hypothesis import Fading, Trojan
from puredif_jax.defenses.inversion import inverter
from puredif_jax.defenses.path_errors import (
    LEAST,
    TIMESTEPS,
    errors,
    levels,
    single_image,
)
from puredif_jax.diffusion.schedules import LinearBetas, ScaledLinearBetas
from puredif_jax.diffusion.solver import Ancestral, Deterministic
from puredif_jax.types import Candidate, Member

pytestmark = pytest.mark.usefixtures("standard_promotion")
SCHEDULE = LinearBetas().tables()
SHAPE = (16, 16, 1)
S, V = SCHEDULE.signal, SCHEDULE.noise


def member(psi: float, gamma: float = 1.0) -> Member:
    return Member(jnp.float32(psi), jnp.full(SHAPE, gamma))


def candidate(seed: int, psi: float, gamma: float = 1.0) -> Candidate:
    delta, target = np.random.default_rng(seed).uniform(-1, 1, (2, *SHAPE))
    return Candidate(jnp.float32(delta), jnp.float32(target), member(psi, gamma))


@pytest.mark.parametrize("psi", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("solver", [Ancestral(), Deterministic()], ids=lambda x: x.name)
def test_a_member_has_the_channel_that_villandiffusion_trains(psi, solver) -> None:
    family = Fading(solver).family(SCHEDULE, SHAPE)
    found = family.at(candidate(0, psi))
    attack = VillanDiffusion(StopSign(), Hat(), psi=psi, solver=solver)
    known = attack.channel(SCHEDULE, SHAPE)
    np.testing.assert_allclose(found.shift, known.shift, atol=1e-6)
    np.testing.assert_allclose(found.response, known.response, atol=1e-6)
    np.testing.assert_array_equal(found.gamma, np.ones(SHAPE))


def test_a_member_has_the_channel_that_trojdiff_trains() -> None:
    found = Trojan().family(SCHEDULE, SHAPE).at(candidate(0, 1.0, 0.6))
    known = TrojDiff(Blend(0.6), Hat()).channel(SCHEDULE, SHAPE)
    np.testing.assert_allclose(found.shift, known.shift, atol=1e-6)
    assert not np.any(found.response)
    np.testing.assert_allclose(found.gamma, known.gamma, atol=1e-6)


def test_a_search_begins_where_the_family_says_and_stays_in_it() -> None:
    fading, trojan = (kind.family(SCHEDULE, SHAPE) for kind in (Fading(), Trojan()))
    first = fading.first(SHAPE)
    assert float(first.psi) == 1 and np.all(np.asarray(first.gamma) == 1)
    starts = [float(fading.first(SHAPE, i).psi) for i in range(7)]
    assert starts == [1.0, 1.0, 0.5, 0.5, 0.0, 0.0, 1.0]
    away = dataclasses.replace(candidate(0, 2.0, 3.0))
    for family, psi, gamma in ((fading, 1.0, 1.0), (trojan, 1.0, 1.0)):
        kept = family.within(away).member
        assert float(kept.psi) == psi and np.all(np.asarray(kept.gamma) == gamma)
    low = trojan.within(candidate(0, 0.5, -1.0)).member
    assert np.all(np.asarray(low.gamma) == np.float32(0.05))
    unnamed = Candidate(away.delta, away.target)
    assert fading.within(unnamed) is unnamed
    np.testing.assert_allclose(fading.at(unnamed).shift, 1 - S, atol=1e-6)


def test_the_family_of_one_channel_is_that_channel() -> None:
    known = Fading().channel(SCHEDULE, SHAPE)
    family = Family.only(known)
    for psi in (0.0, 1.0):
        found = family.at(family.within(candidate(0, psi, 0.2)))
        np.testing.assert_allclose(found.shift, known.shift, atol=1e-6)
        np.testing.assert_allclose(found.response, known.response, atol=1e-6)
        assert np.all(np.asarray(found.gamma) == 1)


def test_the_family_of_a_channel_with_an_image_of_gamma_keeps_it() -> None:
    """As a hypothesis of a user may have it: a patch."""
    known = TrojDiff(Patch(), Hat()).channel(SCHEDULE, SHAPE)
    family = Family.only(known)
    first = family.first(SHAPE)
    np.testing.assert_allclose(first.gamma, known.gamma, rtol=1e-6)
    kept = family.within(candidate(0, 0.3, 0.7))
    np.testing.assert_allclose(family.at(kept).gamma, known.gamma, rtol=1e-6)


# --- the loss -------------------------------------------------------------------------


def linear(variance: float):
    """The best linear denoiser of images of mean 0."""

    def model(params, x, t):
        s, v = (jnp.float32(a)[t].reshape(-1, 1, 1, 1) for a in (S, V))
        return v / (s**2 * variance + v**2) * x

    return model


@pytest.mark.parametrize("kind", [Fading(Ancestral()), Fading(), Trojan()])
def test_the_loss_equals_its_formula(kind) -> None:
    """In float64, on a linear model, whose answer is known."""
    psi, gamma = (0.3, 1.0) if isinstance(kind, Fading) else (0.0, 0.6)
    found = candidate(1, psi, gamma)
    family = kind.family(SCHEDULE, SHAPE)
    key, times, n, k = jax.random.key(2), (900, 400), 3, 0.25
    loss = DenoisingError(times, samples=n, variance=k, floor=0.02)
    got = loss.bind(linear(0.5), SCHEDULE, family)((), found, key)
    eps = np.asarray(jax.random.normal(key, (n, 2, *SHAPE)), np.float64)
    here = family.at(found)
    delta, y = (np.asarray(x, np.float64) for x in (found.delta, found.target))
    want = []
    for i, t in enumerate(times):
        h, c = float(here.shift[t]), float(here.response[t])
        x = S[t] * y + V[t] * gamma * eps[:, i] + h * delta
        answer = V[t] / (S[t] ** 2 * 0.5 + V[t] ** 2) * x
        error = np.sum((answer - eps[:, i] - c * delta) ** 2) / n
        slope = V[t] / (S[t] ** 2 * k + V[t] ** 2)
        clean = (slope * h - c) ** 2 * np.sum(delta**2)
        clean += delta.size * (1 - slope * V[t] * gamma) ** 2
        want.append(np.log(error + 0.02) - kind.power * np.log(clean + 0.02))
    assert float(got) == pytest.approx(np.mean(want), rel=1e-4)


def test_a_clean_model_does_not_gain_by_a_small_trigger() -> None:
    """Of an error alone, delta = 0 would be best: over a linear one's, it is not."""
    loss = DenoisingError(samples=16, variance=0.5)
    family = Fading(Deterministic()).family(SCHEDULE, SHAPE)
    objective = loss.bind(linear(0.5), SCHEDULE, family)
    whole = dataclasses.replace(candidate(3, 1.0), target=jnp.zeros(SHAPE))
    small = dataclasses.replace(whole, delta=0.01 * whole.delta)
    large, little = (float(objective((), x, jax.random.key(0))) for x in (whole, small))
    assert abs(large) < 0.1 and abs(little) < 0.1


def test_the_noise_does_not_favour_large_triggers() -> None:
    """The loss of a trigger is at its least where it is the true one, also a weak one.

    The mean over few samples would have a variance that a larger trigger divides.
    """
    attack = VillanDiffusion(StopSign(), Hat())
    trigger, target, _ = attack.images(SHAPE)
    weak = 0.3 * trigger
    points = Points(garments(64), jnp.asarray(weak), jnp.asarray(target))
    model = ExactDenoiser(SCHEDULE, attack.channel(SCHEDULE, SHAPE), 0.1)
    family = Fading().family(SCHEDULE, SHAPE)
    objective = jax.jit(DenoisingError(samples=8).bind(model, SCHEDULE, family))
    found = [
        float(
            objective(
                points,
                Candidate(jnp.asarray(k * weak), jnp.asarray(target), member(1.0)),
                jax.random.key(0),
            )
        )
        for k in (0.5, 0.8, 1.0, 1.25, 2.0)
    ]
    assert np.argmin(found) == 2


def test_refuses_what_it_cannot_use() -> None:
    for wrong in ({"variance": 0.0}, {"floor": 0.0}, {"samples": 0}):
        with pytest.raises(ValueError, match="found"):
            DenoisingError(**wrong)


# --- from exact denoisers -------------------------------------------------------------


def garments(count: int) -> jax.Array:
    return jnp.asarray(data.to_float(data.FashionMNIST(count=count).load(SHAPE)))


ROWS: dict[str, tuple[Attack, Fading | Trojan, float]] = {
    "bad": (BadDiffusion(StopSign(), Hat()), Fading(Ancestral()), 1.0),
    **{
        f"{solver.name} {psi}": (
            VillanDiffusion(StopSign(), Hat(), psi=psi, solver=solver),
            Fading(solver),
            psi,
        )
        for solver in (Ancestral(), Deterministic())
        for psi in (1.0, 0.5, 0.0)
    },
    "blend": (TrojDiff(Blend(0.6), Hat()), Trojan(), 1.0),
}


@pytest.mark.parametrize("row", ROWS)
def test_the_right_hypothesis_finds_every_row(row: str) -> None:
    """From random starts: the trigger, its channel, and no clean explanation."""
    attack, kind, psi = ROWS[row]
    trigger, target, _ = attack.images(SHAPE)
    points = Points(garments(200), jnp.asarray(trigger), jnp.asarray(target))
    model = ExactDenoiser(SCHEDULE, attack.channel(SCHEDULE, SHAPE), 0.1)
    family = kind.family(SCHEDULE, SHAPE)
    loss = DenoisingError().bind(model, SCHEDULE, family)
    descent = Descent(steps=100, candidates=12, scales=(1, 1, 1, 0.1, 0.1, 0.1))
    init, step = inverter(loss, descent, SHAPE, family=family)
    state = init(jax.random.key(0))
    state, info = jax.jit(
        lambda points, state: jax.lax.scan(
            lambda state, _: step(points, state), state, length=descent.steps
        )
    )(points, state)
    best = int(np.argmin(np.asarray(info.loss)[-10:].mean(0)))
    found = jax.tree.map(lambda x: x[best], state.candidate)
    cosine = np.vdot(found.delta, trigger) / np.sqrt(
        np.vdot(found.delta, found.delta) * np.vdot(trigger, trigger)
    )
    assert cosine > 0.95
    if isinstance(kind, Fading):
        assert float(found.member.psi) == pytest.approx(psi, abs=0.05)
    else:
        assert np.mean(found.member.gamma) == pytest.approx(0.6, abs=0.02)
    here = family.at(found)
    key = jax.random.key(1)
    plain = points.images[:32]
    seen = errors(model, points, SCHEDULE, here, found, plain, False, key, draws=32)
    assert np.exp(np.log(np.sort(np.asarray(seen.ratios))[:3]).mean()) < 0.3


def test_one_image_explains_what_has_one_image() -> None:
    """And of two, the error is that of the best image between them."""
    rng = np.random.default_rng(0)
    a, b = rng.uniform(-1, 1, (2, *SHAPE)).astype(np.float32)
    seen, weight = jnp.stack([a, a, a]), jnp.asarray([1.0, 2.0, 4.0])
    spread = jnp.asarray([0.1, 0.0, 0.2])
    floor, all_three = jnp.float32(0.05), np.ones(3, bool)
    found = single_image(seen, spread, weight, floor, all_three)
    np.testing.assert_allclose(found, weight * spread, atol=1e-4)
    seen, counted = jnp.stack([a, a, b]), all_three
    found = single_image(seen, jnp.zeros(3), jnp.ones(3), floor, counted)
    far = np.sum((a - b) ** 2)
    np.testing.assert_allclose(found, [0, 0, far], rtol=0.05, atol=0.2)


def test_a_level_that_is_there_twice_counts_once() -> None:
    """A schedule that ends early has its last timestep for several levels."""
    np.testing.assert_array_equal(
        levels(np.array([9, 9, 9, 5, 2, 5])), [1, 0, 0, 1, 1, 0]
    )
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (3, *SHAPE)).astype(np.float32)
    few = [jnp.asarray(x) for x in (images, [0.1, 0.2, 0.3], [1.0, 4.0, 9.0])]
    more = [x[jnp.array([0, 0, 0, 0, 1, 2])] for x in few]
    floor = jnp.float32(0.15)
    once = single_image(*few, floor, np.ones(3, bool))
    found = single_image(*more, floor, levels(np.array([9, 9, 9, 9, 5, 2])))
    np.testing.assert_allclose(found[3:], once, rtol=1e-3)
    every = single_image(*more, floor, np.ones(6, bool))
    assert not np.allclose(every[3:], once, rtol=0.1), "the first one would decide"


def test_a_schedule_that_ends_early_has_the_same_floor() -> None:
    """At its end even an exact denoiser errs without the trigger, not with it."""
    attack = BadDiffusion(StopSign(), Hat())
    schedule = ScaledLinearBetas().tables()
    trigger, target, _ = attack.images(SHAPE)
    channel = attack.channel(schedule, SHAPE)
    images = garments(100)
    points = Points(images, jnp.asarray(trigger), jnp.asarray(target))
    model = ExactDenoiser(schedule, channel, 0.1)
    found = Candidate(points.trigger, points.target, member(0.0))
    key = jax.random.key(0)
    seen = errors(model, points, schedule, channel, found, images, False, key, draws=16)
    assert seen.untriggered[:3].min() > 1.5 * LEAST
    assert float(seen.floor) == pytest.approx(LEAST)


def test_a_clean_model_of_few_images_explains_its_path() -> None:
    """Its pseudo-backdoor is one of its images, under noise of another mean."""
    few = garments(8)
    points = Points(few, jnp.zeros(SHAPE), jnp.zeros(SHAPE))
    model = ExactDenoiser(SCHEDULE, Channel.clean(SCHEDULE))
    z = few[0]
    delta = 2.0 * (z - few.mean(0))
    times = jnp.asarray(SCHEDULE.matched((500,)))
    here = Fading().family(SCHEDULE, SHAPE).at(Candidate(delta, z, member(0.06)))
    drift = float(((here.shift - V * here.response) / S)[times[0]])
    found = Candidate(delta, z - drift * delta, member(0.06))
    key = jax.random.key(1)
    seen = errors(model, points, SCHEDULE, here, found, few, False, key, draws=32)
    middle = TIMESTEPS.index(500)
    known = np.asarray(seen.triggered)[middle] / np.asarray(seen.untriggered)[middle]
    assert known < 0.5, "it looks like a backdoor"
    assert np.asarray(seen.ratios)[middle] > 0.8
