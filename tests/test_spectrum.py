"""The mean Jacobian's leading directions, and the starts that follow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puredif_jax.attacks.baddiffusion import BadDiffusion
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
    return spectrum.leads(answers, spectrum.starts, shape, KEY)


def orthonormal() -> np.ndarray:
    rows = np.random.default_rng(0).normal(size=(np.prod(SHAPE), 2))
    found: np.ndarray = np.linalg.qr(rows)[0].T.reshape(2, *SHAPE).astype(np.float32)
    return found


@pytest.mark.parametrize(
    "schedule,kind", [(FADING, Fading()), (EXPLODING, Exploding())], ids=["vp", "ve"]
)
def test_directions_are_singular_vectors_of_a_known_jacobian(schedule, kind) -> None:
    """Of a linear model, M(x) = x / v - 0.5 u <a, x> / v - 0.3 a <u, x> / v."""
    a, u = orthonormal()
    v = float(schedule.noise[-1])

    def model(params, x: Array, t: Array) -> Array:
        x = x / v
        first, second = (jnp.sum(x * b[None], (1, 2, 3), keepdims=True) for b in (a, u))
        return x - 0.5 * first * u[None] - 0.3 * second * a[None]

    found = directions(model, {}, Spectrum(draws=8192), schedule, SHAPE, kind)
    assert found.shape == (2, *SHAPE)
    np.testing.assert_allclose(np.abs(np.vdot(found[0], a)), 1, atol=0.05)
    np.testing.assert_allclose(np.abs(np.vdot(found[1], u)), 1, atol=0.05)


def test_an_answer_that_is_no_number_is_left_out() -> None:
    a, _ = orthonormal()

    def model(params, x: Array, t: Array) -> Array:
        off = 0.5 * jnp.sum(x * a[None], (1, 2, 3), keepdims=True) * a[None]
        answer = x - off
        return answer.at[3].set(jnp.nan)

    found = directions(model, {}, Spectrum(draws=2048), FADING, SHAPE, Fading())
    np.testing.assert_allclose(np.abs(np.vdot(found[0], a)), 1, atol=0.1)


def test_the_trigger_of_an_exact_model_is_the_leading_direction() -> None:
    """One of noise, which no smooth start is near to."""
    attack, shape = (
        BadDiffusion(RandomPattern(1.0, 3), Hat(), trigger_only=True),
        (16, 16, 1),
    )
    trigger, target, _ = map(jnp.asarray, attack.images(shape))
    images = jnp.asarray(to_float(FashionMNIST(count=64).load(shape)))
    points = Points(images, trigger, target)
    model = ExactDenoiser(FADING, attack.channel(FADING, shape), 0.1)
    first, _ = directions(model, points, Spectrum(), FADING, shape, Fading())
    cosine = np.vdot(first, trigger) / np.linalg.norm(trigger.ravel())
    assert abs(cosine) > 0.5


def test_candidates_are_pairs_of_signs_at_psi_one_and_zero() -> None:
    spectrum = Spectrum(rms=0.5)
    leads = jnp.asarray(orthonormal())
    family: Family = Fading().family(FADING, SHAPE)
    found = spectrum.candidates(leads, 4, family, SHAPE)
    want = np.clip(0.5 * np.sqrt(np.prod(SHAPE)) * orthonormal()[0], -1, 1)
    np.testing.assert_allclose(found.delta, [want, -want, want, -want], atol=1e-6)
    np.testing.assert_array_equal(found.target, np.zeros((4, *SHAPE)))
    assert found.member is not None
    np.testing.assert_array_equal(found.member.psi, [1, 1, 0, 0])
    assert found.member.gamma.shape == (4, *SHAPE)


def test_without_a_psi_each_pair_has_a_direction_of_its_own() -> None:
    leads = jnp.asarray(orthonormal())
    family: Family = Exploding().family(EXPLODING, SHAPE)
    found = Spectrum(rms=0.1).candidates(leads, 4, family, SHAPE)
    first, second = 0.1 * np.sqrt(np.prod(SHAPE)) * orthonormal()
    want = [first, -first, second, -second]
    np.testing.assert_allclose(found.delta, np.clip(want, -1, 1), atol=1e-6)


def test_large_images_have_fewer_draws() -> None:
    counts = [Spectrum().count((n, n, 3)) for n in (16, 32, 64, 256, 4096)]
    assert counts == [4096, 4096, 1365, 85, 1]


def test_candidates_of_a_spectrum_are_whole_pairs() -> None:
    found = [Spectrum().led(n) for n in (1, 2, 3, 4, 6, 8, 16, 32)]
    assert found == [0, 0, 0, 2, 2, 4, 4, 4]


@pytest.mark.parametrize(
    "wrong,message",
    [
        ({"starts": 0}, "starts must be 1 or more, found 0"),
        ({"draws": 0}, "draws must be 1 or more, found 0"),
        ({"together": 0}, "together must be 1 or more, found 0"),
        ({"breadth": 0.0}, "breadth must be above 0"),
        ({"rms": -1.0}, "rms must be above 0"),
        ({"rate": 0.0}, "rate must be above 0"),
    ],
    ids=str,
)
def test_a_spectrum_that_cannot_be_is_refused(wrong, message) -> None:
    with pytest.raises(ValueError, match=message):
        Spectrum(**wrong)
