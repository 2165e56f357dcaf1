"""What a run will cost, before it begins: operations, memory and time of its parts."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from puredif_jax.attacks.base import Attack
from puredif_jax.attacks.channel import Channel
from puredif_jax.defenses.denoising_consistency import ESTIMATE
from puredif_jax.defenses.distribution_shift import DistributionShift
from puredif_jax.defenses.hypothesis import Hypothesis
from puredif_jax.defenses.inversion import Descent
from puredif_jax.defenses.objective import Loss
from puredif_jax.defenses.reinforcement import Reinforcement
from puredif_jax.diffusion.sampling import unclipped
from puredif_jax.diffusion.solver import Solver
from puredif_jax.runs import parallel
from puredif_jax.stages.experiment import Experiment, Inversion, Scan, Sweep
from puredif_jax.stages.lab import PLAIN, Lab
from puredif_jax.stages.perform import open_lab
from puredif_jax.stages.scan import as_experiment, find_models
from puredif_jax.stages.search import inverter_of
from puredif_jax.stages.train import trainer_of
from puredif_jax.stages.weights import Truth, find_weights
from puredif_jax.types import InputError, Params

Row = dict[str, Any]
STEPS = 3  # that are measured


Step = Callable[[Params, Any], Any]


class Program(NamedTuple):
    """One compiled step.

    operations: floating-point ones of the loop's body, on a device; nan where the
      compiler does not tell.
    memory: bytes on a device at the peak: arguments, results and temporaries.
    seconds: of a step, inside a loop of `STEPS`.
    """

    operations: float
    memory: int
    seconds: float


def measure(step: Step, params: Params, state: Any) -> Program:
    """Compiles (params, state) -> state, and takes a few steps."""

    @jax.jit
    def advance(params: Params, state: Any) -> Any:
        taken, _ = jax.lax.scan(
            lambda state, _: (step(params, state), None), state, length=STEPS
        )
        return taken

    compiled = advance.lower(params, state).compile()
    found, sizes = compiled.cost_analysis() or {}, compiled.memory_analysis()
    assert sizes is not None
    memory = sizes.argument_size_in_bytes + sizes.output_size_in_bytes
    memory += sizes.temp_size_in_bytes - sizes.alias_size_in_bytes
    jax.block_until_ready(compiled(params, state))
    began = time.perf_counter()
    jax.block_until_ready(compiled(params, state))
    seconds = (time.perf_counter() - began) / STEPS
    return Program(found.get("flops", float("nan")), memory, seconds)


class Part(NamedTuple):
    """Steps of one kind in a run.

    name: what one step is.
    times: how many there are.
    evaluations: of the network on one image in a step; with its gradient three.
    key: programs of the same name and key on the same model are the same.
    program: (lab, weights) -> the step, and a state before it.
    """

    name: str
    times: float
    evaluations: int
    key: Any
    program: Callable[[Lab, Params], tuple[Step, Any]]


class Cost(NamedTuple):
    """What a run will cost.

    rows: a kind of step each, with its number, operations, memory and time.
    hours: of all of them.
    memory: bytes on a device, of the largest program.
    process: bytes of the host's memory at the peak of this process, which has done a
      few steps of each part, as a run does; with Python, JAX and what XLA compiles.
    device: bytes of a device's memory at that peak; None where it is the host's.
    parameters: of the largest model.
    """

    rows: tuple[Row, ...]
    hours: float
    memory: int
    process: int
    device: int | None
    parameters: int

    def __str__(self) -> str:
        lines = [
            f"{row['times']:.0f} x {row['one']}: {row['operations']:.3g} operations, "
            f"{row['memory'] / 2**20:.0f} MiB, {row['seconds']:.3g} s each; "
            f"{row['times'] * row['seconds'] / 3600:.2g} hours"
            for row in self.rows
        ]
        device = ""
        if self.device is not None:
            device = f", {self.device / 2**20:,.0f} MiB of a device"
        lines.append(
            f"about {self.hours:.2g} hours, {self.process / 2**20:,.0f} MiB of the "
            f"process at the peak{device}, {self.memory / 2**20:,.0f} MiB of it in the "
            f"largest program, {self.parameters:,} parameters"
        )
        return "\n".join(lines)


def estimate(wanted: Experiment | Scan | Sweep) -> Cost:
    """The cost of a run that has not begun, from a few steps of each of its parts.

    Operations are those of the network, as the compiler counts them for its forward
    pass. Steps are measured on fresh weights. Not counted are compilation, files, the
    reading of data, the choices of a survey, and what an audit measures of a trigger.

    Raises:
      InputError: no model to scan can be read; of several, the others are estimated.
    """
    rows: dict[tuple[Any, ...], Row] = {}
    labs: dict[Any, tuple[Lab, Params, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, experiment in enumerate(_experiments(wanted)):
            model = (
                experiment.model,
                experiment.schedule,
                experiment.prediction,
                experiment.devices,
                experiment.images,
            )
            if model not in labs:
                # Its folder is thrown away.
                workdir = f"{folder}/{number}"
                lab = open_lab(dataclasses.replace(experiment, workdir=workdir))
                params = lab.run.replicate(jax.jit(lab.unet.init)(lab.key))
                one = _drawing(lab.run.mesh.size, 0).program(lab, params)
                labs[model] = lab, params, measure(one[0], params, one[1]).operations
            lab, params, operations = labs[model]
            for part in parts(experiment):
                key = (model, part.name, part.key)
                if key not in rows:
                    logging.info("measuring %s", part.name)
                    step, state = part.program(lab, params)
                    program = measure(step, params, state)
                    rows[key] = {
                        "one": part.name,
                        "times": 0.0,
                        "operations": part.evaluations * operations,
                        "memory": program.memory,
                        "seconds": program.seconds,
                    }
                rows[key]["times"] += part.times
    found = tuple(rows.values())
    return Cost(
        found,
        sum(row["times"] * row["seconds"] for row in found) / 3600,
        max((row["memory"] for row in found), default=0),
        *parallel.peak_memory(),
        max(sum(x.size for x in jax.tree.leaves(p)) for _, p, _ in labs.values()),
    )


def _experiments(wanted: Experiment | Scan | Sweep) -> Iterator[Experiment]:
    if isinstance(wanted, Sweep):
        yield from wanted.chosen()
    elif isinstance(wanted, Scan):
        errors: list[InputError] = []
        models = find_models(wanted)
        for name, folder in models.items():
            try:
                yield as_experiment(wanted, name, folder)
            except InputError as error:
                logging.error("%s is left out: %s", name, error)
                errors.append(error)
        if len(errors) == len(models):
            raise errors[0]
    else:
        yield wanted


def parts(experiment: Experiment) -> Iterator[Part]:
    """The parts of a run, as `stages.perform` does them."""
    batch, draws = experiment.evaluation.batch, experiment.evaluation.draws
    attack = experiment.attack
    if experiment.training is not None:
        yield _training(experiment)
    if experiment.training is not None or experiment.weights is not None:
        evaluation = experiment.evaluation
        steps = evaluation.deterministic.steps
        if attack is not None:
            steps = evaluation.sampler(attack.solver).steps
            yield _drawing(batch, 2 * draws * steps)
        else:
            yield _drawing(batch, PLAIN * steps)
        models = 2 if experiment.training and experiment.weights is not None else 1
        frechet = models * evaluation.frechet_draws * evaluation.deterministic.steps
        yield _drawing(batch, frechet)
    if experiment.amplification is not None and attack is not None:
        count = len(experiment.amplification.snapshots)
        steps = experiment.evaluation.sampler(attack.solver).steps
        yield _drawing(batch, 2 * draws * steps * count)
        reinforcement: Reinforcement = experiment.amplification.reinforcement
        loss = reinforcement.loss(attack.solver)
        descent = reinforcement.descending(attack.solver)
        times = descent.steps * count
        channel = functools.partial(_attacked, attack)
        yield _descent(loss, channel, descent, times, "reinforcement")
    if experiment.audit is not None:
        for name in experiment.audit.weights:
            known = _known_solver(experiment, name)
            for hypothesis in experiment.audit.tried(experiment.schedule.tables()):
                methods = experiment.audit.methods(hypothesis)
                for method, inversion in methods.items():
                    yield from _inversion(method, inversion, hypothesis)
                steps = _drawn(experiment, hypothesis.solver)
                yield _drawing(batch, (len(methods) * draws + PLAIN) * steps)
                if known not in (
                    None,
                    hypothesis.solver,
                ):  # drawn again, as the backdoor wants it
                    steps = _drawn(experiment, known)
                    yield _drawing(batch, len(methods) * draws * steps)
            if known is not None and name != "trained":  # by the true trigger
                yield _drawing(batch, draws * _drawn(experiment, known))


def _drawn(experiment: Experiment, solver: Solver) -> int:
    """Evaluations for an image of an audit; one that is clipped is drawn twice."""
    sampler = experiment.evaluation.sampler(solver)
    return sampler.steps * (1 if unclipped(sampler) is None else 2)


def _known_solver(experiment: Experiment, name: str) -> Solver | None:
    """The kind of the backdoor that is compared with, where one is known."""
    if name == "trained":
        return experiment.attack.solver if experiment.attack else None
    schedule, shape = experiment.schedule.tables(), experiment.model.image_shape
    truth = Truth.beside(find_weights(name), schedule, shape)
    return truth.solver if truth else None


def _training(experiment: Experiment) -> Part:
    training, attack = experiment.training, experiment.attack
    assert training is not None

    def program(lab: Lab, params: Params) -> tuple[Step, Any]:
        made = trainer_of(lab.setup, training, attack)(None)
        images = np.zeros((training.batch, *lab.unet.image_shape), np.float32)
        split = parallel.put(images, parallel.along(lab.run.mesh, "batch"))

        def step(params: Params, state: Any) -> Any:
            state, images = state
            return made.step(state, images)[0], images

        return step, (made.init(params, lab.key), split)

    kind = type(attack).__name__ if attack else "clean"
    name = f"training step of {training.batch} images ({kind})"
    return Part(name, training.steps, 3 * training.batch, None, program)


def _drawing(batch: int, images: float) -> Part:
    def program(lab: Lab, params: Params) -> tuple[Step, Any]:
        def step(params: Params, x: Any) -> Any:
            return lab.model(params, lab.setup.shard(x), jnp.zeros((batch,), jnp.int32))

        return step, jnp.zeros((batch, *lab.unet.image_shape))

    name = f"network evaluation of {batch} images"
    return Part(name, images / batch, batch, None, program)


def _descent(
    loss: Loss,
    channel: Callable[[Lab], Channel],
    descent: Descent,
    times: float,
    name: str,
) -> Part:
    """The step of all candidates, as `loops` compiles it."""

    def program(lab: Lab, params: Params) -> tuple[Step, Any]:
        plain = dataclasses.replace(descent, scout=0)
        count = descent.candidates
        search = inverter_of(lab.setup, loss, plain, channel(lab), candidates=count)

        def step(params: Params, state: Any) -> Any:
            return search.step(params, state)[0]

        return step, search.init(lab.key)

    count = descent.candidates
    name = f"step of {name}, {count} candidate{'s' * (count > 1)}"
    return Part(name, times, 3 * loss.evaluations * count, loss, program)


def _attacked(attack: Attack, lab: Lab) -> Channel:
    return lab.place(attack.channel(lab.schedule, lab.unet.image_shape))


def _inversion(
    method: str, inversion: Inversion, hypothesis: Hypothesis
) -> Iterator[Part]:
    descent, loss = inversion.descent, inversion.loss
    name = f"inversion by {method}"

    def channel(lab: Lab) -> Channel:
        return lab.channel(hypothesis)

    if descent.scout:
        final = dataclasses.replace(descent, candidates=descent.last)
        yield _descent(loss, channel, descent, descent.scout, name)
        yield _descent(loss, channel, final, descent.steps - descent.scout, name)
    else:
        yield _descent(loss, channel, descent, descent.steps, name)
    judged = DistributionShift(samples=inversion.heldout).evaluations
    times = descent.candidates + (descent.last if descent.scout else 0)
    yield _drawing(judged, times * judged)
    if not loss.seeks_target:
        yield _drawing(ESTIMATE.samples, times * ESTIMATE.evaluations)
    if (survey := inversion.survey) is not None:
        yield _drawing(survey.together * survey.draws, survey.evaluations)
