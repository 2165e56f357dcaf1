"""A model before its defenses: inverted, drawn from and measured, with what is seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from puredif_jax.defenses.base import Inverted
from puredif_jax.defenses.features import spread_ratio
from puredif_jax.defenses.hypothesis import Hypothesis
from puredif_jax.defenses.inversion import Inversion
from puredif_jax.diffusion.sampling import Sampler, unclipped
from puredif_jax.diffusion.schedules import NoiseSchedule
from puredif_jax.metrics import measures as metrics
from puredif_jax.runs import parallel
from puredif_jax.runs.page import Section
from puredif_jax.stages import calibration, search
from puredif_jax.stages.evaluation import Evaluation
from puredif_jax.stages.evidence import drawn, evidence
from puredif_jax.stages.lab import PLAIN, Lab
from puredif_jax.stages.weights import Truth
from puredif_jax.types import Candidate, Member, NoiseModel, Params

STORED = (
    "delta",
    "target",
    "psi",
    "gamma",
    "errors",
    "falling",
    "draws",
    "seconds",
)
"""What is kept of an inversion; without a clip also "draws_unclipped"."""


class Seen(NamedTuple):
    """What there is to see of one inversion.

    pictures: its trigger, and how that differs from a known one.
    curves: its loss, by name.
    sections: the evidence and draws of a defense whose verdict counts.
    """

    pictures: tuple[tuple[str, np.ndarray], ...]
    curves: Mapping[str, Any]
    sections: tuple[Section, ...]


class Inspector:
    """The bench of one model: a `defenses.base.Bench` in a run folder.

    Args:
      lab, evaluation: the run, and how it draws.
      label: a name for the model alone.
      weights: its parameters.
      hypotheses: the kinds of backdoor that are sought.
      main: name of the defense whose evidence is shown.
      truth: the backdoor that it is known to have, only compared with.
      drawn: name by which the draws of the true trigger are kept.

    Attributes:
      seen: of each inversion, by method and hypothesis.
      candidates: the triggers with their images, by the same, as numpy.
      compared: with the truth, fields of `Inverted` by the names of both. No defense
        sees them.
    """

    def __init__(
        self,
        lab: Lab,
        evaluation: Evaluation,
        label: str,
        weights: Params,
        hypotheses: tuple[Hypothesis, ...],
        main: str,
        truth: Truth | None,
        drawn: str,
    ) -> None:
        self.lab, self.evaluation, self.label = lab, evaluation, label
        self._truth = truth
        self.compared: dict[tuple[str, str], dict[str, float]] = {}
        self.seen: dict[tuple[str, Hypothesis], Seen] = {}
        self.candidates: dict[tuple[str, Hypothesis], Candidate] = {}
        self._draws: dict[tuple[str, str], np.ndarray] = {}
        self._params, self._hypotheses = weights, hypotheses
        self._main, self._drawn = main, drawn

    @property
    def model(self) -> NoiseModel:
        """Predicts the noise."""
        return self.lab.model

    @property
    def params(self) -> Params:
        """Its parameters."""
        return self._params

    @property
    def schedule(self) -> NoiseSchedule:
        """Its forward process."""
        return self.lab.schedule

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.lab.setup.image_shape

    @property
    def hypotheses(self) -> tuple[Hypothesis, ...]:
        """The kinds of backdoor that are sought."""
        return self._hypotheses

    def clean_scores(self, defense: str) -> tuple[float, ...]:
        """As the package knows them."""
        return calibration.clean_scores(defense)

    def denoising(self, hypothesis: Hypothesis) -> float:
        """`features.denoising` of plain draws; computed once."""
        name = f"{self.label}_{_file(hypothesis)}"
        return self.lab.denoising(name, self.params, self.plain(hypothesis))

    def plain(self, hypothesis: Hypothesis, free: bool = False) -> np.ndarray:
        """Draws from plain noise; `free` does without the clip of the sampler."""
        lab, sampler = self.lab, self.evaluation.sampler(hypothesis.solver)
        if free:
            sampler = unclipped(sampler) or sampler

        def draw() -> Mapping[str, Any]:
            return {"images": lab.draw(self.params, sampler, lab.zero, PLAIN)}

        end = "_unclipped" if free else ""
        name = f"plain_{self.label}_{_file(hypothesis)}{end}"
        return lab.run.once(name, draw)["images"]

    def invert(
        self,
        method: str,
        hypothesis: Hypothesis,
        inversion: Inversion,
        placebos: tuple[Hypothesis, ...] = (),
    ) -> Inverted:
        """Inverts by one method under one hypothesis, and measures what comes out."""
        lab, truth = self.lab, self._truth
        stage = kept(method, self.label, hypothesis.name)
        result = self._invert(stage, hypothesis, inversion)
        others = [self._placebo(method, each, inversion) for each in placebos]
        delta, target = result["delta"], result["target"]
        name = f"{method}, {hypothesis.name}"
        pictures = [(f"inverted trigger, {name}", delta)]
        if truth is not None:
            compared = self._compare(stage, truth, hypothesis, result)
            self.compared[method, hypothesis.name] = compared
            difference = delta - truth.trigger
            pictures.append((f"difference from the true one, {name}", difference))
        plain = self.plain(hypothesis)
        candidate = _candidate(result)
        errors = lab.errors(
            stage,
            self.params,
            hypothesis,
            candidate,
            plain,
        )
        measured = lab.features(
            self.params,
            hypothesis,
            candidate,
            errors,
            result["errors"].min(),
            result["falling"],
            np.array([_reached(each) for each in others], np.float32),
            result["draws"][:PLAIN],
            plain,
        )
        sampler = self.evaluation.sampler_for(hypothesis, candidate)
        drawn_by = [(sampler, result["draws"], plain)]
        unclipped_ratio = None
        if (free := unclipped(sampler)) is not None:
            both = result["draws_unclipped"], self.plain(hypothesis, free=True)
            unclipped_ratio = spread_ratio(*both)
            drawn_by.append((free, *both))
        gain = float(measured.gain)
        found = Inverted(
            method=method,
            hypothesis=hypothesis.name,
            evaluations=sum(map(inversion.evaluations, (hypothesis, *placebos))),
            seconds=float(sum(each["seconds"] for each in (result, *others))),
            score=float(-np.log10(gain)) if 0 < gain < np.inf else -np.inf,
            contrast=float(target.std()),
            rms=self.schedule.trigger_unit * float(np.sqrt(np.mean(delta**2))),
            **self._member(hypothesis, candidate, inversion),
            uniformity_unclipped=unclipped_ratio,
            **{k: float(v) for k, v in measured._asdict().items()},
        )
        sections: tuple[Section, ...] = ()
        curves: dict[str, Any] = {}
        if method == self._main:
            label = f"{self.label}_{_file(hypothesis)}"
            shown = lab.evidence(label, self.params, hypothesis, candidate)
            sections = (
                evidence(hypothesis, target, errors, shown),
                *(drawn(hypothesis, *each) for each in drawn_by),
            )
            curves = self._curves(stage, hypothesis, inversion.descent.scout)
        self._draws[method, hypothesis.name] = result["draws"]
        self.candidates[method, hypothesis] = parallel.gather(candidate)
        self.seen[method, hypothesis] = Seen(tuple(pictures), curves, sections)
        return found

    def draws(self, method: str, hypothesis: Hypothesis) -> np.ndarray:
        """With the trigger that was found, as they were measured."""
        return self._draws[method, hypothesis.name]

    def _member(
        self, hypothesis: Hypothesis, candidate: Candidate, inversion: Inversion
    ) -> dict[str, float]:
        """What the search could choose of the channel: fields of `Inverted`."""
        if not any(phase.loss.seeks_member for phase in inversion.phases):
            return {}
        family = hypothesis.family(self.schedule, self.image_shape)
        return {
            name: float(np.mean(getattr(candidate.member, name)))
            for name in ("psi", "gamma")
            if np.ptp(getattr(family, name)[:2], axis=0).any()
        }

    def with_truth(self, found: Inverted) -> Inverted:
        """A row beside what a known backdoor says; for reports, not for defenses."""
        known: dict[str, Any] = dict(
            self.compared.get((found.method, found.hypothesis), {})
        )
        return dataclasses.replace(found, **known)

    def _invert(
        self, stage: str, hypothesis: Hypothesis, inversion: Inversion
    ) -> dict[str, np.ndarray]:
        """Inverts under one hypothesis: delta, target, held-out errors and draws."""
        lab, evaluation = self.lab, self.evaluation

        def compute() -> Mapping[str, Any]:
            candidate, errors, falling = search.invert(
                lab,
                stage,
                self.params,
                hypothesis,
                inversion,
            )
            sampler = evaluation.sampler_for(hypothesis, candidate)
            member = candidate.member
            assert member is not None  # a family was searched
            channel = lab.family(hypothesis).at(candidate)
            inside = channel if hypothesis.controlled else None
            draws = {"draws": sampler, "draws_unclipped": unclipped(sampler)}
            return {
                "delta": candidate.delta,
                "target": candidate.target,
                "psi": member.psi,
                "gamma": member.gamma,
                "errors": errors,
                "falling": falling,
                **{
                    name: lab.draw(
                        self.params,
                        by,
                        candidate.delta,
                        evaluation.draws,
                        inside=inside,
                    )
                    for name, by in draws.items()
                    if by is not None
                },
                "seconds": search.seconds(lab, stage, inversion),
            }

        drawn = (
            []
            if unclipped(evaluation.sampler(hypothesis.solver)) is None
            else ["draws_unclipped"]
        )
        return lab.run.once(stage, compute, (*STORED, *drawn))

    def _placebo(
        self, method: str, placebo: Hypothesis, inversion: Inversion
    ) -> Mapping[str, np.ndarray]:
        """What the same search reaches under a placebo."""
        lab, stage = self.lab, kept(method, self.label, placebo.name)

        def compute() -> Mapping[str, Any]:
            found = search.invert(lab, stage, self.params, placebo, inversion)
            return {
                "errors": found.errors,
                "falling": found.falling,
                "seconds": search.seconds(lab, stage, inversion),
            }

        return lab.run.once(stage, compute, ("errors", "falling", "seconds"))

    def _curves(self, stage: str, hypothesis: Hypothesis, scout: int) -> dict[str, Any]:
        """The loss of every scout, and the least of those that went on; on host 0."""
        if not parallel.is_host_zero():  # another one may see an older file
            return {}
        steps, losses = [], []
        done = scout
        for part in (stage, f"{stage}_end"):
            curve = self.lab.run.metrics.read(part)
            if len(curve["step"]):
                steps.append(done + curve["step"])
                losses.append(curve["loss"].min(axis=-1))
                done = steps[-1][-1]
        curves: dict[str, Any] = {}
        if steps:
            curves[hypothesis.name] = (np.concatenate(steps), np.concatenate(losses))
        scouts = self.lab.run.metrics.read(f"{stage}_scouts") if scout else {}
        if len(scouts.get("step", ())):
            for i, loss in enumerate(scouts["loss"].reshape(len(scouts["step"]), -1).T):
                curves[f"{hypothesis.name}, scout {i + 1}"] = (scouts["step"], loss)
        return curves

    def _compare(
        self,
        stage: str,
        truth: Truth,
        hypothesis: Hypothesis,
        result: Mapping[str, np.ndarray],
    ) -> dict[str, float]:
        """Success of an inverted trigger beside the true one's, and their distance.

        Returns fields of `Inverted`.
        """
        lab, evaluation = self.lab, self.evaluation
        draws, psi = evaluation.draws, truth.psi(lab.schedule)
        sampler = evaluation.sampler(truth.solver, psi)

        def success(name: str, r: np.ndarray, by: Sampler) -> float:
            found = lab.success(
                name, self.params, by, r, truth.target, draws, truth.inside
            )
            return found.rate

        delta = result["delta"]
        inside = hypothesis.controlled or truth.controlled
        same = not inside and sampler == evaluation.sampler_for(
            hypothesis, _candidate(result)
        )
        rates = {}
        for by, end in ((sampler, ""), (unclipped(sampler), "_unclipped")):
            if by is None:
                continue
            if same:  # the draws at hand are these
                images = result[f"draws{end}"]
                own = metrics.success(images, truth.target)["mse<0.01"]
            else:
                own = success(f"{stage}{end}", delta, by)
            rates[f"success{end}"] = own
            true = success(f"{self._drawn}{end}", truth.trigger, by)
            rates[f"true_success{end}"] = true
        distance = metrics.trigger_distance(delta, truth.trigger)
        return {
            **rates,
            **{k: float(v) for k, v in distance._asdict().items()},
        }


def _reached(result: Mapping[str, np.ndarray]) -> float:
    """What a search under a placebo would reach if it fell for another quarter.

    So a search that was too short explains no less than a longer one. A search that
    ended in no finite numbers leaves no score.
    """
    return float(result["errors"].min() - np.maximum(result["falling"], 0))


def _candidate(result: Mapping[str, np.ndarray]) -> Candidate:
    """The candidate that a search has kept, from what is stored."""
    delta, target, *member = (
        jnp.asarray(result[name]) for name in ("delta", "target", "psi", "gamma")
    )
    return Candidate(delta, target, Member(*member))


def kept(method: str, label: str, hypothesis: str) -> str:
    """The name by which a run keeps an inversion, in `results/`."""
    how = method.replace(", ", "_").replace(" ", "_")
    return f"{how}_{label}_{hypothesis.replace(' ', '_')}"


def _file(hypothesis: Hypothesis) -> str:
    """A hypothesis in the name of a file."""
    return hypothesis.name.replace(" ", "_")
