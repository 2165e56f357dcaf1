"""What a run will cost, before it begins: operations, memory and time of its parts."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from absl import logging

from puredif_jax.runs import parallel
from puredif_jax.stages.experiment import Experiment, Scan, Sweep
from puredif_jax.stages.lab import Lab
from puredif_jax.stages.perform import context_of, open_lab
from puredif_jax.stages.scan import as_experiment, find_models
from puredif_jax.stages.work import Step, drawing
from puredif_jax.types import InputError, Params

Row = dict[str, Any]
STEPS = 3  # that are measured


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

    Operations are the network's own, as the compiler counts them for its forward pass.
    Steps are measured on fresh weights. Compilation, files, the reading of data, and
    what an audit measures of a trigger are not counted.

    Raises:
      InputError: something given is wrong, or no model to scan can be read; of several
        the others are estimated.
    """
    rows: dict[tuple[Any, ...], Row] = {}
    refused: list[InputError] = []
    sizes: dict[Any, tuple[float, int]] = {}  # operations and parameters, by model
    at_hand: _Opened | None = None  # of the last experiment
    with tempfile.TemporaryDirectory() as folder:
        for number, experiment in enumerate(_experiments(wanted)):
            if at_hand is None or at_hand.model != _model(experiment):
                at_hand = None  # before the next one takes memory
                at_hand = _opened(experiment, f"{folder}/{number}")
            try:
                _add(rows, sizes, experiment, at_hand)
            except InputError as error:
                if not isinstance(wanted, Scan):
                    raise
                logging.error("%s is left out: %s", experiment.workdir, error)
                refused.append(error)
    found = tuple(rows.values())
    if refused and not found:
        raise refused[0]
    return Cost(
        found,
        sum(row["times"] * row["seconds"] for row in found) / 3600,
        max((row["memory"] for row in found), default=0),
        *parallel.peak_memory(),
        max(count for _, count in sizes.values()),
    )


class _Opened(NamedTuple):
    """A model with fresh weights, in a folder that is thrown away."""

    model: tuple[Any, ...]
    lab: Lab
    params: Params


def _model(experiment: Experiment) -> tuple[Any, ...]:
    """What programs are made of: experiments that share it share them."""
    return (
        experiment.model,
        experiment.schedule,
        experiment.prediction,
        experiment.devices,
        experiment.images,
    )


def _opened(experiment: Experiment, workdir: str) -> _Opened:
    lab = open_lab(dataclasses.replace(experiment, workdir=workdir))
    params = lab.run.replicate(jax.jit(lab.unet.init)(lab.key))
    return _Opened(_model(experiment), lab, params)


def _add(
    rows: dict[tuple[Any, ...], Row],
    sizes: dict[Any, tuple[float, int]],
    experiment: Experiment,
    opened: _Opened,
) -> None:
    """Adds what an experiment takes to the rows, and measures what is new there.

    Raises:
      InputError: something given is wrong.
    """
    model, lab, params = opened
    if model not in sizes:
        step, state = drawing(lab.run.mesh.size, 0).program(lab, params)
        count = sum(x.size for x in jax.tree.leaves(params))
        sizes[model] = measure(step, params, state).operations, count
    operations = sizes[model][0]
    context = context_of(experiment, lab)
    for stage in experiment.stages:
        stage.check(context)
    for part in (work for stage in experiment.stages for work in stage.work(context)):
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


def _experiments(wanted: Experiment | Scan | Sweep) -> Iterator[Experiment]:
    if isinstance(wanted, Sweep):
        yield from wanted.chosen()
    elif isinstance(wanted, Scan):
        errors: list[InputError] = []
        models = find_models(wanted)
        for name, folder in models.items():
            try:
                yield as_experiment(wanted, name, folder)
            except Exception as error:  # whatever a stranger's model has led to
                if not isinstance(error, InputError):
                    error = InputError(f"{type(error).__name__}: {error}")
                logging.error("%s is left out: %s", name, error)
                errors.append(error)
        if len(errors) == len(models):
            raise errors[0]
    else:
        yield wanted
