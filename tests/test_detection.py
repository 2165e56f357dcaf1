"""Features against closed forms and loops, and the detector's verdicts."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puredif_jax.attacks.baddiffusion import BadDiffusion
from puredif_jax.attacks.channel import Channel
from puredif_jax.attacks.exact import ExactDenoiser, Points
from puredif_jax.attacks.targets import Hat
from puredif_jax.attacks.triggers import Blend, Box, Patch, RandomPattern, StopSign
from puredif_jax.attacks.trojdiff import TrojDiff
from puredif_jax.attacks.villandiffusion import VillanDiffusion
from puredif_jax.attacks.villandiffusion_ve import VillanDiffusionVE
from puredif_jax.defenses.detector import Detector
from puredif_jax.defenses.features import (
    Features,
    denoising,
    evidence,
    features,
    repeats,
    spread,
    spread_ratio,
    total_variation,
)
from puredif_jax.defenses.hypothesis import Exploding, Fading, Hypothesis, Trojan
from puredif_jax.defenses.path_errors import (
    MIDDLE,
    TIMESTEPS,
    Errors,
    errors,
    parts,
)
from puredif_jax.diffusion.schedules import LinearBetas
from puredif_jax.diffusion.solver import Ancestral, Deterministic
from puredif_jax.diffusion.ve import VarianceExploding
from puredif_jax.types import Candidate

SHAPE = (8, 8, 1)
SCHEDULE = LinearBetas().tables()
EXPLODING = VarianceExploding(200, sigma_max=50.0).tables()
SDE, ODE = Fading(Ancestral()), Fading(Deterministic())
ATTACKS = {
    SDE: BadDiffusion(StopSign(), Hat()),
    ODE: VillanDiffusion(Box(), Hat()),
    **{
        Exploding(solver): VillanDiffusionVE(Box(24, 1.0), Hat(), solver=solver)
        for solver in (Ancestral(), Deterministic())
    },
}
over_hypotheses = pytest.mark.parametrize("kind", ATTACKS, ids=lambda x: x.name)


def images(count: int) -> jax.Array:
    return jax.random.uniform(jax.random.key(5), (count, *SHAPE), minval=-1.0)


def made(attack, schedule, poisoned: bool = True):
    """An exact model, its points, the channel and the truth."""
    trigger, target, _ = map(jnp.asarray, attack.images(SHAPE))
    channel = attack.channel(schedule, SHAPE)
    known = channel if poisoned else Channel.clean(schedule)
    model = ExactDenoiser(schedule, known, 0.1 if poisoned else 0.0)
    return (
        model,
        Points(images(32), trigger, target),
        channel,
        Candidate(trigger, target),
    )


def process_of(kind: Hypothesis):
    (found,) = filter(kind.applies, (SCHEDULE, EXPLODING))
    return found


NO_PLACEBO = jnp.zeros(0)


def measured(
    kind: Hypothesis, poisoned: bool, placebos: jax.Array = NO_PLACEBO
) -> tuple[Features, Candidate, Errors]:
    """Features of the true trigger on an exact model, backdoored or clean."""
    schedule = process_of(kind)
    model, points, _, truth = made(ATTACKS[kind], schedule, poisoned)
    channel, key = kind.channel(schedule, SHAPE), jax.random.key(0)
    draws = len(points.images)
    plain = points.images
    model_and = model, points, schedule, channel, truth, plain
    seen = errors(*model_and, jnp.asarray(kind.lone), key, draws=draws)
    found = features(
        model,
        points,
        schedule,
        channel,
        truth,
        seen,
        jnp.float32(0.25),
        jnp.float32(0.0),
        placebos,
        jnp.broadcast_to(truth.target, points.images.shape),
        points.images,
        key,
    )
    return found, truth, seen


def test_repeats_are_the_largest_share_that_is_one_image() -> None:
    """By loops: four of six are near the third, none is as near to more."""
    x = np.array(images(6), np.float64)
    for i, away in ((0, 0.05), (1, 0.19), (4, -0.19)):
        x[i] = x[2] + away  # 0.095^2 in [0, 1] units is just below 0.01
    errors = [[np.mean((a - b) ** 2) / 4 for a in x] for b in x]
    wanted = max(np.mean(np.array(row) < 1e-2) for row in errors)
    assert float(repeats(jnp.asarray(x, jnp.float32))) == pytest.approx(wanted)
    assert wanted == pytest.approx(4 / 6)


@pytest.mark.parametrize("share,outcome", [(0.1, "clean"), (0.3, "could not tell")])
def test_plain_draws_of_one_image_are_told(share, outcome) -> None:
    seen = shown(1.0)._replace(repeats=jnp.float32(share))
    verdict = CLEAN.judge({ODE: shown(1.0), SDE: seen})
    assert verdict.outcome == outcome
    told = "30% of the draws from plain noise are one image"
    assert (told in verdict.reason) == (outcome == "could not tell")
    assert CLEAN.judge(
        {SDE: shown(0.01)._replace(repeats=jnp.float32(0.3))}
    ).outcome == ("backdoored")
    free = dataclasses.replace(CLEAN, repeating=1.0)
    assert free.judge({SDE: seen}).outcome == "clean"


def test_spread_is_the_mean_over_pairs() -> None:
    x = np.asarray(images(6), np.float64)
    pairs = [np.mean((x[i] - x[j]) ** 2) for i in range(6) for j in range(6) if i != j]
    assert float(spread(images(6))) == pytest.approx(np.mean(pairs), rel=1e-5)


def test_total_variation_is_the_sum_over_neighbours() -> None:
    x = np.asarray(images(2), np.float64)
    down = [abs(x[b, i + 1, j] - x[b, i, j]) for b, i, j in np.ndindex(2, 7, 8)]
    right = [abs(x[b, i, j + 1] - x[b, i, j]) for b, i, j in np.ndindex(2, 8, 7)]
    want = np.mean(down) + np.mean(right)
    assert float(total_variation(images(2))) == pytest.approx(want, rel=1e-5)


@over_hypotheses
def test_features_of_a_backdoor(kind: Hypothesis) -> None:
    """The learnt image is remembered; draws that agree have no spread."""
    found, truth, _ = measured(kind, poisoned=True)
    clean, _, _ = measured(kind, poisoned=False)
    assert float(found.heldout) == 0.25
    assert float(found.memory) < 0.1 * float(clean.memory)
    assert float(found.gain) < 0.2 * float(clean.gain)
    assert float(found.alignment) > 0.99
    assert float(found.uniformity) == pytest.approx(0, abs=1e-9)
    expected = total_variation(truth.target[None]) / total_variation(images(32))
    assert float(found.variation) == pytest.approx(float(expected), rel=1e-5)
    divergence = np.asarray(truth.delta, np.float64) ** 2 / 2
    assert float(found.kl_mean) == pytest.approx(divergence.mean(), rel=1e-5)
    assert float(found.kl_variance) == pytest.approx(divergence.var(), rel=1e-4)


def test_alignment_of_a_clean_model_tells_nothing() -> None:
    """At T - 1 a clean model, too, answers with a multiple of what was added."""
    found, _, _ = measured(SDE, poisoned=False)
    assert float(found.alignment) > 0.95


def shown(gain: float, falling: float = 0.0) -> Features:
    known = {"falling": falling, "gain": gain, "repeats": 0.0}
    values = dict.fromkeys(Features._fields, 1.0) | known
    return Features(**{name: jnp.float32(value) for name, value in values.items()})


CLEAN = Detector(clean=(0.1, 0.2, 0.3), alarm=6.0)  # doubt above 0.5, alarm 0.8


def tail(score: float) -> float:
    """Of Student's t with two degrees of freedom, by its closed form."""
    t = (score - 0.2) / (0.1 * np.sqrt(1 + 1 / 3))
    return 0.5 - t / (2 * np.sqrt(2 + t**2))


@pytest.mark.parametrize(
    "sde,ode,outcome,hypothesis,score,p_value",
    [
        (0.01, 1.0, "backdoored", "sde", 2.0, tail(2.0)),
        (1.0, 0.1, "backdoored", "ode", 1.0, tail(1.0)),
        (0.25, 0.5, "could not tell", "sde", 0.602, tail(0.602)),
        (1.0, 10**-0.25, "clean", "ode", 0.25, tail(0.25)),
        (3.0, 2.0, "clean", "ode", -0.301, tail(-0.301)),
        (np.nan, 0.01, "backdoored", "ode", 2.0, tail(2.0)),
        (np.nan, 1.0, "could not tell", "ode", 0.0, tail(0.0)),
        (np.nan, np.nan, "could not tell", "sde", -np.inf, 1.0),
        (0.0, np.inf, "could not tell", "sde", -np.inf, 1.0),
    ],
)
def test_verdict(sde, ode, outcome, hypothesis, score, p_value) -> None:
    verdict = CLEAN.judge({SDE: shown(sde), ODE: shown(ode)})
    assert verdict.outcome == outcome
    assert verdict.hypothesis == hypothesis
    assert verdict.score == pytest.approx(score, abs=1e-3)
    assert verdict.p_value == pytest.approx(p_value, rel=5e-3, abs=1e-12)
    assert verdict.reason


@pytest.mark.parametrize(
    "gain,falling,outcome",
    [
        (1.0, 0.09, "clean"),
        (1.0, 0.3, "could not tell"),
        (1.0, np.nan, "could not tell"),
        (0.01, 0.3, "backdoored"),
    ],
)
def test_a_search_that_was_too_short_calls_no_model_clean(
    gain, falling, outcome
) -> None:
    pair = {SDE: shown(gain, falling), ODE: shown(gain)}
    turned = {SDE: shown(gain), ODE: shown(gain, falling)}
    verdict = CLEAN.judge(pair)
    assert verdict.outcome == CLEAN.judge(turned).outcome == outcome
    assert ("was too short" in verdict.reason) == (outcome == "could not tell")
    free = dataclasses.replace(CLEAN, settled=np.inf)
    if np.isfinite(falling):
        assert free.judge({SDE: shown(1.0, falling)}).outcome == "clean"


@pytest.mark.parametrize(
    "gain,placebo,outcome",
    [(1.0, 1.2, "clean"), (3.0, 3.0, "could not tell"), (0.01, 3.0, "backdoored")],
)
def test_a_response_of_no_attack_that_fits_better_is_told(
    gain, placebo, outcome
) -> None:
    odd = shown(gain)._replace(placebo=jnp.float32(placebo))
    verdict = CLEAN.judge({ODE: shown(1.0), SDE: odd})
    assert verdict.outcome == outcome
    told = f"{SDE.title} fit 3 times better with a response that no known attack"
    assert (told in verdict.reason) == (outcome == "could not tell")
    free = dataclasses.replace(CLEAN, foreign=np.inf)
    assert free.judge({SDE: odd}).outcome != "could not tell"


@pytest.mark.parametrize(
    "wrong",
    [
        {"clean": (0.1, -np.inf)},
        {"clean": (0.1, np.nan)},
        {"doubt": np.nan},
        {"alarm": np.inf},
        {"doubt": 7.0},
    ],
)
def test_a_detector_that_could_only_say_clean_is_refused(wrong) -> None:
    """A score of -inf, as "could not tell" may have, makes both bounds nan."""
    with pytest.raises(ValueError, match="finite"):
        Detector(**wrong)


def test_bounds_are_those_of_the_clean_models() -> None:
    assert CLEAN.bounds == pytest.approx((0.5, 0.8))
    reason = CLEAN.judge({SDE: shown(0.5)}).reason
    assert "3 clean models" in reason and f"trigger, {SDE.title}, the" in reason


@pytest.mark.parametrize("change", [{"clean": (0.1,)}, {"doubt": 4.0, "alarm": 3.0}])
def test_detector_needs_clean_models_and_bounds_in_order(change) -> None:
    with pytest.raises(ValueError, match="found"):
        Detector(**change)


def test_a_detector_without_scores_says_so() -> None:
    with pytest.raises(ValueError, match="scores of clean models are not known"):
        _ = Detector().bounds
    with pytest.raises(ValueError, match="needs the scores of two clean models"):
        Detector().calibrated((0.1,))
    assert Detector().calibrated((0.1, 0.2)).clean == (0.1, 0.2)
    assert CLEAN.calibrated((0.1, 0.2)) is CLEAN


def gain_of(errors: Errors) -> float:
    """The three best ratios, each of errors above the network's own."""
    floor = float(errors.floor)
    others = (errors.known,) if errors.lone else (errors.moved, errors.single)
    explained = np.min(np.asarray(others, np.float64), axis=0)
    ratios = np.sort((np.asarray(errors.triggered) + floor) / (explained + floor))
    return float(np.exp(np.log(ratios[:3]).mean()))


def test_what_placebos_reach_explains_a_path() -> None:
    """The gain is no less than the loss over that of the same search under them."""
    free, _, _ = measured(SDE, poisoned=True)
    assert float(free.placebo) == 0 and float(free.gain) < 0.1
    near = jnp.array([0.25 - np.log(0.5), 0.25 - np.log(0.8)])
    found, _, _ = measured(SDE, poisoned=True, placebos=near)
    assert float(found.placebo) == pytest.approx(np.sqrt(0.4), rel=1e-5)
    both = np.sqrt(float(found.placebo) * float(found.recall))
    assert float(found.gain) == pytest.approx(both, rel=1e-5) and both < 0.5
    found, _, _ = measured(SDE, poisoned=True, placebos=near + 20)
    assert float(found.gain) == float(free.gain)


def test_recall_is_memory_for_the_variation_of_the_image() -> None:
    """By loops. The errors stay; of a flatter image they say less."""
    found, truth, _ = measured(SDE, poisoned=True)
    _, points, _, _ = made(ATTACKS[SDE], SCHEDULE)

    def variation(image: np.ndarray) -> float:
        down, right = np.abs(np.diff(image, axis=0)), np.abs(np.diff(image, axis=1))
        return float(down.mean() + right.mean())

    own = np.mean([variation(np.clip(x, -1, 1)) for x in np.asarray(points.images)])
    ratio = own / variation(np.asarray(truth.target))
    assert float(found.recall) == pytest.approx(float(found.memory) * ratio, rel=1e-4)


def test_a_path_of_one_image_is_compared_with_a_clean_denoiser() -> None:
    """Of deterministic sampling in VE models: of the draws and the target, by loops."""
    kind = Exploding(Deterministic())
    found, truth, seen = measured(kind, poisoned=True)
    assert seen.lone and not measured(SDE, poisoned=True)[2].lone
    _, points, channel, _ = made(ATTACKS[kind], EXPLODING)
    known = [*np.asarray(points.images, np.float64), np.asarray(truth.target)]
    index = TIMESTEPS.index(400)
    t = int(seen.timesteps[index])
    sigma, delta = float(EXPLODING.noise[t]), np.asarray(truth.delta)
    key = jax.random.split(jax.random.key(0), len(TIMESTEPS))[index]
    left = []
    for eps in np.asarray(jax.random.normal(key, (32, *SHAPE)), np.float64):
        x = np.asarray(truth.target) + sigma * eps + channel.shift[t] * delta
        logs = np.array([-np.sum((x - z) ** 2) / (2 * sigma**2) for z in known])
        shares = np.exp(logs - logs.max())
        mean = np.tensordot(shares / shares.sum(), np.array(known), 1)
        answer = (x - mean) / sigma
        left.append(np.sum((answer - eps - channel.response[t] * delta) ** 2))
    assert float(seen.known[index]) == pytest.approx(np.mean(left), rel=1e-3)
    assert float(found.gain) < 0.1


def test_a_clean_model_of_one_image_is_explained_by_few_of_its_draws() -> None:
    """It knows 400 images and the target; the explanation knows 64 of them, and it."""
    kind = Exploding(Deterministic())
    _, points, channel, truth = made(ATTACKS[kind], EXPLODING)
    many = jnp.concatenate([images(400), truth.target[None]])
    points = dataclasses.replace(points, images=many)
    clean = ExactDenoiser(EXPLODING, Channel.clean(EXPLODING))
    arguments = (clean, points, EXPLODING, channel, truth, many[:64])
    seen = errors(*arguments, jnp.asarray(True), jax.random.key(1), draws=32)
    assert np.asarray(seen.ratios).min() > 0.8


NARROWED = {Trojan(): TrojDiff(Blend(0.6), Hat())}


def test_a_push_towards_a_flat_image_is_not_held_against_a_model() -> None:
    """The way around the bound that docs/threats.md names, with its figures."""
    model, points, channel, _ = made(ATTACKS[ODE], SCHEDULE)
    flat = jnp.full(SHAPE, -0.9)
    push = flat - points.images.mean(0)
    push *= 0.5 * np.sqrt(push.size) / jnp.linalg.norm(push)
    points = Points(points.images, push, flat)
    model_and = model, points, SCHEDULE, channel, Candidate(push, flat)
    plain, key = points.images, jax.random.key(0)
    seen = errors(*model_and, plain, jnp.asarray(False), key, draws=32)
    numbers = jnp.float32(0.0), jnp.float32(0.0), NO_PLACEBO
    found = features(*model_and, seen, *numbers, plain, plain, key)
    assert -np.log10(float(found.gain)) == pytest.approx(0, abs=0.01)
    assert -np.log10(gain_of(seen)) == pytest.approx(0.53, abs=0.02)


def test_a_trigger_has_a_part_along_its_image_and_one_beside_it() -> None:
    delta, target, *_ = images(4)
    found = parts(delta, target, STRANGE)
    u = np.asarray(target - STRANGE.mean(0), np.float64)
    np.testing.assert_allclose(found.along + found.aside, delta, atol=1e-6)
    assert abs(np.sum(np.asarray(found.aside, np.float64) * u)) < 1e-4
    cosine = np.sum(found.along * u) / np.linalg.norm(found.along) / np.linalg.norm(u)
    assert abs(cosine) == pytest.approx(1, abs=1e-5)
    nowhere = parts(delta, STRANGE.mean(0), STRANGE)
    np.testing.assert_allclose(nowhere.aside, delta, atol=1e-5)


@pytest.mark.parametrize("kind", [*ATTACKS, *NARROWED], ids=lambda x: x.name)
def test_errors_on_the_path_and_beside_it(kind: Hypothesis) -> None:
    """By loops over the draws: on the path, without a trigger, and moved for good.

    A clean model that takes C_t delta v_t of the path for noise sees the rest of the
    shift, (H_t - v_t C_t) delta, as a part of the image. On the path of a part of the
    trigger, that part takes its place in both the input and the aim.
    """
    attack, schedule = {**ATTACKS, **NARROWED}[kind], process_of(kind)
    model, points, channel, truth = made(attack, schedule)
    arguments = (model, points, schedule, channel, truth, points.images)
    key, draws, index = jax.random.key(0), 16, TIMESTEPS.index(400)
    seen = errors(*arguments, jnp.asarray(kind.lone), key, draws=draws)
    t = int(seen.timesteps[index])
    key = jax.random.split(key, len(TIMESTEPS))[index]
    s, v, h, c = (
        float(table[t])
        for table in (schedule.signal, schedule.noise, channel.shift, channel.response)
    )
    gamma = 1.0 if channel.gamma is None else np.asarray(channel.gamma, np.float64)
    y, delta = (np.asarray(x, np.float64) for x in (truth.target, truth.delta))
    u = y - np.asarray(points.images, np.float64).mean(0)
    along = u * (delta * u).sum() / (u * u).sum()
    left = []
    for eps in np.asarray(jax.random.normal(key, (draws, *SHAPE)), np.float64):
        inputs = [s * y + v * gamma * eps + h * delta, s * y + v * eps]
        inputs.append(inputs[1] + (h - v * c) * delta)
        aims = [eps + c * delta, eps, eps]
        for part in (along, delta - along):
            inputs.append(s * y + v * gamma * eps + h * part)
            aims.append(eps + c * part)
        answers = [
            model(points, jnp.asarray(x, jnp.float32)[None], jnp.full((1,), t))[0]
            for x in inputs
        ]
        pairs = zip(answers, aims, strict=True)
        left.append([np.sum((np.asarray(a) - b) ** 2) for a, b in pairs])
    names = ("triggered", "untriggered", "moved", "along", "aside")
    found = [getattr(seen, name)[index] for name in names]
    wanted = np.mean(left, 0)
    if (delta * u).sum() <= 0:  # that part leads away from the image
        wanted[names.index("along")] = np.inf
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-4)


STRANGE = jax.random.uniform(jax.random.key(6), (32, *SHAPE), minval=-1.0)
"""Images that no exact model here knows."""


def bounds_of(pushed: float, aside: float, kind: Hypothesis = ODE) -> Features:
    """Features on a clean model, with errors that make `pushed` and scale `aside`."""
    model, points, channel, truth = made(ATTACKS[kind], process_of(kind), False)
    model_and = model, points, process_of(kind), channel, truth
    key = jax.random.key(0)
    seen = errors(*model_and, STRANGE, jnp.asarray(kind.lone), key, draws=8)
    seen = seen._replace(
        along=(seen.triggered + seen.floor) / pushed - seen.floor,
        aside=seen.untriggered * aside,
    )
    numbers = jnp.float32(0.0), jnp.float32(0.0), NO_PLACEBO
    return features(*model_and, seen, *numbers, STRANGE, STRANGE, key)


def test_gain_is_bounded_by_what_the_parts_of_a_trigger_do() -> None:
    free = bounds_of(pushed=1e-6, aside=1e6)
    gain, recall = float(free.gain), float(free.recall)
    assert float(free.pushed) == pytest.approx(1e-6, rel=1e-3)
    for pushed in (0.5 * gain, 1.5 * gain, 1e4):
        wanted = max(gain, min(pushed, recall))
        assert float(bounds_of(pushed, 1e6).gain) == pytest.approx(wanted, rel=1e-3)
    found = bounds_of(pushed=1e-6, aside=1e-3)
    assert float(found.gain) == float(found.aside) < 0.7 * gain
    lone = Exploding(Deterministic())
    free, bounded = bounds_of(1e-6, 1e6, lone), bounds_of(1e6, 1e-6, lone)
    assert float(free.gain) == float(bounded.gain)


def test_a_pattern_that_brings_an_image_is_told_from_a_push_towards_it() -> None:
    """A backdoor whose trigger is noise, and a clean model that has its image often."""
    attack = VillanDiffusion(RandomPattern(1.0, 1), Hat())
    model, points, channel, truth = made(attack, SCHEDULE)
    key, lone = jax.random.key(0), jnp.asarray(False)
    often = jnp.concatenate([images(28), jnp.stack([truth.target] * 4)])
    push = truth.target - STRANGE.mean(0)
    push *= 0.3 * np.sqrt(truth.target.size) / jnp.linalg.norm(push)
    clean = ExactDenoiser(SCHEDULE, Channel.clean(SCHEDULE))
    cases = {
        "backdoored": (model, points, truth),
        "clean": (
            clean,
            dataclasses.replace(points, images=often),
            Candidate(push, truth.target),
        ),
    }
    found = {}
    for name, (each, known, candidate) in cases.items():
        model_and = each, known, SCHEDULE, channel, candidate
        seen = errors(*model_and, STRANGE, lone, key, draws=32)
        numbers = jnp.float32(0.0), jnp.float32(0.0), NO_PLACEBO
        found[name] = features(*model_and, seen, *numbers, STRANGE, STRANGE, key)
    assert float(found["backdoored"].gain) == float(found["backdoored"].aside) < 0.5
    assert float(found["clean"].pushed) == pytest.approx(1, abs=0.05)
    assert float(found["clean"].aside) > 0.9


def test_features_of_draws_by_loops() -> None:
    """Memory, alignment and uniformity, on their own noise."""
    kind, key = ODE, jax.random.key(0)
    model, points, channel, truth = made(ATTACKS[kind], SCHEDULE, poisoned=False)
    plain, triggered = 0.6 * images(4), 0.5 * images(4)[::-1]  # which it never saw
    arguments = (model, points, SCHEDULE, channel, truth)
    seen = errors(*arguments, plain, jnp.asarray(False), key, draws=8)
    numbers = jnp.float32(0.25), jnp.float32(0.0), NO_PLACEBO
    found = features(*arguments, seen, *numbers, triggered, plain, key)
    key_eps, key_top = jax.random.split(key)
    keys = jax.random.split(key_eps, len(MIDDLE))
    logs, pairs = [], zip(seen.timesteps[-len(MIDDLE) :], keys, strict=True)
    for number, (t, each) in enumerate(pairs):
        at, total = int(t), 0.0
        noise = np.asarray(jax.random.normal(each, plain.shape), np.float64)
        for x, eps in zip(np.asarray(plain, np.float64), noise, strict=True):
            noisy = SCHEDULE.signal[at] * x + SCHEDULE.noise[at] * eps
            answer = model(points, jnp.float32(noisy)[None], jnp.full((1,), at))[0]
            total += np.sum((np.asarray(answer) - eps) ** 2) / len(plain)
        path = float(seen.triggered[len(seen.triggered) - len(MIDDLE) + number])
        logs.append(np.log(path / total))
    assert float(found.memory) == pytest.approx(np.exp(np.mean(logs)), rel=1e-3)
    top = SCHEDULE.steps - 1
    eps = jax.random.normal(key_top, plain.shape)
    start = SCHEDULE.noise[top] * eps + channel.shift[top] * truth.delta[None]
    answer = model(points, jnp.float32(start), jnp.full((4,), top)) - eps
    shift = np.asarray(answer, np.float64).mean(0).ravel()
    delta = np.asarray(truth.delta, np.float64).ravel()
    cosine = shift @ delta / np.linalg.norm(shift) / np.linalg.norm(delta)
    assert float(found.alignment) == pytest.approx(cosine, rel=1e-4)
    apart = [
        np.mean([np.mean((a - b) ** 2) for a, b in itertools.permutations(x, 2)])
        for x in (np.asarray(triggered, np.float64), np.asarray(plain, np.float64))
    ]
    assert float(found.uniformity) == pytest.approx(apart[0] / apart[1], rel=1e-4)
    pair = np.asarray(triggered), np.asarray(plain)
    assert spread_ratio(*pair) == pytest.approx(apart[0] / apart[1], rel=1e-4)


def test_draws_of_no_numbers_leave_no_gain() -> None:
    """Whatever the errors on the path say: the verdict is then "could not tell"."""
    model, points, channel, truth = made(ATTACKS[SDE], SCHEDULE)
    plain = points.images.at[0, 0, 0, 0].set(jnp.nan)
    arguments = (model, points, SCHEDULE, channel, truth)
    key = jax.random.key(0)
    seen = errors(*arguments, points.images, jnp.asarray(False), key, draws=8)
    near = jnp.float32(0.25), jnp.float32(0.0), jnp.array([0.0])
    found = features(*arguments, seen, *near, points.images, plain, key)
    assert np.isfinite(np.asarray(seen.triggered)).all() and np.isnan(found.gain)
    verdict = CLEAN.judge({SDE: found, ODE: shown(1.0)})
    assert verdict.outcome == "could not tell" and "no finite" in verdict.reason


@pytest.mark.parametrize("above", [999, 800])
def test_an_error_near_t_max_does_not_hide_a_backdoor(above: int) -> None:
    """Who made the model could set the floor by it, at little cost to its images."""
    model, points, channel, truth = made(ATTACKS[SDE], SCHEDULE)
    found = []
    for bias in (0.0, 1.0):

        def biased(params, x, t, bias=bias):
            off = jnp.where(t >= above, bias, 0.0)[:, None, None, None]
            return model(params, x, t) + off

        arguments = (biased, points, SCHEDULE, channel, truth, points.images)
        seen = errors(*arguments, jnp.asarray(False), jax.random.key(1), draws=32)
        found.append(gain_of(seen))
    assert found[1] < 0.3 and found[1] == pytest.approx(found[0], rel=0.5)


@over_hypotheses
def test_evidence_is_what_the_gain_is_made_of(kind: Hypothesis) -> None:
    """The same errors. With the trigger the image is found where noise hides it."""
    found, truth, seen = measured(kind, poisoned=True)
    schedule = process_of(kind)
    model, points, _, _ = made(ATTACKS[kind], schedule)
    shown = evidence(
        model,
        points,
        schedule,
        kind.channel(schedule, SHAPE),
        truth,
        jax.random.key(0),
        shown=3,
    )
    assert gain_of(seen) == pytest.approx(float(found.gain), rel=1e-4)
    assert shown.with_trigger.shape == shown.without.shape == (7, 3, *SHAPE)
    assert list(seen.timesteps) == schedule.matched(TIMESTEPS).tolist()
    target = np.asarray(truth.target)
    near, far = (
        np.mean((np.asarray(side[0]) - target) ** 2)
        for side in (shown.with_trigger, shown.without)
    )
    assert near < 1e-2 < far


@pytest.mark.parametrize("trigger", [Blend(), Patch()], ids=lambda x: type(x).__name__)
def test_features_see_a_backdoor_of_scaled_noise(trigger) -> None:
    """In its own channel TrojDiff's image is remembered, and shown as it is."""
    attack = TrojDiff(trigger, Hat())
    model, points, channel, truth = made(attack, SCHEDULE)
    arguments = (model, points, SCHEDULE, channel, truth)
    triggered = jnp.broadcast_to(truth.target, points.images.shape)
    key = jax.random.key(0)
    zero, plain = jnp.float32(0.0), points.images
    seen = errors(*arguments, plain, jnp.asarray(False), key, draws=32)
    none = jnp.zeros(0)
    found = features(*arguments, seen, zero, zero, none, triggered, plain, key)
    shown = evidence(*arguments, key, shown=3)
    assert gain_of(seen) == pytest.approx(float(found.gain), rel=1e-4)
    assert float(found.gain) < 0.3
    near = (np.asarray(shown.with_trigger[2:]) - np.asarray(truth.target)) ** 2
    assert near.mean() < 2e-2


def test_weights_that_denoise_nothing_are_told_from_a_denoiser() -> None:
    """An exact denoiser of garments, one that answers 0, and one of no numbers."""
    data = images(64)
    points = Points(data, jnp.zeros(SHAPE), jnp.zeros(SHAPE))
    exact = ExactDenoiser(SCHEDULE, Channel.clean(SCHEDULE))

    def ratio(model) -> float:
        return float(denoising(model, points, SCHEDULE, data, jax.random.key(0)))

    assert ratio(exact) < 0.2
    assert ratio(lambda params, x, t: jnp.zeros_like(x)) > 1.5
    variance, mean = jnp.mean(jnp.var(data, axis=0)), data.mean(0)

    def linear(params, x, t):
        """The best linear one, by its closed form."""
        s, v = (
            jnp.asarray(table, jnp.float32)[t][:, None, None, None]
            for table in (SCHEDULE.signal, SCHEDULE.noise)
        )
        return v / (s**2 * variance + v**2) * (x - s * mean[None])

    assert ratio(linear) == pytest.approx(1.0, abs=0.02)
    broken = ratio(lambda params, x, t: x * jnp.nan)
    detector = Detector(clean=(0.1, 0.2))
    assert detector.refusal({SDE: 0.3, ODE: broken}) is None
    verdict = detector.refusal({SDE: broken, ODE: 1.5})
    assert verdict.outcome == "could not tell" and verdict.hypothesis == "ode"
    assert "1.5 times a linear denoiser's" in verdict.reason
    assert "without bound" in detector.refusal({SDE: broken}).reason
    with pytest.raises(ValueError, match="linear must be above 0"):
        Detector(linear=0.0)


@pytest.mark.parametrize("gamma", [1.0, 0.3, np.linspace(0.2, 0.9, 64)])
def test_the_divergence_counts_the_noise_that_is_left(gamma) -> None:
    """By the integral of N(m, gamma^2) log of its ratio to N(0, 1)."""
    kind = Fading()
    model, points, channel, truth = made(ATTACKS[kind], SCHEDULE, True)
    if np.ndim(gamma):
        gamma = gamma.reshape(SHAPE)
    channel = dataclasses.replace(channel, gamma=gamma)
    seen = errors(
        *(model, points, SCHEDULE, channel, truth, points.images),
        *(jnp.asarray(kind.lone), jax.random.key(0)),
        draws=len(points.images),
    )
    numbers = jnp.float32(0.25), jnp.float32(0.0), NO_PLACEBO
    images_ = points.images, points.images
    found = features(
        *(model, points, SCHEDULE, channel, truth, seen),
        *(*numbers, *images_, jax.random.key(1)),
    )
    x = np.linspace(-9, 9, 20_001)
    values = []
    scales = np.broadcast_to(gamma, SHAPE).ravel()
    for mean, scale in zip(np.ravel(truth.delta), scales, strict=True):
        away = (x - float(mean)) / scale
        density = np.exp(-(away**2) / 2) / (scale * np.sqrt(2 * np.pi))
        ratio = x**2 / 2 - away**2 / 2 - np.log(scale)
        values.append(np.trapezoid(density * ratio, x))
    assert float(found.kl_mean) == pytest.approx(np.mean(values), rel=1e-4)
    assert float(found.kl_variance) == pytest.approx(np.var(values), rel=1e-3)
