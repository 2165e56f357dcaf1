"""Variance-exploding processes: formulas, ranges, scores, and the golden steps."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_channel import close, golden, maker

from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.diffusion.ddpm import DDPM
from puredif_jax.diffusion.multistep import DPMSolver, UniPC
from puredif_jax.diffusion.prediction import (
    Ranged,
    Retimed,
    ScorePrediction,
    estimates,
    predicting,
)
from puredif_jax.diffusion.sampling import sample, trajectory
from puredif_jax.diffusion.schedules import LinearBetas, NoiseSchedule
from puredif_jax.diffusion.ve import (
    Preconditioned,
    PredictorCorrector,
    VarianceExploding,
)

SHAPE = (4, 4, 1)
RANGES = [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)]
over_ranges = pytest.mark.parametrize("values", RANGES, ids=str)


def normal(seed: int, *shape: int) -> jax.Array:
    draws = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jnp.asarray(draws)


def ranged(x, values):
    """Images in [-1, 1] in another range."""
    low, high = values
    return low + (x + 1) / 2 * (high - low)


# --- The process ---------------------------------------------------------------------


@over_ranges
@pytest.mark.parametrize("steps, least, most", [(1000, 0.01, 380.0), (5, 0.5, 8.0)])
def test_sigma_is_a_power_of_the_ratio(steps, least, most, values) -> None:
    """In the unit of the images; the tables are of images in [-1, 1]."""
    process = VarianceExploding(steps, least, most, values)
    tables = process.tables()
    sigma = [least * math.pow(most / least, t / (steps - 1)) for t in range(steps)]
    unit = 2 / (values[1] - values[0])
    assert tables.steps == process.steps == steps and tables.values == values
    np.testing.assert_array_equal(tables.signal, np.ones(steps))
    np.testing.assert_allclose(tables.noise, unit * np.array(sigma), rtol=1e-12)
    np.testing.assert_allclose(tables.given, sigma, rtol=1e-12)
    assert tables.prior == pytest.approx(unit * most, rel=1e-12)
    assert tables.noise[-1] == pytest.approx(tables.prior, rel=1e-12)
    assert not tables.fades
    unseen = VarianceExploding(steps, least, most, values, given_sigma=False).tables()
    assert unseen.times is None
    np.testing.assert_array_equal(unseen.given, np.arange(steps))


def test_sigma_of_one_thousand_steps_is_that_of_two_thousand() -> None:
    """At the ends, and by the golden table of the latter."""
    tables = VarianceExploding(steps=2000).tables()
    np.testing.assert_allclose(tables.times, maker.SIGMA, rtol=1e-10)
    ends = VarianceExploding().tables().times[[0, -1]]
    np.testing.assert_allclose(ends, maker.SIGMA[[0, -1]], rtol=1e-10)


@over_ranges
def test_sampling_starts_about_the_zero_of_the_network(values) -> None:
    """There it is sigma_max times the noise, as in diffusers: nothing is added."""
    tables, noise = VarianceExploding(values=values).tables(), normal(0, 3, *SHAPE)
    start = tables.start(noise)
    close(ranged(np.float64(start), values), 380.0 * np.float64(noise))


def test_an_ordinary_start_is_the_noise_and_the_trigger() -> None:
    noise, trigger = normal(1, 2, *SHAPE), normal(7, 1, *SHAPE)
    schedule = LinearBetas().tables()
    np.testing.assert_array_equal(schedule.start(noise), noise)
    np.testing.assert_array_equal(schedule.start(noise, trigger), noise + trigger)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 1},
        {"sigma_min": 0.0},
        {"sigma_min": 400.0},
        {"sigma_max": math.inf},
        {"sigma_max": math.nan},
        {"values": (1.0, 0.0)},
        {"values": (0.0, math.inf)},
    ],
)
def test_a_process_that_is_none_is_refused(changes) -> None:
    with pytest.raises(ValueError, match="(VarianceExploding needs|must rise).*found"):
        VarianceExploding(**changes)


def test_another_range_needs_a_signal_that_stays() -> None:
    plain = LinearBetas().tables()
    with pytest.raises(ValueError, match=r"\(0.0, 1.0\) need a signal .* 0.00635"):
        NoiseSchedule(plain.signal, plain.noise, values=(0.0, 1.0))


def test_timesteps_are_met_by_their_snr() -> None:
    """sigma of [-1, 1] is v / s of the linear schedule, as near as a step allows."""
    tables, linear = VarianceExploding().tables(), LinearBetas().tables()
    named = (900, 500, 100)
    wanted = (linear.noise / linear.signal)[list(named)]
    ratio = tables.noise[tables.matched(named)] / wanted
    step = 38_000 ** (1 / 999)
    assert (np.abs(np.log(ratio)) <= np.log(step) / 2 + 1e-9).all()


# --- What a network is given and predicts --------------------------------------------


@over_ranges
def test_a_network_is_given_its_own_range_and_sigma(values) -> None:
    """x in [-1, 1] as an image of its range, and the sigma of the timestep."""
    x, t = normal(2, 3, *SHAPE), jnp.asarray([0, 500, 999])
    seen = Ranged(lambda params, x, t: x, values)(None, x, t)
    np.testing.assert_allclose(seen, ranged(np.float64(x), values), rtol=2e-6)
    tables = VarianceExploding(values=values).tables()
    given = Retimed(lambda params, x, t: t, tables.times)(None, x, t)
    np.testing.assert_allclose(given, tables.times[np.asarray(t)], rtol=1e-6)

    def network(params, x, t):
        assert t.dtype == jnp.float32
        return params * x + t[:, None, None, None]

    model = predicting(network, tables, "epsilon")
    wanted = 3 * ranged(np.float64(x), values)
    wanted += tables.times[np.asarray(t)][:, None, None, None]
    close(model(jnp.float32(3), x, t), wanted)


@over_ranges
@pytest.mark.parametrize("t", [0, 300, 700, 999])
def test_a_score_tells_the_noise_and_the_image(values, t: int) -> None:
    """eps = -sigma S and x0hat = x + sigma^2 S, in the unit of the network."""
    tables = VarianceExploding(values=values).tables()
    sigma, x = tables.times[t], normal(3, 2, *SHAPE)
    x = x * (1 + tables.noise[t])

    def score(params, x, s):
        return jnp.sin(x) / (s[:, None, None, None] + 0.5)

    model = predicting(score, tables, "score")
    assert isinstance(model, ScorePrediction)
    found = estimates(model, None, tables, x, jnp.asarray(t))
    own = ranged(np.asarray(x), values).astype(np.float32)  # as the network sees it
    said = np.asarray(score(None, jnp.asarray(own), jnp.full((2,), sigma, jnp.float32)))
    # sin of many turns: the rounding of the input is in it.
    loose = 1e-6 * max(1.0, np.abs(own).max()) * sigma / (sigma + 0.5)
    np.testing.assert_allclose(found.eps, -sigma * said, atol=loose + 1e-6)
    image = np.float64(own) + sigma**2 * said
    size = np.abs(image).max() + np.abs(own).max()
    back = ranged(np.float64(found.x0), values)
    np.testing.assert_allclose(back, image, atol=2e-6 * size + sigma * (loose + 1e-6))
    np.testing.assert_array_equal(model(None, x, jnp.full((2,), t)), found.eps)


@pytest.mark.parametrize("t", [5, 400])
def test_a_score_of_a_fading_process_is_divided_by_its_signal(t: int) -> None:
    """x0hat = (x + v^2 S) / s."""
    tables, x = LinearBetas().tables(), normal(4, 2, *SHAPE)
    model = predicting(lambda params, x, t: jnp.cos(x), tables, "score")
    found = estimates(model, None, tables, x, jnp.asarray(t))
    s, v = tables.signal[t], tables.noise[t]
    said = np.cos(np.float64(x))
    close(found.eps, -v * said)
    close(found.x0, (np.float64(x) + v**2 * said) / s)


# --- The predictor and the corrector -------------------------------------------------


def test_a_path_corrects_at_each_level_and_steps_down() -> None:
    tables = VarianceExploding(steps=5).tables()
    times, goals = PredictorCorrector(levels=5).path(tables)
    assert times.dtype == goals.dtype == np.int32
    assert times.tolist() == [4, 4, 3, 3, 2, 2, 1, 1, 0, 0]
    assert goals.tolist() == [4, 3, 3, 2, 2, 1, 1, 0, 0, -1]
    times, goals = PredictorCorrector(levels=5, corrections=0).path(tables)
    assert (times.tolist(), goals.tolist()) == ([4, 3, 2, 1, 0], [3, 2, 1, 0, -1])
    times, goals = PredictorCorrector(levels=3, corrections=2).path(tables)
    assert times.tolist() == [4, 4, 4, 2, 2, 2, 0, 0, 0]
    assert goals.tolist() == [4, 4, 2, 2, 2, 0, 0, 0, -1]


def test_a_path_needs_a_signal_that_stays_and_so_many_levels() -> None:
    with pytest.raises(ValueError, match="needs a process whose signal stays, found"):
        PredictorCorrector(levels=5).path(LinearBetas().tables())
    with pytest.raises(ValueError, match="1 to 5 steps, found 6"):
        PredictorCorrector(levels=6).path(VarianceExploding(steps=5).tables())


@pytest.mark.parametrize(
    "changes", [{"levels": 0}, {"corrections": -1}, {"snr": 0.0}, {"snr": math.inf}]
)
def test_a_predictor_corrector_that_is_none_is_refused(changes) -> None:
    with pytest.raises(ValueError, match="predictor-corrector needs .*found"):
        PredictorCorrector(**changes)


TABLES = VarianceExploding(steps=2000).tables()
SAMPLER = PredictorCorrector(levels=2000, snr=maker.SNR)


def score(params, x, sigma):
    """The network of the golden steps, on a batch."""
    del params
    sigma = sigma[:, None, None, None]
    return (jnp.sin(3 * x / (1 + sigma)) / 2 + 0.3 - x) / (sigma**2 + 0.05)


@pytest.mark.parametrize("kind", ["predicted", "corrected"])
@pytest.mark.parametrize("row, level", [*enumerate(maker.LEVELS)])
def test_each_step_is_that_of_the_score_sde(monkeypatch, kind, row, level) -> None:
    """Of diffusers' scheduler, in [0, 1]; with the same noise given."""
    z = jnp.asarray(golden()["ve_z"], jnp.float32)
    monkeypatch.setattr(jax.random, "normal", lambda *_: z)
    x = jnp.asarray(2 * golden()["ve_states"][row] - 1, jnp.float32)
    model, now = predicting(score, TABLES, "score"), jnp.int32(level)
    found = estimates(model, None, TABLES, x, now)
    then = now if kind == "corrected" else now - 1
    drawn, steps = SAMPLER.step(
        TABLES, found, x, now, then, jax.random.key(0), jnp.int32(3)
    )
    assert steps == 4
    close(ranged(np.float64(drawn), (0, 1)), golden()[f"ve_{kind}"][row])


def test_a_stride_is_one_step_of_the_reverse_process(monkeypatch) -> None:
    """x + w S + sqrt(w) z with w = sigma_t^2 - sigma_n^2, whatever lies between."""
    z = jnp.asarray(golden()["ve_z"], jnp.float32)
    monkeypatch.setattr(jax.random, "normal", lambda *_: z)
    x, model = golden()["ve_states"][1], predicting(score, TABLES, "score")
    inside = jnp.asarray(2 * x - 1, jnp.float32)
    for t, n in ((1500, 1300), (1500, 2), (1500, -1)):
        now, then = jnp.int32(t), jnp.int32(n)
        found = estimates(model, None, TABLES, inside, now)
        drawn, _ = SAMPLER.step(
            TABLES, found, inside, now, then, jax.random.key(0), jnp.int32(0)
        )
        adjacent = maker.SIGMA[n] if n >= 0 else 0.0
        wanted = maker.predicted(x, golden()["ve_z"], maker.SIGMA[t], adjacent)
        back, rounded = ranged(np.float64(drawn), (0, 1)), 1e-6 * np.abs(x).max()
        np.testing.assert_allclose(back, wanted, rtol=0, atol=rounded)


def gaussian(params, x, t):
    """The exact noise prediction when data is N(mu, sigma^2 I)."""
    mu, sigma = params
    v = jnp.asarray(SHORT.noise, jnp.float32)[t][:, None, None, None]
    return v * (x - mu) / (sigma**2 + v**2)


SHORT = VarianceExploding(200, 0.01, 50.0).tables()


def test_steps_draw_noise_of_their_own() -> None:
    """Two corrections at one level, whose key is the same: by the count of steps."""
    x = jnp.zeros((64, *SHAPE))
    found = estimates(gaussian, (0.0, 1.0), SHORT, x + 1.0, jnp.int32(100))
    now, key = jnp.int32(100), jax.random.key(8)
    sampler = PredictorCorrector(200, 2)
    moved = [
        sampler.step(SHORT, found, x, now, now, key, jnp.int32(count))[0]
        for count in (0, 1, 0)
    ]
    np.testing.assert_array_equal(moved[0], moved[2])
    first, second = (np.asarray(y - y.mean()).ravel() for y in moved[:2])
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.2


@pytest.mark.parametrize(
    "sampler",
    [
        PredictorCorrector(200, 0),
        PredictorCorrector(200, 1, 0.1),
        DDPM(200, spacing="linspace"),
        DDIM(200, spacing="linspace"),
        DPMSolver(100),
        UniPC(100),
    ],
    ids=lambda x: f"{type(x).__name__}-{getattr(x, 'corrections', '')}",
)
def test_samples_of_a_gaussian_have_its_moments(sampler) -> None:
    """Every sampler draws from a process whose signal stays."""
    mu = jnp.linspace(-0.8, 0.8, 16).reshape(1, *SHAPE)
    params, key = (mu, jnp.float32(0.5)), jax.random.key(9)
    start = SHORT.start(normal(5, 1024, *SHAPE))
    found = sample(gaussian, params, SHORT, sampler, start, key)
    found = np.asarray(found, np.float64)
    np.testing.assert_allclose(found.mean(0), mu[0], atol=0.08)
    assert (found - np.asarray(mu)).std() == pytest.approx(0.5, rel=0.06)


@pytest.mark.parametrize("corrections", [0, 1])
def test_estimates_of_a_trajectory_are_those_of_its_levels(corrections) -> None:
    """One for each evaluation; of a single image it is that image."""
    sampler = PredictorCorrector(20, corrections)
    start = SHORT.start(normal(6, 2, *SHAPE))
    params = (jnp.full((1, *SHAPE), 0.3), jnp.float32(0.0))
    run = (gaussian, params, SHORT, sampler, start, jax.random.key(3))
    images, x0 = trajectory(*run)
    assert x0.shape == (sampler.steps, 2, *SHAPE) == (20 * (1 + corrections), 2, *SHAPE)
    np.testing.assert_allclose(x0, np.full(x0.shape, 0.3), atol=1e-3)
    np.testing.assert_allclose(images, np.full(images.shape, 0.3), atol=1e-3)


# --- A network of another process ----------------------------------------------------


def test_a_preconditioned_network_of_a_fading_process_is_one_of_this() -> None:
    """Of N(0, c^2): that of s x_0 + v eps becomes that of x_0 + sigma eps."""
    process, c2 = Preconditioned(VarianceExploding(100, sigma_max=50.0)), 0.3
    tables, linear = process.tables(), LinearBetas().tables()
    assert process.steps == tables.steps == 100

    def network(params, x, t):
        log_snr = jnp.interp(t, jnp.arange(1000.0), jnp.asarray(linear.log_snr))
        s2 = jax.nn.sigmoid(log_snr)[:, None, None, None]
        return jnp.sqrt(1 - s2) * x / (s2 * c2 + 1 - s2)

    model = predicting(network, tables, "epsilon")
    for t in (0, 30, 60, 99):
        sigma = tables.noise[t]
        x = normal(4, 2, *SHAPE) * float(sigma)
        wanted = sigma * np.float64(x) / (c2 + sigma**2)
        found = model(None, x, jnp.full((2,), t))
        np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-5)


def test_a_preconditioned_network_sees_a_variance_of_one() -> None:
    """Of images of variance 1, and at the times of equal signal-to-noise ratio."""
    tables = Preconditioned(VarianceExploding(100, sigma_max=50.0)).tables()
    plain, linear = VarianceExploding(100, sigma_max=50.0).tables(), LinearBetas()
    np.testing.assert_allclose(tables.scale**2 * (1 + plain.noise**2), 1, rtol=1e-12)
    np.testing.assert_array_equal(tables.noise, plain.noise)
    assert (tables.prior, tables.values) == (plain.prior, plain.values)
    assert (np.diff(tables.times) > 0).all()
    found = np.interp(tables.times, np.arange(1000), linear.tables().log_snr)
    np.testing.assert_allclose(found, tables.log_snr, rtol=1e-9)


def test_draws_start_at_the_noise_of_their_first_timestep() -> None:
    """Where the signal stays, each level has a noise, and the trigger goes with it."""
    tables = VarianceExploding(values=(-1.0, 1.0)).tables()
    noise, trigger = normal(1, 2, *SHAPE), normal(2, 1, *SHAPE)
    for first in (999, 900, 10):
        found = tables.start(noise, trigger, first)
        close(found, tables.noise[first] * np.float64(noise + trigger))
    linear = LinearBetas().tables()
    np.testing.assert_array_equal(linear.start(noise, trigger, 900), noise + trigger)
