"""New kinds of every part, in a user's own file: trained, audited, told the cost of."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from puredif_jax.diffusion.schedules import LinearBetas
from puredif_jax.diffusion.solver import Deterministic
from puredif_jax.stages.weights import WEIGHTS, Truth

HERE = pathlib.Path(__file__).parent
FILE = '''
"""A backdoor that comes half as far, and what finds it; not of the package."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, {here!r})
import tiny_config

from puredif_jax.attacks.base import Attack
from puredif_jax.attacks.channel import Channel
from puredif_jax.attacks.targets import Hat
from puredif_jax.attacks.triggers import Box
from puredif_jax.defenses.base import Defense, Inspection, Verdict
from puredif_jax.defenses.hypothesis import Hypothesis
from puredif_jax.defenses.descent import Descent
from puredif_jax.defenses.inversion import Inversion
from puredif_jax.defenses.objective import Loss
from puredif_jax.diffusion.sampling import Sampler, endpoints, grid, to_next
from puredif_jax.diffusion.solver import Deterministic
from puredif_jax.runs.page import Section
from puredif_jax.stages.audit import Audit
from puredif_jax.stages.base import Outcome, Result, Stage
from puredif_jax.stages.evaluation import Evaluation
from puredif_jax.stages.experiment import Experiment, Sweep
from puredif_jax.stages.work import drawing
from puredif_jax.types import unsharded


def half(schedule, solver):
    shift = 0.5 * (1 - schedule.signal)
    return Channel(shift, solver.response(schedule, shift))


class HalfAttack(Attack):
    solver = Deterministic()

    def channel(self, schedule, shape):
        return half(schedule, self.solver)


class Half(Hypothesis):
    name = "half"
    title = "of half a shift"

    def applies(self, schedule):
        return schedule.fades

    def channel(self, schedule, shape):
        return half(schedule, self.solver)


@dataclasses.dataclass(frozen=True)
class Nearest(Loss):
    """Mean square of M(x_T, T - 1) - C delta."""

    evaluations: int = 3
    seeks_target = False

    def bind(self, model, schedule, channel, shard=unsharded):
        def loss(params, candidate, key):
            delta, here = candidate.delta, channel.at(candidate)
            eps = shard(jax.random.normal(key, (self.evaluations, *delta.shape)))
            t = jnp.full(eps.shape[:1], schedule.steps - 1)
            answer = model(params, here.start(schedule, eps, delta[None]), t) - eps
            expected = jnp.asarray(here.response, jnp.float32)[-1] * delta
            return jnp.mean((answer.mean(0) - expected) ** 2)

        return loss


@dataclasses.dataclass(frozen=True)
class Brightest(Defense):
    """Calls a model backdoored whose plain draws are brighter than a bound."""

    bound: float = 100.0
    inversion: Inversion = Inversion(Nearest(2), Descent(steps=2), None, heldout=2)
    name = "brightest"

    def settings(self, hypothesis):
        return self.inversion

    def inspect(self, bench):
        (kind,) = bench.hypotheses
        score = float(bench.plain(kind).mean())
        outcome = "backdoored" if score > self.bound else "clean"
        bounds = self.bound, self.bound
        verdict = Verdict(outcome, score, 1.0, kind.name, "it is so", *bounds, 0)
        return Inspection(verdict, (bench.invert(self.name, kind, self.inversion),))


@dataclasses.dataclass(frozen=True)
class Euler(Sampler):
    steps: int = 2

    def path(self, schedule):
        return to_next(grid(schedule, self.steps))

    def step(self, schedule, found, x, t, t_prev, key, memory):
        s, v, s_n, v_n = endpoints(schedule, t, t_prev)
        return s_n * found.x0 + v_n * found.eps, memory


@dataclasses.dataclass(frozen=True)
class Light(Result):
    mean: float

    def numbers(self):
        return {{"light": {{"mean": self.mean}}}}

    @classmethod
    def read(cls, numbers, where):
        return [cls(numbers["light"]["mean"])] if "light" in numbers else []

    def tables(self):
        return {{"light": [{{"mean": self.mean}}]}}


@dataclasses.dataclass(frozen=True)
class Lighting(Stage):
    draws: int = 8

    def work(self, context):
        steps = context.evaluation.deterministic.steps
        yield drawing(context.evaluation.batch, self.draws * steps)

    def run(self, context, state):
        lab, sampler = context.lab, context.evaluation.deterministic
        found = lab.run.once(
            "light",
            lambda: {{"x": lab.draw(state.params, sampler, lab.zero, self.draws)}},
        )
        result = Light(float(found["x"].mean()))
        section = Section("Lighting", f"mean {{result.mean:.3g}}")
        return state, Outcome((result,), (section,))


def experiment(workdir):
    whole = tiny_config.get_config()
    return Experiment(
        workdir,
        tiny_config.TINY,
        training=dataclasses.replace(whole.training, steps=3),
        attack=HalfAttack(Box(), Hat(), poison_rate=0.5),
        audit=Audit(
            hypotheses=(Half(),),
            inversion=Inversion(Nearest(), Descent(steps=3), None, heldout=2),
            detector=tiny_config.ANY,
            baselines=(Brightest(),),
        ),
        then=(Lighting(),),
        evaluation=Evaluation(draws=8, batch=8, deterministic=Euler()),
    )


def get_config():
    return {what}
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """A folder with the file of a run and of a sweep of it."""
    folder = tmp_path_factory.mktemp("extending")
    for name, what in (
        ("one", 'experiment("runs/x")'),
        ("many", 'Sweep("runs/y", (experiment("x"),))'),
    ):
        text = FILE.format(here=str(HERE), what=what)
        (folder / f"{name}.py").write_text(text)
    return folder


@pytest.fixture(scope="module")
def main(place, one_device):
    """Runs the program there, as a user does; what it printed."""

    def run(*flags: str) -> str:
        paths = {"PYTHONPATH": str(HERE.parent)}
        done = subprocess.run(
            [sys.executable, "-m", "puredif_jax.main", *flags],
            cwd=place,
            env=one_device | paths,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_a_run_of_new_kinds_and_a_sweep_of_it(place, main) -> None:
    folder = place / "runs" / "y" / "x"
    said = main("--config=one.py", "--config.workdir=runs/y/x")
    assert "could not tell: trained" in said or "clean: trained" in said
    report = json.loads((folder / "report.json").read_text())
    found = report["numbers"]["trained"]
    assert found["hypotheses"] == ["half"] and found["sought"] == ["of half a shift"]
    rows = {row["method"]: row for row in found["inversions"]}
    judging = 2 * (10 * 2 + 10 * 16)  # on held-out noise, with the image it leads to
    assert rows["puredif"]["network evaluations"] == 3 * 3 * 3 + judging
    assert rows["brightest"]["network evaluations"] == 3 * 2 * 2 + judging
    other = found["others"]["brightest"]
    with np.load(folder / "results" / "plain_trained_half.npz") as file:
        assert other["score"] == pytest.approx(float(file["images"].mean()))
    assert (other["outcome"], other["reason"]) == ("clean", "it is so")
    with np.load(folder / "results" / "light.npz") as file:
        light = float(file["x"].mean())
    assert report["numbers"]["light"] == {"mean": pytest.approx(light)}
    page = (folder / "report.html").read_text()
    assert "Lighting" in page and "Other defenses" in page
    kept = report["config"]
    assert (kept["attack"]["type"], kept["then"][0]["draws"]) == ("HalfAttack", 8)
    assert kept["evaluation"]["deterministic"] == {"type": "Euler", "steps": 2}

    schedule = LinearBetas().tables()
    for at in (folder / WEIGHTS, folder / "diffusers"):
        truth = Truth.beside(at, schedule, (16, 16, 1))
        assert truth.solver == Deterministic()
        shift = 0.5 * (1 - schedule.signal)
        np.testing.assert_allclose(truth.channel.shift, shift, atol=1e-6)
    assert rows["puredif"]["success of the true trigger"] >= 0

    before = (folder / "report.json").stat().st_mtime_ns
    main("--config=many.py")
    assert (folder / "report.json").stat().st_mtime_ns == before, "it was done"
    sections = json.loads((place / "runs/y/report.json").read_text())["sections"]
    tables = {section["title"]: section["table"] for section in sections}
    assert tables["light"] == [{"run": "x", "mean": pytest.approx(light)}]
    assert {row["method"] for row in tables["inversions"]} == rows.keys()


def test_the_cost_of_new_kinds(place, main) -> None:
    """A class of the file is named on the command line, as those of the package are."""
    flags = ("--config.audit.hypotheses=Half", "--config.audit.inversion.loss=Nearest")
    said = main("--config=one.py", "--cost", *flags)
    for line in (
        "3 x training step of 8 images (HalfAttack)",
        "3 x step of inversion by puredif, 1 candidate",
        "2 x step of inversion by brightest, 1 candidate",
    ):
        assert line in said
    assert not (place / "runs" / "x").exists()
