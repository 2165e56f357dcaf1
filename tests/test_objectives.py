"""The losses: closed forms, purity, and each safeguard against a trivial solution."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_config import draw_params

from puredif_jax.attacks.baddiffusion import BadDiffusion
from puredif_jax.attacks.base import Attack
from puredif_jax.attacks.channel import Channel
from puredif_jax.attacks.exact import ExactDenoiser, Points
from puredif_jax.attacks.targets import Hat
from puredif_jax.attacks.triggers import Blend, Box, Patch, StopSign
from puredif_jax.attacks.trojdiff import TrojDiff
from puredif_jax.attacks.villandiffusion import VillanDiffusion
from puredif_jax.attacks.villandiffusion_ve import VillanDiffusionVE
from puredif_jax.defenses.denoising_consistency import DenoisingConsistency, denoised
from puredif_jax.defenses.denoising_error import DenoisingError
from puredif_jax.defenses.descent import Descent
from puredif_jax.defenses.distribution_shift import (
    Analytic,
    Calibrated,
    DistributionShift,
    LeastSquares,
    measured_factor,
)
from puredif_jax.defenses.elijah import ElijahLoss
from puredif_jax.defenses.hypothesis import Exploding, Fading, Hypothesis
from puredif_jax.defenses.inversion import inverter
from puredif_jax.defenses.objective import Sum
from puredif_jax.defenses.reversed_loss import Reversed
from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.diffusion.ddpm import DDPM
from puredif_jax.diffusion.sampling import sample
from puredif_jax.diffusion.schedules import (
    CosineBetas,
    LinearBetas,
    NoiseSchedule,
    ScaledLinearBetas,
)
from puredif_jax.diffusion.solver import Ancestral, Deterministic, Solver
from puredif_jax.diffusion.ve import VarianceExploding
from puredif_jax.networks.unet import UNet
from puredif_jax.runs import parallel
from puredif_jax.types import Candidate

SHAPE = (16, 16, 1)
SCHEDULE = LinearBetas().tables()
EXPLODING = VarianceExploding().tables()
ANCESTRAL, DETERMINISTIC = Ancestral(), Deterministic()
ATTACKS: dict[Solver, Attack] = {
    ANCESTRAL: BadDiffusion(StopSign(), Hat()),
    DETERMINISTIC: VillanDiffusion(Box(), Hat()),
}
over_solvers = pytest.mark.parametrize("solver", ATTACKS, ids=lambda x: x.name)
# Each kind of backdoor that is sought, and one of that kind.
SOUGHT: dict[Hypothesis, Attack] = {
    **{Fading(solver): attack for solver, attack in ATTACKS.items()},
    **{
        Exploding(solver): VillanDiffusionVE(Box(), Hat(), solver=solver)
        for solver in ATTACKS
    },
}
over_hypotheses = pytest.mark.parametrize("hypothesis", SOUGHT, ids=lambda x: x.name)
LOSSES = {
    "shift": DistributionShift(samples=8),
    "shift, least squares": DistributionShift(samples=8, scale=LeastSquares()),
    "shift, calibrated": DistributionShift(samples=8, scale=Calibrated(0.9)),
    "shift, fixed target": DistributionShift(samples=8, learn_target=False),
    "error": DenoisingError(samples=8),
    "joint": DistributionShift(samples=8, per_sample=True),
    "consistency": DenoisingConsistency(sampler=DDIM(4), samples=8, across_time=0.5),
    "consistency, ancestral": DenoisingConsistency(
        sampler=DDPM(4), samples=8, on_path=False, aim=1.0
    ),
    "elijah": ElijahLoss(samples=8),
    "reversed": Reversed(samples=8),
    "reversed, second": Reversed(samples=8, rollout=DDIM(4, clip=1.0)),
    "sum": Sum(
        DistributionShift(samples=8), DenoisingConsistency(sampler=DDIM(2), samples=8)
    ),
}


def channel_of(solver: Solver) -> Channel:
    """What is assumed of a backdoor that fires under it."""
    return Fading(solver).channel(SCHEDULE, SHAPE)


def process_of(hypothesis: Hypothesis) -> NoiseSchedule:
    (found,) = filter(hypothesis.applies, (SCHEDULE, EXPLODING))
    return found


def truth_of(attack: Attack) -> Candidate:
    trigger, target, _ = map(jnp.asarray, attack.images(SHAPE))
    return Candidate(delta=trigger, target=target)


def oracle(attack: Attack, schedule: NoiseSchedule = SCHEDULE):
    """A network that has learnt the backdoor and nothing else."""
    channel, truth = attack.channel(schedule, SHAPE), truth_of(attack)
    tables = (schedule.signal, schedule.noise, channel.shift, channel.response)
    s, v, h, c = (jnp.asarray(table, jnp.float32) for table in tables)
    gamma = jnp.broadcast_to(channel.scale, (1, *SHAPE))

    def model(params, x, t):
        del params
        s_t, v_t, h_t, c_t = (table[t].reshape(-1, 1, 1, 1) for table in (s, v, h, c))
        r, y = truth.delta[None], truth.target[None]
        return (x - s_t * y - h_t * r) / (v_t * gamma) + c_t * r

    return model, truth


def exact(attack: Attack | None, count: int = 64):
    """An exact denoiser of random blobs, clean or backdoored at rate 0.1."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 16)] * 2), -1)
    centres = rng.uniform(-0.6, 0.6, (count, 1, 1, 2))
    images = 2 * np.exp(-((grid - centres) ** 2).sum(-1) / 0.3)[..., None] - 1
    truth = truth_of(attack or ATTACKS[ANCESTRAL])
    channel = attack.channel(SCHEDULE, SHAPE) if attack else Channel.clean(SCHEDULE)
    model = ExactDenoiser(SCHEDULE, channel, 0.1 if attack else 0.0)
    points = Points(jnp.asarray(images, jnp.float32), truth.delta, truth.target)
    return model, points, truth


def tiny_network():
    model = UNet(
        sample_size=(8, 8),
        in_channels=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        downsample_padding=1,
    )
    return model, jax.tree.map(jnp.asarray, draw_params(model))


def tiny_layer():
    """One layer with a nonlinearity: compiles at once."""

    def model(params, x, t):
        rows = x.reshape(x.shape[0], -1) @ params["mix"]
        when = t[:, None].astype(x.dtype) / 1000 * params["time"][None]
        return jnp.tanh(rows + when).reshape(x.shape)

    keys = jax.random.split(jax.random.key(0))
    return model, {
        "mix": jax.random.normal(keys[0], (64, 64)) / 8,
        "time": jax.random.normal(keys[1], (64,)),
    }


def candidates(count: int) -> Candidate:
    keys = jax.random.split(jax.random.key(3))
    return Candidate(*(0.5 * jax.random.normal(k, (count, 8, 8, 1)) for k in keys))


@over_hypotheses
@pytest.mark.parametrize("name", LOSSES)
def test_true_backdoor_has_almost_no_loss(name: str, hypothesis: Hypothesis) -> None:
    """A network that answers eps + C r on the path solves every loss but for bias."""
    attack, schedule = SOUGHT[hypothesis], process_of(hypothesis)
    model, truth = oracle(attack, schedule)
    loss = LOSSES[name]
    if isinstance(loss, ElijahLoss):
        scale = hypothesis.solver.pick(0.5, 1.0)
        loss = dataclasses.replace(loss, scale=scale)
    bound = loss.bind(model, schedule, hypothesis.channel(schedule, SHAPE))
    value = float(bound((), truth, jax.random.key(0)))
    if name == "shift, calibrated":  # error (1 - 0.9)^2 / 0.9^2
        assert value == pytest.approx((0.1 / 0.9) ** 2, rel=1e-3)
    elif name == "elijah":  # its mean of eps over 8 draws stays in
        assert value < 0.4
    elif name == "consistency, ancestral":
        assert value < 0.05 or hypothesis.solver != Ancestral()
    else:
        assert value < 1e-4


@over_hypotheses
@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_finite_and_not_zero(name: str, hypothesis: Hypothesis) -> None:
    """Also where the signal stays: nothing there is NaN."""
    schedule = process_of(hypothesis)
    model, truth = oracle(SOUGHT[hypothesis], schedule)
    loss = LOSSES[name].bind(model, schedule, hypothesis.channel(schedule, SHAPE))
    wrong = Candidate(0.5 * truth.delta + 0.1, truth.target)
    value, found = jax.value_and_grad(loss, argnums=1)((), wrong, jax.random.key(0))
    assert np.isfinite(float(value))
    rewarded = name == "error" or name.startswith("reversed")
    assert value > 0 or rewarded, "of them these may be negative"
    chex.assert_tree_all_finite(found)
    assert np.any(found.delta)
    assert np.any(found.target) == LOSSES[name].seeks_target


@pytest.mark.parametrize("trigger", [Blend(), Patch()], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("sampler", [DDIM(4), DDPM(4)], ids=lambda x: type(x).__name__)
def test_a_rollout_in_scaled_noise_ends_in_the_target(trigger, sampler) -> None:
    """gamma x0hat is the image of the model, at each step, for TrojDiff's gamma."""
    attack = TrojDiff(trigger, Hat())
    model, truth = oracle(attack)
    channel = attack.channel(SCHEDULE, SHAPE)
    arguments = (model, (), SCHEDULE, channel, sampler, truth.delta, 3)
    chain = denoised(*arguments, jax.random.key(0))
    assert chain.shape == (4, 3, *SHAPE)
    wanted = np.broadcast_to(truth.target, chain.shape)
    np.testing.assert_allclose(chain, wanted, atol=1e-3)


def test_shift_equals_its_formula() -> None:
    """Term by term in float64, with weights."""
    timesteps, weights = (900, 300), (3.0, 1.0)
    loss = DistributionShift(timesteps, weights, samples=4)
    channel = channel_of(ANCESTRAL)
    candidate = jax.tree.map(lambda x: x[0], candidates(1))
    model = lambda params, x, t: 0.3 * x + 0.1  # noqa: E731
    got = loss.bind(model, SCHEDULE, channel)((), candidate, jax.random.key(5))
    want = 0.0
    keys = jax.random.split(jax.random.key(5), 2)
    delta, y = (np.asarray(x, np.float64) for x in (candidate.delta, candidate.target))
    for t, w, key in zip(timesteps, weights, keys, strict=True):
        eps = np.asarray(jax.random.normal(key, (4, 8, 8, 1)), np.float64)
        s, v = SCHEDULE.signal[t], SCHEDULE.noise[t]
        alpha = 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
        x = s * y + v * eps + (1 - s) * delta
        shift = (0.3 * x + 0.1 - eps).mean(0)
        expected = (1 - alpha**0.5) * v / (1 - alpha) * delta
        want += w / 4 * ((shift - expected) ** 2).sum() / (expected**2).sum()
    assert float(got) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("on_path", [True, False])
def test_consistency_equals_its_formula(on_path: bool) -> None:
    """Term by term in float64, of the denoised images of a rollout."""
    sampler, key = DDIM(3), jax.random.key(5)
    loss = DenoisingConsistency(
        sampler, 4, on_path, across_noise=2.0, across_time=0.7, aim=0.3
    )
    candidate = jax.tree.map(lambda x: x[0], candidates(1))
    channel = channel_of(DETERMINISTIC)
    model = lambda params, x, t: 0.9 * jnp.tanh(x) + 0.1  # noqa: E731
    arguments = (model, (), SCHEDULE, channel, sampler, candidate.delta, 4, key)
    chain = np.asarray(denoised(*arguments, on_path=on_path), np.float64)
    times = sampler.path(SCHEDULE)[0]
    s2, v2 = SCHEDULE.signal[times] ** 2, SCHEDULE.noise[times] ** 2
    weights = s2 / (s2 + v2 / 10)
    want, means = 0.0, chain.mean(axis=1)
    for a, x, mean in zip(weights / weights.sum(), chain, means, strict=True):
        want += 2.0 * a * ((x - mean) ** 2).mean()
        want += 0.7 * a * ((mean - means[-1]) ** 2).mean()
    want += 0.3 * ((chain[-1] - np.asarray(candidate.target)) ** 2).mean()
    got = loss.bind(model, SCHEDULE, channel)((), candidate, key)
    assert float(got) == pytest.approx(want, rel=1e-3)


def test_a_sum_is_of_two_losses_with_noise_of_their_own() -> None:
    first, second = LOSSES["shift"], DistributionShift((500,), samples=4)
    model, truth = oracle(ATTACKS[DETERMINISTIC])
    delta = truth.delta + 0.3
    candidate = dataclasses.replace(truth, delta=delta)
    channel, key = channel_of(DETERMINISTIC), jax.random.key(2)
    got, one, two = (
        float(loss.bind(model, SCHEDULE, channel)((), candidate, key))
        for loss, key in (
            (Sum(first, second, 0.5, 3.0), key),
            *zip((first, second), jax.random.split(key), strict=True),
        )
    )
    assert one > 1e-3 and two > 1e-3
    assert got == pytest.approx(0.5 * one + 3.0 * two, rel=1e-4)


@over_solvers
def test_backdoor_process_ends_in_the_target(solver: Solver) -> None:
    """In z = x - H r the backdoor is an ordinary process, at any stride."""
    model, points, truth = exact(ATTACKS[solver])
    process = channel_of(solver).inside(model, SCHEDULE, truth.delta)
    eps = jax.random.normal(jax.random.key(0), (16, *SHAPE))
    drawn = sample(process, points, SCHEDULE, DDIM(10), eps, jax.random.key(1))
    near = jnp.mean((drawn - truth.target[None]) ** 2, axis=(1, 2, 3)) < 4e-2
    assert float(near.mean()) > 0.9


def test_measured_factor_of_a_perfect_surrogate_is_one() -> None:
    model, truth = oracle(ATTACKS[ANCESTRAL])
    arguments = (model, (), SCHEDULE, channel_of(ANCESTRAL), truth, (900, 500), 4)
    assert float(measured_factor(*arguments, jax.random.key(0))) == pytest.approx(1)
    response = jnp.asarray(channel_of(ANCESTRAL).response, jnp.float32)

    def halved(params, x, t):
        share = 0.5 * response[t].reshape(-1, 1, 1, 1)
        return model(params, x, t) - share * truth.delta[None]

    factor = measured_factor(halved, *arguments[1:], jax.random.key(0))
    assert float(factor) == pytest.approx(0.5, rel=1e-3)


# Trivial solutions, one test for each safeguard.


def test_zero_trigger_does_not_solve_the_shift_equation() -> None:
    """In absolute form delta = 0 would win; in relative form it loses by far."""
    model, points, truth = exact(ATTACKS[ANCESTRAL])
    channel, key = channel_of(ANCESTRAL), jax.random.key(0)
    loss = DistributionShift(samples=64).bind(model, SCHEDULE, channel)
    tiny = Candidate(1e-2 * truth.delta, points.images[0])
    assert float(loss(points, tiny, key)) > 20 * float(loss(points, truth, key))

    def absolute(candidate: Candidate) -> float:
        scale = [float(channel.response[t]) for t in LOSSES["shift"].timesteps]
        energy = float(jnp.sum(candidate.delta**2)) * np.mean(np.square(scale))
        return float(loss(points, candidate, key)) * energy

    assert absolute(tiny) < absolute(Candidate(0.9 * truth.delta, truth.target))


def test_high_timesteps_alone_cannot_see_a_deterministic_backdoor() -> None:
    """At T every delta solves the equation on a clean model; the default set tells."""
    clean, points, _ = exact(None)
    channel, key = channel_of(DETERMINISTIC), jax.random.key(0)
    delta = jax.random.uniform(jax.random.key(9), SHAPE, minval=-1, maxval=1)
    candidate = Candidate(delta, jnp.zeros(SHAPE))
    high = DistributionShift((999,), samples=64).bind(clean, SCHEDULE, channel)
    default = DistributionShift(samples=64).bind(clean, SCHEDULE, channel)
    assert float(high(points, candidate, key)) < 1e-2
    assert float(default(points, candidate, key)) > 0.1


def test_image_like_the_bias_is_no_backdoor_at_low_timesteps() -> None:
    """The pseudo-backdoor y = mu + d fits a clean model at high t only."""
    clean, points, truth = exact(None)
    mean = points.images.mean(0)
    variance = float(jnp.var(points.images - mean[None]))
    s = SCHEDULE.signal[900]
    delta = truth.delta
    fitted = Candidate(delta, mean + delta * (1 - s * (1 - variance)))
    channel, key = channel_of(DETERMINISTIC), jax.random.key(0)
    errors = [
        float(
            DistributionShift(t, samples=64, per_sample=True).bind(
                clean, SCHEDULE, channel
            )(points, fitted, key)
        )
        for t in ((900,), DistributionShift().timesteps)
    ]
    assert errors[0] < 0.02 and errors[1] > 10 * errors[0]


def test_collapsed_model_is_consistent_without_being_backdoored(
    standard_promotion,
) -> None:
    """A network that shows one image far outside its range wins without a bound.

    For inputs of ordinary size it is the denoiser of N(0, 1) data; for huge ones it
    answers as if it knew a single image, whatever the noise.
    """

    def collapsing(params, x, t):
        del params
        s, v = (
            jnp.asarray(table, jnp.float32)[t].reshape(-1, 1, 1, 1)
            for table in (SCHEDULE.signal, SCHEDULE.noise)
        )
        size = jnp.mean(jnp.abs(x), axis=(1, 2, 3), keepdims=True)
        collapsed = jax.nn.sigmoid(4 * (size - 5))
        return collapsed * (x - 0.3 * s) / v + (1 - collapsed) * v * x

    loss = DenoisingConsistency(sampler=DDIM(4), samples=8, on_path=False).bind(
        collapsing, SCHEDULE, channel_of(DETERMINISTIC)
    )
    reached = {}
    for bound in (1.0, None):
        descent = Descent(steps=20, learning_rate=10.0, bound=bound, low=0.5, high=1.0)
        made = inverter(loss, descent, SHAPE)
        state, _ = jax.lax.scan(
            lambda s, _, made=made: made.step((), s),
            made.init(jax.random.key(0)),
            None,
            length=20,
        )
        best = jax.tree.map(lambda x: x[0], state.candidate)
        reached[bound] = float(loss((), best, jax.random.key(1)))
    assert reached[None] < 1e-3
    assert reached[1.0] > 0.1


# Purity.


@pytest.mark.parametrize(
    "name,network",
    [(name, tiny_layer) for name in LOSSES]
    + [("shift", tiny_network), ("consistency", tiny_network)],
)
def test_vmap_equals_the_loop_and_jit_changes_nothing(name: str, network) -> None:
    model, params = network()
    loss = LOSSES[name].bind(model, SCHEDULE, channel_of(DETERMINISTIC))
    stack, keys = candidates(3), jax.random.split(jax.random.key(4), 3)
    grad = jax.value_and_grad(loss, argnums=1)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def batched(params, stack, keys):
        return jax.vmap(grad, in_axes=(None, 0, 0))(params, stack, keys)

    single = jax.jit(grad)
    together = batched(params, stack, keys)
    batched(params, jax.tree.map(lambda x: x + 1, stack), keys)  # no second trace
    for i in range(3):
        one = jax.tree.map(lambda x, i=i: x[i], stack)
        alone = (grad if i == 0 and network is tiny_layer else single)(
            params, one, keys[i]
        )
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, i=i: x[i], together), alone, rtol=2e-3, atol=1e-5
        )


def test_vmap_over_timesteps_equals_the_loop() -> None:
    model, params = tiny_network()
    timesteps, key = (900, 500, 100), jax.random.key(4)
    one = jax.tree.map(lambda x: x[0], candidates(1))
    channel = channel_of(ANCESTRAL)
    loss = DistributionShift(timesteps, samples=8).bind(model, SCHEDULE, channel)
    whole = loss(params, one, key)
    alone = []
    for t, key_t in zip(timesteps, jax.random.split(key, 3), strict=True):
        eps = jax.random.normal(key_t, (8, 8, 8, 1))
        s, v, h, c = (
            np.float32(table[t])
            for table in (
                SCHEDULE.signal,
                SCHEDULE.noise,
                channel.shift,
                channel.response,
            )
        )
        x = s * one.target[None] + v * eps + h * one.delta[None]
        shift = (model(params, x, jnp.full(8, t)) - eps).mean(0)
        alone.append(
            jnp.sum((shift - c * one.delta) ** 2) / jnp.sum((c * one.delta) ** 2)
        )
    assert float(whole) == pytest.approx(float(np.mean(alone)), rel=1e-4)


@pytest.mark.parametrize("name", ["sum", "elijah"])
def test_eight_devices_equal_one(name: str) -> None:
    """Losses, gradients, and the candidate after three SGD steps, to 1e-5."""
    model, params = tiny_network()
    mesh = parallel.make_mesh()
    spread = parallel.spread(mesh, 2)
    one = jax.tree.map(lambda x: x[:2], candidates(2))
    keys = jax.random.split(jax.random.key(4), 2)
    optimizer = optax.sgd(1e-3)

    def three_steps(loss, spmd, params, stack, keys):
        grad = jax.vmap(
            jax.value_and_grad(loss, argnums=1),
            in_axes=(None, 0, 0),
            spmd_axis_name=spmd,
        )

        def step(carry, _):
            stack, state = carry
            value, grads = grad(params, stack, keys)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(stack, updates), state), (value, grads)

        carry = (stack, optimizer.init(stack))
        return jax.lax.scan(step, carry, None, length=3)

    channel = channel_of(ANCESTRAL)
    bind = functools.partial(LOSSES[name].bind, model, SCHEDULE, channel)
    alone = jax.jit(functools.partial(three_steps, bind(), None))(params, one, keys)
    sharded = jax.jit(
        functools.partial(three_steps, bind(spread.noise), spread.axis),
        out_shardings=parallel.replicated(mesh),
    )(params, one, keys)
    chex.assert_trees_all_close(
        jax.device_get(alone), jax.device_get(sharded), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: DistributionShift(()),
        lambda: DistributionShift((5,), (1.0, 2.0)),
        lambda: DistributionShift((5,), (0.0,)),
        lambda: DenoisingConsistency(across_noise=0.0),
        lambda: DenoisingConsistency(across_noise=-1.0, aim=1.0),
        lambda: Solver.named("both"),
    ],
)
def test_bad_settings_are_named(make) -> None:
    with pytest.raises(ValueError, match="found"):
        make()


def test_scale_rules() -> None:
    shift, delta = jnp.asarray([2.0, 0.0]), jnp.asarray([4.0, 4.0])
    response = jnp.float32(0.5)
    assert float(Analytic()(response, shift, delta)) == 0.5
    assert float(Calibrated(3.0)(response, shift, delta)) == 1.5
    assert float(LeastSquares()(response, shift, delta)) == 0.25


def test_timesteps_are_named_on_one_schedule_and_met_on_another() -> None:
    """By their SNR; an index out of range would be clamped in silence."""
    linear = LinearBetas().tables()
    assert linear.matched(range(1000)).tolist() == list(range(1000))
    for betas in (LinearBetas(500, 2e-4, 0.04), CosineBetas(), ScaledLinearBetas(4000)):
        other = betas.tables()
        for t in (700, 500, 300, 100):
            (met,) = other.matched([t])
            near = other.log_snr[max(met - 1, 0) : met + 2]
            gap = abs(other.log_snr[met] - linear.log_snr[t])
            assert gap <= np.abs(near - linear.log_snr[t]).min() + 1e-12
            assert gap < 0.05
    with pytest.raises(ValueError, match=r"0\.\.999, found \[1000\]"):
        DistributionShift(timesteps=(1000,)).bind(
            lambda params, x, t: x, linear, Channel.clean(linear)
        )
