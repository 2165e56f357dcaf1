"""What `--cost` tells, against counts by hand and by a network that counts."""

import dataclasses
import pathlib
import sys
from collections.abc import Iterator

import jax
import pytest

from puredif_jax import main
from puredif_jax.defenses.descent import Descent
from puredif_jax.defenses.distribution_shift import DistributionShift
from puredif_jax.defenses.elijah import Elijah
from puredif_jax.defenses.hypothesis import Fading
from puredif_jax.defenses.inversion import Inversion
from puredif_jax.defenses.puredif import Puredif
from puredif_jax.defenses.terd import Terd
from puredif_jax.diffusion.solver import Ancestral
from puredif_jax.networks.memory import activations
from puredif_jax.networks.unet import SHIPPED, UNet
from puredif_jax.runs import parallel
from puredif_jax.stages import cost, programs, search, train
from puredif_jax.stages.audit import Audit
from puredif_jax.stages.evaluation import Evaluation
from puredif_jax.stages.experiment import Experiment, Sweep
from puredif_jax.stages.perform import context_of, open_lab, perform
from puredif_jax.stages.work import Work, inverting
from puredif_jax.types import Params

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from tiny_config import DEEP, TINY, draw_params, get_config, shapes  # noqa: E402

pytestmark = pytest.mark.usefixtures("standard_promotion")
SDE = Fading(Ancestral())


def tiny(workdir: pathlib.Path | str) -> Experiment:
    """A short training, on one device, and mostly draws."""
    config = get_config()
    return dataclasses.replace(
        config,
        workdir=str(workdir),
        model=DEEP,
        amplification=None,
        audit=None,
        evaluation=dataclasses.replace(config.evaluation, draws=64),
        devices=1,
        chunk=20,
    )


def convolutions(params: Params) -> float:
    """Operations of all kernels on one image, two a multiplication."""
    small = ("down_blocks_1", "down_blocks_0_down", "mid", "up_blocks_0_res")
    total = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path[0].key
        if leaf.ndim == 4:
            side = 8 if name.startswith(small) else 16
            total += 2 * leaf.size * side**2
        elif leaf.ndim == 2 and "attentions" in name:
            total += 2 * leaf.size * 8**2
        elif leaf.ndim == 2:
            total += 2 * leaf.size
    return total


@pytest.fixture(scope="module")
def told() -> cost.Cost:
    with jax.numpy_dtype_promotion("standard"):  # optax
        return cost.estimate(tiny("runs/never"))


def test_operations_are_those_of_the_kernels(told) -> None:
    params = draw_params(DEEP)
    (drawn,) = [r for r in told.rows if r["one"] == "network evaluation of 8 images"]
    one = drawn["operations"] / 8
    # GroupNorm, SiLU and the sums are the rest: much, for four channels.
    assert 1.0 < one / convolutions(params) < 2.0
    (trained,) = [r for r in told.rows if r["one"].startswith("training")]
    assert trained["operations"] == pytest.approx(3 * 8 * one)
    assert told.parameters == sum(x.size for x in jax.tree.leaves(params))


def test_memory_and_time_are_those_of_the_parts(told) -> None:
    assert told.memory == max(row["memory"] for row in told.rows) > 4 * told.parameters
    seconds = sum(row["times"] * row["seconds"] for row in told.rows)
    assert told.hours == pytest.approx(seconds / 3600) and told.hours > 0
    assert "12 x training step of 8 images (VillanDiffusion)" in str(told)
    last = str(told).splitlines()[-1]
    assert "MiB of the process at the peak" in last and "largest program" in last
    assert told.process > 100 * 2**20 > told.memory, "Python and JAX are in it"
    assert told.device is None
    assert not pathlib.Path("runs/never").exists()


def parts(experiment: Experiment) -> list[Work]:
    """The steps that all stages of a run will take."""
    context = context_of(experiment, open_lab(experiment))
    return [part for stage in experiment.stages for part in stage.work(context)]


@pytest.fixture
def own_programs() -> Iterator[None]:
    """Programs that no other test has made or gets."""
    makers = programs.drawing, train._training
    for make in makers:
        make.cache_clear()
    yield
    for make in makers:
        make.cache_clear()


@pytest.mark.usefixtures("own_programs")
def test_the_network_is_evaluated_as_often_as_told(tmp_path, monkeypatch) -> None:
    """In training and draws; test_experiment.py counts inversions."""
    images, network = [], UNet.__call__

    def counting(self, params, x, t, dropout_key=None):
        jax.debug.callback(lambda x: images.append(x.shape[0]), x)
        return network(self, params, x, t, dropout_key)

    experiment = dataclasses.replace(tiny(tmp_path), model=TINY)
    wanted = sum(
        part.times * part.evaluations / (1 if "network" in part.name else 3)
        for part in parts(experiment)
    )
    monkeypatch.setattr(UNet, "__call__", counting)
    perform(experiment)
    jax.effects_barrier()
    assert sum(images) == wanted


def test_what_is_compared_with_the_truth_is_drawn_as_the_backdoor_wants(
    tmp_path,
) -> None:
    """The true trigger, and what was found under the other hypotheses."""

    def drawn(name: str) -> float:
        audit = Audit(weights=(name,))
        told = parts(Experiment(str(tmp_path / name), SHIPPED, audit=audit))
        return sum(p.times * p.evaluations for p in told if "network" in p.name)

    ancestral, draws = Evaluation().ancestral.steps, Evaluation().draws
    assert drawn("baddiffusion") - drawn("clean") == 3 * draws * ancestral


def test_memory_is_that_of_all_candidates_and_of_what_judges_them(monkeypatch) -> None:
    """As the loops compile them; the audit of a scan with eight candidates and one.

    A CPU takes one candidate at once, other devices eight. Where only the one fits
    into memory its forward pass is still done once: of the two that slices would take,
    the compiler keeps one.
    """

    def told(candidates: int, together: int) -> cost.Cost:
        whole = dataclasses.replace(tiny("runs/never"), model=TINY)
        descent = Descent(steps=10, candidates=candidates, together=together)
        loss = DistributionShift(samples=1)
        inversion = Inversion(loss=loss, descent=descent, heldout=16)
        audit = Audit(weights=("clean",), hypotheses=(SDE,), inversion=inversion)
        return cost.estimate(
            dataclasses.replace(whole, training=None, attack=None, audit=audit)
        )

    def rows(candidates: int, together: int = 8) -> dict[str, dict]:
        return {row["one"]: row for row in told(candidates, together).rows}

    here = rows(8)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(search, "fitting", lambda descent, mesh: descent)
        eight, pairs = rows(8), rows(8, together=2)
    ten = 10 * activations(TINY, shapes(TINY), TINY.image_shape)
    monkeypatch.setattr(parallel, "free_memory", lambda: 2 * ten)
    one = rows(1)
    step = "step of inversion by puredif, {}"
    alone, together = (
        one[step.format("1 candidate")],
        eight[step.format("8 candidates")],
    )
    assert here[step.format("8 candidates")]["memory"] < 2 * alone["memory"]
    assert 4 < together["memory"] / alone["memory"] < 9
    assert together["operations"] == 8 * alone["operations"]
    assert pairs[step.format("8 candidates")]["memory"] < together["memory"] / 2
    judged = eight["network evaluation of 160 images"]
    assert judged["times"] == 3 * 2 * 8 and judged["memory"] > 160 * 16 * 16 * 4


def test_each_stage_tells_its_own_steps(tmp_path) -> None:
    """In the order of the run, and of amplification both loops."""
    told = parts(dataclasses.replace(get_config(), workdir=str(tmp_path), devices=1))
    steps = [(part.name, part.times) for part in told if "network" not in part.name]
    assert steps == [
        ("step of reinforcement, 1 candidate", 2 * 6),
        ("training step of 8 images (VillanDiffusion)", 12),
        ("step of inversion by puredif, 3 candidates", 2),
        ("step of inversion by puredif, 2 candidates", 4),
        ("step of inversion by elijah, 1 candidate", 10),
    ]


def test_a_run_of_nothing_costs_nothing(tmp_path) -> None:
    found = cost.estimate(Experiment(str(tmp_path), TINY))
    assert (found.rows, found.hours, found.memory) == ((), 0, 0)


def test_a_sweep_measures_equal_parts_once() -> None:
    runs = [dataclasses.replace(tiny(name), model=TINY) for name in "ab"]
    rows = cost.estimate(Sweep("runs/never", tuple(runs))).rows
    assert len(rows) == 2
    assert {row["times"] for row in rows} == {2 * 12, 2 * 2 * 64 * 2 / 8}


def test_the_flag_tells_and_does_not_run(tmp_path, capsys) -> None:
    config = pathlib.Path(__file__).with_name("tiny_config.py")
    argv = ["main", f"--config={config}", f"--config.workdir={tmp_path / 'run'}"]
    monkeyed = ["--cost", "--config.amplification=none", "--config.audit=none"]
    try:
        main.main(main.parse([*argv, *monkeyed]))
    finally:
        main.flags.FLAGS.cost = False
    assert "hours" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", Audit().hypotheses, ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    "defense", [Puredif(), Elijah(), Terd()], ids=lambda each: each.name
)
def test_the_parts_of_an_inversion_are_what_it_says_that_it_takes(
    defense, kind
) -> None:
    for each, inversion in defense.inversions([kind]).items():
        parts = list(inverting("any", inversion, each))
        counted = sum(part.times * part.evaluations for part in parts)
        assert counted == inversion.evaluations(each)
