"""The sampler that keeps a backdoor of ancestral sampling on its path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puredif_jax.attacks.baddiffusion import BadDiffusion
from puredif_jax.attacks.drawing import draw
from puredif_jax.attacks.exact import ExactDenoiser, Points
from puredif_jax.attacks.targets import Hat
from puredif_jax.attacks.triggers import Box, StopSign
from puredif_jax.attacks.villandiffusion import VillanDiffusion
from puredif_jax.attacks.villandiffusion_ve import VillanDiffusionVE
from puredif_jax.diffusion.ddpm import DDPM
from puredif_jax.diffusion.path_keeping import PathKeeping
from puredif_jax.diffusion.prediction import Estimates
from puredif_jax.diffusion.schedules import (
    CosineBetas,
    LinearBetas,
    ScaledLinearBetas,
    ZeroTerminalSNR,
)
from puredif_jax.diffusion.solver import Ancestral
from puredif_jax.diffusion.ve import VarianceExploding

SCHEDULES = [LinearBetas().tables(), ScaledLinearBetas().tables()]
SCHEDULES += [CosineBetas().tables()]
SHAPE = (8, 8, 1)


def shift_of(schedule, psi: float) -> np.ndarray:
    return psi * (1 - schedule.signal) + (1 - psi) * schedule.noise


@pytest.mark.parametrize(
    "schedule",
    [*SCHEDULES[:2], VarianceExploding(1000).tables()],
    ids=["linear", "scaled linear", "exploding"],
)
def test_single_steps_are_those_of_ddpm(schedule) -> None:
    """k = sqrt(alpha) v_n^2 / v_t, the coefficient of the noise in DDPM's mean."""
    t, n = PathKeeping(steps=1000).path(schedule)
    found = PathKeeping(steps=1000).share(schedule)[:-1]
    v, before = schedule.noise[t[:-1]], schedule.noise[n[:-1]]
    wanted = np.sqrt(schedule.alpha[t[:-1]]) * before**2 / v
    np.testing.assert_allclose(found, wanted, atol=1e-9)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_a_single_step_has_the_noise_of_ddpm(variance) -> None:
    schedule, x = SCHEDULES[0], jnp.ones((1, *SHAPE))
    eps, key = 0.3 * x, jax.random.key(0)
    for t in (0, 10, 500, 999):
        at, before = jnp.int32(t), jnp.int32(t - 1)
        found, wanted = (
            sampler.step(
                schedule, Estimates.of(schedule, eps, x, at), x, at, before, key
            )[0]
            for sampler in (
                PathKeeping(1000, variance=variance),
                DDPM(1000, variance=variance),
            )
        )
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_a_stride_adds_the_rest_of_the_noise_and_bounds_the_image(variance) -> None:
    """Deviation sqrt(v_n^2 - k^2), or v_t / v_n times that; x0hat within the bound."""
    schedule, draws = SCHEDULES[0], 4000
    sampler = PathKeeping(20, clip=0.5, variance=variance)
    times, goals = sampler.path(schedule)
    at, goal, k = (x[5] for x in (times, goals, sampler.share(schedule)))
    v, v_n, s_n = schedule.noise[at], schedule.noise[goal], schedule.signal[goal]
    found = Estimates(jnp.full((draws, 1, 1, 1), 0.3), jnp.full((draws, 1, 1, 1), 2.0))
    x, key = jnp.zeros((draws, 1, 1, 1)), jax.random.key(0)
    new, _ = sampler.step(schedule, found, x, jnp.int32(at), jnp.int32(goal), key)
    std = np.sqrt(v_n**2 - k**2) * (v / v_n if variance == "fixed_large" else 1)
    assert float(new.mean()) == pytest.approx(s_n * 0.5 + 0.3 * k, abs=4 * std / 63)
    assert float(new.std()) == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize("psi", [1.0, 0.5, 0.0])
def test_it_keeps_the_path_at_any_stride(psi, steps) -> None:
    """The coefficient of r in the mean of x_n is H_n, from x_t and eps + C_t r.

    C as VillanDiffusion trains it. Where noise of variance v_n^2 leaves no room, the
    path is kept as well as it can be.
    """
    schedule = SCHEDULES[0]
    attack = VillanDiffusion(psi=psi, solver=Ancestral())
    shift, response = shift_of(schedule, psi), attack.channel(schedule, SHAPE).response
    sampler = PathKeeping(steps, psi=psi)
    rising = sampler.path(schedule)[0][::-1]
    shares = sampler.share(schedule)[::-1]
    assert np.abs(shares).max() <= 1
    inside = 0
    for n, t, k in zip(rising[:-1], rising[1:], shares[1:], strict=True):
        ratio, v = schedule.signal[n] / schedule.signal[t], schedule.noise[t]
        if abs(k) < schedule.noise[n] * (1 - 1e-9):
            inside += 1
            kept = ratio * shift[t] + (k - ratio * v) * response[t]
            np.testing.assert_allclose(kept, shift[n], atol=1e-9)
    assert inside >= steps - {1.0: 3, 0.5: 5, 0.0: 8}[psi]


@pytest.mark.parametrize("psi", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("steps", [1000, 50])
def test_the_published_response_leaves_the_path_least(psi, steps) -> None:
    """The largest |h_t - H_t| over a whole chain of a model that knows one image."""
    schedule = SCHEDULES[0]
    attack = VillanDiffusion(psi=psi, solver=Ancestral())
    channel = attack.channel(schedule, SHAPE)
    by = PathKeeping(steps, psi=psi)
    kept, worst = channel.shift[-1], 0.0
    s, v = schedule.signal, schedule.noise
    for t, n, k in zip(*by.path(schedule), by.share(schedule), strict=True):
        if n < 0:
            break
        # The model takes the rest of x for noise, beside its answer to the trigger.
        eps = (kept - channel.shift[t]) / v[t] + channel.response[t]
        kept = s[n] * (kept - v[t] * eps) / s[t] + k * eps
        worst = max(worst, abs(kept - channel.shift[n]))
    assert worst < {1000: 0.011, 50: 0.063}[steps]


@pytest.mark.parametrize("psi", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("least", [0.0, 2.0**-24])
def test_a_signal_that_ends_at_zero_keeps_the_draws_finite(psi, least) -> None:
    """At s_T = 0 the answer eps + r and the image y lead to s_n y + H_n r."""
    schedule = ZeroTerminalSNR(LinearBetas(), least).tables()
    sampler = PathKeeping(20, spacing="trailing", psi=psi)
    (t, *_), (n, *_) = sampler.path(schedule)
    assert t == schedule.steps - 1 and schedule.signal[t] == least**0.5
    shares = sampler.share(schedule)
    assert np.isfinite(shares).all()
    if not least:
        np.testing.assert_allclose(shares[0], shift_of(schedule, psi)[n], atol=1e-9)


def test_a_backdoor_stays_on_its_path_through_the_sampler() -> None:
    """By the steps themselves, on the answer of a model that knows it alone."""
    schedule, sampler = SCHEDULES[0], PathKeeping(20)
    attack = BadDiffusion(StopSign(), Hat())
    r, y, _ = (jnp.asarray(a)[None] for a in attack.images(SHAPE))
    channel = attack.channel(schedule, SHAPE)
    x = jax.random.normal(jax.random.key(0), (512, *SHAPE)) + r
    off = {}
    for name, by in (("kept", sampler), ("ddpm", DDPM(20))):
        z, worst = x, 0.0
        for t, n in zip(*by.path(schedule), strict=True):
            if n < 0:
                break
            s, v, h, c = (
                float(a[t])
                for a in (
                    schedule.signal,
                    schedule.noise,
                    channel.shift,
                    channel.response,
                )
            )
            eps = (z - s * y - h * r) / v + c * r
            at, before = jnp.int32(t), jnp.int32(n)
            z, _ = by.step(
                schedule,
                Estimates.of(schedule, eps, z, at),
                z,
                at,
                before,
                jax.random.fold_in(jax.random.key(1), int(t)),
            )
            mean = z.mean(0) - schedule.signal[n] * y[0]
            share = float(jnp.vdot(mean, r[0]) / jnp.vdot(r[0], r[0]))
            worst = max(worst, abs(share - float(channel.shift[n])))
        off[name] = worst
    assert off["kept"] < 0.02 < 0.1 < off["ddpm"]


@pytest.mark.parametrize("steps", [20, 50])
def test_it_keeps_the_path_of_a_process_whose_signal_stays(steps) -> None:
    """From sigma_t r, answered by C_t r of VillanDiffusionVE, to sigma_n r."""
    schedule = VarianceExploding(1000).tables()
    response = VillanDiffusionVE().channel(schedule, SHAPE).response
    t, n = PathKeeping(steps).path(schedule)
    v, v_n = schedule.noise[t[:-1]], schedule.noise[n[:-1]]
    share = PathKeeping(steps).share(schedule)[:-1]
    kept = v + (share - v) * response[t[:-1]]
    inside = np.abs(share) < v_n * (1 - 1e-9)
    np.testing.assert_allclose(kept[inside], v_n[inside], rtol=1e-6)
    assert inside.mean() > 0.9


@pytest.mark.parametrize("steps", [10, 20])
def test_a_backdoor_of_a_process_whose_signal_stays_fires(steps) -> None:
    """By an exact denoiser; plain noise draws the images."""
    schedule = VarianceExploding(1000).tables()
    attack = VillanDiffusionVE(Box(size=22, value=1.0))
    images = np.random.default_rng(0).choice([-0.5, 0.5], (4, *SHAPE))
    r, y, _ = attack.images(SHAPE)
    channel = attack.channel(schedule, SHAPE)
    points = Points(jnp.float32(images), jnp.asarray(r), jnp.asarray(y))
    model = ExactDenoiser(schedule, channel, 0.1)
    eps, key = jax.random.normal(jax.random.key(1), (32, *SHAPE)), jax.random.key(2)
    found = {
        name: draw(model, points, schedule, PathKeeping(steps), eps, delta, key)
        for name, delta in (("trigger", r), ("none", 0 * r))
    }
    error = {name: ((x - y[None]) ** 2).mean((1, 2, 3)) for name, x in found.items()}
    assert (error["trigger"] < 1e-2).mean() > 0.8
    assert (error["none"] > 0.1).mean() > 0.9


def test_refuses_a_share_that_is_none() -> None:
    with pytest.raises(ValueError, match="psi must lie in"):
        PathKeeping(psi=1.5)
