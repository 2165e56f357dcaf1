"""diffusion: tables, the forward process, both samplers, and `sample`."""

from __future__ import annotations

import dataclasses
import decimal
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.diffusion.ddpm import DDPM
from puredif_jax.diffusion.multistep import DPMSolver, UniPC
from puredif_jax.diffusion.path_keeping import PathKeeping
from puredif_jax.diffusion.prediction import Estimates, diffuse, lookup, predict_x0
from puredif_jax.diffusion.sampling import grid, sample, trajectory
from puredif_jax.diffusion.schedules import (
    CosineBetas,
    LinearBetas,
    NoiseSchedule,
    ScaledLinearBetas,
)

SCHEDULE = LinearBetas().tables()
GOLDEN_T = [0, 100, 500, 700, 900, 999]
GOLDEN_NOISE = [0.0100, 0.3238, 0.9603, 0.9966, 0.9999, 1.0000]
GOLDEN_ONE_MINUS_SIGNAL = [0.0001, 0.0539, 0.7211, 0.9171, 0.9836, 0.9936]
DIFFUSERS_ABAR = {
    LinearBetas(): [
        0.999899983,
        0.895141363,
        0.0777966529,
        0.00686827861,
        2.70244491e-4,
    ]
    + [4.03583035e-5],
    ScaledLinearBetas(): [0.999149978, 0.894223154, 0.276332468, 0.0825208127]
    + [0.0141511327, 0.0046600951],
    CosineBetas(): [0.999958694, 0.971575618, 0.492285043, 0.201868892, 0.0236161072]
    + [2.42873499e-9],
}
SAMPLERS = [
    DDPM(steps=40),
    PathKeeping(steps=40),
    DDIM(steps=40),
    DDIM(steps=40, eta=0.5),
    DDIM(steps=40, eta=1.0),
    DPMSolver(steps=40),
    UniPC(steps=40),
]
over_samplers = pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
SHORT = [DDPM(steps=7), DDIM(steps=7), DDIM(steps=7, eta=0.5), DPMSolver(steps=7)]
SHORT += [UniPC(steps=7), PathKeeping(steps=7), PathKeeping(steps=7, psi=0.0)]
over_short_samplers = pytest.mark.parametrize("sampler", SHORT, ids=repr)


def normal(seed: int, *shape: int) -> jax.Array:
    """Normal draws made by numpy: nothing to compile."""
    draws = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jnp.asarray(draws)


def quick_key(seed: int) -> jax.Array:
    """A key whose draws compile in half the time, for tests of other things."""
    return jax.random.key(seed, impl="rbg")


def exact_tables(steps: int, start: float, end: float) -> tuple[list, list]:
    """s_t and v_t from the product of 1 - beta_t in 60 decimal digits."""
    with decimal.localcontext(prec=60):
        first, last = decimal.Decimal(start), decimal.Decimal(end)
        signal, noise, product = [], [], decimal.Decimal(1)
        for t in range(steps):
            product *= 1 - (first + (last - first) * t / (steps - 1))
            signal.append(float(product.sqrt()))
            noise.append(float((1 - product).sqrt()))
    return signal, noise


def coefficients(t: int, n: int) -> tuple[float, float, float, float]:
    """s_t, v_t, s_n, v_n in Python floats; n = -1 is the clean end."""
    end = (float(SCHEDULE.signal[n]), float(SCHEDULE.noise[n])) if n >= 0 else (1, 0)
    return float(SCHEDULE.signal[t]), float(SCHEDULE.noise[t]), *end


def posterior(t: int, n: int) -> tuple[float, float, float]:
    """(weight of x_0, weight of x_t, std) of q(x_n | x_t, x_0), by Bayes' rule.

    x_n given x_0 is N(s_n x_0, v_n^2); x_t given x_n is N(k x_n, 1 - k^2), k = s_t/s_n.
    """
    if n < 0:
        return 1.0, 0.0, 0.0
    s, _, s_n, v_n = coefficients(t, n)
    k = s / s_n
    precision = 1 / v_n**2 + k**2 / (1 - k**2)
    weights = s_n / v_n**2 / precision, k / (1 - k**2) / precision
    return *weights, precision**-0.5


def pairs(steps: int) -> list[tuple[int, int]]:
    """(t, t_prev) of a chain of evenly spaced timesteps, from high to low."""
    rising = [i * (1000 // steps) for i in range(steps)]
    return list(zip(rising, [-1, *rising[:-1]], strict=True))[::-1]


def point_mass(params, x, t):
    """The exact noise prediction when all data is the image `params`."""
    signal = jnp.asarray(SCHEDULE.signal, jnp.float32)[t][:, None, None, None]
    noise = jnp.asarray(SCHEDULE.noise, jnp.float32)[t][:, None, None, None]
    return (x - signal * params) / noise


def gaussian(params, x, t):
    """The exact noise prediction when data is N(mu, sigma^2 I)."""
    mu, sigma = params
    signal = jnp.asarray(SCHEDULE.signal, jnp.float32)[t][:, None, None, None]
    noise = jnp.asarray(SCHEDULE.noise, jnp.float32)[t][:, None, None, None]
    return noise * (x - signal * mu) / (signal**2 * sigma**2 + noise**2)


def nonlinear(params, x, t):
    """A cheap network that depends on its parameters, on x and on t."""
    phase = t[:, None, None, None].astype(jnp.float32) / 100
    return jnp.sin(params * x + phase)


# --- Tables --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps, start, end", [(1000, 1e-4, 0.02), (7, 0.01, 0.3), (2, 0.5, 0.5)]
)
def test_tables_are_the_products_of_one_minus_beta(steps, start, end):
    schedule = LinearBetas(steps, start, end).tables()
    signal, noise = exact_tables(steps, start, end)
    assert schedule.signal.dtype == schedule.noise.dtype == np.float64
    assert schedule.steps == steps
    np.testing.assert_allclose(schedule.signal, signal, rtol=1e-12)
    np.testing.assert_allclose(schedule.noise, noise, rtol=1e-11)


@pytest.mark.parametrize("steps, start, end", [(1000, 0.00085, 0.012), (7, 0.01, 0.3)])
def test_roots_of_scaled_betas_are_linear(steps, start, end):
    alpha = ScaledLinearBetas(steps, start, end).tables().alpha
    roots = np.sqrt(1 - alpha)
    assert roots[0] ** 2 == pytest.approx(start) and roots[-1] ** 2 == pytest.approx(
        end
    )
    np.testing.assert_allclose(np.diff(roots), (roots[-1] - roots[0]) / (steps - 1))


def test_cosine_betas_have_a_cosine_as_signal_until_the_cap():
    schedule = CosineBetas().tables()
    angle = [math.pi / 2 * ((t + 1) / 1000 + 0.008) / 1.008 for t in range(999)]
    wanted = np.cos(angle) / math.cos(math.pi / 2 * 0.008 / 1.008)
    np.testing.assert_allclose(schedule.signal[:-1], wanted, rtol=1e-9)
    assert 1 - schedule.alpha[-1] == pytest.approx(0.999)


@pytest.mark.parametrize("betas", DIFFUSERS_ABAR, ids=lambda b: type(b).__name__)
def test_tables_are_those_of_diffusers(betas):
    """`alphas_cumprod` of diffusers 0.42.1, which is computed in float32."""
    abar = betas.tables().signal[GOLDEN_T] ** 2
    np.testing.assert_allclose(abar, DIFFUSERS_ABAR[betas], rtol=1e-4, atol=1e-8)


def test_tables_match_the_published_numbers():
    np.testing.assert_allclose(SCHEDULE.noise[GOLDEN_T], GOLDEN_NOISE, atol=6e-5)
    np.testing.assert_allclose(
        1 - SCHEDULE.signal[GOLDEN_T], GOLDEN_ONE_MINUS_SIGNAL, atol=6e-5
    )
    assert 1 / SCHEDULE.signal[-1] == pytest.approx(157, abs=1)


def test_alpha_is_one_minus_beta_and_previous_is_shifted():
    beta = [1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)]
    np.testing.assert_allclose(1 - SCHEDULE.alpha, beta, rtol=1e-9)
    signal, noise = SCHEDULE.previous
    assert (signal[0], noise[0]) == (1.0, 0.0)
    np.testing.assert_array_equal(signal[1:], SCHEDULE.signal[:-1])
    np.testing.assert_array_equal(noise[1:], SCHEDULE.noise[:-1])


@pytest.mark.parametrize(
    "changes",
    [{"steps": 1}, {"start": 0.0}, {"start": 0.03}, {"end": 1.0}, {"start": -1.0}],
)
@pytest.mark.parametrize("kind", [LinearBetas, ScaledLinearBetas])
def test_a_schedule_that_is_none_is_refused(kind, changes):
    with pytest.raises(ValueError, match=f"{kind.__name__} needs.*found"):
        kind(**changes)


@pytest.mark.parametrize("changes", [{"steps": 1}, {"cap": 1.0}, {"offset": -0.1}])
def test_a_cosine_schedule_that_is_none_is_refused(changes):
    with pytest.raises(ValueError, match="CosineBetas needs.*found"):
        CosineBetas(**changes)


@pytest.mark.parametrize("signal, noise", [((3,), (4,)), ((2, 2), (2, 2))])
def test_tables_of_other_shapes_are_refused(signal, noise):
    with pytest.raises(ValueError, match="one shape"):
        NoiseSchedule(np.ones(signal), np.ones(noise))


# --- The forward process -------------------------------------------------------------


@pytest.mark.parametrize("t, shape", [([3, 7, 0], (3, 1, 1, 1)), (7, ())])
def test_lookup_broadcasts_over_images(t, shape):
    table = np.arange(10, dtype=np.float64) ** 2
    found = lookup(table, jnp.asarray(t, jnp.int32))
    assert found.shape == shape and found.dtype == jnp.float32
    np.testing.assert_array_equal(found.ravel(), np.ravel(np.square(t)))


def test_diffuse_mixes_each_image_at_its_own_timestep():
    t = [0, 500, 999]
    x0 = jnp.full((3, 2, 2, 1), 2.0)
    eps = jnp.full((3, 2, 2, 1), -1.0)
    found = diffuse(SCHEDULE, x0, eps, jnp.asarray(t))
    signal, noise = exact_tables(1000, 1e-4, 0.02)
    for image, i in zip(found, t, strict=True):
        np.testing.assert_allclose(image, 2 * signal[i] - noise[i], rtol=1e-5)


def test_predict_x0_inverts_diffuse():
    x0, eps = normal(0, 2, 6, 4, 4, 3)
    t = jnp.asarray(GOLDEN_T)
    found = predict_x0(SCHEDULE, diffuse(SCHEDULE, x0, eps, t), eps, t)
    np.testing.assert_allclose(found, x0, atol=2e-4)  # v_T / s_T is 157
    at_500 = jnp.full((6,), 500)
    x = diffuse(SCHEDULE, x0, eps, at_500)
    found = predict_x0(SCHEDULE, x, eps, jnp.int32(500))
    np.testing.assert_allclose(found, x0, atol=1e-5)


def test_diffuse_refuses_noise_of_another_shape():
    with pytest.raises(AssertionError):
        diffuse(SCHEDULE, jnp.ones((2, 4, 4, 3)), jnp.ones((2, 4, 4, 1)), jnp.zeros(2))


# --- Grids ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps, expected",
    [
        (1, [0]),
        (3, [0, 333, 666]),
        (50, list(range(0, 1000, 20))),
        (1000, list(range(1000))),
    ],
)
def test_grid_is_the_leading_one(steps, expected):
    found = grid(SCHEDULE, steps)
    assert found.dtype == np.int32
    assert found.tolist() == expected


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_grid_refuses_a_number_of_steps(steps):
    with pytest.raises(ValueError, match=f"1 to 1000 steps, found {steps}"):
        grid(SCHEDULE, steps)


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_multistep_grids_need_a_step_more(spacing):
    for sampler in (DPMSolver, UniPC):
        assert len(sampler(999, spacing).path(SCHEDULE)[0]) == 999
        with pytest.raises(ValueError, match="1 to 999 steps, found 1000"):
            sampler(1000, spacing).path(SCHEDULE)


# --- One step ------------------------------------------------------------------------

STEPS = [(999, 998), (500, 499), (50, 49), (1, 0), (980, 960), (20, 0), (0, -1)]


@pytest.mark.parametrize("sampler", [DDPM(), DDIM(eta=1.0)], ids=repr)
@pytest.mark.parametrize("t, n", STEPS)
def test_stochastic_step_has_the_moments_of_the_posterior(sampler, t, n):
    s, v, _, _ = coefficients(t, n)
    of_x0, of_x, std = posterior(t, n)
    x, eps = normal(1, 2, 1, 256, 256, 1)
    step = functools.partial(
        sampler.step, SCHEDULE, t=jnp.int32(t), t_prev=jnp.int32(n)
    )
    key, nothing = jax.random.key(2), Estimates(0 * eps, 0 * eps)
    noise, _ = step(nothing, x=0 * x, key=key)
    found = Estimates.of(SCHEDULE, eps, x, jnp.int32(t))
    mean = step(found, x=x, key=key)[0] - noise
    x64, eps64 = np.asarray(x, np.float64), np.asarray(eps, np.float64)
    expected = of_x0 * (x64 - v * eps64) / s + of_x * x64
    # The step is computed in float32, where 1 - alpha_t keeps 3 to 4 digits.
    np.testing.assert_allclose(mean, expected, rtol=5e-4, atol=5e-4)
    np.testing.assert_allclose(noise.std(), std, rtol=0.015)
    assert abs(float(noise.mean())) <= 5 * std / 256
    assert std > 0 or not np.any(noise)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("t, n", STEPS)
def test_eta_is_the_share_of_the_posterior_std(eta, t, n):
    zero = jnp.zeros((1, 256, 256, 1))
    key, now, then = jax.random.key(2), jnp.int32(t), jnp.int32(n)
    noise, _ = DDIM(eta=eta).step(SCHEDULE, Estimates(zero, zero), zero, now, then, key)
    np.testing.assert_allclose(noise.std(), eta * posterior(t, n)[2], rtol=0.015)


@over_samplers
@pytest.mark.parametrize("t, n", STEPS)
def test_step_keeps_the_marginals_of_a_single_image(sampler, t, n):
    """With data at y alone, x_t ~ N(s_t y, v_t^2) gives x_n ~ N(s_n y, v_n^2)."""
    y, (s, v, s_n, v_n) = 0.7, coefficients(t, n)
    eps = normal(3, 1, 256, 256, 1)
    x = s * y + v * eps
    key, now, then = jax.random.key(4), jnp.int32(t), jnp.int32(n)
    found, _ = sampler.step(
        SCHEDULE,
        Estimates.of(SCHEDULE, eps, x, now),
        x,
        now,
        then,
        key,
        sampler.begin(x),
    )
    assert float(found.mean()) == pytest.approx(s_n * y, abs=5 * v_n / 256 + 1e-3)
    assert float(found.std()) == pytest.approx(v_n, rel=0.015, abs=1e-3)


# --- The whole chain -----------------------------------------------------------------


def gaussian_moments(sampler, sigma: float, mu: np.ndarray) -> tuple[np.ndarray, float]:
    """Mean and std of the samples for data N(mu, sigma^2): a product over the grid."""
    mean, variance = np.zeros_like(mu), 1.0
    for t, n in pairs(sampler.steps):
        s, v, s_n, v_n = coefficients(t, n)
        gain = s * sigma**2 / (s**2 * sigma**2 + v**2)  # x0hat = mu + gain (x - s mu)
        if isinstance(sampler, DDIM) and sampler.eta == 0:
            of_eps = v_n / v
            of_x0, of_x, std = s_n - of_eps * s, of_eps, 0.0
        else:
            of_x0, of_x, std = posterior(t, n)
        mean = of_x0 * (mu + gain * (mean - s * mu)) + of_x * mean
        variance = (of_x0 * gain + of_x) ** 2 * variance + std**2
    return mean, variance**0.5


@pytest.mark.parametrize(
    "sampler",
    [DDPM(1000), DDIM(1000), DDIM(50), DDIM(100, eta=1.0)],
    ids=repr,
)
def test_samples_of_a_gaussian_have_its_moments(sampler):
    sigma, mu = 0.5, np.linspace(-0.8, 0.8, 16).reshape(1, 4, 4, 1)
    start = normal(5, 1024, 4, 4, 1)
    params = (jnp.asarray(mu, jnp.float32), jnp.float32(sigma))
    found = sample(gaussian, params, SCHEDULE, sampler, start, jax.random.key(6))
    found = np.asarray(found, np.float64)
    mean, std = gaussian_moments(sampler, sigma, mu)
    count = found.size
    np.testing.assert_allclose(found.mean(0), mean[0], atol=5 * std / 1024**0.5)
    residual = found - mean
    assert residual.mean() == pytest.approx(0, abs=5 * std / count**0.5)
    assert residual.std() == pytest.approx(std, rel=5 / (2 * count) ** 0.5)
    # The discretisation itself is small: 1 % with all timesteps, 7 % with 100.
    np.testing.assert_allclose(mean, mu, atol=4e-3)
    assert std == pytest.approx(sigma, rel=0.01 if sampler.steps == 1000 else 0.07)


@pytest.mark.parametrize("steps", [1, 10, 50, 1000])
def test_ddim_of_a_gaussian_is_a_known_linear_map(steps):
    sigma, mu = 0.4, 0.3
    start = normal(7, 8, 2, 2, 1)
    params = (jnp.full((1, 1, 1, 1), mu), jnp.float32(sigma))
    found = sample(gaussian, params, SCHEDULE, DDIM(steps), start, jax.random.key(0))
    first, factor = pairs(steps)[0][0], 1.0
    for t, n in pairs(steps):
        s, v, s_n, v_n = coefficients(t, n)
        factor *= (s_n * s * sigma**2 + v_n * v) / (s**2 * sigma**2 + v**2)
    s = float(SCHEDULE.signal[first])
    expected = mu + factor * (np.asarray(start, np.float64) - s * mu)
    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize("sampler", [*SAMPLERS[:4], SAMPLERS[5]], ids=repr)
def test_a_single_image_is_returned_and_estimated_at_every_step(sampler):
    y = jnp.linspace(-1, 1, 12).reshape(1, 2, 2, 3)
    run = (point_mass, y, SCHEDULE, sampler, normal(8, 4, 2, 2, 3), quick_key(9))
    images, estimates = trajectory(*run)
    assert estimates.shape == (sampler.steps, 4, 2, 2, 3)
    for found in (images, *estimates[:: sampler.steps // 4]):
        np.testing.assert_allclose(found, jnp.broadcast_to(y, found.shape), atol=1e-3)


@pytest.mark.parametrize("sampler", SHORT[:3], ids=repr)
def test_clip_bounds_the_predicted_image(sampler):
    x = jnp.linspace(-1, 1, 9).reshape(1, 3, 3, 1)
    eps, key = -50 * x, quick_key(9)  # x0hat = 1.5 x at t = 0, 13,000 x at 999
    clipped = dataclasses.replace(sampler, clip=0.5)
    zero, minus_one, high = jnp.int32(0), jnp.int32(-1), jnp.int32(999)
    for t, gain in ((zero, 1.5), (high, 50 / float(SCHEDULE.signal[-1]))):
        free, _ = sampler.step(
            SCHEDULE, Estimates.of(SCHEDULE, eps, x, t), x, t, minus_one, key
        )
        np.testing.assert_allclose(free, gain * x, rtol=0.02)
        bounded, _ = clipped.step(
            SCHEDULE, Estimates.of(SCHEDULE, eps, x, t), x, t, minus_one, key
        )
        np.testing.assert_allclose(bounded, jnp.clip(gain * x, -0.5, 0.5), rtol=0.02)
        assert np.abs(bounded).max() <= 0.5 * (1 + 1e-3)
    # A bound that is not reached changes nothing.
    t = jnp.int32(100)
    found = Estimates.of(SCHEDULE, 0.1 * x, x, t)
    middle = (SCHEDULE, found, x, t, jnp.int32(90), key)
    loose, _ = dataclasses.replace(sampler, clip=1.2).step(*middle)
    np.testing.assert_array_equal(loose, sampler.step(*middle)[0])


@over_short_samplers
def test_trajectory_is_a_loop_over_steps(sampler):
    key = quick_key(10)
    x = start = normal(11, 2, 3, 3, 1)
    params, estimates = jnp.float32(1.5), []
    memory = sampler.begin(x)
    for t, n in zip(*sampler.path(SCHEDULE), strict=True):
        eps = nonlinear(params, x, jnp.full((2,), t))
        s, v, _, _ = coefficients(t, n)
        estimates.append((x - v * eps) / s)
        step_key = jax.random.fold_in(key, t)
        now, then = jnp.int32(t), jnp.int32(n)
        x, memory = sampler.step(
            SCHEDULE,
            Estimates.of(SCHEDULE, eps, x, now),
            x,
            now,
            then,
            step_key,
            memory,
        )
    run = (nonlinear, params, SCHEDULE, sampler, start, key)
    images, found = trajectory(*run)
    np.testing.assert_allclose(images, x, rtol=5e-4, atol=1e-4)
    np.testing.assert_allclose(found, jnp.stack(estimates), rtol=1e-3, atol=1e-3)


@dataclasses.dataclass(frozen=True)
class Trace:
    """A sampler that writes what it sees of step t into row t // spacing."""

    steps: int

    def path(self, schedule):
        return DDPM(self.steps).path(schedule)

    def begin(self, x):
        return ()

    def step(self, schedule, found, x, t, t_prev, key, memory):
        row = t // (schedule.steps // self.steps)
        seen = jnp.stack([t, t_prev]).astype(jnp.float32)
        seen = jnp.concatenate(
            [seen, found.eps[0, 0, :1, 0], jax.random.normal(key, (1,))]
        )
        return x.at[0, row, :, 0].set(seen), memory


def traced(seed=0):
    def timestep(params, x, t):
        del params
        assert t.shape == (1,)
        return jnp.broadcast_to(t[:, None, None, None].astype(jnp.float32), x.shape)

    start = jnp.full((1, 5, 4, 1), jnp.nan)
    key = quick_key(seed)
    run = (timestep, None, SCHEDULE, Trace(5), start, key)
    found = sample(*run)
    np.testing.assert_array_equal(found, trajectory(*run)[0])
    return np.asarray(found[0, :, :, 0])


def test_steps_see_their_timesteps_and_draw_from_different_keys():
    found = traced()
    assert found[:, 0].tolist() == [0, 200, 400, 600, 800]
    assert found[:, 1].tolist() == [-1, 0, 200, 400, 600]
    assert found[:, 2].tolist() == found[:, 0].tolist()
    draws = np.concatenate([found[:, 3], traced(seed=1)[:, 3]])
    assert len(np.unique(draws)) == 10
    np.testing.assert_array_equal(found, traced())


@dataclasses.dataclass(frozen=True)
class Still:
    """A sampler that does nothing."""

    steps: int = 3

    def path(self, schedule):
        del schedule
        return np.array([2, 1, 0]), np.array([1, 0, -1])

    def begin(self, x):
        return jnp.int32(0)

    def step(self, schedule, found, x, t, t_prev, key, memory):
        """Counts its own steps, to see that what it remembers comes back."""
        del schedule, found, key
        x = jnp.where(memory == 2 - t, x, jnp.nan)
        return x, memory + 1


def test_shard_is_put_on_the_start_and_on_every_step():
    start, key = jnp.zeros((1, 2, 2, 1)), quick_key(0)
    arguments = (nonlinear, jnp.float32(1), SCHEDULE, Still(), start, key)
    assert float(sample(*arguments, shard=lambda x: x + 1).max()) == 4
    assert float(sample(*arguments).max()) == 0


@pytest.mark.parametrize("sampler", SHORT[:2], ids=repr)
def test_remat_changes_the_memory_and_not_the_gradient(sampler):
    start = normal(12, 2, 3, 3, 1)

    def loss(start, params, remat):
        key = quick_key(13)
        images, estimates = trajectory(
            nonlinear, params, SCHEDULE, sampler, start, key, remat=remat
        )
        return jnp.mean(images**2) + jnp.mean(estimates**2)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    plain = gradient(start, jnp.float32(0.1), False)
    remat = gradient(start, jnp.float32(0.1), True)
    chex.assert_tree_all_finite(plain)
    assert all(np.any(leaf) for leaf in plain)
    chex.assert_trees_all_close(plain, remat, rtol=1e-4)
    program = jax.make_jaxpr(loss, static_argnums=2)
    assert "remat" in str(program(start, jnp.float32(0.1), True))
    assert "remat" not in str(program(start, jnp.float32(0.1), False))


@pytest.mark.parametrize("sampler", SHORT[:2], ids=repr)
def test_sample_is_traced_once_a_shape(sampler):
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(params, start, key):
        return sample(nonlinear, params, SCHEDULE, sampler, start, key)

    for seed in range(3):
        run(jnp.float32(seed), jnp.full((2, 2, 2, 1), seed + 0.5), quick_key(seed))
    with pytest.raises(AssertionError, match="traced"):
        run(jnp.float32(0), jnp.ones((3, 2, 2, 1)), quick_key(0))


def test_math_of_one_step_by_hand():
    """DDIM with s = 0.8, v = 0.6 to s = 1: x0hat = (x - 0.6 eps) / 0.8."""
    schedule = NoiseSchedule(np.array([0.8, 0.6]), np.array([0.6, 0.8]))
    x, eps = jnp.full((1, 1, 1, 1), 2.0), jnp.full((1, 1, 1, 1), 1.0)
    key = quick_key(0)
    low, high = jnp.int32(0), jnp.int32(1)
    found = Estimates.of(schedule, eps, x, low)
    last, _ = DDIM(1).step(schedule, found, x, low, jnp.int32(-1), key)
    assert math.isclose(last.item(), (2 - 0.6) / 0.8, rel_tol=1e-6)
    found = Estimates.of(schedule, eps, x, high)
    first, _ = DDIM(2).step(schedule, found, x, high, low, key)
    assert math.isclose(first.item(), 0.8 * (2 - 0.8) / 0.6 + 0.6, rel_tol=1e-6)
