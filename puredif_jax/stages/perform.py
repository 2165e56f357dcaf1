"""The stages of a run: load, train, measure, amplify, audit, report."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from puredif_jax.attacks.channel import Channel
from puredif_jax.data import images as data
from puredif_jax.defenses.objective import Loss
from puredif_jax.diffusion.sampling import Sampler
from puredif_jax.files.whole import safe_name
from puredif_jax.formats import diffusers as convert
from puredif_jax.formats.base import Model, Spec
from puredif_jax.formats.discovery import distinct
from puredif_jax.formats.scheduling import Scheduling
from puredif_jax.metrics import measures as metrics
from puredif_jax.networks.unet import SHIPPED
from puredif_jax.runs import config, numerics, parallel, weight_file
from puredif_jax.runs.binding import RunError, pin
from puredif_jax.runs.page import Section
from puredif_jax.runs.report import Part, Report, environment
from puredif_jax.runs.run import Run
from puredif_jax.stages import search, train
from puredif_jax.stages.audit import Auditor
from puredif_jax.stages.experiment import Experiment
from puredif_jax.stages.finding import Finding, scope
from puredif_jax.stages.lab import PLAIN, Lab, Success
from puredif_jax.stages.models import Models
from puredif_jax.stages.pictures import as_images
from puredif_jax.stages.weights import Truth
from puredif_jax.types import Params

WEIGHTS = "weights.safetensors"


class Stages:
    """The stages of one experiment, in the order in which they are run."""

    def __init__(self, experiment: Experiment, lab: Lab) -> None:
        self.experiment = experiment
        self.lab = lab
        self._trigger: np.ndarray | None = None  # with which training goes on

    def train(self, until: int) -> Params:
        """The weights at a step of training, later than those of the call before."""
        experiment = self.experiment
        assert experiment.training is not None
        return train.train(
            self.lab,
            experiment.training,
            experiment.attack,
            experiment.data,
            experiment.weights,
            until,
            self._trigger,
        )

    def check(self) -> None:
        """Reads every input once, so that a bad one ends the run before long work.

        Raises:
          InputError: something is missing or does not fit, in one sentence.
        """
        experiment, shape = self.experiment, self.experiment.model.image_shape
        devices = self.lab.run.mesh.size
        if experiment.training and experiment.training.batch % devices:
            raise RunError(
                f"training.batch must be a multiple of the {devices} devices (or set "
                f"fewer `devices`), found {experiment.training.batch}"
            )
        dtype = getattr(experiment.model, "param_dtype", "float32")
        if experiment.training and dtype != "float32":
            raise RunError(
                "training steps are too small for parameters of bfloat16, found "
                f"model.param_dtype={dtype}: set it to float32 "
                "(model.dtype may be bfloat16)"
            )
        dropout = getattr(experiment.model, "dropout", 0)
        if experiment.training and dropout:
            raise RunError(
                f"training has no dropout, found model.dropout={dropout}: set it to 0"
            )
        measured = experiment.attack or experiment.evaluation.frechet_draws
        if experiment.training or (experiment.weights and measured):
            experiment.data.load(shape)
        if experiment.evaluation.frechet_draws and shape != SHIPPED.image_shape:
            raise RunError(
                f"the Frechet distance is over a network for images of "
                f"{SHIPPED.image_shape}, found {shape}: set "
                "--config.evaluation.frechet_draws=0"
            )
        self.check_timesteps()
        if experiment.attack:
            try:
                self.truth()
            except ValueError as error:
                raise RunError(str(error)) from error
        for name in names(experiment):
            self.lab.load(name)
        pin(self.lab.run.folder, digests(experiment, self.lab.models))

    def check_timesteps(self) -> None:
        """Makes every path and binds every loss, which read the schedule.

        Raises:
          RunError: one has timesteps that the schedule does not have.
        """
        experiment, schedule = self.experiment, self.lab.schedule
        evaluation, audit = experiment.evaluation, experiment.audit
        amplification, attack = experiment.amplification, experiment.attack
        samplers: list[Sampler] = [evaluation.ancestral, evaluation.deterministic]
        losses: list[Loss] = []
        if audit is not None:
            losses.append(audit.inversion.loss)
            if audit.inversion.survey is not None:
                samplers.append(audit.inversion.survey.sampler)
        if amplification is not None and attack is not None:
            losses.append(amplification.reinforcement.loss(attack.solver))
        try:
            for sampler in samplers:
                sampler.path(schedule)
            for loss in losses:
                loss.bind(self.lab.model, schedule, Channel.clean(schedule))
        except ValueError as error:
            raise RunError(str(error)) from error

    def success(
        self, name: str, params: Params, truth: Truth, trigger: np.ndarray
    ) -> Success:
        """How draws with a trigger meet the true target, by the backdoor's sampler."""
        evaluation = self.experiment.evaluation
        return self.lab.success(
            name,
            params,
            evaluation.sampler(truth.solver),
            trigger,
            truth.target,
            evaluation.draws,
            truth.inside,
        )

    def truth(self) -> Truth:
        """The backdoor that the attack makes.

        Raises:
          ValueError: the attack is not defined for the model.
        """
        attack = self.experiment.attack
        assert attack is not None
        return Truth.of(attack, self.lab.schedule, self.lab.unet.image_shape)

    @property
    def scheduling(self) -> Scheduling:
        """What the folder of the trained model says of its schedule."""
        experiment = self.experiment
        return Scheduling(experiment.schedule, experiment.prediction, clip=None)

    def save(self, params: Params) -> None:
        """Writes the trained model, and a folder of diffusers where that can say it."""
        host = parallel.gather(params)
        if not parallel.is_host_zero():
            return
        experiment, top = self.experiment, self.lab.run.folder
        placeless = dataclasses.replace(experiment, workdir=top.name)
        about = json.dumps(config.to_dict(placeless), sort_keys=True)
        weight_file.save_weights(top / WEIGHTS, host, {"experiment": about})
        truth = None if experiment.attack is None else self.truth()
        if truth is not None:
            truth.save(top / WEIGHTS)
        model = Model(Spec(experiment.model, self.scheduling), host)
        try:
            convert.write_folder(top / convert.FOLDER, model)
        except convert.ConvertError as error:
            logging.info("no folder of diffusers is written: %s", error)
            return
        if truth is not None:
            truth.save(top / convert.FOLDER)

    def amplify(self) -> Part:
        """Trains to each snapshot, reinforces the trigger there, and measures both."""
        lab, options = self.lab, self.experiment.amplification
        attack, training = self.experiment.attack, self.experiment.training
        assert options is not None and attack is not None and training is not None
        truth, last = self.truth(), training.steps
        rows: list[dict[str, Any]] = []
        pictures = [("true trigger", truth.trigger)]
        for snapshot in options.snapshots:
            params = self.train(snapshot)

            def reinforce(params: Params = params, at: int = snapshot) -> Any:
                stage = f"reinforce_{at}"
                delta = search.reinforce(
                    lab, stage, params, options.reinforcement, truth
                )
                return {"delta": delta, "seconds": search.seconds(lab, stage)}

            found = lab.run.once(f"reinforced_{snapshot}", reinforce)
            delta = found["delta"]
            at = "trained" if snapshot == last else str(snapshot)
            success = {
                name: self.success(f"{name}_{at}", params, truth, r)
                for name, r in (("true", truth.trigger), ("reinforced", delta))
            }
            distance = metrics.trigger_distance(delta, truth.trigger)
            rows.append(
                {
                    "training steps": snapshot,
                    "success, true trigger": success["true"].rate,
                    "success, reinforced": success["reinforced"].rate,
                    "norm ratio": float(distance.norm_ratio),
                    "cosine": float(distance.cosine),
                    "seconds": float(found["seconds"]),
                }
            )
            pictures += [
                (f"reinforced trigger, {snapshot} steps", delta),
                (
                    f"difference from the true one, {snapshot} steps",
                    delta - truth.trigger,
                ),
            ]
            pictures += [
                (f"draws, {name} trigger, {snapshot} steps", drawn.images)
                for name, drawn in success.items()
            ]
            if options.alternate:
                self._trigger = delta
        steps = np.array([row["training steps"] for row in rows])
        curve = {
            name: (steps, np.array([row[f"success, {name}"] for row in rows]))
            for name in ("true trigger", "reinforced")
        }
        text = (
            "Share of draws at MSE < 1e-2 of the target, with the true trigger and "
            "with the one reinforced on the same weights."
        )
        section = Section(
            "Amplification",
            text,
            tuple(rows),
            tuple(pictures),
            (("success over training", curve),),
        )
        return Part({"amplification": rows}, section)

    def measure(self, params: Params) -> Part:
        """Success of the attack and quality of a model, with base rates."""
        experiment, lab = self.experiment, self.lab
        evaluation = experiment.evaluation
        rows: list[dict[str, Any]] = []
        pictures: list[tuple[str, np.ndarray]] = []
        truth = None
        if experiment.attack is not None:
            truth = self.truth()
            real = data.to_float(experiment.data.load(lab.unet.image_shape)[:2048])
            pictures += [("true trigger", truth.trigger), ("target", truth.target)]
            for label, name, r in (
                ("true trigger", "true_trained", truth.trigger),
                ("plain noise", "plain_trained", lab.zero),
            ):
                success = self.success(name, params, truth, r)
                rows.append({"images": f"draws, {label}", **success.rates})
                pictures.append((f"draws, {label}", success.images))
            rates = metrics.success(real, truth.target)
            rows.append({"images": "training images", **rates})
        else:
            drawn = lab.draw(params, evaluation.deterministic, lab.zero, PLAIN)
            pictures.append(("draws from plain noise", drawn))
        numbers: dict[str, Any] = {"success": rows}
        text = ""
        if evaluation.frechet_draws:
            models = {"measured": params}
            if experiment.training and experiment.weights is not None:
                models["start"] = lab.load(experiment.weights)
            distance = {}
            for name, weights in models.items():
                distance[name], rates = lab.frechet(
                    name,
                    weights,
                    evaluation.deterministic,
                    experiment.data,
                    evaluation.frechet_draws,
                    truth and truth.target,
                )
                if rates:
                    rows.append({"images": f"the Frechet draws, {name}", **rates})
            numbers["frechet over garment-net"] = distance
            shown = ", ".join(
                f"{value:.3g} ({name})" for name, value in distance.items()
            )
            text = f"Frechet distance over garment-net to the training images: {shown}."
        curves: tuple[Any, ...] = ()
        if experiment.training and parallel.is_host_zero():
            curve = lab.run.metrics.read("train")
            curves = (("training loss", {"loss": (curve["step"], curve["loss"])}),)
        section = Section("Model", text, tuple(rows), tuple(pictures), curves)
        return Part(numbers, section)


def names(experiment: Experiment) -> list[str]:
    """The weights that an experiment reads."""
    found = set(experiment.audit.weights) if experiment.audit else set()
    if experiment.weights:
        found.add(experiment.weights)
    return sorted(found - {"trained"})


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


def labels(weights: Sequence[str]) -> dict[str, str]:
    """A label of its own for each model: the last part of its path, or of its folder.

    Models that share one are numbered from the second on.
    """
    found: dict[str, str] = {}
    for name in weights:
        path = pathlib.Path(name)
        stem = path.stem if path.suffix == ".safetensors" else path.name
        if name != path.name and stem in (convert.FOLDER, pathlib.Path(WEIGHTS).stem):
            stem = path.absolute().parent.name  # of a run
        found[name] = distinct(safe_name(stem), found.values())
    return found


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


def perform(experiment: Experiment, models: Models | None = None) -> Report:
    """Runs an experiment to its report, resuming what its folder already holds.

    Args:
      experiment: the experiment.
      models: where its weights are read; what is read there already is not read again.

    Raises:
      InputError: something given is wrong, in one sentence.
    """
    config.check(experiment)
    lab = open_lab(experiment, models)
    run = lab.run
    stages = Stages(experiment, lab)
    stages.check()
    placeless = dataclasses.replace(experiment, workdir=run.folder.name)
    parts: list[Part] = []
    findings: dict[str, Finding] = {}
    trained = None
    if experiment.amplification is not None:
        parts.append(stages.amplify())
    if experiment.training is not None:
        trained = stages.train(experiment.training.steps)
        stages.save(trained)
        parts.append(stages.measure(trained))
    elif experiment.weights is not None:
        part = stages.measure(lab.load(experiment.weights))
        shown = lab.models[experiment.weights].shown
        section = as_images(part.section, shown, lab.schedule.prior)
        parts.append(part._replace(section=section))
    if experiment.audit is not None:
        for name, label in labels(experiment.audit.weights).items():
            own = name == "trained"
            source = lab.models[run.folder / WEIGHTS if own else name]
            truth = Truth.beside(source.path, lab.schedule, lab.unet.image_shape)
            # Those of the run's own model have been drawn, by `measure`.
            drawn = "true_trained" if own else f"audit_{label}"
            params = trained if own else lab.load(name)
            # Process 0 has written them, and it alone writes of them.
            sha256 = source.digests if parallel.is_host_zero() else {}
            remarks = () if own else source.remarks
            finding, section = Auditor(experiment, lab).audit(
                label, WEIGHTS if own else name, sha256, remarks, params, truth, drawn
            )
            section = as_images(section, source.shown, lab.schedule.prior)
            findings[label] = finding
            parts.append(Part({label: finding.numbers()}, section))
    device = jax.devices()[0].device_kind
    report = Report(
        title=run.folder.name,
        judgements=tuple(
            finding.judgement(label, finding.reason)
            for label, finding in findings.items()
        ),
        about=scope([*findings.values()]),
        sections=tuple(part.section for part in parts),
        config=config.to_dict(placeless),
        environment=environment()
        | {
            "device": device,
            "devices": run.mesh.size,
            "images at a time": min(lab.together, experiment.images),
        }
        | _settings(run),
        numbers={k: v for part in parts for k, v in part.numbers.items()},
    )
    if parallel.is_host_zero():
        report.write(run.folder)
    parallel.agreed(True)  # it is there before any process goes on
    return report


def _settings(run: Run) -> dict[str, Any]:
    """How the settings differ under which parts of a run were made, if they do."""
    if not parallel.is_host_zero():
        return {}
    changes = numerics.changes(run.folder)
    return {"went on under other settings": changes} if changes else {}
