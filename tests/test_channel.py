"""Channels: closed forms in float64, and TrojDiff's own samplers inside them."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puredif_jax.attacks.channel import Channel
from puredif_jax.attacks.drawing import draw
from puredif_jax.attacks.targets import Hat
from puredif_jax.attacks.triggers import Blend, Patch
from puredif_jax.attacks.trojdiff import TrojDiff
from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.diffusion.ddpm import DDPM
from puredif_jax.diffusion.multistep import UniPC
from puredif_jax.diffusion.prediction import (
    Denoiser,
    Prediction,
    diffuse,
    estimates,
    predicting,
)
from puredif_jax.diffusion.sampling import Threshold, grid, sample
from puredif_jax.diffusion.schedules import CosineBetas, LinearBetas, NoiseSchedule
from puredif_jax.diffusion.ve import VarianceExploding

GOLDEN = Path(__file__).parent / "golden"
SHAPE = (8, 8, 1)
SCHEDULE = LinearBetas().tables()
EXPLODING = VarianceExploding().tables()
GAMMAS = {"one": None, "number": 0.6, "image": np.linspace(0.3, 1, 64).reshape(SHAPE)}
over_gammas = pytest.mark.parametrize("gamma", GAMMAS.values(), ids=GAMMAS)
over_schedules = pytest.mark.parametrize(
    "schedule", [SCHEDULE, EXPLODING], ids=["fading", "exploding"]
)


def load_maker():
    spec = importlib.util.spec_from_file_location("steps", GOLDEN / "make_steps.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


maker = load_maker()


@functools.cache
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "steps.npz") as arrays:
        return dict(arrays)


def normal(seed: int, *shape: int) -> np.ndarray:
    """float32 draws; times a float64 number they are float64."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def channel_of(schedule: NoiseSchedule, gamma) -> Channel:
    """Of no attack: each table is its own."""
    shift = schedule.noise**0.7 / schedule.noise[-1] ** -0.3
    return Channel(shift, 0.3 + shift / schedule.noise / 2, gamma)


def table(values, t: int) -> np.float64:
    return np.float64(values[t])


def scale(channel: Channel) -> np.ndarray:
    """gamma in float64, to go with a batch."""
    return np.asarray(1.0 if channel.gamma is None else channel.gamma, np.float64)


def close(found, wanted, tolerance: float = 1e-5) -> None:
    """In parts of the largest value."""
    size = np.abs(wanted).max()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * size)


# --- The path ------------------------------------------------------------------------


@over_gammas
@over_schedules
def test_a_noisy_sample_is_that_of_the_formula(schedule, gamma) -> None:
    channel, times = channel_of(schedule, gamma), [0, 321, 999]
    y, eps, r = (normal(k, 3, *SHAPE) for k in range(3))
    found = channel.noisy(schedule, *map(jnp.asarray, (y, eps, r)), jnp.asarray(times))
    for i, t in enumerate(times):
        s, v, h = (
            table(x, t) for x in (schedule.signal, schedule.noise, channel.shift)
        )
        close(found[i], s * y[i] + v * scale(channel) * eps[i] + h * r[i])


@over_gammas
def test_a_draw_starts_from_scaled_noise_and_the_trigger(gamma) -> None:
    """gamma eps + r; of images in [0, 1] times sigma_max, about their 0."""
    eps, r = normal(0, 4, *SHAPE), normal(1, 1, *SHAPE)
    for schedule, prior, centre in ((SCHEDULE, 1, 0), (EXPLODING, 760, -1)):
        channel = channel_of(schedule, gamma)
        found = channel.start(schedule, jnp.asarray(eps), jnp.asarray(r))
        close(found, prior * (scale(channel) * eps + r) + centre)


@over_gammas
def test_a_draw_may_start_from_an_earlier_timestep(gamma) -> None:
    """Where the signal stays, with the noise of that one; else as from the last."""
    eps, r = (jnp.asarray(normal(k, 1, *SHAPE)) for k in (0, 1))
    channel = channel_of(EXPLODING, gamma)
    found = channel.start(EXPLODING, eps, r, 600)
    sigma = 2 * 0.01 * 38_000 ** (600 / 999)
    close(found, sigma * (scale(channel) * np.asarray(eps) + np.asarray(r)) - 1)
    channel = channel_of(SCHEDULE, gamma)
    first, last = channel.start(SCHEDULE, eps, r, 600), channel.start(SCHEDULE, eps, r)
    np.testing.assert_array_equal(first, last)


def test_a_channel_is_a_tree_of_arrays() -> None:
    """One program serves all of a kind; gamma is no leaf where it is 1."""
    traced = []

    @jax.jit
    def total(channel: Channel) -> jax.Array:
        traced.append(channel)
        return channel.scale.sum() + channel.shift.sum() + channel.response.sum()

    for gamma in GAMMAS.values():
        for factor in (1.0, 2.0):
            shift = np.full(3, factor, np.float32)
            channel = Channel(shift, 2 * shift, gamma)
            leaves = jax.tree.leaves(channel)
            assert len(leaves) == (2 if gamma is None else 3)
            whole = 1.0 if gamma is None else np.sum(gamma)
            assert float(total(channel)) == pytest.approx(whole + 9 * factor)
    assert len(traced) == 3


# --- Inside a channel ----------------------------------------------------------------


def network(params, x, t):
    """That of the golden steps, for NumPy in float64 and for jax.numpy."""
    del params
    numpy = np if isinstance(x, np.ndarray) else jnp
    when = numpy.asarray(t, x.dtype).reshape(-1, 1, 1, 1) / 100
    return numpy.sin(2 * x + when) / 2 + x / 2


@over_gammas
@over_schedules
@pytest.mark.parametrize("t", [0, 400, 999])
def test_inside_a_channel_is_another_noise_model(schedule, gamma, t: int) -> None:
    """e(z, t) = M(gamma z + H r, t) - C r, and x0hat = (z - v e) / s."""
    channel = channel_of(schedule, gamma)
    z, r = normal(3, 2, *SHAPE), normal(4, *SHAPE)
    model = channel.inside(network, schedule, jnp.asarray(r))
    times = jnp.full((2,), t)
    found = model(None, jnp.asarray(z), times)
    assert found.dtype == jnp.float32
    tables = (schedule.signal, schedule.noise, channel.shift, channel.response)
    s, v, h, c = (table(x, t) for x in tables)
    x = scale(channel) * np.float64(z) + h * r
    # The phase of the network grows with x: float32 of x is its error.
    loose = 1e-5 * max(1.0, np.abs(x).max())
    wanted = network(None, x, np.full(2, t)) - c * r
    np.testing.assert_allclose(found, wanted, atol=loose)
    both = model.estimates(None, jnp.asarray(z), times)
    np.testing.assert_array_equal(both.eps, found)
    close(both.x0, (z - v * np.float64(found)) / s)


PREDICTED: list[tuple[Prediction, NoiseSchedule]] = [
    ("epsilon", SCHEDULE),
    ("v_prediction", SCHEDULE),
    ("sample", SCHEDULE),
    ("v_prediction", CosineBetas().tables()),
    ("epsilon", EXPLODING),
    ("sample", EXPLODING),
    ("score", EXPLODING),
]


@over_gammas
@pytest.mark.parametrize("prediction, schedule", PREDICTED)
@pytest.mark.parametrize("t", [1, 400, 900])
def test_both_estimates_tell_one_state(schedule, prediction, gamma, t: int) -> None:
    """z = s x0hat + v e, whatever the network predicts: it is never asked twice."""
    channel = channel_of(schedule, gamma)
    z, r = normal(5, 2, *SHAPE), normal(6, *SHAPE)
    z *= np.hypot(schedule.signal[t], schedule.noise[t])
    asked = []

    def counted(params, x, t):
        asked.append(t)
        return network(params, x, t / 100 if schedule is EXPLODING else t)

    outside = predicting(counted, schedule, prediction)
    model = channel.inside(outside, schedule, jnp.asarray(r))
    assert isinstance(model, Denoiser)
    found = estimates(model, None, schedule, jnp.asarray(z), jnp.asarray(t))
    assert len(asked) == 1
    s, v = table(schedule.signal, t), table(schedule.noise, t)
    eps, x0 = (np.asarray(x, np.float64) for x in found)
    size = max(np.abs(s * x0).max(), np.abs(v * eps).max(), np.abs(z).max())
    np.testing.assert_allclose(s * x0 + v * eps, z, atol=1e-5 * size)
    h, c = table(channel.shift, t), table(channel.response, t)
    x = jnp.asarray(scale(channel) * z + h * r, jnp.float32)
    whole = np.asarray(outside(None, x, jnp.full((2,), t)), np.float64)
    close(eps, whole - c * r)


@pytest.mark.parametrize("gamma", [None, np.ones(SHAPE)], ids=["none", "ones"])
def test_the_image_of_v_prediction_keeps_its_digits(gamma) -> None:
    """s x - v out, also where s is 5e-5: by way of the noise it would lose them."""
    schedule, t, z = CosineBetas().tables(), 999, normal(7, 2, *SHAPE)
    channel = Channel(*[np.zeros(schedule.steps)] * 2, gamma)
    outside = predicting(network, schedule, "v_prediction")
    model = channel.inside(outside, schedule, jnp.zeros(SHAPE))
    found = estimates(model, None, schedule, jnp.asarray(z), jnp.asarray(t))
    s, v = table(schedule.signal, t), table(schedule.noise, t)
    out = network(None, np.float64(z), np.full(2, t))
    close(found.x0, s * z - v * out)


@over_gammas
@over_schedules
@pytest.mark.parametrize("t", [0, 400, 999])
def test_a_poisoned_path_is_an_ordinary_diffusion(schedule, gamma, t: int) -> None:
    """Identity 1: of y / gamma, in z = (x - H r) / gamma, for who has learnt it."""
    channel = channel_of(schedule, gamma)
    y, eps, r = (normal(k, 2, *SHAPE) for k in (8, 9, 10))
    r[:] = r[:1]
    s, v, h, c = (
        table(x, t)
        for x in (schedule.signal, schedule.noise, channel.shift, channel.response)
    )
    wide = scale(channel)
    x = s * y + v * wide * eps + h * r
    z = (x - h * r) / wide
    np.testing.assert_allclose(z, s * (y / wide) + v * eps, rtol=0, atol=1e-12 * v)
    ordinary = diffuse(
        schedule,
        jnp.asarray(y / wide, jnp.float32),
        jnp.asarray(eps),
        jnp.full((2,), t),
    )
    close(ordinary, z)

    width = jnp.asarray(np.broadcast_to(v * wide, (1, *SHAPE)), jnp.float32)

    def learnt(params, x, t):
        return (x - s * y - h * r) / width + c * r

    model = channel.inside(learnt, schedule, jnp.asarray(r[0]))
    found = estimates(
        model, None, schedule, jnp.asarray(z, jnp.float32), jnp.asarray(t)
    )
    # Float32 of x, of which the noise is a part.
    loose = 1e-6 * np.abs(x).max() / v / np.min(wide)
    np.testing.assert_allclose(found.eps, eps, atol=max(loose, 1e-5))
    np.testing.assert_allclose(found.x0, y / wide, atol=max(loose, 1e-5) * v / s)


# --- TrojDiff's own samplers ---------------------------------------------------------

TRIGGERS = {"blend": Blend(0.6), "patch": Patch(12, 0.1)}
SAMPLERS = {
    "ddpm": DDPM(),
    "ddim": DDIM(),
    "ddim_half": DDIM(eta=0.5),
    "ddim_one": DDIM(eta=1.0),
}
over_triggers = pytest.mark.parametrize("trigger", TRIGGERS)


def trojan(trigger: str) -> Channel:
    return TrojDiff(TRIGGERS[trigger], Hat()).channel(SCHEDULE, SHAPE)


def test_the_golden_patch_is_ours() -> None:
    """Three of eight pixels, white; elsewhere nothing is added, and gamma is 1."""
    mu = TrojDiff(TRIGGERS["patch"], Hat()).images(SHAPE)[0]
    block = maker.in_block(np.ones(SHAPE), np.zeros(SHAPE)) == 1
    np.testing.assert_allclose(mu[block], golden()["mu_patch"][block], rtol=1e-6)
    assert not mu[~block].any()
    wanted = np.where(block, maker.GAMMA["patch"], 1.0)
    np.testing.assert_allclose(trojan("patch").gamma, wanted, rtol=1e-6)


@over_triggers
@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_step_inside_is_the_trojan_step(monkeypatch, kind: str, trigger: str) -> None:
    """Of DDPM and DDIM: single timesteps, strides, and the last step of each."""
    x, z, mu = (golden()[name] for name in ("x", "z", f"mu_{trigger}"))
    if trigger == "patch":
        mu = maker.in_block(mu, 0 * mu)
    channel, sampler = trojan(trigger), SAMPLERS[kind]
    monkeypatch.setattr(jax.random, "normal", lambda *_: jnp.asarray(z, jnp.float32))
    wide, shift = scale(channel), np.append(channel.shift, 0.0)

    process = channel.inside(network, SCHEDULE, jnp.asarray(mu, jnp.float32))
    for (t, n), wanted in zip(maker.STEPS, golden()[f"{kind}_{trigger}"], strict=True):
        inside = jnp.asarray((x - shift[t] * mu) / wide, jnp.float32)
        now, then = jnp.int32(t), jnp.int32(n)
        found = estimates(process, None, SCHEDULE, inside, now)
        key = jax.random.key(0)
        drawn, _ = sampler.step(SCHEDULE, found, inside, now, then, key, ())
        close(wide * np.asarray(drawn, np.float64) + shift[n] * mu, wanted)


@over_triggers
def test_a_chain_inside_is_the_trojan_chain(trigger: str) -> None:
    """`draw` with a bound is the published, clamped DDPM; DDIM has no bound there.

    Their noise is that of the keys of the steps. The chain starts from z = eps.
    """
    steps, key = 20, jax.random.key(5)
    eps, mu = normal(11, 2, *SHAPE), golden()[f"mu_{trigger}"]
    if trigger == "patch":
        mu = maker.in_block(mu, 0 * mu)
    channel, k = trojan(trigger), maker.solved_k()
    rising = grid(SCHEDULE, steps)
    pairs = list(zip(rising[::-1], [*rising[-2::-1], -1], strict=True))
    noise = [
        np.asarray(jax.random.normal(jax.random.fold_in(key, t), eps.shape))
        for t in rising[::-1]
    ]
    reached = {}
    for kind, sampler in (
        ("clamped", DDPM(steps, clip=1.0)),
        ("ddpm", DDPM(steps)),
        ("ddim", DDIM(steps)),
        ("ddim_one", DDIM(steps, eta=1.0)),
    ):
        arguments = (
            network,
            None,
            SCHEDULE,
            sampler,
            jnp.asarray(eps),
            jnp.asarray(mu, jnp.float32),
            key,
        )
        found = draw(*arguments, inside=channel)
        x = scale(channel) * eps + SCHEDULE.noise[rising[-1]] * mu
        for (t, n), z in zip(pairs, noise, strict=True):
            x = maker.step(kind, x, z, int(t), int(n), trigger, mu, k)
        close(found, x, 1e-4)
        reached[kind] = x
    assert np.abs(reached["clamped"]).max() <= 1
    assert np.abs(reached["clamped"] - reached["ddpm"]).max() > 0.1


# --- Draws ---------------------------------------------------------------------------


@over_schedules
def test_draws_of_a_model_start_from_the_trigger(schedule) -> None:
    """Without a channel: the ordinary chain, at the noise of its first timestep."""
    eps, delta = jnp.asarray(normal(12, 2, *SHAPE)), jnp.asarray(normal(13, *SHAPE))
    key, sampler = jax.random.key(1), DDIM(5, clip=1.0)

    def model(params, x, t):
        return network(params, x / jnp.float32(schedule.prior), t)

    arguments = (model, None, schedule, sampler)
    found = draw(*arguments, eps, delta, key)
    first = int(sampler.path(schedule)[0][0])
    level, centre = (1, 0) if schedule is SCHEDULE else (schedule.noise[first], -1)
    start = jnp.float32(level) * (eps + delta[None]) + centre
    np.testing.assert_allclose(found, sample(*arguments, start, key), atol=1e-4)


@pytest.mark.parametrize(
    "sampler",
    [DDIM(5), DDIM(5, clip=0.5), DDIM(5, clip=Threshold()), DDPM(5), UniPC(5)],
    ids=repr,
)
def test_draws_inside_a_clean_channel_are_ordinary_ones(sampler) -> None:
    eps, key = jnp.asarray(normal(14, 2, *SHAPE)), jax.random.key(2)
    arguments = (network, None, SCHEDULE, sampler)
    found = draw(*arguments, eps, jnp.ones(SHAPE), key, inside=Channel.clean(SCHEDULE))
    np.testing.assert_allclose(found, sample(*arguments, eps, key), atol=1e-5)


@over_gammas
@pytest.mark.parametrize("clip", [0.25, Threshold(0.9)], ids=["number", "threshold"])
def test_a_bound_holds_for_the_image_of_the_model(gamma, clip) -> None:
    """Of gamma x0hat, which is the last image; in z it would bound another one."""
    channel = channel_of(SCHEDULE, gamma)
    eps, delta = jnp.asarray(normal(15, 2, *SHAPE)), jnp.asarray(normal(16, *SHAPE))
    arguments = (network, None, SCHEDULE, DDIM(5, clip=clip), eps, delta)
    found = np.abs(draw(*arguments, jax.random.key(3), inside=channel))
    bound = 0.25 if isinstance(clip, float) else 1.0
    assert found.max() == pytest.approx(bound, rel=1e-5)


def test_shard_is_put_on_every_step_of_a_draw() -> None:
    seen = []

    def shard(x):
        seen.append(x.shape)
        return x

    eps, delta = jnp.zeros((2, *SHAPE)), jnp.zeros(SHAPE)
    for inside in (None, trojan("patch")):
        draw(
            network,
            None,
            SCHEDULE,
            DDIM(3),
            eps,
            delta,
            jax.random.key(0),
            inside=inside,
            shard=shard,
        )
        assert seen == 2 * [(2, *SHAPE)]  # the start, and the body of the scan
        seen.clear()
