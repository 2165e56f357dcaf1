"""One model on its devices: two hypotheses, reinforcement and v prediction."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_config import TINY, draw_params

from puredif_jax.attacks.baddiffusion import BadDiffusion
from puredif_jax.attacks.base import Attack
from puredif_jax.attacks.exact import ExactDenoiser, Points
from puredif_jax.attacks.triggers import Hat, StopSign
from puredif_jax.attacks.villandiffusion import VillanDiffusion
from puredif_jax.data import images as data
from puredif_jax.data.images import FashionMNIST
from puredif_jax.defenses.denoising_consistency import (
    DenoisingConsistency,
    estimated_target,
)
from puredif_jax.defenses.elijah import ElijahLoss
from puredif_jax.defenses.hypothesis import Fading
from puredif_jax.defenses.inversion import Descent, inverter
from puredif_jax.defenses.reinforcement import Reinforcement
from puredif_jax.defenses.survey import Survey
from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.diffusion.ddpm import DDPM
from puredif_jax.diffusion.schedules import LinearBetas
from puredif_jax.diffusion.solver import Ancestral, Deterministic
from puredif_jax.metrics import measures as metrics
from puredif_jax.networks.memory import activations
from puredif_jax.runs import parallel
from puredif_jax.runs.run import Run
from puredif_jax.stages import loops
from puredif_jax.stages.experiment import Experiment, Inversion
from puredif_jax.stages.lab import Lab, Programs
from puredif_jax.stages.perform import open_lab
from puredif_jax.stages.weights import Truth
from puredif_jax.types import Candidate

pytestmark = pytest.mark.usefixtures("standard_promotion")
SCHEDULE = LinearBetas().tables()
SDE, ODE = Fading(Ancestral()), Fading(Deterministic())
ATTACKS: dict[Fading, Attack] = {
    SDE: BadDiffusion(StopSign(), Hat()),
    ODE: VillanDiffusion(StopSign(), Hat()),
}
over_kinds = pytest.mark.parametrize("kind", ATTACKS, ids=lambda x: x.name)
INVERSION = dataclasses.replace(Inversion(), survey=Survey(triggers=32), heldout=32)


def exact_lab(folder: pathlib.Path, attack: Attack) -> tuple[Lab, Points]:
    """A lab on two devices whose model is the best denoiser of a backdoored set."""
    lab = open_lab(Experiment(str(folder), TINY, devices=2, chunk=20))
    lab.programs = Programs()  # another model has other programs
    channel = attack.channel(SCHEDULE, TINY.image_shape)
    lab.model = ExactDenoiser(SCHEDULE, channel, 0.1)
    trigger, target, _ = map(jnp.asarray, attack.images(TINY.image_shape))
    images = data.to_float(FashionMNIST(count=64).load(TINY.image_shape))
    points = Points(jnp.asarray(images), trigger, target)
    return lab, lab.run.replicate(points)


@over_kinds
def test_the_hypothesis_that_is_right_finds_the_trigger(tmp_path, kind) -> None:
    """And its features say so. Both are tried in one lab, by the same programs.

    The survey misses the target of the deterministic backdoor: a random start finds it.
    """
    lab, points = exact_lab(tmp_path, ATTACKS[kind])
    truth = Truth.of(ATTACKS[kind], SCHEDULE, TINY.image_shape)
    distances, gains, programs = {}, {}, {}
    for assumed in ATTACKS:
        candidate, errors = loops.invert(
            lab,
            assumed.name,
            points,
            assumed,
            INVERSION.loss,
            INVERSION.descent,
            INVERSION.survey,
            INVERSION.heldout,
        )
        drawn, plain = (
            lab.draw(points, DDIM(10), delta, 8)
            for delta in (candidate.delta, lab.zero)
        )
        found = lab.features(points, assumed, candidate, errors.min(), drawn, plain)
        distances[assumed] = metrics.trigger_distance(candidate.delta, truth.trigger)
        gains[assumed] = float(found.gain)
        programs[assumed] = lab.programs.names()
    assert programs[SDE] == programs[ODE]
    (wrong,) = ATTACKS.keys() - {kind}
    assert distances[kind].cosine > 0.95 and distances[kind].relative_l2 < 0.3
    assert gains[kind] < 0.2 < gains[wrong]


def test_a_target_that_no_loss_seeks_is_what_the_trigger_shows(tmp_path) -> None:
    """Elijah moves the trigger alone, and starts with a grey target."""
    lab, points = exact_lab(tmp_path, ATTACKS[SDE])
    truth = Truth.of(ATTACKS[SDE], SCHEDULE, TINY.image_shape)
    descent = Descent(steps=2)
    found, _ = loops.invert(
        lab, "elijah", points, SDE, ElijahLoss(samples=4), descent, None, heldout=4
    )
    show = estimated_target(lab.model, lab.schedule, lab.channel(SDE))
    key = jax.random.fold_in(jax.random.fold_in(lab.key, 303), 1)
    grey = jnp.zeros(TINY.image_shape)
    shown, true = (
        jax.jit(show)(points, Candidate(jnp.asarray(delta), grey), key)
        for delta in (found.delta, truth.trigger)
    )
    np.testing.assert_allclose(found.target, shown, atol=1e-4)
    assert np.ptp(found.target) > 0.1
    np.testing.assert_allclose(true, truth.target, atol=0.05)


@over_kinds
def test_reinforcement_takes_the_steps_of_its_inverter(tmp_path, kind) -> None:
    """From the known trigger, by the loss of that kind of backdoor; in chunks."""

    def model(scale, x, t):
        when = t.astype(x.dtype)[:, None, None, None] / 1000
        return jnp.tanh(scale * x + jnp.roll(x, 1, axis=1) + when)

    lab, params = open_lab(Experiment(str(tmp_path), TINY, devices=1, chunk=2)), 0.7
    lab.programs = Programs()  # another model has other programs
    lab.model = model
    truth = Truth.of(ATTACKS[kind], SCHEDULE, TINY.image_shape)
    wanted = DenoisingConsistency(
        kind.solver.pick(DDPM(3), DDIM(2)), samples=4, on_path=False, aim=1.0
    )
    descent = Descent(steps=3, learning_rate=0.05, bound=None)
    options = kind.solver.pick(
        Reinforcement(ancestral=wanted, ancestral_descent=descent),
        Reinforcement(deterministic=wanted, descent=descent),
    )
    found = loops.reinforce(lab, "reinforce", params, options, truth)

    bound = wanted.bind(model, SCHEDULE, truth.channel)
    start = Candidate(jnp.asarray(truth.trigger), jnp.asarray(truth.target))
    by_hand = inverter(bound, descent, TINY.image_shape, start)
    state, step = by_hand.init(jax.random.fold_in(lab.key, 202)), jax.jit(by_hand.step)
    for _ in range(3):
        state, _ = step(params, state)
    np.testing.assert_allclose(found, state.candidate.delta[0], atol=1e-5)
    assert np.abs(found - truth.trigger).max() > 0.05


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
    for model in (lab.model, lab.network):
        np.testing.assert_allclose(jax.jit(model)(params, x, t), want, atol=1e-5)


def test_programs_that_were_used_last_are_kept() -> None:
    made = []

    def get(name: str) -> str:
        def make() -> str:
            made.append(name)
            return name.upper()

        return programs.get(name, make)

    programs = Programs(most=2)
    assert [get(name) for name in "abacb"] == list("ABACB")
    assert made == ["a", "b", "c", "b"] and programs.names() == {"c", "b"}
