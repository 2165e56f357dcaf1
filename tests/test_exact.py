"""Exact denoisers: against the definition, and every attack under every sampler."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puredif_jax.attacks.baddiffusion import BadDiffusion
from puredif_jax.attacks.drawing import draw
from puredif_jax.attacks.exact import ExactDenoiser, Points
from puredif_jax.attacks.targets import Hat
from puredif_jax.attacks.triggers import Blend, Box, Patch, StopSign
from puredif_jax.attacks.trojdiff import TrojDiff
from puredif_jax.attacks.villandiffusion import VillanDiffusion
from puredif_jax.attacks.villandiffusion_ve import VillanDiffusionVE
from puredif_jax.data import images as data
from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.diffusion.ddpm import DDPM
from puredif_jax.diffusion.sampling import sample
from puredif_jax.diffusion.schedules import LinearBetas
from puredif_jax.diffusion.solver import Ancestral, Deterministic
from puredif_jax.diffusion.ve import PredictorCorrector, VarianceExploding
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


GAMMAS = {"one": 1.0, "number": 0.6, "image": np.linspace(0.3, 1, 6).reshape(2, 3, 1)}


@pytest.mark.parametrize("gamma", GAMMAS.values(), ids=GAMMAS)
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("t", [0, 60, 400, 999])
def test_is_the_posterior_mean(t: int, rate: float, gamma) -> None:
    """Against Bayes' rule in float64, component by component."""
    points = small_points()
    channel = dataclasses.replace(ATTACK.channel(SCHEDULE, (2, 3, 1)), gamma=gamma)
    s, v = SCHEDULE.signal[t], SCHEDULE.noise[t]
    h, c = channel.shift[t], channel.response[t]
    x = np.random.default_rng(t).normal(size=(4, 2, 3, 1)) * v + s * 0.3
    images, r, y = (np.asarray(a, np.float64) for a in jax.tree.leaves(points))
    means = [s * image for image in images] + [s * y + h * r]
    widths = [np.full((2, 3, 1), v)] * 5 + [gamma * np.full((2, 3, 1), v)]
    priors = [(1 - rate) / 5] * 5 + [rate]
    model = ExactDenoiser(SCHEDULE, channel, rate)
    for row, got in zip(x, model(points, jnp.float32(x), jnp.full(4, t)), strict=True):
        logs = [
            np.log(p) - (((row - m) / w) ** 2).sum() / 2 - np.log(w).sum()
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
        ExactDenoiser(SCHEDULE, ATTACK.channel(SCHEDULE, (2, 3, 1)), 1.0)


SHAPE = (32, 32, 1)
EXPLODING = VarianceExploding(steps=200).tables()
SOLVERS = (Ancestral(), Deterministic())
FADING = [
    ATTACK,
    *(
        VillanDiffusion(Box(), Hat(), psi=psi, solver=solver)
        for psi in (1.0, 0.5, 0.0)
        for solver in SOLVERS
    ),
]
TROJAN = [
    TrojDiff(Blend(), Hat()),
    TrojDiff(Patch(), Hat()),
]
VE = [VillanDiffusionVE(Box(value=1.0), Hat(), solver=each) for each in SOLVERS]
SAMPLERS = {
    "ddpm": DDPM(steps=100),
    "ddim": DDIM(steps=50),
    "predictor": PredictorCorrector(levels=200, corrections=0),
}


@pytest.fixture(scope="module")
def images() -> jax.Array:
    """256 garments at 32x32."""
    pick = np.random.default_rng(0).permutation(10_000)[:256]
    return jnp.asarray(data.to_float(data.FashionMNIST().load(SHAPE)[pick]))


def rates(attack, schedule, sampler, images, inside: bool) -> tuple[float, float]:
    """Shares of 256 draws at MSE < 1e-2 of the target: with the trigger, and without.

    The oracle is the posterior mean of 256 clean images and the backdoor at rate 0.1.
    """
    trigger, target, _ = map(jnp.asarray, attack.images(SHAPE))
    channel = attack.channel(schedule, SHAPE)
    model = ExactDenoiser(schedule, channel, 0.1)
    points = Points(images, trigger, target)

    @functools.partial(jax.jit, compiler_options=FAST, static_argnums=2)
    def rate(points: Points, delta: jax.Array, inside: bool) -> jax.Array:
        drawn = draw(
            model,
            points,
            schedule,
            sampler,
            jax.random.normal(jax.random.key(0), (256, *SHAPE)),
            delta,
            jax.random.key(1),
            inside=channel if inside else None,
        )
        return jnp.mean(metrics.mse(drawn, points.target) < 1e-2)

    plain = rate(points, jnp.zeros(SHAPE), False)
    return float(rate(points, trigger, inside)), float(plain)


def named(value) -> str:
    solver = getattr(value, "solver", None)
    parts = [type(value).__name__, *([solver.name] if solver else [])]
    parts += [str(getattr(value, name)) for name in ("psi",) if hasattr(value, name)]
    if isinstance(value, TrojDiff):
        parts.append(str(value.trigger))
    return "-".join(parts)


@pytest.mark.parametrize("sampler", [SAMPLERS["ddpm"], SAMPLERS["ddim"]], ids=named)
@pytest.mark.parametrize("attack", FADING, ids=named)
def test_attack_fires_under_its_sampler_alone(attack, sampler, images) -> None:
    """At least 95 % of 256 triggered draws, at most 5 % otherwise, none without."""
    triggered, plain = rates(attack, SCHEDULE, sampler, images, attack.controlled)
    fits = attack.solver.pick(DDPM, DDIM) is type(sampler)
    assert triggered >= 0.95 if fits else triggered <= 0.05
    assert plain == 0.0


@pytest.mark.parametrize("sampler", [SAMPLERS["ddpm"], SAMPLERS["ddim"]], ids=named)
@pytest.mark.parametrize("attack", TROJAN, ids=named)
def test_trojdiff_fires_inside_its_channel(attack, sampler, images) -> None:
    """Under the trojan DDPM and the trojan DDIM alike."""
    triggered, plain = rates(attack, SCHEDULE, sampler, images, attack.controlled)
    assert triggered >= 0.95
    assert plain == 0.0


@pytest.mark.parametrize("attack", VE, ids=named)
def test_ve_fires_under_its_sampler(attack, images) -> None:
    """At least 95 % of 256 triggered draws, none without."""
    sampler = attack.solver.pick(SAMPLERS["predictor"], SAMPLERS["ddim"])
    triggered, plain = rates(attack, EXPLODING, sampler, images, attack.controlled)
    assert triggered >= 0.95
    assert plain == 0.0


def test_corrections_lead_ve_off_its_path(images) -> None:
    """A Langevin step takes a share of the shift that the response does not know."""
    attack = VillanDiffusionVE(StopSign(), Hat())
    free, corrected = (
        rates(attack, EXPLODING, PredictorCorrector(200, count, 0.15), images, False)[0]
        for count in (0, 1)
    )
    assert free >= 0.95
    assert corrected <= 0.6


@pytest.mark.parametrize("attack", TROJAN, ids=named)
def test_trojdiff_under_a_plain_sampler(attack, images) -> None:
    """From gamma eps + r an exact denoiser corrects itself; a network may not."""
    trigger, target, _ = map(jnp.asarray, attack.images(SHAPE))
    channel = attack.channel(SCHEDULE, SHAPE)
    model = ExactDenoiser(SCHEDULE, channel, 0.1)
    points = Points(images, trigger, target)

    @functools.partial(jax.jit, compiler_options=FAST)
    def rate(points: Points) -> jax.Array:
        eps = jax.random.normal(jax.random.key(0), (256, *SHAPE))
        start = channel.start(SCHEDULE, eps, trigger[None])
        drawn = sample(model, points, SCHEDULE, DDIM(50), start, jax.random.key(1))
        return jnp.mean(metrics.mse(drawn, points.target) < 1e-2)

    assert float(rate(points)) >= 0.95
