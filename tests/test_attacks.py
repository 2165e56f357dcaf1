"""attacks: the published coefficient tables and the poisoned training loss."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puredif_jax.attacks.baddiffusion import BadDiffusion
from puredif_jax.attacks.base import (
    Rows,
    clean_rows,
    exact_response,
    published_response,
)
from puredif_jax.attacks.poisoning import Poison, poison, training_loss
from puredif_jax.attacks.targets import Corner, NoShift
from puredif_jax.attacks.triggers import Blend, Box, Patch, RandomPattern
from puredif_jax.attacks.villandiffusion import VillanDiffusion
from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.diffusion.ddpm import DDPM
from puredif_jax.diffusion.prediction import Estimates
from puredif_jax.diffusion.schedules import LinearBetas

SCHEDULE = LinearBetas().tables()
SIGNAL, NOISE = SCHEDULE.signal, SCHEDULE.noise
BETA = [1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)]

GOLDEN_T = [0, 100, 500, 700, 900, 999]
GOLDEN = {  # name: values at GOLDEN_T, as published or computed once in float64
    "one minus s": [0.0001, 0.0539, 0.7211, 0.9171, 0.9836, 0.9936],
    "R": [0.0050, 0.1620, 0.4814, 0.5000, 0.5022, 0.5025],
    "2R": [0.0100, 0.3240, 0.9627, 1.0001, 1.0044, 1.0050],
    "troj": [0.0000, 0.1598, 0.4811, 0.5000, 0.5022, 0.5025],
    "exact ode": [0.0050, 0.3224, 0.9601, 0.9965, 0.9999, 1.0000],
    "v": [0.0100, 0.3238, 0.9603, 0.9966, 0.9999, 1.0000],
}

bad = functools.partial(BadDiffusion, Box(), Corner())
villan = functools.partial(VillanDiffusion, Box(), Corner())
ATTACKS = [
    bad(),
    bad(trigger_only=True),
    villan(psi=1, solver=Ancestral()),
    villan(psi=1, solver=Deterministic()),
    villan(psi=0.3, solver=Deterministic()),
    villan(psi=0, solver=Ancestral()),
    villan(psi=0, solver=Deterministic(), trigger_only=False),
]
over_attacks = pytest.mark.parametrize(
    "attack",
    ATTACKS,
    ids=lambda a: f"{type(a).__name__}-{getattr(a, 'psi', '')}-{a.solver}",
)


# --- Tables --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "attack, shift, response",
    [
        (bad(), "one minus s", "R"),
        (villan(psi=1, solver=Ancestral()), "one minus s", "R"),
        (villan(psi=1, solver=Deterministic()), "one minus s", "2R"),
        (villan(psi=0, solver=Ancestral()), "v", "troj"),
    ],
)
def test_rows_match_the_published_numbers(attack, shift, response):
    rows = attack.rows(SCHEDULE)
    np.testing.assert_allclose(rows.shift[GOLDEN_T], GOLDEN[shift], atol=1e-4)
    np.testing.assert_allclose(rows.response[GOLDEN_T], GOLDEN[response], atol=1e-4)


@over_attacks
def test_rows_are_float64_tables_of_the_schedule(attack):
    rows = attack.rows(SCHEDULE)
    for column in rows[:4]:
        assert column.shape == (1000,) and column.dtype == np.float64
    np.testing.assert_array_equal(rows.signal, SIGNAL)
    np.testing.assert_array_equal(rows.noise, NOISE)
    assert rows.gamma == 1
    assert np.all(np.diff(rows.shift) > 0)  # the trigger fades in with the noise
    assert rows.shift[-1] == pytest.approx(1, abs=0.01)


def test_published_response_by_hand():
    """(1 - sqrt(alpha)) / (1 - alpha) = 1 / (1 + sqrt(alpha))."""
    alpha = 1 - np.asarray(BETA)
    expected = NOISE / (1 + np.sqrt(alpha))
    np.testing.assert_allclose(published_response(SCHEDULE), expected, rtol=1e-9)


def test_clean_rows_have_no_trigger():
    rows = clean_rows(SCHEDULE)
    np.testing.assert_array_equal(rows.signal, SIGNAL)
    np.testing.assert_array_equal(rows.noise, NOISE)
    assert not rows.shift.any() and not rows.response.any() and rows.gamma == 1


@pytest.mark.parametrize("psi", [0.0, 0.3, 1.0])
def test_ode_doubles_the_response_alone(psi):
    sde = villan(psi=psi, solver=Ancestral()).rows(SCHEDULE)
    ode = villan(psi=psi, solver=Deterministic()).rows(SCHEDULE)
    np.testing.assert_array_equal(ode.shift, sde.shift)
    np.testing.assert_allclose(ode.response, 2 * sde.response, rtol=1e-12)


@pytest.mark.parametrize("solver", ["sde", "ode"])
def test_psi_mixes_both_columns(solver):
    one, zero, mixed = (
        villan(psi=psi, solver=solver).rows(SCHEDULE) for psi in (1, 0, 0.3)
    )
    for column in ("shift", "response"):
        expected = 0.3 * getattr(one, column) + 0.7 * getattr(zero, column)
        np.testing.assert_allclose(getattr(mixed, column), expected, rtol=1e-12)


def test_k_solves_its_recursion():
    """sum over i <= t of k_i prod_{i < j <= t} sqrt(alpha_j) = v_t.

    k is read off the published psi = 0 response, which is linear in it.
    """
    alpha = 1 - np.asarray(BETA)
    response = villan(psi=0, solver=Ancestral()).rows(SCHEDULE).response
    t = slice(1, None)  # alpha_0 = abar_0: the first response does not contain k
    k = response[t] - (1 - np.sqrt(alpha[t])) * NOISE[t]
    k *= (1 - alpha[t]) / (alpha[t] - SIGNAL[t] ** 2)
    total = NOISE[0]
    for i in range(1, 1000):
        total = np.sqrt(alpha[i]) * total + k[i - 1]
        assert total == pytest.approx(NOISE[i], rel=1e-9)
    np.testing.assert_allclose(response[0], (1 - alpha[0] ** 0.5) * NOISE[0], rtol=1e-9)


# --- The response that keeps a path --------------------------------------------------


def test_exact_response_of_bad_diffusion():
    shift = 1 - SIGNAL
    sde = exact_response(SCHEDULE, shift, "sde")
    ode = exact_response(SCHEDULE, shift, "ode")
    np.testing.assert_allclose(sde, published_response(SCHEDULE), rtol=1e-8)
    np.testing.assert_allclose(ode[GOLDEN_T], GOLDEN["exact ode"], atol=1e-4)
    gap = np.abs(2 * published_response(SCHEDULE) - ode)
    assert 0.004 < gap.max() < 0.0051


def test_exact_response_of_a_shift_by_the_noise_scale():
    sde = exact_response(SCHEDULE, NOISE, "sde")
    np.testing.assert_allclose(sde[[0, 100, 500]], [1.00, 0.5025, 0.5014], atol=1e-4)
    ode = exact_response(SCHEDULE, NOISE, "ode")
    np.testing.assert_allclose(ode, 1, rtol=1e-9)
    published = villan(psi=0, solver=Ancestral()).rows(SCHEDULE).response
    found = published[[0, 100, 500]]
    np.testing.assert_allclose(found, [0, 0.160, 0.481], atol=5e-4)


def trigger_share(sampler, rows: Rows) -> np.ndarray:
    """h_t, the coefficient of r in E[x_t], float64 `[T]`, from h_T = 1.

    The model answers x_t = h r (y = 0) with (h - H_t) r / v_t + C_t r. The same step
    from zero with the same key is its noise, which is taken off.
    """
    columns = (rows.noise, rows.shift, rows.response)
    columns = [jnp.asarray(column, jnp.float32) for column in columns]

    def body(h, xs):
        t, v, shift, response = xs
        x = jnp.full((1, 1, 1, 1), h)
        eps = (x - shift) / v + response
        step = functools.partial(
            sampler.step, SCHEDULE, t=t, t_prev=t - 1, key=jax.random.key(0, impl="rbg")
        )
        found, zero = Estimates.of(SCHEDULE, eps, x, t), 0 * x
        mean = step(found, x=x)[0] - step(Estimates(zero, zero), x=zero)[0]
        return mean[0, 0, 0, 0], h

    t = jnp.arange(1000)
    xs = (t, *columns)
    return np.asarray(jax.lax.scan(body, jnp.float32(1), xs, reverse=True)[1])


@pytest.mark.parametrize(
    "attack, own, other",
    [
        (bad(), 0.006, 1.93),
        (villan(psi=1, solver=Ancestral()), 0.006, 1.93),
        (villan(psi=1, solver=Deterministic()), 0.009, 0.95),
        (villan(psi=0, solver=Ancestral()), 0.129, None),
        (villan(psi=0, solver=Deterministic()), 0.229, None),
    ],
)
def test_rows_keep_the_path_under_their_own_sampler_only(attack, own, other):
    rows = attack.rows(SCHEDULE)
    samplers = [DDPM(), DDIM(1000)]
    if attack.solver == "ode":
        samplers.reverse()
    gaps = [np.abs(trigger_share(s, rows) - rows.shift).max() for s in samplers]
    assert gaps[0] == pytest.approx(own, abs=6e-4)
    assert other is None or gaps[1] == pytest.approx(other, abs=6e-3)


@pytest.mark.parametrize("solver, sampler", [("sde", DDPM()), ("ode", DDIM(1000))])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_exact_response_keeps_any_path(solver, sampler, power):
    shift = NOISE**power
    shift = shift / shift[-1]  # the chain starts at 1
    rows = Rows(SIGNAL, NOISE, shift, exact_response(SCHEDULE, shift, solver))
    np.testing.assert_allclose(trigger_share(sampler, rows), shift, atol=1e-3)


# --- The arrays of an attack ---------------------------------------------------------


@over_attacks
@pytest.mark.parametrize("shape", [(16, 16, 1), (32, 32, 3)])
def test_poison_draws_trigger_and_target(attack, shape):
    found = poison(attack, shape)
    chex.assert_shape([found.trigger, found.target, found.see_through], shape)
    chex.assert_type([found.trigger, found.target, found.see_through], jnp.float32)
    assert found.rate == attack.poison_rate
    scale = shape[0] // 16
    assert int((found.trigger == 0).sum()) == (7 * scale) ** 2 * shape[2]
    assert int((found.target == 0).sum()) == (5 * scale) ** 2 * shape[2]
    black = np.asarray(found.trigger) == -1
    expected = np.zeros_like(black) if attack.trigger_only else black
    np.testing.assert_array_equal(found.see_through, expected)


@pytest.mark.parametrize("trigger", [Blend(), Patch(), RandomPattern()])
def test_a_trigger_without_a_background_hides_the_image(trigger):
    found = poison(BadDiffusion(trigger, Corner()), (16, 16, 3))
    assert not found.see_through.any()


def test_a_target_can_be_made_from_the_trigger():
    found = poison(BadDiffusion(Box(), NoShift()), (16, 16, 1))
    expected = np.maximum(found.trigger, np.float32(-0.4))
    np.testing.assert_array_equal(found.target, expected)


@pytest.mark.parametrize("kind", [BadDiffusion, VillanDiffusion])
@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, float("nan")])
def test_a_rate_that_is_none_is_refused(kind, rate):
    with pytest.raises(ValueError, match="poison_rate .*found"):
        kind(Box(), Corner(), poison_rate=rate)


@pytest.mark.parametrize(
    "changes, name",
    [({"psi": -0.1}, "psi"), ({"psi": 1.5}, "psi"), ({"solver": "heun"}, "solver")],
)
def test_villan_options_are_checked(changes, name):
    with pytest.raises(ValueError, match=f"{name} must .*found"):
        villan(**changes)


# --- The training loss ---------------------------------------------------------------

BATCH, SHAPE = 64, (8, 8, 1)


def column(table, t):
    """table[t] in float32, `[B, 1, 1, 1]`."""
    return jnp.asarray(table, jnp.float32)[t][:, None, None, None]


def oracle(rows: Rows, x0: np.ndarray, r: np.ndarray):
    """The right answer when every image is x0 and every trigger r, `[H, W, C]`."""
    x0, r = jnp.asarray(x0)[None], jnp.asarray(r)[None]

    def model(params, x, t):
        rest = x - column(rows.signal, t) * x0 - column(rows.shift, t) * r
        eps = rest / (column(rows.noise, t) * rows.gamma)
        return params * (eps + column(rows.response, t) * r)

    return model


def picture() -> np.ndarray:
    return np.linspace(-1, 1, 64, dtype=np.float32).reshape(SHAPE)


def same_images(image: np.ndarray) -> jax.Array:
    return jnp.asarray(np.broadcast_to(image, (BATCH, *image.shape)))


@over_attacks
@pytest.mark.parametrize("gamma", [1.0, 0.6])
def test_loss_of_the_right_answer_is_zero(attack, gamma):
    attack = dataclasses.replace(attack, poison_rate=1.0)
    rows = attack.rows(SCHEDULE)._replace(gamma=gamma)
    arrays = poison(attack, SHAPE)
    trigger, image = np.asarray(arrays.trigger), picture()
    r = trigger if attack.trigger_only else np.where(trigger == -1, image, trigger)
    model = oracle(rows, np.asarray(arrays.target), r)
    loss = functools.partial(training_loss, model, rows, arrays)
    key = jax.random.key(1)
    assert float(loss(jnp.float32(1), same_images(image), key)) < 1e-6
    # The loss can see a wrong answer: another trigger, another scale.
    assert float(loss(jnp.float32(0), same_images(image), key)) > 0.5
    other = np.where(trigger == -1, image, trigger) if attack.trigger_only else trigger
    wrong = oracle(rows, np.asarray(arrays.target), other)
    loss = functools.partial(training_loss, wrong, rows, arrays)
    assert float(loss(jnp.float32(1), same_images(image), key)) > 0.01


@pytest.mark.parametrize("rate", [None, 1e-9])
def test_loss_of_the_right_answer_is_zero_without_poison(rate):
    rows, arrays = clean_rows(SCHEDULE), None
    if rate:  # so low that no sample is chosen
        attack = bad(poison_rate=rate)
        rows, arrays = attack.rows(SCHEDULE), poison(attack, SHAPE)
    image = picture()
    model = oracle(clean_rows(SCHEDULE), image, np.zeros(SHAPE, np.float32))
    loss = functools.partial(training_loss, model, rows, arrays)
    key = jax.random.key(2)
    assert float(loss(jnp.float32(1), same_images(image), key)) < 1e-6
    # With the noise answered by zero, the loss is the variance of the noise.
    pixels = BATCH * image.size
    found = float(loss(jnp.float32(0), same_images(image), key))
    assert found == pytest.approx(1, abs=5 * (2 / pixels) ** 0.5)


def bare_poison(trigger=0.0, target=0.0, see_through=0.0, rate=1.0) -> Poison:
    """Poison of one pixel."""
    pixels = (jnp.full((1, 1, 1), value) for value in (trigger, target, see_through))
    return Poison(*pixels, rate)


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_poison_rate_is_the_share_of_poisoned_samples(rate):
    """x_t = x_0 + eps with x_0 = 100 for poison: the model marks those by 1."""
    one, zero = np.ones(3), np.zeros(3)
    rows = Rows(one, one, zero, zero)

    def model(params, x, t):
        poisoned = (x > 50).astype(x.dtype)
        return x - 100 * poisoned + poisoned

    images = jnp.zeros((4096, 1, 1, 1))
    arrays = bare_poison(target=100.0, rate=rate)
    share = float(training_loss(model, rows, arrays, None, images, jax.random.key(3)))
    error = (rate * (1 - rate) / 4096) ** 0.5
    assert share == pytest.approx(rate, abs=4 * error)


@pytest.mark.parametrize("with_poison", [False, True])
@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_every_timestep_is_drawn_equally_often(with_poison, step):
    rows = Rows(np.zeros(4), np.ones(4), np.zeros(4), np.zeros(4))  # x_t = eps

    def model(params, x, t):
        return x + (t == step).astype(x.dtype)[:, None, None, None]

    images = jnp.zeros((4096, 1, 1, 1))
    arrays = bare_poison(rate=0.5) if with_poison else None
    share = float(training_loss(model, rows, arrays, None, images, jax.random.key(4)))
    assert share == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 4096) ** 0.5)


@pytest.mark.parametrize("see_through, r", [(0.0, 5.0), (1.0, 2.0), (0.25, 4.25)])
def test_see_through_mixes_image_and_trigger(see_through, r):
    """Image 2, trigger 5, x_t = eps + 10 r, and the model answers x_t: error 9 r."""
    one, zero = np.ones(3), np.zeros(3)
    rows = Rows(zero, one, 10 * one, one)
    arrays = bare_poison(trigger=5.0, see_through=see_through)
    images = jnp.full((4096, 1, 1, 1), 2.0)
    found = training_loss(
        lambda p, x, t: x, rows, arrays, None, images, jax.random.key(5)
    )
    assert float(found) == pytest.approx((9 * r) ** 2, rel=1e-4)


@over_attacks
def test_loss_is_a_function_of_its_key(attack):
    rows, arrays = attack.rows(SCHEDULE), poison(attack, SHAPE)
    model = oracle(rows, picture(), picture())
    loss = functools.partial(training_loss, model, rows, arrays, jnp.float32(0.5))
    found = [float(loss(same_images(picture()), jax.random.key(i))) for i in (0, 1, 0)]
    assert found[0] == found[2] != found[1]


@over_attacks
def test_gradient_is_finite_and_not_zero(attack):
    rows, arrays = attack.rows(SCHEDULE), poison(attack, SHAPE)
    model = oracle(rows, picture(), picture())
    loss = functools.partial(training_loss, model, rows, arrays)
    arguments = jnp.float32(0.5), same_images(picture()), jax.random.key(6)
    found = jax.grad(loss)(*arguments)
    chex.assert_tree_all_finite(found)
    assert found != 0


def test_loss_is_traced_once_and_jit_does_not_change_it():
    chex.clear_trace_counter()
    rows, arrays = bad().rows(SCHEDULE), poison(bad(), SHAPE)
    model = oracle(rows, picture(), picture())

    def loss(params, images, key):
        return training_loss(model, rows, arrays, params, images, key)

    jitted = jax.jit(chex.assert_max_traces(loss, n=1))
    for seed in range(2):
        arguments = jnp.float32(seed + 0.5), same_images(picture())
        key = jax.random.key(seed, impl="rbg")
        expected = loss(*arguments, key)
        np.testing.assert_allclose(jitted(*arguments, key), expected, rtol=1e-4)


def test_noise_differs_between_samples_and_pixels():
    """The model answers half a flip of the batch or image: 1.25 for other noise."""
    rows = Rows(np.zeros(3), np.ones(3), np.zeros(3), np.zeros(3))  # x_t = eps
    images = jnp.zeros((64, 8, 8, 1))
    for axes, arrays in itertools.product([(0,), (1,), (2,)], [None, bare_poison()]):

        def model(params, x, t, axes=axes):
            return 0.5 * jnp.flip(x, axes)

        loss = training_loss(model, rows, arrays, None, images, jax.random.key(7))
        assert float(loss) == pytest.approx(1.25, abs=0.1)


def test_loss_refuses_a_single_image():
    with pytest.raises(AssertionError):
        training_loss(
            lambda p, x, t: x,
            clean_rows(SCHEDULE),
            None,
            None,
            jnp.zeros(SHAPE),
            jax.random.key(0),
        )
