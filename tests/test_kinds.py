"""Kinds of every part of the core: none is forgotten here, and each keeps its contract.

A new class of the package is found by inheritance: a row for it has to be added to the
lists below, or to those of the tests that they are taken from.
"""

from __future__ import annotations

import abc
import importlib
import inspect
import pkgutil
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_attacks
import test_defenses
import test_inputs
import test_objectives
import test_removal
import test_triggers
import test_uniformity
from test_schedules import KINDS

import puredif_jax
from puredif_jax.attacks.base import Attack
from puredif_jax.attacks.channel import Channel
from puredif_jax.attacks.drawing import draw
from puredif_jax.attacks.targets import Target
from puredif_jax.attacks.triggers import Trigger
from puredif_jax.attacks.villandiffusion_ve import VillanDiffusionVE
from puredif_jax.defenses.base import Defense
from puredif_jax.defenses.blocks import Blocks
from puredif_jax.defenses.detector import Detector, Scores
from puredif_jax.defenses.elijah import Uniformity
from puredif_jax.defenses.family import Family
from puredif_jax.defenses.hypothesis import Fading, Hypothesis, Trojan
from puredif_jax.defenses.inputs import InputTest
from puredif_jax.defenses.inversion import Inversion
from puredif_jax.defenses.objective import Loss
from puredif_jax.defenses.removal import Removal
from puredif_jax.defenses.spectrum import Spectrum
from puredif_jax.defenses.starts import Starts
from puredif_jax.defenses.terd import Divergence, DivergenceVariance
from puredif_jax.defenses.uniformity import PairDistance
from puredif_jax.diffusion.ddim import DDIM, QuadraticDDIM
from puredif_jax.diffusion.ddpm import DDPM
from puredif_jax.diffusion.multistep import DPMSolver, UniPC
from puredif_jax.diffusion.path_keeping import PathKeeping
from puredif_jax.diffusion.prediction import lookup
from puredif_jax.diffusion.sampling import Sampler, sample, trajectory, unclipped
from puredif_jax.diffusion.schedules import (
    LinearBetas,
    NoiseSchedule,
    Process,
    ScaledLinearBetas,
)
from puredif_jax.diffusion.solver import Ancestral, Solver
from puredif_jax.diffusion.ve import (
    Preconditioned,
    PredictorCorrector,
    VarianceExploding,
)
from puredif_jax.diffusion.widened import Widened
from puredif_jax.types import Array

SHAPE = (8, 8, 1)
PROCESSES: list[Process] = [
    *KINDS,
    ScaledLinearBetas(),
    Widened(LinearBetas(), 5.0),
    VarianceExploding(),
    VarianceExploding(50, values=(-1.0, 1.0), given_sigma=False),
    Preconditioned(VarianceExploding(50, sigma_max=50.0)),
]
SAMPLERS: list[Sampler] = [
    DDPM(8),
    PathKeeping(8),
    DDIM(8),
    DDIM(8, eta=1.0),
    QuadraticDDIM(8),
    DPMSolver(8),
    UniPC(8),
    PredictorCorrector(8),
    PredictorCorrector(8, corrections=0),
]
ATTACKS: list[Attack] = [
    *test_attacks.ATTACKS,
    *test_attacks.TROJAN,
    *test_attacks.VE,
]
SOLVERS: tuple[Solver, ...] = test_attacks.SOLVERS
HYPOTHESES: list[Hypothesis] = [
    *test_objectives.SOUGHT,
    *Fading(Ancestral()).placebos,
    Trojan(),
]
LOSSES: list[Loss] = [*test_objectives.LOSSES.values()]
STARTS: list[Starts] = [Blocks(places=4), Spectrum(draws=48)]
LISTS: dict[type, Iterable[object]] = {
    Attack: ATTACKS,
    Defense: test_defenses.DEFENSES,
    InputTest: test_inputs.TESTS,
    Scores: [Detector(), Uniformity(), Divergence(), DivergenceVariance()],
    Hypothesis: HYPOTHESES,
    Loss: LOSSES,
    Process: PROCESSES,
    PairDistance: test_uniformity.DISTANCES,
    Removal: test_removal.REMOVALS,
    Sampler: SAMPLERS,
    Solver: SOLVERS,
    Starts: STARTS,
    Target: test_triggers.TARGETS,
    Trigger: test_triggers.TRIGGERS,
}
LAYERS = ("diffusion", "attacks", "defenses")


# --- None is forgotten ---------------------------------------------------------------


def modules() -> list[str]:
    """Those of the layers of the core, by name."""
    return [
        f"puredif_jax.{layer}.{module.name}"
        for layer in LAYERS
        for path in puredif_jax.__path__
        for module in pkgutil.iter_modules([f"{path}/{layer}"])
    ]


def concrete(base: type, package: str = "puredif_jax") -> set[type]:
    """All that inherit from it and can be made, of a package, at any depth."""
    found, waiting = set(), [base]
    while waiting:
        each = waiting.pop()
        waiting += each.__subclasses__()
        within = f"{each.__module__}.".startswith(f"{package}.")
        if within and not inspect.isabstract(each):
            found.add(each)
    return found


@pytest.mark.parametrize("base", LISTS, ids=lambda x: x.__name__)
def test_every_kind_of_the_package_is_in_a_list(base: type) -> None:
    for name in modules():
        importlib.import_module(name)
    assert inspect.isabstract(base), "else it would be a kind of its own"
    tested = {type(each) for each in LISTS[base]}
    kinds = concrete(base)
    assert kinds - tested == set(), "a row of them is missing"
    assert len(kinds) > 1


def test_a_kind_that_is_forgotten_is_found() -> None:
    """Also below a kind, and not what is abstract or of a user's file."""

    class Base(abc.ABC):
        @abc.abstractmethod
        def f(self) -> None: ...

    class Half(Base):
        pass

    class Kind(Half):
        def f(self) -> None: ...

    class Heir(Kind):
        pass

    assert concrete(Base, __name__) == {Kind, Heir}
    assert concrete(Base) == set()


def test_every_abstract_base_of_the_core_has_a_list() -> None:
    """Denoisers wrap networks; no configuration holds them."""
    bases = {
        each
        for name in modules()
        for each in vars(importlib.import_module(name)).values()
        if inspect.isclass(each)
        and each.__module__ == name
        and abc.ABC in each.__bases__
    }
    assert {x.__name__ for x in bases - LISTS.keys()} == {"Denoiser"}


# --- Processes and samplers ----------------------------------------------------------


def named(each: object) -> str:
    return type(each).__name__


@pytest.mark.parametrize("process", PROCESSES, ids=named)
def test_a_process_makes_tables_of_its_length(process: Process) -> None:
    tables = process.tables()
    assert isinstance(tables, NoiseSchedule)
    assert tables.steps == process.steps > 1
    for table in (tables.signal, tables.noise, tables.given, tables.added):
        assert table.shape == (process.steps,)
    assert tables.signal.dtype == tables.noise.dtype == np.float64
    assert (np.diff(tables.log_snr) < 0).all() and np.isfinite(tables.log_snr).all()
    assert (tables.noise > 0).all() and (tables.added > 0).all()
    assert tables.fades == (tables.signal[-1] < 1)
    low, high = tables.values
    # A draw starts where the forward process ends: of a network's own image 0.
    ends = np.hypot(tables.noise[-1], tables.signal[-1] * (not tables.fades))
    centre = -(low + high) / (high - low)
    zero, one = (float(tables.start(np.float64(x))) for x in (0.0, 1.0))
    assert zero == pytest.approx(centre) and one - zero == pytest.approx(tables.prior)
    assert tables.prior == pytest.approx(ends, rel=0.05) or process.steps < 100
    assert type(process)(**vars(process)) == process
    assert hash(process) == hash(type(process)(**vars(process)))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_a_path_falls_to_the_clean_end(sampler: Sampler) -> None:
    schedule = process_of(sampler)
    times, goals = sampler.path(schedule)
    assert times.dtype == goals.dtype == np.int32
    assert times.shape == goals.shape == (sampler.steps,)
    assert 0 <= times.min() and times.max() < schedule.steps
    assert (np.diff(times) <= 0).all() and (goals <= times).all() and goals[-1] == -1
    np.testing.assert_array_equal(goals[:-1], times[1:])


def process_of(sampler: Sampler) -> NoiseSchedule:
    process = LinearBetas()
    if isinstance(sampler, PredictorCorrector):
        process = VarianceExploding()
    return process.tables()


def refuses(sampler: Sampler, tables: NoiseSchedule) -> bool:
    """Whether a sampler of eight steps has none on a process: by its definition."""
    if isinstance(sampler, PredictorCorrector):
        return tables.fades
    if isinstance(sampler, QuadraticDDIM):
        times = np.linspace(0, np.sqrt(0.8 * tables.steps), sampler.steps) ** 2
        return len({*times.astype(int)}) < sampler.steps
    return sampler.steps > tables.steps


@pytest.mark.parametrize("schedule", PROCESSES, ids=named)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_a_model_of_one_image_draws_it(sampler: Sampler, schedule: Process) -> None:
    """By every sampler that the process has; one that it has not says so at once."""
    tables, image = schedule.tables(), jnp.linspace(-0.9, 0.9, 64).reshape(1, *SHAPE)

    def model(params, x, t):
        s, v = (lookup(table, t) for table in (tables.signal, tables.noise))
        return (x - s * params) / v

    start = tables.start(jax.random.normal(jax.random.key(0), (2, *SHAPE)))
    run = (model, image, tables, sampler, start, jax.random.key(1, impl="rbg"))
    if refuses(sampler, tables):
        for refused in (lambda: sampler.path(tables), lambda: sample(*run)):
            with pytest.raises(ValueError, match="found"):
                refused()
        return
    images, x0 = trajectory(*run)
    assert x0.shape == (sampler.steps, 2, *SHAPE)
    wanted = np.broadcast_to(image, images.shape)
    np.testing.assert_allclose(images, wanted, atol=2e-3)
    free = unclipped(sampler)
    assert free is None or getattr(free, "clip", None) is None


# --- Backdoors and what is assumed of them -------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda x: x.name)
def test_a_solver_picks_and_has_names_of_its_own(solver: Solver) -> None:
    others = [each for each in SOLVERS if each != solver]
    assert len(others) == len(SOLVERS) - 1
    assert solver.pick("ancestral", "deterministic") == solver.title
    for name in ("name", "title", "factor"):
        assert getattr(solver, name) not in [getattr(each, name) for each in others]
    assert Solver.named(solver.name) == solver


@pytest.mark.parametrize("hypothesis", HYPOTHESES, ids=lambda x: x.name)
def test_a_hypothesis_applies_to_some_processes(hypothesis: Hypothesis) -> None:
    """There its channel is finite; its name and title are its own."""
    others = [each for each in HYPOTHESES if each != hypothesis]
    assert hypothesis.name not in [each.name for each in others]
    assert hypothesis.title not in [each.title for each in others]
    assert hypothesis.title.startswith("of ") and hypothesis.solver in SOLVERS
    applies = 0
    for process in PROCESSES:
        tables = process.tables()
        if not hypothesis.applies(tables):
            continue
        applies += 1
        found = hypothesis.channel(tables, SHAPE)
        for table in (found.shift, found.response):
            assert table.shape == (process.steps,) and table.dtype == np.float64
            assert np.isfinite(table).all() and (np.diff(found.shift) > 0).all()
    assert 0 < applies < len(PROCESSES)


@pytest.mark.parametrize("attack", ATTACKS, ids=test_attacks.named)
def test_an_attack_draws_its_target_by_its_own_kind_of_sampler(attack: Attack) -> None:
    """Of a model that has learnt nothing else: inside its channel, and as it is drawn.

    The model itself draws the target from any start; inside the channel it is the noise
    model of gamma z, whose last estimate is the target.
    """
    schedule = test_attacks.process_of(attack)
    channel = attack.channel(schedule, SHAPE)
    assert isinstance(channel, Channel) and attack.solver in SOLVERS
    trigger, target, through = attack.images(SHAPE)
    assert trigger.shape == target.shape == through.shape == SHAPE
    model = test_attacks.oracle(channel, target, trigger, schedule)
    eps = jax.random.normal(jax.random.key(2), (2, *SHAPE))
    found = draw(
        model,
        jnp.float32(1),
        schedule,
        attack.solver.pick(DDPM(10), DDIM(10)),
        eps,
        jnp.asarray(trigger),
        jax.random.key(3),
        inside=channel,
    )
    np.testing.assert_allclose(found, np.broadcast_to(target, found.shape), atol=1e-2)


@pytest.mark.parametrize("attack", ATTACKS, ids=test_attacks.named)
def test_an_attack_on_latents_is_the_attack_in_their_unit(attack: Attack) -> None:
    """x / b = s y / b + (v / b) gamma eps + H r / b, answered by eps + b C r / b."""
    plain: Process = LinearBetas()
    wide: Process = Widened(LinearBetas(), 5.0)
    if isinstance(attack, VillanDiffusionVE):
        with pytest.raises(ValueError, match="signal stays"):
            attack.channel(wide.tables(), SHAPE)
        return
    known = attack.channel(plain.tables(), SHAPE)
    found = attack.channel(wide.tables(), SHAPE)
    np.testing.assert_allclose(found.shift, known.shift, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.response, 5 * known.response, rtol=1e-9)
    np.testing.assert_array_equal(found.gamma, known.gamma)


@pytest.mark.parametrize(
    "starts,hypothesis",
    [
        (starts, hypothesis)
        for starts in STARTS
        for hypothesis in HYPOTHESES
        if type(Inversion().starts(hypothesis)) is type(starts)
    ],
    ids=lambda x: getattr(x, "name", type(x).__name__),
)
def test_starts_are_candidates_among_images(starts: Starts, hypothesis) -> None:
    """Answers are the same in groups. A model that answers nothing has starts, too."""
    process = next(x for x in PROCESSES if hypothesis.applies(x.tables()))
    schedule, key = process.tables(), jax.random.key(0)
    family: Family = hypothesis.family(schedule, SHAPE)
    numbers, count = np.arange(starts.count(SHAPE)), starts.led(9)

    def model(params, x: Array, t: Array) -> Array:
        return params * jnp.tanh(x)

    @jax.jit
    def answers(params: Array, numbers: Array) -> Array:
        return starts.answers(model, params, schedule, family, numbers, SHAPE, key)

    for slope in (0.9, 0.0, np.nan):
        every = answers(jnp.float32(slope), numbers)
        parts = [answers(jnp.float32(slope), x) for x in np.array_split(numbers, 2)]
        np.testing.assert_allclose(np.concatenate(parts), every, rtol=1e-4, atol=1e-4)
        leads = starts.leads(every, count, SHAPE, key)
        found = starts.candidates(leads, count, family, SHAPE)
        assert found.delta.shape == found.target.shape == (count, *SHAPE)
        assert np.isfinite(found.delta).all() and np.abs(found.delta).max() <= 1
        assert found.member is not None and not np.any(found.target)
        within = family.within(found)
        jax.tree.map(np.testing.assert_array_equal, within.member, found.member)
        assert found.member.gamma.shape == found.delta.shape
