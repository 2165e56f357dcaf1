"""The audit of a model: a trigger is sought under each hypothesis, and judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from puredif_jax.defenses.detector import Detector, Verdict
from puredif_jax.defenses.features import Evidence, Features, spread_ratio
from puredif_jax.defenses.hypothesis import Hypothesis
from puredif_jax.diffusion.sampling import Sampler, unclipped
from puredif_jax.diffusion.schedules import LinearBetas
from puredif_jax.metrics import measures as metrics
from puredif_jax.networks.unet import SHIPPED
from puredif_jax.runs import parallel
from puredif_jax.runs.page import Section
from puredif_jax.stages import search
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
    def hypotheses(self) -> tuple[Hypothesis, ...]:
        """The kinds of backdoor that are sought."""
        assert self.experiment.audit is not None
        return self.experiment.audit.tried(self.lab.schedule)

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
            return Finding(
                weights,
                sha256,
                remarks,
                verdict,
                self.calibration,
                tuple(each.name for each in self.hypotheses),
                tuple(each.title for each in self.hypotheses),
                tuple(rows),
            )

        if (refused := self._refusal(label, params)) is not None:
            section = self._refused(label, params, refused)
            return Audited(finding(refused, ()), section)
        ours: dict[Hypothesis, _Inverted] = {}
        rows: list[dict[str, Any]] = []
        pictures: list[tuple[str, np.ndarray]] = []
        curves: dict[str, Any] = {}
        if truth is not None:
            pictures += [("true trigger", truth.trigger), ("true target", truth.target)]
        for hypothesis in self.hypotheses:
            for method, inversion in options.methods(hypothesis).items():
                found = self._inverted(
                    label, params, hypothesis, method, inversion, truth, drawn
                )
                rows.append(found.row)
                pictures += found.pictures
                if method == "puredif":
                    ours[hypothesis] = found
                    stage = _stage(method, label, hypothesis)
                    curves |= self._curves(stage, hypothesis, inversion.descent.scout)
        verdict = options.detector.judge({k: v.features for k, v in ours.items()})
        (best,) = (k for k in ours if k.name == verdict.hypothesis)
        others = [k for k in ours if k != best]
        sections = [
            *ours[best].sections,
            next_steps([verdict.outcome]),
            *(
                dataclasses.replace(section, text="")  # as above
                for other in others
                for section in ours[other].sections
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
        ratios: dict[Hypothesis, float] = {}
        for each in self.hypotheses:
            plain = self._plain(label, params, each)
            name = f"{label}_{_file(each)}"
            ratios[each] = self.lab.denoising(name, params, plain)
        return options.detector.refusal(ratios)

    def _refused(self, label: str, params: Params, verdict: Verdict) -> Section:
        """The page of weights that denoise nothing: what they draw, and what to do."""
        (best,) = (k for k in self.hypotheses if k.name == verdict.hypothesis)
        images = self._plain(label, params, best)[:SHOWN]
        caption = f"draws from plain noise, {best.name}"
        shown = Section("Draws", pictures=((caption, images),))
        sections = (shown, next_steps([verdict.outcome]))
        return Section(f"Audit of {label}", sections=sections)

    def _inverted(
        self,
        label: str,
        params: Params,
        hypothesis: Hypothesis,
        method: str,
        inversion: Inversion,
        truth: Truth | None,
        drawn: str,
    ) -> _Inverted:
        """Inverts by one method under one hypothesis, and measures what comes out."""
        lab, options = self.lab, self.experiment.audit
        assert options is not None
        stage = _stage(method, label, hypothesis)
        result = self._invert(stage, params, hypothesis, inversion)
        delta, target = result["delta"], result["target"]
        row: dict[str, Any] = {"method": method, "hypothesis": hypothesis.name}
        if truth is not None:
            row |= self._compare(drawn, stage, params, truth, hypothesis, result)
        row["network evaluations"] = inversion.evaluations
        row["seconds"] = float(result["seconds"])
        pictures = [(f"inverted trigger, {method}, {hypothesis.name}", delta)]
        if truth is not None:
            caption = f"difference from the true one, {method}, {hypothesis.name}"
            pictures.append((caption, delta - truth.trigger))
        plain = self._plain(label, params, hypothesis)
        candidate = Candidate(jnp.asarray(delta), jnp.asarray(target))
        measured = lab.features(
            params,
            hypothesis,
            candidate,
            result["errors"].min(),
            result["draws"][:PLAIN],
            plain,
        )
        row |= {k: float(v) for k, v in measured._asdict().items()}
        row["score"] = options.detector.score(measured)
        row["contrast"] = float(target.std())
        sampler = self.experiment.evaluation.sampler(hypothesis.solver)
        drawn_by = [(sampler, result["draws"], plain)]
        if (free := unclipped(sampler)) is not None:
            both = (
                result["draws_unclipped"],
                self._plain(label, params, hypothesis, free),
            )
            ratio = spread_ratio(*both)
            row["uniformity, unclipped"] = ratio
            drawn_by.append((free, *both))
        sections: tuple[Section, ...] = ()
        if method == "puredif":
            name = f"{label}_{_file(hypothesis)}"
            evidence = lab.evidence(name, params, hypothesis, candidate, len(plain))
            sections = (
                _evidence(hypothesis, target, evidence),
                *(_draws(hypothesis, *each) for each in drawn_by),
            )
        return _Inverted(row, pictures, measured, sections)

    def _invert(
        self, stage: str, params: Params, hypothesis: Hypothesis, inversion: Inversion
    ) -> dict[str, np.ndarray]:
        """Inverts under one hypothesis: delta, target, held-out errors and draws."""
        lab, evaluation = self.lab, self.experiment.evaluation

        def compute() -> Mapping[str, Any]:
            candidate, errors = search.invert(
                lab,
                stage,
                params,
                hypothesis,
                inversion.loss,
                inversion.descent,
                inversion.survey,
                inversion.heldout,
            )
            sampler = evaluation.sampler(hypothesis.solver)
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
                "seconds": search.seconds(lab, stage),
            }

        return lab.run.once(stage, compute)

    def _plain(
        self,
        label: str,
        params: Params,
        hypothesis: Hypothesis,
        free: Sampler | None = None,
    ) -> np.ndarray:
        """Draws from plain noise; `free` replaces a sampler that clips."""
        lab, sampler = (
            self.lab,
            free or self.experiment.evaluation.sampler(hypothesis.solver),
        )

        def draw() -> Mapping[str, Any]:
            return {"images": lab.draw(params, sampler, lab.zero, PLAIN)}

        name = f"plain_{label}_{_file(hypothesis)}" + ("_unclipped" if free else "")
        return lab.run.once(name, draw)["images"]

    def _curves(self, stage: str, hypothesis: Hypothesis, scout: int) -> dict[str, Any]:
        """The loss of every scout, and the least of those that went on; on host 0."""
        if not parallel.is_host_zero():  # another one may see an older file
            return {}
        curve = self.lab.run.metrics.read(stage)
        curves: dict[str, Any] = {}
        curves[hypothesis.name] = (scout + curve["step"], curve["loss"].min(axis=-1))
        if scout:
            scouts = self.lab.run.metrics.read(f"{stage}_scouts")
            for i, loss in enumerate(scouts["loss"].reshape(len(scouts["step"]), -1).T):
                curves[f"{hypothesis.name}, scout {i + 1}"] = (scouts["step"], loss)
        return curves

    def _compare(
        self,
        drawn: str,
        stage: str,
        params: Params,
        truth: Truth,
        hypothesis: Hypothesis,
        result: Mapping[str, np.ndarray],
    ) -> dict[str, float]:
        """Success of an inverted trigger beside the true one's, and their distance.

        The draws of the true trigger are kept by the name `drawn`.
        """
        lab, evaluation = self.lab, self.experiment.evaluation
        sampler, draws = evaluation.sampler(truth.solver), evaluation.draws

        def success(name: str, r: np.ndarray, by: Sampler) -> float:
            found = lab.success(name, params, by, r, truth.target, draws, truth.inside)
            return found.rate

        delta = result["delta"]
        same = hypothesis.solver == truth.solver and not truth.controlled
        rates = {}
        for by, end in ((sampler, ""), (unclipped(sampler), "_unclipped")):
            if by is None:
                continue
            if same:  # the draws at hand are these
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


def _stage(method: str, label: str, hypothesis: Hypothesis) -> str:
    """Name of an inversion in the run folder."""
    how = method.replace(", ", "_").replace(" ", "_")
    return f"{how}_{label}_{_file(hypothesis)}"


def _file(hypothesis: Hypothesis) -> str:
    """A hypothesis in the name of a file."""
    return hypothesis.name.replace(" ", "_")


def _evidence(hypothesis: Hypothesis, target: np.ndarray, found: Evidence) -> Section:
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
    title = f"Evidence: {hypothesis.solver.title} sampling"
    return Section(
        title,
        _EVIDENCE,
        tuple(rows),
        (
            (
                f"estimated target, {hypothesis.name}, contrast {target.std():.2g}",
                target,
            ),
        ),
        columns=columns,
        pairs=tuple(pairs),
    )


def _draws(
    hypothesis: Hypothesis, sampler: Sampler, triggered: np.ndarray, plain: np.ndarray
) -> Section:
    """Whole chains with the trigger beside those without it."""
    clip = getattr(sampler, "clip", None)
    how = "unclipped"
    if clip is not None:
        how = f"clipped at {clip:g}" if isinstance(clip, float) else "thresholded"
    count = min(len(triggered), len(plain), SHOWN)  # pairs of one noise
    pairs = (
        (f"draws with the trigger, {hypothesis.name}, {how}", triggered[:count]),
        (f"draws from plain noise, {hypothesis.name}, {how}", plain[:count]),
    )
    return Section(f"Draws: {hypothesis.solver.title} sampling", _DRAWS, pairs=pairs)


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
