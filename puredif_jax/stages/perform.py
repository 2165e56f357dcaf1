"""An experiment, from its configuration to its report, by the stages that it has."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from puredif_jax.runs import config, numerics, parallel
from puredif_jax.runs.binding import RunError, pin
from puredif_jax.runs.report import Report, environment
from puredif_jax.runs.run import Run
from puredif_jax.stages.base import Context, Outcome, State
from puredif_jax.stages.experiment import Experiment
from puredif_jax.stages.finding import Finding, scope
from puredif_jax.stages.lab import Lab
from puredif_jax.stages.models import Models


def names(experiment: Experiment) -> list[str]:
    """The weights that an experiment reads."""
    return sorted(
        {
            name
            for stage in experiment.stages
            for name in stage.reads(experiment.weights)
        }
    )


def opened(experiment: Experiment) -> Models:
    """Where the weights of an experiment are read."""
    audit = experiment.audit
    return Models(None if audit is None else audit.scheduler)


def digests(experiment: Experiment, models: Models) -> dict[str, str]:
    """The fingerprint of each of the weights that an experiment reads.

    Raises:
      InputError: they cannot be read.
    """
    return {name: models[name].fingerprint for name in names(experiment)}


def open_lab(experiment: Experiment, models: Models | None = None) -> Lab:
    """The model of an experiment on its devices, in its folder.

    Args:
      experiment: the experiment.
      models: where its weights are read.

    Raises:
      InputError: the devices do not fit, or the folder holds another run.
    """
    mesh = parallel.make_mesh(experiment.devices)
    return Lab(
        Run(
            experiment.workdir,
            config.to_dict(experiment),
            mesh,
            experiment.save_every,
        ),
        experiment.model,
        experiment.schedule,
        experiment.evaluation.batch,
        experiment.seed,
        experiment.chunk,
        experiment.prediction,
        experiment.images,
        opened(experiment) if models is None else models,
    )


def context_of(experiment: Experiment, lab: Lab) -> Context:
    """What the stages of an experiment share."""
    return Context(
        lab,
        experiment.evaluation,
        experiment.data,
        experiment.weights,
        experiment.training,
        experiment.attack,
        () if experiment.audit is None else experiment.audit.weights,
    )


def check(experiment: Experiment, context: Context) -> None:
    """Reads every input once, so that a bad one ends the run before long work.

    Raises:
      InputError: something is missing or does not fit, in one sentence.
    """
    lab, evaluation = context.lab, context.evaluation
    for stage in experiment.stages:
        stage.check(context)
    try:
        for sampler in (evaluation.ancestral, evaluation.deterministic):
            sampler.path(lab.schedule)
    except ValueError as error:
        raise RunError(str(error)) from error
    _ = context.truth  # refused where the attack is not defined
    judged = {name for audit in experiment.audits for name in audit.reads(None)}
    for name in names(experiment):
        begins = context.training is not None and name == context.weights
        if begins:
            lab.load(name, start=True)
        if name in judged or not begins:
            lab.load(name)
    others = {k: v for x in experiment.stages for k, v in x.inputs(context).items()}
    pin(lab.run.folder, digests(experiment, lab.models), others)


def perform(experiment: Experiment, models: Models | None = None) -> Report:
    """Runs an experiment to its report, resuming what its folder already holds.

    Args:
      experiment: the experiment.
      models: where its weights are read; what is read there already is not read again.

    Raises:
      InputError: something given is wrong, in one sentence.
    """
    config.check(experiment)
    try:
        hash(experiment)
    except TypeError as error:
        raise RunError(
            f"the configuration is no key of compiled programs ({error}): it must hold "
            "frozen dataclasses, numbers, strings and tuples"
        ) from error
    lab = open_lab(experiment, models)
    run, context = lab.run, context_of(experiment, lab)
    check(experiment, context)
    state, outcomes = State(), list[Outcome]()
    kinds = [type(stage) for stage in experiment.stages]
    for i, stage in enumerate(experiment.stages):
        here = dataclasses.replace(context, place=kinds[:i].count(kinds[i]))
        state, outcome = stage.run(here, state)
        outcomes.append(outcome)
    found = [result for outcome in outcomes for result in outcome.results]
    judgements = (result.judgement() for result in found)
    placeless = dataclasses.replace(experiment, workdir=run.folder.name)
    report = Report(
        title=run.folder.name,
        judgements=tuple(each for each in judgements if each is not None),
        about=scope([result for result in found if isinstance(result, Finding)]),
        sections=tuple(part for outcome in outcomes for part in outcome.sections),
        config=config.to_dict(placeless),
        environment=environment()
        | {
            "device": jax.devices()[0].device_kind,
            "devices": run.mesh.size,
            "images at a time": min(lab.together, experiment.images),
        }
        | _settings(run),
        numbers={k: v for each in found for k, v in each.numbers().items()},
    )
    if parallel.is_host_zero():
        report.write(run.folder)
    parallel.agreed(True)  # it is there before any process goes on
    return report


def _settings(run: Run) -> dict[str, Any]:
    """How the settings changed under which a run was made, if they did."""
    if not parallel.is_host_zero():
        return {}
    changes = numerics.changes(run.folder)
    return {"went on under other settings": changes} if changes else {}
