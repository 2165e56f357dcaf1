"""Removals against their formulas, and on a model that can be repaired by hand."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puredif_jax.attacks.channel import Channel
from puredif_jax.attacks.training import Training, trainer
from puredif_jax.defenses import principal as principal_file
from puredif_jax.defenses.hypothesis import Fading, Trojan
from puredif_jax.defenses.principal import noise_in, principal, unknown
from puredif_jax.defenses.removal import (
    Backdoor,
    FineTuning,
    Pruning,
    Removal,
    ThreeTerms,
    Unlearning,
    noised,
)
from puredif_jax.diffusion.schedules import LinearBetas
from puredif_jax.diffusion.solver import Ancestral

pytestmark = pytest.mark.usefixtures("standard_promotion")
SCHEDULE, SHAPE, KEY = LinearBetas().tables(), (4, 4, 1), jax.random.key(0)
REMOVALS: list[Removal] = [FineTuning(), Pruning(0.1), ThreeTerms(), Unlearning()]
IMAGES = jax.random.uniform(jax.random.key(1), (6, *SHAPE), minval=-1)
TRIGGER = jnp.linspace(-1, 0.5, 16).reshape(SHAPE)
CLEAN = principal(np.asarray(IMAGES))


def model(params, x, t):
    """Answers a part of its input, and another part of the trigger."""
    along = jnp.tensordot(x, TRIGGER, 3) / jnp.sum(TRIGGER**2)
    return params["all"] * x + params["r"] * along[:, None, None, None] * TRIGGER[None]


def backdoor(channel: Channel | None = None) -> Backdoor:
    reference = {"all": jnp.float32(0.9), "r": jnp.float32(-0.4)}
    channel = channel or Fading(Ancestral()).channel(SCHEDULE, SHAPE)
    return Backdoor(channel, TRIGGER, reference, CLEAN)


THETA = {"all": jnp.float32(0.8), "r": jnp.float32(-0.1)}


def value(removal: Removal, params=THETA, **how: bool) -> float:
    known = backdoor()
    return float(removal.loss(model, SCHEDULE, known, params, IMAGES, KEY, **how))


def test_the_clean_term_is_the_ordinary_loss_or_follows_the_reference() -> None:
    x, eps, t = map(np.asarray, noised(SCHEDULE, IMAGES, KEY))
    s, v = (
        np.asarray(table)[np.asarray(t)].reshape(-1, 1, 1, 1)
        for table in (SCHEDULE.signal, SCHEDULE.noise)
    )
    np.testing.assert_allclose(x, s * IMAGES + v * eps, rtol=1e-5)
    answer = np.asarray(model(THETA, x, t))
    wanted = np.mean((answer - eps) ** 2)
    assert value(FineTuning()) == pytest.approx(wanted, rel=1e-5)
    follows = np.mean((answer - np.asarray(model(backdoor().reference, x, t))) ** 2)
    assert value(FineTuning(), distilled=True) == pytest.approx(follows, rel=1e-5)
    reference = backdoor().reference
    assert value(FineTuning(), reference, distilled=True) == 0


def test_three_terms_equal_their_formula() -> None:
    key_clean, key_eps = jax.random.split(KEY)
    clean = FineTuning().loss(model, SCHEDULE, backdoor(), THETA, IMAGES, key_clean)
    eps = jax.random.normal(key_eps, IMAGES.shape)
    t = jnp.full((6,), 999)
    wanted = np.asarray(model(backdoor().reference, eps, t))
    first = np.mean((np.asarray(model(THETA, eps + TRIGGER[None], t)) - wanted) ** 2)
    second = np.mean((np.asarray(model(THETA, eps, t)) - wanted) ** 2)
    total = float(clean) + 0.7 * (first + second)
    assert value(ThreeTerms(weight=0.7)) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("kind", [Fading(Ancestral()), Trojan()], ids=lambda x: x.name)
def test_unlearning_equals_its_formula(kind) -> None:
    """Of dense matrices, in float64."""
    channel = kind.channel(SCHEDULE, SHAPE)
    channel = dataclasses.replace(channel, gamma=jnp.full(SHAPE, 0.7))
    known = backdoor(channel)
    removal = Unlearning(weight=0.3)
    found = removal.loss(model, SCHEDULE, known, THETA, IMAGES, KEY, distilled=True)
    key_clean, key_plain = jax.random.split(KEY)
    rest = FineTuning().loss(
        model, SCHEDULE, known, THETA, IMAGES, key_clean, distilled=True
    )
    x, eps, t = noised(SCHEDULE, IMAGES, key_plain)
    covariance = np.cov(np.asarray(IMAGES, np.float64).reshape(6, 16), rowvar=False)
    total, shares = 0.0, []
    for i, each in enumerate(np.asarray(t)):
        s, v = SCHEDULE.signal[each], SCHEDULE.noise[each]
        noisy = s * IMAGES[i] + v * 0.7 * eps[i] + channel.shift[each] * TRIGGER
        apart = np.asarray(noisy - x[i], np.float64).reshape(16)
        taken = v * np.linalg.solve(s**2 * covariance + v**2 * np.eye(16), apart)
        own = model(known.reference, x[i : i + 1], t[i : i + 1])[0]
        ordinary = np.asarray(own) + taken.reshape(SHAPE)
        now = np.asarray(model(known.reference, noisy[None], t[i : i + 1])[0])
        way = np.asarray(own + channel.response[each] * TRIGGER) - ordinary
        share = np.vdot(now - ordinary, way) / np.vdot(way, way)
        shares.append(share)
        wanted = now - np.clip(share, 0, 1) * way
        answered = model(THETA, noisy[None], t[i : i + 1])[0]
        total += np.mean((np.asarray(answered) - wanted) ** 2) / 6
    assert float(found) == pytest.approx(float(rest) + 0.3 * total, rel=1e-3)
    assert max(shares) > 0  # so that the second term is not empty


def test_unlearning_leaves_a_linear_clean_denoiser_alone() -> None:
    """With a trigger in the span of the images, of a zero mean, at every timestep."""
    mean = jnp.mean(IMAGES, 0)

    def linear(params, x, t):
        s = jnp.asarray(SCHEDULE.signal, jnp.float32)[t].reshape(-1, 1, 1, 1)
        return params * noise_in(SCHEDULE, CLEAN, x - s * mean[None], t)

    channel = Fading(Ancestral()).channel(SCHEDULE, SHAPE)
    known = Backdoor(channel, TRIGGER, jnp.ones(()), CLEAN)
    rest = SCHEDULE, known, jnp.ones(()), IMAGES, KEY, True
    assert float(Unlearning().loss(linear, *rest)) == pytest.approx(0, abs=1e-9)
    assert (
        float(Unlearning().loss(linear, *rest[:2], jnp.ones(()) * 1.1, *rest[3:])) > 0
    )


def test_unlearning_teaches_a_model_little_that_answers_otherwise() -> None:
    """What lies on the other side of a clean answer than the backdoor's is left."""
    mean, channel = jnp.mean(IMAGES, 0), Fading(Ancestral()).channel(SCHEDULE, SHAPE)

    def bent(params, x, t):
        s = jnp.asarray(SCHEDULE.signal, jnp.float32)[t].reshape(-1, 1, 1, 1)
        along = jnp.tensordot(x - s * mean[None], TRIGGER, 3) / jnp.sum(TRIGGER**2)
        extra = along[:, None, None, None] * TRIGGER[None]
        return noise_in(SCHEDULE, CLEAN, x - s * mean[None], t) + params * extra

    taught = {}
    for share in (-0.4, 0.4):  # a backdoor of ancestral sampling answers less
        theta = jnp.float32(share)
        known = Backdoor(channel, 8 * TRIGGER, theta, CLEAN)
        taught[share] = float(
            Unlearning().loss(bent, SCHEDULE, known, theta, IMAGES, KEY, True)
        )
    assert 0 <= taught[0.4] < 0.1 * taught[-0.4]


@pytest.mark.parametrize("count", [40, 6], ids=["many images", "few images"])
def test_what_is_taken_for_noise_is_that_of_a_dense_covariance(count) -> None:
    rng = np.random.default_rng(3)
    spread = np.linspace(0.1, 1, 24).reshape(4, 3, 2)
    images = rng.normal(size=(count, 4, 3, 2)) * spread
    known, added = principal(images), rng.normal(size=(4, 4, 3, 2)).astype(np.float32)
    flat = known.directions.reshape(len(known.directions), -1)
    np.testing.assert_allclose(flat @ flat.T, np.eye(len(flat)), atol=1e-5)
    assert len(flat) == min(count - 1, 24) and (np.diff(known.variances) <= 0).all()
    covariance = np.cov(images.reshape(count, -1), rowvar=False)
    times = np.array([0, 100, 500, 999])
    found = noise_in(SCHEDULE, known, jnp.asarray(added), jnp.asarray(times))
    for t, h, each in zip(times, added, found, strict=True):
        s, v = SCHEDULE.signal[t], SCHEDULE.noise[t]
        dense = s**2 * covariance + v**2 * np.eye(24)
        wanted = v * np.linalg.solve(dense, h.reshape(-1))
        np.testing.assert_allclose(each.reshape(-1), wanted, rtol=2e-3, atol=1e-4)


def test_large_images_keep_the_components_that_fit(monkeypatch) -> None:
    """What is left of the variance is the same in all other directions."""
    images = np.random.default_rng(4).normal(size=(30, 4, 4, 1))
    whole = principal(images)
    assert whole.rest == pytest.approx(0, abs=1e-5)
    monkeypatch.setattr(principal_file, "MOST", 5 * 16)
    found = principal(images)
    np.testing.assert_allclose(found.variances, whole.variances[:5], rtol=1e-4)
    assert found.rest == pytest.approx(whole.variances[5:].sum() / 11, rel=1e-4)
    flat = found.directions.reshape(5, 16)
    dense = (flat.T * (found.variances - found.rest)) @ flat + found.rest * np.eye(16)
    s, v = SCHEDULE.signal[300], SCHEDULE.noise[300]
    wanted = v * np.linalg.solve(
        s**2 * dense + v**2 * np.eye(16), np.asarray(TRIGGER).reshape(-1)
    )
    taken = noise_in(SCHEDULE, found, TRIGGER[None], jnp.array([300]))[0]
    np.testing.assert_allclose(taken.reshape(-1), wanted, rtol=1e-3, atol=1e-5)
    monkeypatch.setattr(principal_file, "IMAGES", 10)
    assert len(principal(images).variances) == 5


def test_images_without_a_variance_leave_the_whole_trigger_noise() -> None:
    for known in (principal(np.ones((3, 4, 4, 1))), unknown(SHAPE)):
        assert len(known.variances) == 0 and known.rest == 0
        found = noise_in(SCHEDULE, known, TRIGGER[None], jnp.array([500]))
        np.testing.assert_allclose(found[0], TRIGGER / SCHEDULE.noise[500], rtol=1e-5)


def test_bytes_are_read_as_images() -> None:
    rng = np.random.default_rng(5)
    pixels = rng.integers(0, 256, (20, 4, 4, 1), np.uint8)
    first, second = principal(pixels), principal(pixels / 127.5 - 1)
    np.testing.assert_allclose(first.variances, second.variances, rtol=1e-3)


def test_a_covariance_needs_images() -> None:
    images = np.ones((3, 4, 4, 1))
    with pytest.raises(ValueError, match="two images or more, found 1"):
        principal(images[:1])
    images[1, 2, 2] = np.nan
    with pytest.raises(ValueError, match="finite images"):
        principal(images)


@pytest.mark.parametrize(
    "removal", [ThreeTerms(), Unlearning(weight=1.0)], ids=lambda x: x.name
)
@pytest.mark.parametrize("distilled", [False, True])
def test_a_removal_ends_the_answer_to_the_trigger(removal, distilled) -> None:
    """Of the model above r goes from -0.4 towards that of a clean one, 0 or less."""
    used, control = removal, FineTuning()
    ends = {}
    for each in (used, control):

        def loss(params, images, key, each=each):
            known = model, SCHEDULE, backdoor()
            return each.loss(*known, params, images, key, distilled)

        training = Training(steps=200, batch=6, learning_rate=0.02, warmup=0)
        made = trainer(loss, training)
        state = made.init(backdoor().reference, KEY)
        step = jax.jit(lambda s, _, made=made: made.step(s, IMAGES))
        state, _ = jax.lax.scan(step, state, None, length=200)
        x = TRIGGER[None] + jax.random.normal(KEY, (64, *SHAPE))
        shift = model(state.params, x, None) - model(
            state.params, x - TRIGGER[None], None
        )
        share = jnp.vdot(shift.mean(0), TRIGGER) / jnp.vdot(TRIGGER, TRIGGER)
        ends[each.name] = float(share)
    start = 0.9 - 0.4
    if isinstance(removal, ThreeTerms):
        assert ends[used.name] < start - 0.1, "the trigger is ignored"
    else:
        assert ends[used.name] > start + 0.2, "the trigger is noise"
    if distilled:
        assert ends[control.name] == pytest.approx(start, abs=0.02), "it stays"


def test_pruning_leaves_out_the_weakest_channels() -> None:
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 2, 10)), jnp.float32)
    weak = jnp.asarray([1, 1, 0.1, 1, 1, 1, 0.2, 1, 1, 1.0])
    kernel = kernel * weak.reshape(1, 1, 1, 10)
    tree = {
        "conv": {"kernel": kernel, "bias": jnp.ones(10)},
        "norm": {"scale": jnp.ones(10), "bias": jnp.ones(10)},
        "dense": {"kernel": jnp.ones((4, 10)), "bias": jnp.ones(10)},
    }
    found = Pruning(share=0.2).prepared(tree)
    gone = np.array([2, 6])
    assert not np.any(found["conv"]["kernel"][..., gone])
    assert not np.any(found["conv"]["bias"][gone])
    kept = np.setdiff1d(np.arange(10), gone)
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(
            found["conv"][name][..., kept], tree["conv"][name][..., kept]
        )
    for name in ("norm", "dense"):
        jax.tree.map(np.testing.assert_array_equal, found[name], tree[name])
    with pytest.raises(ValueError, match="share must lie"):
        Pruning(share=1.0)


@pytest.mark.parametrize("removal", REMOVALS, ids=lambda x: x.name)
def test_a_removal_is_differentiable_and_keeps_the_tree(removal: Removal) -> None:
    def loss(params):
        return removal.loss(model, SCHEDULE, backdoor(), params, IMAGES, KEY)

    found, grads = jax.jit(jax.value_and_grad(loss))(THETA)
    assert np.isfinite(float(found)) and np.isfinite(jax.tree.leaves(grads)).all()
    assert jax.tree.structure(removal.prepared(THETA)) == jax.tree.structure(THETA)
    assert removal.name not in [
        x.name for x in REMOVALS if type(x) is not type(removal)
    ]
