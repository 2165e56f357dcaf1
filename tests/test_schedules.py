"""Noise schedules against their closed forms, and what a network is given."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.diffusion.prediction import (
    SamplePrediction,
    diffuse,
    estimates,
    predicting,
)
from puredif_jax.diffusion.sampling import Threshold, sample
from puredif_jax.diffusion.schedules import (
    ContinuousTime,
    CosineBetas,
    LinearBetas,
    NoiseSchedule,
    SigmoidBetas,
    SineNoise,
    TrainedBetas,
    ZeroTerminalSNR,
)

KINDS = [
    LinearBetas(),
    CosineBetas(50),
    SigmoidBetas(),
    TrainedBetas((0.1, 0.2, 0.5)),
    ZeroTerminalSNR(LinearBetas()),
    ZeroTerminalSNR(CosineBetas(), 2.0**-24),
    ContinuousTime(LinearBetas()),
    SineNoise(200),
]


@pytest.mark.parametrize("betas", KINDS, ids=lambda x: type(x).__name__)
def test_every_schedule_preserves_variance_and_loses_the_image(betas) -> None:
    tables = betas.tables()
    assert tables.steps == betas.steps == len(tables.given)
    np.testing.assert_allclose(tables.signal**2 + tables.noise**2, 1, atol=1e-12)
    assert (np.diff(tables.signal) < 0).all() and tables.signal[-1] >= 0
    assert np.isfinite(tables.log_snr).all()
    assert (np.diff(tables.given) > 0).all()


def test_sigmoid_betas_by_hand() -> None:
    tables = SigmoidBetas(3, 0.1, 0.4).tables()
    betas = [0.1 + 0.3 / (1 + math.exp(-u)) for u in (-6.0, 0.0, 6.0)]
    abar = np.cumprod([1 - beta for beta in betas])
    np.testing.assert_allclose(tables.signal**2, abar, rtol=1e-12)


def test_trained_betas_are_the_rule_that_made_them() -> None:
    betas = tuple(float(x) for x in np.linspace(1e-4, 0.02, 1000))
    found, wanted = TrainedBetas(betas).tables(), LinearBetas().tables()
    np.testing.assert_array_equal(found.signal, wanted.signal)
    assert "0.0001" not in repr(TrainedBetas(betas))


@pytest.mark.parametrize("betas", [(), (0.1,), (0.1, 0.0), (0.1, 1.5), (0.1, math.nan)])
def test_numbers_that_are_no_betas(betas) -> None:
    with pytest.raises(ValueError, match="two numbers or more in"):
        TrainedBetas(betas)


def test_no_signal_is_left_at_the_end_and_the_start_is_kept() -> None:
    """Lin et al. 2024, algorithm 1, written out."""
    plain, found = LinearBetas().tables(), ZeroTerminalSNR(LinearBetas()).tables()
    first, last = plain.signal[0], plain.signal[-1]
    wanted = (plain.signal - last) * first / (first - last)
    np.testing.assert_allclose(found.signal, wanted, atol=1e-15)
    assert found.signal[-1] == 0 and found.noise[-1] == 1
    assert found.signal[0] == pytest.approx(first)
    kept = ZeroTerminalSNR(LinearBetas(), 2.0**-24).tables()
    assert kept.signal[-1] == 2.0**-12
    np.testing.assert_array_equal(kept.signal[:-1], found.signal[:-1])


def test_what_the_network_is_given_in_place_of_the_timestep() -> None:
    plain, found = LinearBetas().tables(), ContinuousTime(LinearBetas()).tables()
    sigma = np.sqrt((1 - plain.signal**2) / plain.signal**2)
    np.testing.assert_allclose(found.times, 0.25 * np.log(sigma), atol=1e-9)
    sine = SineNoise(4).tables()
    noise = [math.sin(math.pi / 2 * k / 4) ** 2 for k in (1, 2, 3, 4)]
    np.testing.assert_allclose(sine.noise, noise, atol=1e-12)
    angle = [math.atan2(v, math.sqrt(1 - v * v)) / math.pi * 2 for v in noise]
    np.testing.assert_allclose(sine.times, angle, atol=1e-7)
    seen = predicting(lambda params, x, t: t, sine, "epsilon")(
        None, None, jnp.arange(4)
    )
    np.testing.assert_allclose(seen, sine.times, rtol=1e-6)


def test_a_table_of_another_length_is_named() -> None:
    with pytest.raises(ValueError, match=r"one shape \[T\], found .* and \(2,\)"):
        NoiseSchedule(np.ones(3), np.ones(3), np.ones(2))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("betas", [LinearBetas(), ZeroTerminalSNR(LinearBetas())])
def test_one_image_is_drawn_whatever_the_network_predicts(kind, betas) -> None:
    """An exact denoiser of one image, by each of the three predictions."""
    schedule = betas.tables()
    image = jax.random.uniform(jax.random.key(0), (4, 4, 1), minval=-1.0)
    signal = jnp.asarray(schedule.signal, jnp.float32)
    noise = jnp.asarray(schedule.noise, jnp.float32)

    def network(params, x, t):
        s, v = (table[t][:, None, None, None] for table in (signal, noise))
        eps = (x - s * image[None]) / v
        if kind == "epsilon":
            return eps
        whole = jnp.broadcast_to(image[None], x.shape)
        return whole if kind == "sample" else s * eps - v * image[None]

    model = predicting(network, schedule, kind)
    start = jax.random.normal(jax.random.key(1), (2, 4, 4, 1))
    sampler = DDIM(10, spacing="trailing")
    found = sample(model, None, schedule, sampler, start, jax.random.key(2))
    np.testing.assert_allclose(found, np.broadcast_to(image, found.shape), atol=2e-3)


def test_a_network_that_predicts_the_image_gives_the_noise() -> None:
    schedule = LinearBetas().tables()
    image, eps = (jax.random.normal(jax.random.key(k), (3, 4, 4, 1)) for k in (0, 1))
    for t in (0, 500, 999):
        x = diffuse(schedule, image, eps, jnp.full((3,), t))
        model = SamplePrediction(lambda params, x, t: image, schedule)
        found = estimates(model, None, schedule, x, jnp.asarray(t))
        np.testing.assert_array_equal(found.x0, image)
        np.testing.assert_allclose(found.eps, eps, atol=1e-3)


def test_dynamic_thresholding_by_hand() -> None:
    """Saharia et al. 2022, section 2.3: a quantile of each image by itself."""
    x0 = np.random.default_rng(0).normal(scale=2, size=(3, 4, 4, 2)).astype(np.float32)
    x0[2] *= 0.1
    found = Threshold(0.9, 3.0)(jnp.asarray(x0))
    for image, bounded in zip(x0, np.asarray(found), strict=True):
        ordered = np.sort(np.abs(image).ravel())
        place = 0.9 * (ordered.size - 1)
        below = ordered[math.floor(place)]
        q = below + (place % 1) * (ordered[math.ceil(place)] - below)
        bound = min(max(q, 1.0), 3.0)
        wanted = np.clip(image, -bound, bound) / bound
        np.testing.assert_allclose(bounded, wanted, atol=1e-6)
    np.testing.assert_array_equal(Threshold()(jnp.asarray(x0)), np.clip(x0, -1, 1))
    for ratio, most in ((1.1, 1.0), (0.5, 0.5), (0.5, math.inf)):
        with pytest.raises(ValueError, match="ratio <= 1 <= most"):
            Threshold(ratio, most)
