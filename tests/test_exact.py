"""Exact denoisers: against the definition, and every attack under every sampler."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puredif_jax.attacks import base as attacks
from puredif_jax.attacks.base import BadDiffusion, VillanDiffusion
from puredif_jax.attacks.exact import ExactDenoiser, Points
from puredif_jax.attacks.targets import Hat
from puredif_jax.attacks.triggers import Box
from puredif_jax.data import images as data
from puredif_jax.diffusion.sampling import DDIM, DDPM, sample
from puredif_jax.diffusion.schedules import LinearBetas
from puredif_jax.metrics import measures as metrics

SCHEDULE = LinearBetas().tables()
# Much is computed here, and little compiled.
FAST = {
    "xla_backend_optimization_level": 2,
    "xla_llvm_disable_expensive_passes": False,
}
ATTACK = BadDiffusion(Box(), Hat())


def small_points() -> Points:
    rng = np.random.default_rng(0)
    images, (trigger, target) = (
        rng.uniform(-1, 1, (5, 2, 3, 1)),
        rng.uniform(-1, 1, (2, 2, 3, 1)),
    )
    return Points(*(jnp.asarray(x, jnp.float32) for x in (images, trigger, target)))


@pytest.mark.parametrize("gamma", [1.0, 0.6])
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("t", [0, 60, 400, 999])
def test_is_the_posterior_mean(t: int, rate: float, gamma: float) -> None:
    """Against Bayes' rule in float64, component by component."""
    points = small_points()
    rows = ATTACK.rows(SCHEDULE)._replace(gamma=gamma)
    s, v, h, c = (float(table[t]) for table in rows[:4])
    x = np.random.default_rng(t).normal(size=(4, 2, 3, 1)) * v + s * 0.3
    images, r, y = (np.asarray(a, np.float64) for a in jax.tree.leaves(points))
    means = [s * image for image in images] + [s * y + h * r]
    widths = [v] * 5 + [gamma * v]
    priors = [(1 - rate) / 5] * 5 + [rate]
    for row, got in zip(
        x,
        ExactDenoiser(rows, rate)(points, jnp.float32(x), jnp.full(4, t)),
        strict=True,
    ):
        logs = [
            np.log(p) - ((row - m) ** 2).sum() / (2 * w**2) - row.size * np.log(w)
            if p
            else -np.inf
            for p, m, w in zip(priors, means, widths, strict=True)
        ]
        weights = np.exp(np.array(logs) - max(logs))
        weights /= weights.sum()
        answers = [(row - m) / w for m, w in zip(means, widths, strict=True)]
        answers[-1] = answers[-1] + c * r
        want = sum(w * a for w, a in zip(weights, answers, strict=True))
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)


def test_refuses_a_rate_of_one() -> None:
    with pytest.raises(ValueError, match="rate must lie in"):
        ExactDenoiser(ATTACK.rows(SCHEDULE), 1.0)


@pytest.fixture(scope="module")
def images() -> jax.Array:
    """256 garments at 32x32."""
    pick = np.random.default_rng(0).permutation(10_000)[:256]
    return jnp.asarray(data.to_float(data.FashionMNIST().load((32, 32, 1))[pick]))


@pytest.mark.parametrize("sampler", [DDPM(steps=100), DDIM(steps=50)])
@pytest.mark.parametrize(
    "attack",
    [
        ATTACK,
        VillanDiffusion(Box(), Hat()),
        VillanDiffusion(Box(), Hat(), solver="sde"),
        VillanDiffusion(Box(), Hat(), psi=0.5),
        VillanDiffusion(Box(), Hat(), psi=0.0),
        VillanDiffusion(Box(), Hat(), psi=0.0, solver="sde"),
    ],
    ids=lambda a: f"{type(a).__name__}-{a.solver}-{getattr(a, 'psi', 1)}",
)
def test_attack_fires_under_its_sampler_alone(attack, sampler, images) -> None:
    """At least 95 % of 256 triggered draws, at most 5 % otherwise, none without."""
    poison = attacks.poison(attack, (32, 32, 1))
    model = ExactDenoiser(attack.rows(SCHEDULE), 0.1)
    points = Points(images, poison.trigger, poison.target)

    @functools.partial(jax.jit, compiler_options=FAST)
    def rate(points: Points, delta: jax.Array) -> jax.Array:
        eps = jax.random.normal(jax.random.key(0), (256, 32, 32, 1))
        drawn = sample(
            model, points, SCHEDULE, sampler, eps + delta[None], jax.random.key(1)
        )
        return jnp.mean(metrics.mse(drawn, points.target) < 1e-2)

    triggered = float(rate(points, poison.trigger))
    fits = (attack.solver == "ode") == isinstance(sampler, DDIM)
    assert triggered >= 0.95 if fits else triggered <= 0.05
    assert float(rate(points, jnp.zeros((32, 32, 1)))) == 0.0
