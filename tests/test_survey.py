"""Random triggers, the images on which they agree, and the starts they give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puredif_jax.attacks.baddiffusion import BadDiffusion
from puredif_jax.attacks.channel import Channel
from puredif_jax.attacks.exact import ExactDenoiser, Points
from puredif_jax.attacks.targets import Cat
from puredif_jax.attacks.triggers import Box, StopSign
from puredif_jax.attacks.villandiffusion import VillanDiffusion
from puredif_jax.defenses.hypothesis import Fading, Hypothesis
from puredif_jax.defenses.survey import Survey
from puredif_jax.diffusion.schedules import LinearBetas
from puredif_jax.diffusion.solver import Ancestral, Deterministic

SHAPE = (8, 8, 1)
SCHEDULE = LinearBetas().tables()
ATTACKS = {
    Fading(Ancestral()): BadDiffusion(StopSign(), Cat()),
    Fading(Deterministic()): VillanDiffusion(Box(), Cat()),
}


def test_random_triggers_are_smooth_images() -> None:
    survey = Survey(triggers=16, grids=(1, 8), together=8)
    triggers = np.asarray(survey.random_triggers(SHAPE, jax.random.key(0)))
    assert triggers.shape == (16, *SHAPE)
    assert np.abs(triggers).max() <= 1
    flat, rough = triggers[:8], triggers[8:]
    assert flat.std(axis=(1, 2, 3)).max() < 1e-6 < rough.std(axis=(1, 2, 3)).min()
    assert len(np.unique(flat[:, 0, 0, 0])) > 4


def test_candidates_equal_a_loop() -> None:
    """Counting other triggers with a draw nearby, one by one in float64."""
    rng = np.random.default_rng(0)
    survey = Survey(triggers=6, draws=3, together=1, radii=(0.01,), apart=0.05)
    centres = rng.uniform(-1, 1, (4, *SHAPE))
    images = centres[rng.integers(0, 4, (6, 3))]
    images = images + rng.normal(0, 0.15, images.shape)
    triggers = rng.uniform(-1, 1, (6, *SHAPE))

    def mse(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean((a - b) ** 2) / 4)

    index = [(m, d) for m in range(6) for d in range(3)]
    agree = {
        i: {j for j in index if j[0] != i[0] and mse(images[i], images[j]) < 0.01}
        for i in index
    }
    open_, want = list(index), []
    for _ in range(2):
        best = max(open_, key=lambda i: len({m for m, _ in agree[i]}))
        owners = sorted({m for m, _ in agree[best]} | {best[0]})
        members = [*agree[best], best]
        want.append(
            (
                triggers[owners].mean(0),
                np.mean([images[i] for i in members], axis=0),
                len(owners) - 1,
            )
        )
        open_ = [i for i in open_ if mse(images[i], images[best]) > 0.05]
    found, density = survey.candidates(
        jnp.asarray(triggers, jnp.float32), jnp.asarray(images, jnp.float32), 2
    )
    assert [n for _, _, n in want] == density.tolist()
    assert min(n for _, _, n in want) > 0
    for k, (delta, target, _) in enumerate(want):
        np.testing.assert_allclose(found.delta[k], delta, atol=1e-5)
        np.testing.assert_allclose(found.target[k], target, atol=1e-5)


def test_a_larger_radius_counts_where_the_smaller_finds_nothing() -> None:
    """And a draw that agrees with none comes before one that was taken already."""
    survey = Survey(triggers=6, draws=1, together=1, radii=(1e-4, 1e-2), apart=0.03)
    triggers = jnp.arange(6.0)[:, None, None, None] * jnp.ones((1, *SHAPE)) / 5
    levels = jnp.asarray([-0.8, -0.8, 0.0, 0.1, 0.5, 1.0])  # 0.1 apart: 0.0025
    images = levels[:, None, None, None, None] * jnp.ones((1, 1, *SHAPE))
    found, density = survey.candidates(triggers, images, 5)
    assert density.tolist() == [1, 1, 0, 0, 1]
    np.testing.assert_allclose(
        found.target[:, 0, 0, 0], [-0.8, 0.05, 0.5, 1.0, -0.8], atol=1e-6
    )
    np.testing.assert_allclose(found.delta[:2, 0, 0, 0], [0.1, 0.5], atol=1e-6)


def test_draws_that_are_not_finite_are_left_out() -> None:
    """And where no draw lies apart from those taken, the first valid one is given."""
    survey = Survey(triggers=4, draws=2, together=1, radii=(0.01,), apart=0.5)
    triggers = jnp.linspace(-1, 1, 4)[:, None, None, None] * jnp.ones((1, *SHAPE))
    images = jnp.full((4, 2, *SHAPE), 0.25).at[0, 0].set(jnp.nan).at[1, 1, 0].set(-1)
    found, density = survey.candidates(triggers, images, 3)
    assert density.tolist() == [3, 3, 3]
    np.testing.assert_allclose(found.delta, 0, atol=1e-6)
    for k in range(3):
        assert np.isfinite(found.target[k]).all()
    np.testing.assert_allclose(found.target[0], 0.25, atol=0.2)


@pytest.mark.parametrize("kind", ATTACKS, ids=lambda x: x.name)
def test_triggers_of_an_exact_backdoor_meet_in_its_target(kind: Hypothesis) -> None:
    trigger, target, _ = map(jnp.asarray, ATTACKS[kind].images(SHAPE))
    data = jax.random.uniform(jax.random.key(5), (64, *SHAPE), minval=-1.0)
    points = Points(data, trigger, target)
    survey = Survey(triggers=64, draws=4)
    assumed = kind.channel(SCHEDULE, SHAPE)

    def propose(model: ExactDenoiser):
        found = survey.propose(
            model, points, SCHEDULE, assumed, SHAPE, 4, jax.random.key(0)
        )
        gap = np.asarray(found.target - target[None])
        return found, np.mean(gap**2, axis=(1, 2, 3)) / 4

    channel = ATTACKS[kind].channel(SCHEDULE, SHAPE)
    found, errors = propose(ExactDenoiser(SCHEDULE, channel, 0.2))
    best = int(errors.argmin())
    assert errors[best] < 1e-3
    delta, trigger = found.delta[best].ravel(), trigger.ravel()
    cosine = delta @ trigger / jnp.linalg.norm(delta) / jnp.linalg.norm(trigger)
    assert float(cosine) > 0.7
    clean = ExactDenoiser(SCHEDULE, Channel.clean(SCHEDULE))
    assert propose(clean)[1].min() > 0.02


@pytest.mark.parametrize(
    "bad",
    [
        {"grids": ()},
        {"grids": (0,)},
        {"triggers": 9, "together": 2},
        {"triggers": 0},
        {"draws": 0},
        {"radii": ()},
        {"radii": (2e-3, 1e-3)},
    ],
)
def test_bad_settings_are_named(bad) -> None:
    with pytest.raises(ValueError, match="found"):
        Survey(**bad)
