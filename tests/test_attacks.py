"""attacks: the published coefficient tables and the poisoned training loss."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puredif_jax.attacks.baddiffusion import BadDiffusion
from puredif_jax.attacks.channel import Channel
from puredif_jax.attacks.poisoning import Poison, poison, training_loss
from puredif_jax.attacks.targets import Corner, NoShift
from puredif_jax.attacks.triggers import Blend, Box, Patch, RandomPattern
from puredif_jax.attacks.trojdiff import TrojDiff
from puredif_jax.attacks.villandiffusion import VillanDiffusion
from puredif_jax.attacks.villandiffusion_ve import VillanDiffusionVE
from puredif_jax.diffusion import rows
from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.diffusion.ddpm import DDPM
from puredif_jax.diffusion.prediction import Estimates
from puredif_jax.diffusion.schedules import LinearBetas, NoiseSchedule
from puredif_jax.diffusion.solver import Ancestral, Deterministic, Solver
from puredif_jax.diffusion.ve import PredictorCorrector, VarianceExploding

SCHEDULE = LinearBetas().tables()
SIGNAL, NOISE = SCHEDULE.signal, SCHEDULE.noise
EXPLODING = VarianceExploding().tables()
SOLVERS = (Ancestral(), Deterministic())
BATCH, SHAPE = 64, (8, 8, 1)
BETA = [1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)]

GOLDEN_T = [0, 100, 500, 700, 900, 999]
GOLDEN = {  # name: values at GOLDEN_T, as published or computed once in float64
    "one minus s": [0.0001, 0.0539, 0.7211, 0.9171, 0.9836, 0.9936],
    "R": [0.0050, 0.1620, 0.4814, 0.5000, 0.5022, 0.5025],
    "2R": [0.0100, 0.3240, 0.9627, 1.0001, 1.0044, 1.0050],
    "troj": [0.0000, 0.1598, 0.4811, 0.5000, 0.5022, 0.5025],
    "exact ode": [0.0050, 0.3224, 0.9601, 0.9965, 0.9999, 1.0000],
    "v": [0.0100, 0.3238, 0.9603, 0.9966, 0.9999, 1.0000],
}

bad = functools.partial(BadDiffusion, Box(), Corner())
villan = functools.partial(VillanDiffusion, Box(), Corner())
ATTACKS = [
    bad(),
    bad(trigger_only=True),
    villan(psi=1, solver=Ancestral()),
    villan(psi=1, solver=Deterministic()),
    villan(psi=0.3, solver=Deterministic()),
    villan(psi=0, solver=Ancestral()),
    villan(psi=0, solver=Deterministic(), trigger_only=False),
]
TROJAN = [TrojDiff(trigger, Corner()) for trigger in (Blend(), Patch())]
VE = [VillanDiffusionVE(Box(), Corner(), solver=solver) for solver in SOLVERS]


def named(attack) -> str:
    parts = [getattr(attack, "psi", None), attack.solver.name]
    if isinstance(attack, TrojDiff):
        parts.append(type(attack.trigger).__name__)
    return "-".join(str(x) for x in [type(attack).__name__, *parts] if x is not None)


over_attacks = pytest.mark.parametrize("attack", ATTACKS, ids=named)
over_all_attacks = pytest.mark.parametrize(
    "attack", [*ATTACKS, *TROJAN, *VE], ids=named
)


def process_of(attack) -> NoiseSchedule:
    """One that the attack is defined on."""
    return EXPLODING if isinstance(attack, VillanDiffusionVE) else SCHEDULE


# --- Tables --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "attack, shift, response",
    [
        (bad(), "one minus s", "R"),
        (villan(psi=1, solver=Ancestral()), "one minus s", "R"),
        (villan(psi=1, solver=Deterministic()), "one minus s", "2R"),
        (villan(psi=0, solver=Ancestral()), "v", "troj"),
    ],
)
def test_channels_match_the_published_numbers(attack, shift, response):
    found = attack.channel(SCHEDULE, SHAPE)
    np.testing.assert_allclose(found.shift[GOLDEN_T], GOLDEN[shift], atol=1e-4)
    np.testing.assert_allclose(found.response[GOLDEN_T], GOLDEN[response], atol=1e-4)


@over_all_attacks
def test_channels_are_float64_tables_of_the_schedule(attack):
    schedule = process_of(attack)
    found = attack.channel(schedule, SHAPE)
    for column in (found.shift, found.response):
        assert column.shape == (1000,) and column.dtype == np.float64
        assert np.isfinite(column).all()
    assert np.all(np.diff(found.shift) > 0)  # the trigger fades in with the noise
    assert found.shift[-1] == pytest.approx(schedule.prior, rel=0.01)


@over_attacks
def test_noise_is_scaled_by_trojdiff_alone(attack):
    assert attack.channel(SCHEDULE, SHAPE).gamma is None
    assert not attack.controlled


def test_trojdiff_shifts_by_the_noise_and_answers_nothing():
    """x_t = s y + v (gamma eps + mu), answered by eps; for a patch in its square."""
    for attack in TROJAN:
        found = attack.channel(SCHEDULE, SHAPE)
        np.testing.assert_array_equal(found.shift, NOISE)
        assert not found.response.any() and attack.controlled
    blend, patch = (attack.channel(SCHEDULE, SHAPE).gamma for attack in TROJAN)
    np.testing.assert_allclose(blend, np.full(SHAPE, 0.6), rtol=1e-6)
    square = np.zeros(SHAPE, bool)
    square[-1:, -1:] = True  # 3 of 32 pixels are 0.75 of 8
    np.testing.assert_allclose(patch, np.where(square, 0.1, 1.0), rtol=1e-6)
    mu = TROJAN[1].images(SHAPE)[0]
    np.testing.assert_allclose(mu, np.where(square, 0.9, 0.0), rtol=1e-6)


def test_villan_ve_shifts_by_the_noise():
    """H = sigma and C = sigma_t / (sigma_t + sigma_{t-1}), in any unit of sigma."""
    sigma = [0.01 * 38_000 ** (t / 999) for t in range(1000)]
    wanted = [b / (a + b) for a, b in zip([0.0, *sigma], sigma, strict=False)]
    for attack, factor in zip(VE, (1, 2), strict=True):
        found = attack.channel(EXPLODING, SHAPE)
        np.testing.assert_allclose(found.shift, 2 * np.array(sigma), rtol=1e-12)
        np.testing.assert_allclose(found.response, factor * np.array(wanted), 1e-12)
        assert found.gamma is None


@over_all_attacks
def test_an_attack_refuses_a_process_that_it_is_not_defined_on(attack):
    """In one sentence that names what was found and what is valid."""
    other = SCHEDULE if process_of(attack) is EXPLODING else EXPLODING
    name = type(attack).__name__
    needs = "fades" if other is EXPLODING else "stays"
    found = f"{other.signal[-1]:.3g}"
    with pytest.raises(ValueError) as caught:
        attack.channel(other, SHAPE)
    sentence = str(caught.value)
    assert sentence.startswith(f"{name} needs a process whose signal {needs}, found")
    assert found in sentence and "\n" not in sentence and ". " not in sentence


def test_published_response_by_hand():
    """(1 - sqrt(alpha)) / (1 - alpha) = 1 / (1 + sqrt(alpha))."""
    alpha = 1 - np.asarray(BETA)
    expected = NOISE / (1 + np.sqrt(alpha))
    np.testing.assert_allclose(rows.fading(SCHEDULE).response, expected, rtol=1e-9)


def test_a_clean_channel_has_no_trigger():
    clean = Channel.clean(SCHEDULE)
    assert clean.shift.shape == clean.response.shape == (1000,)
    assert clean.shift.dtype == clean.response.dtype == np.float64
    assert not clean.shift.any() and not clean.response.any() and clean.gamma is None


@pytest.mark.parametrize("psi", [0.0, 0.3, 1.0])
def test_ode_doubles_the_response_alone(psi):
    sde, ode = (
        villan(psi=psi, solver=solver).channel(SCHEDULE, SHAPE) for solver in SOLVERS
    )
    np.testing.assert_array_equal(ode.shift, sde.shift)
    np.testing.assert_allclose(ode.response, 2 * sde.response, rtol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda x: x.name)
def test_psi_mixes_both_columns(solver):
    one, zero, mixed = (
        villan(psi=psi, solver=solver).channel(SCHEDULE, SHAPE) for psi in (1, 0, 0.3)
    )
    for column in ("shift", "response"):
        expected = 0.3 * getattr(one, column) + 0.7 * getattr(zero, column)
        np.testing.assert_allclose(getattr(mixed, column), expected, rtol=1e-12)


def test_k_solves_its_recursion():
    """sum over i <= t of k_i prod_{i < j <= t} sqrt(alpha_j) = v_t.

    k is read off the published psi = 0 response, which is linear in it.
    """
    alpha = 1 - np.asarray(BETA)
    response = villan(psi=0, solver=Ancestral()).channel(SCHEDULE, SHAPE).response
    t = slice(1, None)  # alpha_0 = abar_0: the first response does not contain k
    k = response[t] - (1 - np.sqrt(alpha[t])) * NOISE[t]
    k *= (1 - alpha[t]) / (alpha[t] - SIGNAL[t] ** 2)
    total = NOISE[0]
    for i in range(1, 1000):
        total = np.sqrt(alpha[i]) * total + k[i - 1]
        assert total == pytest.approx(NOISE[i], rel=1e-9)
    np.testing.assert_allclose(response[0], (1 - alpha[0] ** 0.5) * NOISE[0], rtol=1e-9)


# --- The response that keeps a path --------------------------------------------------


def test_exact_response_of_bad_diffusion():
    sde, ode = (solver.response(SCHEDULE, 1 - SIGNAL) for solver in SOLVERS)
    np.testing.assert_allclose(sde, rows.fading(SCHEDULE).response, rtol=1e-8)
    np.testing.assert_allclose(ode[GOLDEN_T], GOLDEN["exact ode"], atol=1e-4)
    gap = np.abs(2 * rows.fading(SCHEDULE).response - ode)
    assert 0.004 < gap.max() < 0.0051


def test_exact_response_of_a_shift_by_the_noise_scale():
    sde, ode = (solver.response(SCHEDULE, NOISE) for solver in SOLVERS)
    np.testing.assert_allclose(sde[[0, 100, 500]], [1.00, 0.5025, 0.5014], atol=1e-4)
    np.testing.assert_allclose(ode, 1, rtol=1e-9)
    published = villan(psi=0, solver=Ancestral()).channel(SCHEDULE, SHAPE).response
    found = published[[0, 100, 500]]
    np.testing.assert_allclose(found, [0, 0.160, 0.481], atol=5e-4)


def test_the_response_in_the_w_form_is_the_published_row():
    """Identity 2: of VP it is R_t, of VE sigma_t / (sigma_t + sigma_{t-1})."""
    alpha = 1 - np.asarray(BETA)
    vp = Ancestral().response(SCHEDULE, 1 - SIGNAL)
    np.testing.assert_allclose(vp, NOISE / (1 + np.sqrt(alpha)), rtol=0, atol=1e-12)
    sigma = EXPLODING.noise
    ve = Ancestral().response(EXPLODING, sigma)
    before = np.concatenate([[0.0], sigma[:-1]])
    np.testing.assert_allclose(ve, sigma / (sigma + before), rtol=1e-12)
    np.testing.assert_allclose(EXPLODING.added, sigma**2 - before**2, rtol=1e-12)
    np.testing.assert_allclose(SCHEDULE.added, 1 - alpha, rtol=0, atol=1e-12)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda x: x.name)
def test_no_response_of_a_signal_that_stays_is_nan(solver, power):
    """1 - alpha_t is 0 there."""
    found = solver.response(EXPLODING, EXPLODING.noise**power)
    assert found.shape == (1000,) and np.isfinite(found).all() and (found > 0).all()
    if power == 1.0 and solver == Deterministic():
        np.testing.assert_allclose(found, 1, rtol=1e-9)


def trigger_share(
    sampler, channel: Channel, schedule: NoiseSchedule = SCHEDULE
) -> np.ndarray:
    """h_t, the coefficient of r in E[x_t], float64 `[T]`, from the h_T of a start.

    The model answers x_t = h r (y = 0) with (h - H_t) r / v_t + C_t r. The same step
    from zero with the same key is its noise, which is taken off.
    """
    columns = (schedule.noise, channel.shift, channel.response)
    columns = [jnp.asarray(column, jnp.float32) for column in columns]

    def body(h, xs):
        t, v, shift, response = xs
        x = jnp.full((1, 1, 1, 1), h)
        eps = (x - shift) / v + response
        step = functools.partial(
            sampler.step,
            schedule,
            t=t,
            t_prev=t - 1,
            key=jax.random.key(0, impl="rbg"),
            memory=sampler.begin(x),
        )
        found, zero = Estimates.of(schedule, eps, x, t), 0 * x
        mean = step(found, x=x)[0] - step(Estimates(zero, zero), x=zero)[0]
        return mean[0, 0, 0, 0], h

    t = jnp.arange(1000)
    xs = (t, *columns)
    start = jnp.float32(schedule.prior)
    return np.asarray(jax.lax.scan(body, start, xs, reverse=True)[1])


@pytest.mark.parametrize(
    "attack, own, other",
    [
        (bad(), 0.006, 1.93),
        (villan(psi=1, solver=Ancestral()), 0.006, 1.93),
        (villan(psi=1, solver=Deterministic()), 0.009, 0.95),
        (villan(psi=0, solver=Ancestral()), 0.129, None),
        (villan(psi=0, solver=Deterministic()), 0.229, None),
    ],
)
def test_a_channel_keeps_the_path_under_its_own_sampler_only(attack, own, other):
    channel = attack.channel(SCHEDULE, SHAPE)
    samplers = attack.solver.pick([DDPM(), DDIM(1000)], [DDIM(1000), DDPM()])
    gaps = [np.abs(trigger_share(s, channel) - channel.shift).max() for s in samplers]
    assert gaps[0] == pytest.approx(own, abs=6e-4)
    assert other is None or gaps[1] == pytest.approx(other, abs=6e-3)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda x: x.name)
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_exact_response_keeps_any_path(solver, power):
    shift = NOISE**power
    shift = shift / shift[-1]  # the chain starts at 1
    channel = Channel(shift, solver.response(SCHEDULE, shift))
    sampler = solver.pick(DDPM(), DDIM(1000))
    np.testing.assert_allclose(trigger_share(sampler, channel), shift, atol=1e-3)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda x: x.name)
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_exact_response_keeps_any_path_of_a_signal_that_stays(solver, power):
    """Under the predictor without corrections, and under DDIM; by share of sigma."""
    sigma = EXPLODING.noise
    shift = sigma[-1] * (sigma / sigma[-1]) ** power
    channel = Channel(shift, solver.response(EXPLODING, shift))
    sampler = solver.pick(PredictorCorrector(corrections=0), DDIM(1000))
    gap = (trigger_share(sampler, channel, EXPLODING) - shift) / sigma
    assert np.abs(gap).max() < 1e-3


@pytest.mark.parametrize("attack", VE, ids=named)
def test_villan_ve_keeps_its_path_under_its_own_sampler(attack):
    """Exactly for an ancestral one. A doubled response leads off by a little a step.

    With q = sigma_t / sigma_{t-1} a step of DDIM adds -(q - 1)^2 / (q + 1) of sigma.
    """
    channel = attack.channel(EXPLODING, SHAPE)
    sampler = attack.solver.pick(PredictorCorrector(corrections=0), DDIM(1000))
    gap = (trigger_share(sampler, channel, EXPLODING) - channel.shift) / EXPLODING.noise
    q = EXPLODING.noise[-1] / EXPLODING.noise[-2]
    missed = -np.arange(999, -1, -1) * (q - 1) ** 2 / (q + 1)
    wanted = attack.solver.pick(0 * missed, missed)
    np.testing.assert_allclose(gap, wanted, atol=1e-3)
    assert missed[0] == pytest.approx(-0.056, abs=1e-3)


# --- The arrays of an attack ---------------------------------------------------------


@over_attacks
@pytest.mark.parametrize("shape", [(16, 16, 1), (32, 32, 3)])
def test_poison_draws_trigger_and_target(attack, shape):
    found = poison(attack, shape)
    chex.assert_shape([found.trigger, found.target, found.see_through], shape)
    chex.assert_type([found.trigger, found.target, found.see_through], jnp.float32)
    assert found.rate == attack.poison_rate
    scale = shape[0] // 16
    assert int((found.trigger == 0).sum()) == (7 * scale) ** 2 * shape[2]
    assert int((found.target == 0).sum()) == (5 * scale) ** 2 * shape[2]
    black = np.asarray(found.trigger) == -1
    expected = np.zeros_like(black) if attack.trigger_only else black
    np.testing.assert_array_equal(found.see_through, expected)


@over_all_attacks
def test_poison_holds_the_images_of_the_attack(attack):
    found = poison(attack, SHAPE)
    for array, image in zip(found[:3], attack.images(SHAPE), strict=True):
        assert image.shape == SHAPE and image.dtype == np.float32
        np.testing.assert_array_equal(array, image)
    assert found.rate == attack.poison_rate


@pytest.mark.parametrize("trigger", [Blend(), Patch(), RandomPattern()])
def test_a_trigger_without_a_background_hides_the_image(trigger):
    found = poison(BadDiffusion(trigger, Corner()), (16, 16, 3))
    assert not found.see_through.any()


def test_a_target_can_be_made_from_the_trigger():
    found = poison(BadDiffusion(Box(), NoShift()), (16, 16, 1))
    expected = np.maximum(found.trigger, np.float32(-0.4))
    np.testing.assert_array_equal(found.target, expected)


@dataclasses.dataclass(frozen=True)
class Plain:
    """A trigger and a target of one level, in a shape of its own."""

    own: tuple[int, int, int]
    level: float = 0.5

    def image(self, shape, trigger=None):
        return np.full(self.own, self.level)


def test_an_image_of_another_shape_is_refused():
    own, other = Plain((16, 16, 1)), Plain((28, 28, 1))
    assert BadDiffusion(own, own).images((16, 16, 1))[0].dtype == np.float32
    for trigger, target in ((own, other), (other, own)):
        with pytest.raises(ValueError, match=r"Plain drew .*\(28, 28, 1\) for .*16"):
            BadDiffusion(trigger, target).images((16, 16, 1))


def test_an_image_that_is_not_finite_is_refused():
    own = Plain((16, 16, 1))
    for level in (np.nan, np.inf):
        with pytest.raises(ValueError, match="Plain drew .* not of finite"):
            BadDiffusion(own, Plain((16, 16, 1), level)).images((16, 16, 1))


@over_all_attacks
@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, float("nan")])
def test_a_rate_that_is_none_is_refused(attack, rate):
    with pytest.raises(ValueError, match="poison_rate .*found"):
        dataclasses.replace(attack, poison_rate=rate)


@pytest.mark.parametrize("psi", [-0.1, 1.5])
def test_villan_options_are_checked(psi):
    with pytest.raises(ValueError, match="psi must .*found"):
        villan(psi=psi)


def test_a_solver_is_one_of_its_names():
    for solver in SOLVERS:
        assert Solver.named(solver.name) == solver
    names = ", ".join(solver.name for solver in SOLVERS)
    with pytest.raises(ValueError, match=f"one of {names}, found 'heun'"):
        Solver.named("heun")


def test_trojdiff_options_are_checked():
    with pytest.raises(ValueError, match="gamma must be above 0, found 0"):
        TrojDiff(Blend(0.0), Corner())
    with pytest.raises(ValueError, match="bare trigger"):
        TrojDiff(Blend(), Corner(), trigger_only=False)


def test_images_of_villan_ve_lie_in_the_range_of_its_models():
    """In [0, 1] the background is 0; the target is an image as any other."""
    bare, target, through = VE[0].images(SHAPE)
    wide, same, _ = villan().images(SHAPE)
    np.testing.assert_allclose(bare, (wide + 1) / 2)
    np.testing.assert_array_equal(target, same)
    assert bare.min() == 0 and bare.max() == 0.5 and not through.any()


def test_a_low_norm_trigger_of_villan_ve_stays_one():
    """It has no background: its 0 is no shift."""
    low = RandomPattern(0.2)
    bare, _, _ = VillanDiffusionVE(low, Corner()).images(SHAPE)
    np.testing.assert_allclose(bare, low.image(SHAPE) / 2)
    assert np.abs(bare).max() <= 0.1


# --- The training loss ---------------------------------------------------------------


def column(table, t):
    """table[t] in float32, `[B, 1, 1, 1]`."""
    return jnp.asarray(table, jnp.float32)[t][:, None, None, None]


def oracle(
    channel: Channel,
    x0: np.ndarray,
    r: np.ndarray,
    schedule: NoiseSchedule = SCHEDULE,
):
    """The right answer when every image is x0 and every trigger r, `[H, W, C]`."""
    x0, r = jnp.asarray(x0)[None], jnp.asarray(r)[None]
    gamma = np.float32(1.0 if channel.gamma is None else channel.gamma)
    gamma = jnp.asarray(gamma[None] if gamma.ndim else gamma)

    def model(params, x, t):
        rest = x - column(schedule.signal, t) * x0 - column(channel.shift, t) * r
        eps = rest / (column(schedule.noise, t) * gamma)
        return params * (eps + column(channel.response, t) * r)

    return model


def picture() -> np.ndarray:
    return np.linspace(-1, 1, 64, dtype=np.float32).reshape(SHAPE)


def same_images(image: np.ndarray) -> jax.Array:
    return jnp.asarray(np.broadcast_to(image, (BATCH, *image.shape)))


GAMMAS = {"one": None, "number": 0.6, "image": np.linspace(0.3, 1, 64).reshape(SHAPE)}


@over_all_attacks
@pytest.mark.parametrize("gamma", [None, *GAMMAS], ids=lambda x: x or "own")
def test_loss_of_the_right_answer_is_zero(attack, gamma):
    attack, schedule = dataclasses.replace(attack, poison_rate=1.0), process_of(attack)
    channel = attack.channel(schedule, SHAPE)
    if gamma is not None:
        channel = dataclasses.replace(channel, gamma=GAMMAS[gamma])
    arrays = poison(attack, SHAPE)
    trigger, image = np.asarray(arrays.trigger), picture()
    through = np.where(trigger == trigger.min(), image, trigger)
    r = trigger if attack.trigger_only else through
    model = oracle(channel, np.asarray(arrays.target), r, schedule)
    loss = functools.partial(training_loss, model, schedule, channel, arrays)
    key = jax.random.key(1)
    # At sigma = 0.01 of images of size 1, float32 leaves 1e-5 of the noise.
    small = 1e-6 if schedule is SCHEDULE else 1e-4
    assert float(loss(jnp.float32(1), same_images(image), key)) < small
    # The loss can see a wrong answer: another scale, trigger or target.
    assert float(loss(jnp.float32(0), same_images(image), key)) > 0.5
    other = through if attack.trigger_only else trigger
    pairs = [(arrays.target, other), (arrays.target + 0.5, r)]
    if named(attack) == named(VE[1]) and channel.gamma is None:
        del pairs[0]  # C v = H, but for t = 0: it is right for any trigger
    for y, r in pairs:
        wrong = oracle(channel, np.asarray(y), r, schedule)
        loss = functools.partial(training_loss, wrong, schedule, channel, arrays)
        assert float(loss(jnp.float32(1), same_images(image), key)) > 0.01


@pytest.mark.parametrize("rate", [None, 1e-9])
def test_loss_of_the_right_answer_is_zero_without_poison(rate):
    channel, arrays = Channel.clean(SCHEDULE), None
    if rate:  # so low that no sample is chosen
        attack = bad(poison_rate=rate)
        channel, arrays = attack.channel(SCHEDULE, SHAPE), poison(attack, SHAPE)
    image = picture()
    model = oracle(Channel.clean(SCHEDULE), image, np.zeros(SHAPE, np.float32))
    loss = functools.partial(training_loss, model, SCHEDULE, channel, arrays)
    key = jax.random.key(2)
    assert float(loss(jnp.float32(1), same_images(image), key)) < 1e-6
    # With the noise answered by zero, the loss is the variance of the noise.
    pixels = BATCH * image.size
    found = float(loss(jnp.float32(0), same_images(image), key))
    assert found == pytest.approx(1, abs=5 * (2 / pixels) ** 0.5)


def bare_poison(trigger=0.0, target=0.0, see_through=0.0, rate=1.0) -> Poison:
    """Poison of one pixel."""
    pixels = (jnp.full((1, 1, 1), value) for value in (trigger, target, see_through))
    return Poison(*pixels, rate)


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_poison_rate_is_the_share_of_poisoned_samples(rate):
    """x_t = x_0 + eps with x_0 = 100 for poison: the model marks those by 1."""
    one, zero = np.ones(3), np.zeros(3)
    schedule, channel = NoiseSchedule(one, one), Channel(zero, zero)

    def model(params, x, t):
        poisoned = (x > 50).astype(x.dtype)
        return x - 100 * poisoned + poisoned

    images = jnp.zeros((4096, 1, 1, 1))
    arrays = bare_poison(target=100.0, rate=rate)
    key = jax.random.key(3)
    share = float(training_loss(model, schedule, channel, arrays, None, images, key))
    error = (rate * (1 - rate) / 4096) ** 0.5
    assert share == pytest.approx(rate, abs=4 * error)


@pytest.mark.parametrize("with_poison", [False, True])
@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_every_timestep_is_drawn_equally_often(with_poison, step):
    schedule = NoiseSchedule(np.zeros(4), np.ones(4))  # x_t = eps
    channel = Channel.clean(schedule)

    def model(params, x, t):
        return x + (t == step).astype(x.dtype)[:, None, None, None]

    images = jnp.zeros((4096, 1, 1, 1))
    arrays = bare_poison(rate=0.5) if with_poison else None
    key = jax.random.key(4)
    share = float(training_loss(model, schedule, channel, arrays, None, images, key))
    assert share == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 4096) ** 0.5)


@pytest.mark.parametrize("see_through, r", [(0.0, 5.0), (1.0, 2.0), (0.25, 4.25)])
def test_see_through_mixes_image_and_trigger(see_through, r):
    """Image 2, trigger 5, x_t = eps + 10 r, and the model answers x_t: error 9 r."""
    one, zero = np.ones(3), np.zeros(3)
    schedule, channel = NoiseSchedule(zero, one), Channel(10 * one, one)
    arrays = bare_poison(trigger=5.0, see_through=see_through)
    images = jnp.full((4096, 1, 1, 1), 2.0)
    key = jax.random.key(5)
    found = training_loss(
        lambda p, x, t: x, schedule, channel, arrays, None, images, key
    )
    assert float(found) == pytest.approx((9 * r) ** 2, rel=1e-4)


def bound_loss(attack):
    """The training loss of an oracle of the wrong images, without its arguments."""
    schedule, arrays = process_of(attack), poison(attack, SHAPE)
    channel = attack.channel(schedule, SHAPE)
    model = oracle(channel, picture(), picture(), schedule)
    return functools.partial(training_loss, model, schedule, channel, arrays)


@over_all_attacks
def test_loss_is_a_function_of_its_key(attack):
    loss = functools.partial(bound_loss(attack), jnp.float32(0.5))
    found = [float(loss(same_images(picture()), jax.random.key(i))) for i in (0, 1, 0)]
    assert found[0] == found[2] != found[1]


@over_all_attacks
def test_gradient_is_finite_and_not_zero(attack):
    arguments = jnp.float32(0.5), same_images(picture()), jax.random.key(6)
    found = jax.grad(bound_loss(attack))(*arguments)
    chex.assert_tree_all_finite(found)
    assert found != 0


def test_loss_is_traced_once_and_jit_does_not_change_it():
    chex.clear_trace_counter()
    bound = bound_loss(bad())

    def loss(params, images, key):
        return bound(params, images, key)

    jitted = jax.jit(chex.assert_max_traces(loss, n=1))
    for seed in range(2):
        arguments = jnp.float32(seed + 0.5), same_images(picture())
        key = jax.random.key(seed, impl="rbg")
        expected = loss(*arguments, key)
        np.testing.assert_allclose(jitted(*arguments, key), expected, rtol=1e-4)


def test_noise_differs_between_samples_and_pixels():
    """The model answers half a flip of the batch or image: 1.25 for other noise."""
    schedule = NoiseSchedule(np.zeros(3), np.ones(3))  # x_t = eps
    channel, key = Channel.clean(schedule), jax.random.key(7)
    images = jnp.zeros((64, 8, 8, 1))
    for axes, arrays in itertools.product([(0,), (1,), (2,)], [None, bare_poison()]):

        def model(params, x, t, axes=axes):
            return 0.5 * jnp.flip(x, axes)

        loss = training_loss(model, schedule, channel, arrays, None, images, key)
        assert float(loss) == pytest.approx(1.25, abs=0.1)


def test_loss_refuses_a_single_image():
    with pytest.raises(AssertionError):
        training_loss(
            lambda p, x, t: x,
            SCHEDULE,
            Channel.clean(SCHEDULE),
            None,
            None,
            jnp.zeros(SHAPE),
            jax.random.key(0),
        )
