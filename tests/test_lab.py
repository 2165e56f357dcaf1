"""One model on its devices: two hypotheses, reinforcement and v prediction."""

import copy
import dataclasses
import gc
import pathlib
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_config import TINY, draw_params

from puredif_jax.attacks.baddiffusion import BadDiffusion
from puredif_jax.attacks.base import Attack
from puredif_jax.attacks.drawing import draw
from puredif_jax.attacks.exact import ExactDenoiser, Points
from puredif_jax.attacks.targets import Hat
from puredif_jax.attacks.training import Training
from puredif_jax.attacks.triggers import Blend, Patch, RandomPattern, StopSign
from puredif_jax.attacks.trojdiff import TrojDiff
from puredif_jax.attacks.villandiffusion import VillanDiffusion
from puredif_jax.data import images as data
from puredif_jax.data.images import FashionMNIST
from puredif_jax.defenses.blocks import Blocks
from puredif_jax.defenses.denoising_consistency import (
    DenoisingConsistency,
    estimated_target,
)
from puredif_jax.defenses.denoising_error import DenoisingError
from puredif_jax.defenses.descent import Descent
from puredif_jax.defenses.distribution_shift import DistributionShift
from puredif_jax.defenses.elijah import ElijahLoss
from puredif_jax.defenses.hypothesis import Fading, Trojan
from puredif_jax.defenses.inversion import Inversion, inverter
from puredif_jax.defenses.reinforcement import Reinforcement
from puredif_jax.defenses.spectrum import Spectrum
from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.diffusion.ddpm import DDPM
from puredif_jax.diffusion.schedules import LinearBetas, ScaledLinearBetas
from puredif_jax.diffusion.solver import Ancestral, Deterministic
from puredif_jax.metrics import measures as metrics
from puredif_jax.networks.memory import activations
from puredif_jax.runs import parallel
from puredif_jax.runs.run import Run
from puredif_jax.stages import programs, scouting, search, train
from puredif_jax.stages.experiment import Experiment
from puredif_jax.stages.lab import Lab
from puredif_jax.stages.perform import open_lab
from puredif_jax.stages.setup import Setup, Stream
from puredif_jax.stages.weights import Truth
from puredif_jax.types import Array, Candidate, Member, NoiseModel, Params

pytestmark = pytest.mark.usefixtures("standard_promotion")
SCHEDULE = LinearBetas().tables()
SDE, ODE = Fading(Ancestral()), Fading(Deterministic())
ATTACKS: dict[Fading, Attack] = {
    SDE: BadDiffusion(StopSign(), Hat()),
    ODE: VillanDiffusion(StopSign(), Hat()),
}
over_kinds = pytest.mark.parametrize("kind", ATTACKS, ids=lambda x: x.name)
INVERSION = dataclasses.replace(Inversion(), heldout=32)


@dataclasses.dataclass(frozen=True)
class Network:
    """A noise model where a lab has its UNet; equal to no other."""

    model: NoiseModel
    image_shape: tuple[int, int, int] = TINY.image_shape

    def __call__(self, params: Params, x: Array, t: Array) -> Array:
        return self.model(params, x, t)


def give(lab: Lab, model: NoiseModel) -> None:
    """Another model for a lab, which has other programs by that."""
    network: Any = Network(model)
    lab.setup = dataclasses.replace(lab.setup, network=network)


def exact_lab(folder: pathlib.Path, attack: Attack) -> tuple[Lab, Points]:
    """A lab on two devices whose model is the best denoiser of a backdoored set."""
    lab = open_lab(Experiment(str(folder), TINY, devices=2, chunk=20))
    channel = attack.channel(SCHEDULE, TINY.image_shape)
    give(lab, ExactDenoiser(SCHEDULE, channel, 0.1))
    trigger, target, _ = map(jnp.asarray, attack.images(TINY.image_shape))
    images = data.to_float(FashionMNIST(count=64).load(TINY.image_shape))
    points = Points(jnp.asarray(images), trigger, target)
    return lab, lab.run.replicate(points)


@over_kinds
def test_the_hypothesis_that_is_right_finds_the_trigger(tmp_path, kind) -> None:
    """And its features say so. Both are tried in one lab, by the same programs."""
    lab, points = exact_lab(tmp_path, ATTACKS[kind])
    truth = Truth.of(ATTACKS[kind], SCHEDULE, TINY.image_shape)
    distances, gains, number = {}, {}, {}
    for assumed in ATTACKS:
        candidate, errors, _ = search.invert(
            lab,
            assumed.name,
            points,
            assumed,
            INVERSION,
        )
        drawn, plain = (
            lab.draw(points, DDIM(10), delta, 8)
            for delta in (candidate.delta, lab.zero)
        )
        found = lab.features(
            points,
            assumed,
            candidate,
            lab.errors(assumed.name, points, assumed, candidate, plain),
            errors.min(),
            np.zeros(()),
            np.zeros(0),
            drawn,
            plain,
        )
        distances[assumed] = metrics.trigger_distance(candidate.delta, truth.trigger)
        gains[assumed] = float(found.gain)
        number[assumed] = made()
    assert number[SDE] == number[ODE], "the second kind had programs of its own"
    (wrong,) = ATTACKS.keys() - {kind}
    assert distances[kind].cosine > 0.95 and distances[kind].relative_l2 < 0.3
    assert gains[kind] < 0.3 < gains[wrong]


@pytest.mark.parametrize(
    "attack,kind,starts",
    [
        (TrojDiff(Patch(), Hat()), Trojan(), "blocks"),
        (BadDiffusion(RandomPattern(1.0), Hat(), trigger_only=True), SDE, "spectrum"),
    ],
    ids=["patch", "noise"],
)
def test_a_trigger_is_found_from_what_the_model_answers(
    tmp_path, attack, kind, starts
) -> None:
    """By a short search. Random starts miss it; what is stored is not asked again."""
    lab, points = exact_lab(tmp_path, attack)
    truth = Truth.of(attack, SCHEDULE, TINY.image_shape)
    descent = dataclasses.replace(INVERSION.descent, candidates=4, scout=10, steps=40)
    wanted = dataclasses.replace(INVERSION, descent=descent)
    random = dataclasses.replace(wanted, **{starts: None})
    cosines = []
    for name, inversion in {"led": wanted, "random": random}.items():
        found, _, _ = search.invert(lab, name, points, kind, inversion)
        distance = metrics.trigger_distance(found.delta, truth.trigger)
        cosines.append(float(distance.cosine))
    assert cosines[0] > 0.99 > 0.5 > cosines[1], cosines
    results = lab.run.folder / "results"
    assert [path.name for path in results.iterdir()] == ["led_starts.npz"]
    before = scouting._answering.cache_info()
    search.invert(lab, "led", points, kind, wanted)
    assert scouting._answering.cache_info() == before


def test_a_scout_that_is_stuck_at_a_part_of_the_trigger_leaps_to_it(tmp_path) -> None:
    """With the other psi and the image there; one that is right stays as it is."""
    lab, points = exact_lab(tmp_path, ATTACKS[SDE])
    truth = Truth.of(ATTACKS[SDE], SCHEDULE, TINY.image_shape)
    family = lab.family(SDE)
    inversion = Inversion(descent=Descent(steps=2, candidates=2, scout=1))
    small = jnp.asarray(truth.trigger) / inversion.leap
    right = Candidate(jnp.asarray(truth.trigger), jnp.asarray(truth.target))
    stuck = Candidate(small, jnp.zeros(TINY.image_shape))
    state = inverter(
        DenoisingError().bind(lab.model, SCHEDULE, family),
        inversion.descent,
        TINY.image_shape,
        family=family,
    ).init(lab.key)
    one = Member(jnp.ones(()), jnp.ones(TINY.image_shape))
    zero = Member(jnp.zeros(()), jnp.ones(TINY.image_shape))
    pair = [
        dataclasses.replace(stuck, member=zero),
        dataclasses.replace(right, member=one),
    ]
    state = dataclasses.replace(
        state, candidate=jax.tree.map(lambda *x: jnp.stack(x), *pair)
    )
    judge = jax.jit(DenoisingError(samples=8).bind(lab.model, SCHEDULE, family))
    before = np.array([judge(points, each, lab.key) for each in pair])
    assert before[0] > before[1] + 1
    given = before.copy()
    found, errors = scouting.leap(lab, points, family, inversion, state, before)
    first, second = (
        jax.tree.map(lambda x, k=k: x[k], found.candidate) for k in range(2)
    )
    assert errors[0] < before[0] - 1 and errors[1] == before[1]
    np.testing.assert_allclose(first.delta, truth.trigger, atol=1e-6)
    assert float(first.member.psi) == 1
    assert float(metrics.mse(first.target[None], truth.target)[0]) < 1e-2
    jax.tree.map(np.testing.assert_array_equal, second, pair[1])
    np.testing.assert_array_equal(before, given)


def test_a_leap_stays_within_the_bound_and_may_be_left_out() -> None:
    family = SDE.family(SCHEDULE, TINY.image_shape)
    shape = TINY.image_shape
    given = Candidate(
        jnp.full(shape, -0.5), jnp.zeros(shape), Member(jnp.ones(()), jnp.ones(shape))
    )
    found = Inversion(leap=3.0).larger(family, given)
    assert [float(each.member.psi) for each in found] == [0.0, 1.0]
    assert all((each.delta == -1).all() for each in found)
    free = Inversion(leap=3.0, descent=Descent(bound=None)).larger(family, given)
    assert all((each.delta == -1.5).all() for each in free)
    assert Inversion().leaps and not Inversion(leap=0).leaps
    assert not Inversion(descent=Descent(scout=0)).leaps
    more = Inversion().evaluations(SDE) - Inversion(leap=0).evaluations(SDE)
    assert more == 16 * 2 * (4 * 10 + 4 * 10)
    with pytest.raises(ValueError, match="leap must be 0 or more, found -1"):
        Inversion(leap=-1)


def test_a_target_that_no_loss_seeks_is_what_the_trigger_shows(tmp_path) -> None:
    """Elijah moves the trigger alone, and starts with a grey target."""
    lab, points = exact_lab(tmp_path, ATTACKS[SDE])
    truth = Truth.of(ATTACKS[SDE], SCHEDULE, TINY.image_shape)
    descent = Descent(steps=2)
    found, *_ = search.invert(
        lab,
        "elijah",
        points,
        SDE,
        Inversion(ElijahLoss(samples=4), descent, None, None, heldout=4),
    )
    show = estimated_target(lab.model, lab.schedule, lab.channel(SDE))
    key = jax.random.fold_in(lab.stream(Stream.HELDOUT), 1)
    grey = jnp.zeros(TINY.image_shape)
    shown, true = (
        jax.jit(show)(points, Candidate(jnp.asarray(delta), grey), key)
        for delta in (found.delta, truth.trigger)
    )
    np.testing.assert_allclose(found.target, shown, atol=1e-4)
    assert np.ptp(found.target) > 0.1
    np.testing.assert_allclose(true, truth.target, atol=0.05)


@pytest.mark.parametrize(
    "attack",
    [*ATTACKS.values(), TrojDiff(Blend(), Hat())],
    ids=lambda x: type(x).__name__,
)
def test_reinforcement_takes_the_steps_of_its_inverter(tmp_path, attack) -> None:
    """From the known trigger, by the loss of that kind of backdoor; in chunks.

    A backdoor that is drawn inside its channel is rolled out there.
    """
    solver = attack.solver

    def model(scale, x, t):
        when = t.astype(x.dtype)[:, None, None, None] / 1000
        return jnp.tanh(scale * x + jnp.roll(x, 1, axis=1) + when)

    lab, params = open_lab(Experiment(str(tmp_path), TINY, devices=1, chunk=2)), 0.7
    give(lab, model)
    truth = Truth.of(attack, SCHEDULE, TINY.image_shape)
    wanted = DenoisingConsistency(
        solver.pick(DDPM(3), DDIM(2)), samples=4, on_path=False, aim=1.0
    )
    descent = Descent(steps=3, learning_rate=0.05, bound=None)
    options = solver.pick(
        Reinforcement(ancestral=wanted, descent=descent),
        Reinforcement(deterministic=wanted, descent=descent),
    )
    found = search.reinforce(lab, "reinforce", params, options, truth, truth.trigger)

    rolled = dataclasses.replace(wanted, on_path=attack.controlled)
    bound = rolled.bind(model, SCHEDULE, truth.channel)
    start = Candidate(jnp.asarray(truth.trigger), jnp.asarray(truth.target))
    by_hand = inverter(bound, descent, TINY.image_shape, start)
    state, step = by_hand.init(lab.stream(Stream.DESCENT)), jax.jit(by_hand.step)
    for _ in range(3):
        state, _ = step(params, state)
    np.testing.assert_allclose(found, state.candidate.delta[0], atol=1e-5)
    assert np.abs(found - truth.trigger).max() > 0.05


@pytest.mark.parametrize("trigger", [Blend(), Patch()], ids=lambda x: type(x).__name__)
def test_who_controls_the_sampler_draws_inside_the_channel(tmp_path, trigger) -> None:
    """By one program, from the same noise; so the trigger of TrojDiff fires."""
    attack = TrojDiff(trigger, Hat())
    lab, points = exact_lab(tmp_path, attack)
    truth = Truth.of(attack, SCHEDULE, TINY.image_shape)
    found = lab.draw(points, DDIM(10), truth.trigger, 8, inside=truth.inside)
    key_start, key_chain = jax.random.split(
        jax.random.fold_in(lab.stream(Stream.DRAWS), 0)
    )
    by_hand = draw(
        ExactDenoiser(SCHEDULE, truth.channel, 0.1),
        points,
        SCHEDULE,
        DDIM(10),
        jax.random.normal(key_start, (lab.setup.batch, *TINY.image_shape)),
        jnp.asarray(truth.trigger),
        key_chain,
        inside=truth.channel,
    )
    np.testing.assert_allclose(found, by_hand[:8], atol=1e-3)
    rates = lab.success(
        "x", points, DDIM(10), truth.trigger, truth.target, 8, truth.inside
    )
    assert rates.rate == 1.0
    plain = lab.draw(points, DDIM(10), lab.zero, 8)
    assert metrics.success(plain, truth.target)["mse<0.01"] == 0.0
    assert Truth.of(ATTACKS[SDE], SCHEDULE, TINY.image_shape).inside is None


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("fit", [12, 4])
def test_the_model_predicts_the_noise_that_the_network_means(
    tmp_path, monkeypatch, prediction, fit
) -> None:
    """eps = s v + sigma x of one that predicts v; all at once, or four at a time."""
    params = jax.tree.map(jnp.asarray, draw_params(TINY, 1))
    size = activations(TINY, params, TINY.image_shape)
    monkeypatch.setattr(parallel, "free_memory", lambda: fit * size)
    run = Run(str(tmp_path), {}, parallel.make_mesh(2), 0.0)
    lab = Lab(run, TINY, LinearBetas(), 4, 0, 1, prediction, images=12)
    assert lab.together == fit
    x = jax.random.normal(jax.random.key(2), (12, *TINY.image_shape))
    t = jnp.arange(12) * 80
    want = TINY(params, x, t)
    if prediction == "v_prediction":
        signal, noise = (
            jnp.asarray(table, jnp.float32)[t][:, None, None, None]
            for table in (SCHEDULE.signal, SCHEDULE.noise)
        )
        want = signal * want + noise * x
    for model in (lab.model, lab.setup.whole):
        np.testing.assert_allclose(jax.jit(model)(params, x, t), want, atol=1e-5)


TRAINING, LOSS, DESCENT = (
    Training(9, warmup=1),
    DistributionShift(samples=1),
    Descent(steps=2),
)
MAKERS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "draws": (programs.drawing, (DDIM(2),)),
    "features": (programs.measuring, ()),
    "errors": (programs.erring, (8,)),
    "evidence": (programs.showing, ()),
    "denoising": (programs.judging_denoiser, ()),
    "judging": (search._judging, (8, False)),
    "descent": (search._descending, (LOSS, DESCENT, 20)),
    "answers": (scouting._answering, (Blocks(),)),
    "leads": (scouting._leading, (Spectrum(), 2)),
    "starts": (scouting._showing, ()),
    "leaps": (scouting._leaping, (Inversion(),)),
    "training": (train._training, (TRAINING, ATTACKS[ODE], 20)),
}
OTHERS: dict[str, tuple[Any, ...]] = {
    "draws": (DDPM(2),),
    "errors": (9,),
    "judging": (9, True),
    "descent": (ElijahLoss(), Descent(steps=3), 21),
    "answers": (Spectrum(),),
    "leads": (Blocks(), 4),
    "leaps": (Inversion(leap=2.0),),
    "training": (Training(8, warmup=1), None, 21),
}
"""Another value of each argument beside the setup."""


def made() -> int:
    """How many programs have been made in this process."""
    return sum(make.cache_info().misses for make, _ in MAKERS.values())


def setup_of(**changes) -> Setup:
    """A setup of objects of its own; `mesh` is the number of devices."""
    fields = {
        "network": dataclasses.replace(TINY),
        "process": LinearBetas(),
        "prediction": "epsilon",
        "slices": 4,
        "batch": 8,
        "mesh": 2,
    } | changes
    return Setup(**fields | {"mesh": parallel.make_mesh(fields["mesh"])})


def test_equal_setups_share_their_programs() -> None:
    first, second = setup_of(), setup_of()
    assert first is not second and first == second
    for name, (make, rest) in MAKERS.items():
        program = make(first, *rest)
        assert make(second, *copy.deepcopy(rest)) is program, name


@pytest.mark.parametrize(
    "change",
    [
        {"network": dataclasses.replace(TINY, norm_eps=1e-4)},
        {"process": ScaledLinearBetas()},
        {"process": LinearBetas(end=0.03)},
        {"prediction": "v_prediction"},
        {"slices": None},
        {"batch": 9},
        {"mesh": 4},
    ],
    ids=lambda x: next(iter(x)),
)
def test_different_setups_share_no_program(change) -> None:
    (field,) = change
    assert field in {x.name for x in dataclasses.fields(Setup)}
    for name, (make, rest) in MAKERS.items():
        assert make(setup_of(), *rest) is not make(setup_of(**change), *rest), name


@pytest.mark.parametrize("name", MAKERS)
def test_whatever_else_a_program_is_made_of_tells_it_apart(name) -> None:
    make, rest = MAKERS[name]
    others = OTHERS.get(name, ())
    assert len(others) == len(rest)
    one = make(setup_of(), *rest)
    for i, other in enumerate(others):
        assert make(setup_of(), *rest[:i], other, *rest[i + 1 :]) is not one


def test_programs_that_were_used_last_are_kept() -> None:
    """And of what is dropped the memory comes back."""
    setup = setup_of(batch=10)

    def get(steps: int) -> weakref.ref:
        return weakref.ref(programs.drawing(setup, DDIM(steps)).__wrapped__)

    first, second = get(1), get(2)
    for steps in range(3, programs.KEPT + 2):  # one too many with the second again
        assert get(1) is first
        get(steps)
    gc.collect()
    assert first() is not None and second() is None


def test_each_use_of_randomness_has_a_stream_of_its_own(tmp_path) -> None:
    lab = open_lab(Experiment(str(tmp_path), TINY, devices=1))
    keys = {name: lab.stream(x) for name, x in Stream.__members__.items()}
    words = {tuple(jax.random.key_data(key).tolist()) for key in keys.values()}
    assert len(words) == len(keys) > 1
