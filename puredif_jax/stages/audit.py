"""The audit of a model: a trigger is sought under each hypothesis, and judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from puredif_jax.attacks.base import Solver
from puredif_jax.defenses.detection import (
    KINDS,
    Detector,
    Evidence,
    Features,
    Verdict,
    spread_ratio,
)
from puredif_jax.diffusion.sampling import Sampler, unclipped
from puredif_jax.diffusion.schedules import LinearBetas
from puredif_jax.metrics import measures as metrics
from puredif_jax.networks.unet import SHIPPED
from puredif_jax.runs import parallel
from puredif_jax.runs.page import Section
from puredif_jax.stages import loops
from puredif_jax.stages.experiment import Experiment, Inversion
from puredif_jax.stages.finding import MEASURES, Calibration, Finding, next_steps
from puredif_jax.stages.lab import PLAIN, SHOWN, Lab
from puredif_jax.stages.weights import Truth
from puredif_jax.types import Candidate, Params

PICTURED = (500, 300, 100)  # timesteps of the evidence: high, middle and low noise

_EVIDENCE = (
    "Both pictures start from the same noisy images of the estimated target. In the "
    "first the model is given the trigger as well. A backdoored model finds its image "
    "with the trigger, also where noise hides it, and makes other images without. For "
    "a clean model the trigger changes little. The score measures this: it is log10 of "
    "how many times the trigger lowers the error, as a geometric mean over the table."
)
_DRAWS = (
    "Both pictures start from the same noise. Draws that look alike prove nothing by "
    "themselves: a large shift of the noise brings many clean models, too, to one flat "
    "image, which every model finds without a trigger. The evidence above tells the "
    "two apart."
)


class Audited(NamedTuple):
    """What was found of one model, and the part of the page on it."""

    finding: Finding
    section: Section


class _Inverted(NamedTuple):
    """One inversion: what was measured, and what there is to see."""

    row: dict[str, Any]
    pictures: list[tuple[str, np.ndarray]]
    features: Features
    sections: tuple[Section, ...]


class Auditor:
    """Inverts and judges models from themselves alone, as an experiment says."""

    def __init__(self, experiment: Experiment, lab: Lab) -> None:
        self.experiment = experiment
        self.lab = lab

    @property
    def calibration(self) -> Calibration:
        """Whose scores the detector compares with: those of models such as these?"""
        experiment, options = self.experiment, self.experiment.audit
        assert options is not None
        if options.detector.clean != Detector().clean:
            return "given scores"
        here = (
            experiment.model,
            experiment.schedule,
            experiment.prediction,
            options.inversion,
        )
        known = here == (SHIPPED, LinearBetas(), "epsilon", Inversion())
        return "this network" if known else "another network"

    def audit(
        self,
        label: str,
        weights: str,
        sha256: Mapping[str, str],
        remarks: tuple[str, ...],
        params: Params,
        truth: Truth | None,
        drawn: str,
    ) -> Audited:
        """Inverts and judges one model, from the model alone.

        Args:
          label: of the model, its own.
          weights: where its weights were read, as the user named it.
          sha256: of each of their files.
          remarks: on how they were read.
          params: its weights.
          truth: the backdoor that it is known to have, only compared with.
          drawn: name by which the draws of the true trigger are kept.
        """
        options = self.experiment.audit
        assert options is not None

        def finding(verdict: Verdict, rows: Sequence[dict[str, Any]]) -> Finding:
            known = self.calibration, options.hypotheses, tuple(rows)
            return Finding(weights, sha256, remarks, verdict, *known)

        if (refused := self._refusal(label, params)) is not None:
            section = self._refused(label, params, refused)
            return Audited(finding(refused, ()), section)
        ours: dict[Solver, _Inverted] = {}
        rows: list[dict[str, Any]] = []
        pictures: list[tuple[str, np.ndarray]] = []
        curves: dict[str, Any] = {}
        if truth is not None:
            pictures += [("true trigger", truth.trigger), ("true target", truth.target)]
        for solver in options.hypotheses:
            for method, inversion in options.methods(solver).items():
                found = self._inverted(
                    label, params, solver, method, inversion, truth, drawn
                )
                rows.append(found.row)
                pictures += found.pictures
                if method == "puredif":
                    ours[solver] = found
                    stage = _stage(method, label, solver)
                    curves |= self._curves(stage, solver, inversion.descent.scout)
        verdict = options.detector.judge({k: v.features for k, v in ours.items()})
        best = verdict.hypothesis
        others = [k for k in options.hypotheses if k != best]
        sections = [
            *ours[best].sections,
            next_steps([verdict.outcome]),
            *(
                dataclasses.replace(section, text="")  # as above
                for solver in others
                for section in ours[solver].sections
            ),
            Section("Measures", table=_measures(rows)),
            Section(
                "Triggers",
                pictures=tuple(pictures),
                curves=(("inversion loss", curves),),
            ),
        ]
        section = Section(f"Audit of {label}", sections=tuple(sections))
        return Audited(finding(verdict, rows), section)

    def _refusal(self, label: str, params: Params) -> Verdict | None:
        """The verdict where the weights denoise nothing, before any inversion."""
        options = self.experiment.audit
        assert options is not None
        if options.detector.linear == np.inf:
            return None
        ratios: dict[Solver, float] = {}
        for solver in options.hypotheses:
            plain = self._plain(label, params, solver)
            ratios[solver] = self.lab.denoising(f"{label}_{solver}", params, plain)
        return options.detector.refusal(ratios)

    def _refused(self, label: str, params: Params, verdict: Verdict) -> Section:
        """The page of weights that denoise nothing: what they draw, and what to do."""
        images = self._plain(label, params, verdict.hypothesis)[:SHOWN]
        caption = f"draws from plain noise, {verdict.hypothesis}"
        shown = Section("Draws", pictures=((caption, images),))
        sections = (shown, next_steps([verdict.outcome]))
        return Section(f"Audit of {label}", sections=sections)

    def _inverted(
        self,
        label: str,
        params: Params,
        solver: Solver,
        method: str,
        inversion: Inversion,
        truth: Truth | None,
        drawn: str,
    ) -> _Inverted:
        """Inverts by one method under one hypothesis, and measures what comes out."""
        lab, options = self.lab, self.experiment.audit
        assert options is not None
        stage = _stage(method, label, solver)
        result = self._invert(stage, params, solver, inversion)
        delta, target = result["delta"], result["target"]
        row: dict[str, Any] = {"method": method, "hypothesis": solver}
        if truth is not None:
            row |= self._compare(drawn, stage, params, truth, solver, result)
        row["network evaluations"] = inversion.evaluations
        row["seconds"] = float(result["seconds"])
        pictures = [(f"inverted trigger, {method}, {solver}", delta)]
        if truth is not None:
            caption = f"difference from the true one, {method}, {solver}"
            pictures.append((caption, delta - truth.trigger))
        plain = self._plain(label, params, solver)
        candidate = Candidate(jnp.asarray(delta), jnp.asarray(target))
        measured = lab.features(
            params,
            solver,
            candidate,
            result["errors"].min(),
            result["draws"][:PLAIN],
            plain,
        )
        row |= {k: float(v) for k, v in measured._asdict().items()}
        row["score"] = options.detector.score(measured)
        row["contrast"] = float(target.std())
        sampler = self.experiment.evaluation.sampler(solver)
        drawn_by = [(sampler, result["draws"], plain)]
        if (free := unclipped(sampler)) is not None:
            both = result["draws_unclipped"], self._plain(label, params, solver, free)
            ratio = spread_ratio(*both)
            row["uniformity, unclipped"] = ratio
            drawn_by.append((free, *both))
        sections: tuple[Section, ...] = ()
        if method == "puredif":
            name = f"{label}_{solver}"
            evidence = lab.evidence(name, params, solver, candidate, len(plain))
            sections = (
                _evidence(solver, target, evidence),
                *(_draws(solver, *each) for each in drawn_by),
            )
        return _Inverted(row, pictures, measured, sections)

    def _invert(
        self, stage: str, params: Params, solver: Solver, inversion: Inversion
    ) -> dict[str, np.ndarray]:
        """Inverts under one hypothesis: delta, target, held-out errors and draws."""
        lab, evaluation = self.lab, self.experiment.evaluation

        def compute() -> Mapping[str, Any]:
            candidate, errors = loops.invert(
                lab,
                stage,
                params,
                solver,
                inversion.loss,
                inversion.descent,
                inversion.survey,
                inversion.heldout,
            )
            sampler = evaluation.sampler(solver)
            draws = {"draws": sampler, "draws_unclipped": unclipped(sampler)}
            return {
                "delta": candidate.delta,
                "target": candidate.target,
                "errors": errors,
                **{
                    name: lab.draw(params, by, candidate.delta, evaluation.draws)
                    for name, by in draws.items()
                    if by is not None
                },
                "seconds": loops.seconds(lab, stage),
            }

        return lab.run.once(stage, compute)

    def _plain(
        self, label: str, params: Params, solver: Solver, free: Sampler | None = None
    ) -> np.ndarray:
        """Draws from plain noise; `free` replaces a sampler that clips."""
        lab, sampler = self.lab, free or self.experiment.evaluation.sampler(solver)

        def draw() -> Mapping[str, Any]:
            return {"images": lab.draw(params, sampler, lab.zero, PLAIN)}

        name = f"plain_{label}_{solver}" + ("_unclipped" if free else "")
        return lab.run.once(name, draw)["images"]

    def _curves(self, stage: str, solver: Solver, scout: int) -> dict[str, Any]:
        """The loss of every scout, and the least of those that went on; on host 0."""
        if not parallel.is_host_zero():  # another one may see an older file
            return {}
        curve = self.lab.run.metrics.read(stage)
        curves: dict[str, Any] = {}
        curves[solver] = (scout + curve["step"], curve["loss"].min(axis=-1))
        if scout:
            scouts = self.lab.run.metrics.read(f"{stage}_scouts")
            for i, loss in enumerate(scouts["loss"].reshape(len(scouts["step"]), -1).T):
                curves[f"{solver}, scout {i + 1}"] = (scouts["step"], loss)
        return curves

    def _compare(
        self,
        drawn: str,
        stage: str,
        params: Params,
        truth: Truth,
        solver: Solver,
        result: Mapping[str, np.ndarray],
    ) -> dict[str, float]:
        """Success of an inverted trigger beside the true one's, and their distance.

        The draws of the true trigger are kept by the name `drawn`.
        """
        lab, evaluation = self.lab, self.experiment.evaluation
        sampler, draws = evaluation.sampler(truth.solver), evaluation.draws

        def success(name: str, r: np.ndarray, by: Sampler) -> float:
            return lab.success(name, params, by, r, truth.target, draws).rate

        delta = result["delta"]
        rates = {}
        for by, end in ((sampler, ""), (unclipped(sampler), "_unclipped")):
            if by is None:
                continue
            if solver == truth.solver:  # the draws at hand are these
                images = result[f"draws{end}"]
                own = metrics.success(images, truth.target)["mse<0.01"]
            else:
                own = success(f"{stage}{end}", delta, by)
            how = ", unclipped" if end else ""
            rates[f"success{how}"] = own
            true = success(f"{drawn}{end}", truth.trigger, by)
            rates[f"success of the true trigger{how}"] = true
        distance = metrics.trigger_distance(delta, truth.trigger)
        return {
            **rates,
            **{k: float(v) for k, v in distance._asdict().items()},
        }


def _stage(method: str, label: str, solver: Solver) -> str:
    """Name of an inversion in the run folder."""
    return f"{method.replace(', ', '_').replace(' ', '_')}_{label}_{solver}"


def _evidence(solver: Solver, target: np.ndarray, found: Evidence) -> Section:
    """The denoised image with the trigger beside that without it, and the errors."""
    rows = [
        {
            "t": int(t),
            "error with the trigger": float(with_trigger),
            "error without": float(without),
            "times": float(without / with_trigger) if with_trigger else np.inf,
        }
        for t, with_trigger, without in zip(
            found.timesteps, found.triggered, found.untriggered, strict=True
        )
    ]
    columns = {
        "t": "timestep: the larger, the more noise",
        "times": "how many times the trigger lowers the error",
        "error with the trigger": "mean squared error of the noise that is predicted",
        "error without": "the same from the same noise, without the trigger",
    }
    at = [i for i, t in enumerate(found.timesteps) if t in PICTURED]
    times = ", ".join(str(found.timesteps[i]) for i in at)
    pairs: list[tuple[str, npt.ArrayLike]] = []
    for name, images in ("with", found.with_trigger), ("without", found.without):
        grid = images[at].reshape(-1, *images.shape[2:])
        rest = f"rows t = {times}, {images.shape[1]} draws of noise, unclipped"
        pairs.append((f"denoised {name} the trigger: {rest}", grid))
    title = f"Evidence: {KINDS[solver]} sampling"
    return Section(
        title,
        _EVIDENCE,
        tuple(rows),
        ((f"estimated target, {solver}, contrast {target.std():.2g}", target),),
        columns=columns,
        pairs=tuple(pairs),
    )


def _draws(
    solver: Solver, sampler: Sampler, triggered: np.ndarray, plain: np.ndarray
) -> Section:
    """Whole chains with the trigger beside those without it."""
    clip = getattr(sampler, "clip", None)
    how = "unclipped"
    if clip is not None:
        how = f"clipped at {clip:g}" if isinstance(clip, float) else "thresholded"
    count = min(len(triggered), len(plain), SHOWN)  # pairs of one noise
    pairs = (
        (f"draws with the trigger, {solver}, {how}", triggered[:count]),
        (f"draws from plain noise, {solver}, {how}", plain[:count]),
    )
    return Section(f"Draws: {KINDS[solver]} sampling", _DRAWS, pairs=pairs)


def _measures(rows: list[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """What was measured of each inversion, a measure a row, with its meaning."""
    names = [name for name in MEASURES if any(name in row for row in rows)]
    columns = {f"{row['method']}, {row['hypothesis']}": row for row in rows}
    return tuple(
        {"measure": name}
        | {column: row.get(name) for column, row in columns.items()}
        | {"meaning": MEASURES[name]}
        for name in names
    )
