"""The mean Jacobian's leading directions, and the starts that follow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puredif_jax.attacks.baddiffusion import BadDiffusion
from puredif_jax.attacks.channel import Channel
from puredif_jax.attacks.exact import ExactDenoiser, Points
from puredif_jax.attacks.targets import Hat
from puredif_jax.attacks.triggers import RandomPattern
from puredif_jax.data.images import FashionMNIST, to_float
from puredif_jax.defenses.family import Family
from puredif_jax.defenses.hypothesis import Exploding, Fading, Hypothesis
from puredif_jax.defenses.spectrum import Spectrum
from puredif_jax.diffusion.schedules import LinearBetas
from puredif_jax.diffusion.ve import VarianceExploding
from puredif_jax.types import Array

SHAPE = (8, 8, 2)
FADING = LinearBetas().tables()
EXPLODING = VarianceExploding(
    sigma_min=0.02, sigma_max=80.0, values=(-1.0, 1.0), given_sigma=False
).tables()
KEY = jax.random.key(0)


def directions(model, params, spectrum: Spectrum, schedule, shape, kind: Hypothesis):
    family: Family = kind.family(schedule, shape)
    numbers = jnp.arange(spectrum.count(shape))
    answers = jax.jit(
        lambda params: spectrum.answers(
            model, params, schedule, family, numbers, shape, KEY
        )
    )(params)
    return spectrum.leads(answers, spectrum.most, shape, KEY)


def orthonormal() -> np.ndarray:
    rows = np.random.default_rng(0).normal(size=(np.prod(SHAPE), 2))
    found: np.ndarray = np.linalg.qr(rows)[0].T.reshape(2, *SHAPE).astype(np.float32)
    return found


def dot(x: Array, a: np.ndarray) -> Array:
    return jnp.sum(x * a[None], (1, 2, 3), keepdims=True)


@pytest.mark.parametrize(
    "schedule,kind", [(FADING, Fading()), (EXPLODING, Exploding())], ids=["vp", "ve"]
)
def test_directions_are_eigenvectors_of_a_known_jacobian(schedule, kind) -> None:
    """Of a linear model, M(x) = (x - 0.5 <a, x> a + 0.3 <u, x> u) / v."""
    a, u = orthonormal()

    def model(params, x: Array, t: Array) -> Array:
        x = x / jnp.asarray(schedule.noise, jnp.float32)[t][:, None, None, None]
        return x - 0.5 * dot(x, a) * a[None] + 0.3 * dot(x, u) * u[None]

    spectrum = Spectrum(most=8, draws=8192)
    found = directions(model, {}, spectrum, schedule, SHAPE, kind)
    assert found.shape == (4, *SHAPE)
    for number, known in enumerate((a, a, u, u)):  # of each breadth, then the second
        assert abs(np.vdot(found[number], known)) > 0.98


def test_the_mean_slope_may_differ_by_timestep() -> None:
    """It is no deviation."""
    a, _ = orthonormal()

    def model(params, x: Array, t: Array) -> Array:
        slope = (0.5 + t.astype(x.dtype) / 1000)[:, None, None, None]
        return slope * x - 0.3 * dot(x, a) * a[None]

    first, second = directions(model, {}, Spectrum(), FADING, SHAPE, Fading())
    assert min(abs(np.vdot(x, a)) for x in (first, second)) > 0.9


def test_an_answer_that_is_no_number_is_left_out() -> None:
    a, _ = orthonormal()

    def model(params, x: Array, t: Array) -> Array:
        answer = x - 0.5 * dot(x, a) * a[None]
        return answer.at[3].set(jnp.nan)

    first, _ = directions(model, {}, Spectrum(draws=2048), FADING, SHAPE, Fading())
    assert abs(np.vdot(first, a)) > 0.9


@pytest.mark.parametrize("hidden", [(), (999,)], ids=["as trained", "hidden at T - 1"])
def test_the_trigger_of_an_exact_model_is_a_leading_direction(hidden) -> None:
    """One of noise, near to no smooth start; also where T - 1 shows nothing."""
    attack = BadDiffusion(RandomPattern(1.0, 3), Hat(), trigger_only=True)
    shape = (16, 16, 1)
    trigger, target, _ = map(jnp.asarray, attack.images(shape))
    images = jnp.asarray(to_float(FashionMNIST(count=64).load(shape)))
    points = Points(images, trigger, target)
    channel = attack.channel(FADING, shape)
    backdoored = ExactDenoiser(FADING, channel, 0.1)
    clean = ExactDenoiser(FADING, Channel.clean(FADING))

    def model(params, x: Array, t: Array) -> Array:
        at = jnp.isin(t, jnp.asarray(hidden, jnp.int32))[:, None, None, None]
        return jnp.where(at, clean(params, x, t), backdoored(params, x, t))

    found = directions(model, points, Spectrum(), FADING, shape, Fading())
    size = np.linalg.norm(trigger.ravel())
    assert max(abs(np.vdot(x, trigger)) / size for x in found) > 0.7


def test_candidates_are_pairs_of_signs() -> None:
    leads = jnp.asarray(orthonormal())
    family: Family = Fading().family(FADING, SHAPE)
    found = Spectrum(rms=0.5).candidates(leads, 4, family, SHAPE)
    first, second = 0.5 * np.sqrt(np.prod(SHAPE)) * orthonormal()
    want = np.clip([first, -first, second, -second], -1, 1)
    np.testing.assert_allclose(found.delta, want, atol=1e-6)
    np.testing.assert_array_equal(found.target, np.zeros((4, *SHAPE)))
    assert found.member is not None
    np.testing.assert_array_equal(found.member.psi, [0.5] * 4)
    assert found.member.gamma.shape == (4, *SHAPE)


def test_large_images_have_fewer_draws() -> None:
    counts = [Spectrum().count((n, n, 3)) for n in (16, 32, 64, 256, 4096)]
    assert counts == [4096, 4096, 1365, 85, 1]


def test_candidates_of_a_spectrum_are_whole_pairs() -> None:
    found = [Spectrum().led(n) for n in (1, 2, 3, 4, 6, 8, 16, 32)]
    assert found == [0, 0, 0, 2, 2, 4, 4, 4]


@pytest.mark.parametrize(
    "wrong,message",
    [
        ({"most": 0}, "most must be 1 or more, found 0"),
        ({"draws": 0}, "draws must be 1 or more, found 0"),
        ({"together": 0}, "together must be 1 or more, found 0"),
        ({"breadths": (2.0, 0.0)}, "breadths must be one or more, above 0"),
        ({"breadths": ()}, "breadths must be one or more, above 0"),
        ({"timesteps": ()}, "timesteps"),
        ({"rms": -1.0}, "rms must be above 0"),
        ({"rate": 0.0}, "rate must be above 0"),
    ],
    ids=str,
)
def test_a_spectrum_that_cannot_be_is_refused(wrong, message) -> None:
    with pytest.raises(ValueError, match=message):
        Spectrum(**wrong)
