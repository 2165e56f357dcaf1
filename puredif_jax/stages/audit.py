"""The audit of models as a stage: each is shown to its defenses, and judged."""

from __future__ import annotations

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from puredif_jax.attacks.channel import Channel
from puredif_jax.defenses.base import Defense, Inspection, Inverted, Verdict
from puredif_jax.defenses.detector import Detector
from puredif_jax.defenses.hypothesis import Exploding, Fading, Hypothesis, Trojan
from puredif_jax.defenses.inversion import Inversion
from puredif_jax.defenses.puredif import Puredif
from puredif_jax.diffusion.sampling import unclipped
from puredif_jax.diffusion.schedules import NoiseSchedule
from puredif_jax.diffusion.solver import Ancestral, Deterministic, Solver
from puredif_jax.files.whole import listed, safe_name
from puredif_jax.formats import diffusers as convert
from puredif_jax.formats.discovery import distinct
from puredif_jax.runs import parallel
from puredif_jax.runs.binding import RunError
from puredif_jax.runs.page import Section
from puredif_jax.stages import calibration
from puredif_jax.stages.amplify import AMPLIFICATION
from puredif_jax.stages.base import Accused, Context, Outcome, Stage, State
from puredif_jax.stages.embedding import GarmentNet, Pixels
from puredif_jax.stages.finding import Finding, next_steps
from puredif_jax.stages.inception import Inception
from puredif_jax.stages.inspector import Inspector
from puredif_jax.stages.lab import PLAIN, SHOWN
from puredif_jax.stages.measure import FRECHET, SUCCESS
from puredif_jax.stages.pictures import as_images
from puredif_jax.stages.repaired import REPAIR, REPAIRED
from puredif_jax.stages.screen import SCREENED
from puredif_jax.stages.weights import WEIGHTS, Truth, find_weights
from puredif_jax.stages.work import Work, drawing, inverting
from puredif_jax.types import Params, shown

OWN = ("trained", "repaired")
"""Names of the results of a run itself."""


@dataclasses.dataclass(frozen=True)
class Audit(Stage):
    """Which models are inverted and judged, and how.

    Attributes:
      weights: names of shipped models, paths of weights, or "trained" or "repaired"
        for the result of this run.
      hypotheses: kinds of backdoor tried on each, as far as they apply to its process.
      inversion: how triggers are sought.
      detector: how they are judged.
      baselines: other defenses to compare with, each with a verdict of its own, such as
        `Elijah()`; the verdict by `inversion` and `detector` counts.
      budget: gradients of the network on an image in each inversion of each defense, to
        compare them at equal cost; 0 for their own settings.
      scheduler: the folder or file from which `schedule` and `prediction` of the run
        were read, where weights have no scheduler of their own; the report names it.
    """

    weights: tuple[str, ...] = ("trained",)
    hypotheses: tuple[Hypothesis, ...] = (
        Fading(Ancestral()),
        Fading(Deterministic()),
        Trojan(),
        Exploding(Ancestral()),
        Exploding(Deterministic()),
    )
    inversion: Inversion = Inversion()
    detector: Detector = Detector()
    baselines: tuple[Defense, ...] = ()
    budget: int = 0
    scheduler: str | None = None

    def __post_init__(self) -> None:
        if self.budget < 0:
            raise ValueError(f"budget must be 0 or more, found {self.budget}")
        names = [hypothesis.name for hypothesis in self.hypotheses]
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"hypotheses must be one or more of different names, found {names}"
            )
        names = [defense.name for defense in self.defenses]
        if len(set(names)) < len(names):
            raise ValueError(f"each defense needs a name of its own, found {names}")

    def tried(self, schedule: NoiseSchedule) -> tuple[Hypothesis, ...]:
        """The hypotheses that apply to a process."""
        return tuple(each for each in self.hypotheses if each.applies(schedule))

    @property
    def defenses(self) -> tuple[Defense, ...]:
        """All defenses that look at each model; the verdict of the first counts."""
        found = (Puredif(self.inversion, self.detector), *self.baselines)
        if not self.budget:
            return found
        return tuple(dataclasses.replace(each, budget=self.budget) for each in found)

    def searches(self, schedule: NoiseSchedule) -> list[tuple[Hypothesis, Inversion]]:
        """All searches that are made on a model of a process."""
        return [
            (kind, inversion)
            for defense in self.defenses
            for hypothesis, inversion in defense.inversions(
                self.tried(schedule)
            ).items()
            for kind in (hypothesis, *defense.placebos(hypothesis))
        ]

    def plan(self, schedule: NoiseSchedule) -> str:
        """How each model of a process is inverted, in words."""
        count = sum(how.evaluations(kind) for kind, how in self.searches(schedule))
        names = listed(hypothesis.name for hypothesis in self.tried(schedule))
        return f"(under {names}, {count:,} evaluations of its network on an image)"

    def reads(self, weights: str | None) -> tuple[str, ...]:
        return tuple(name for name in self.weights if name not in OWN)

    def check(self, context: Context) -> None:
        lab = context.lab
        clean = Channel.clean(lab.schedule)
        try:
            for defense in self.defenses:
                defense.check()
            for kind, inversion in self.searches(lab.schedule):
                cost, asked = inversion.evaluations(kind), 3 * self.budget
                if asked and abs(cost - asked) > 0.15 * asked:
                    raise ValueError(
                        f"a budget of {self.budget} gradients cannot be kept under "
                        f"{kind.name}: the least search has {cost // 3}"
                    )
                for phase in inversion.phases:
                    phase.loss.bind(lab.model, lab.schedule, clean)
        except ValueError as error:
            raise RunError(str(error)) from error

    def work(self, context: Context) -> Iterator[Work]:
        evaluation, schedule = context.evaluation, context.lab.schedule
        batch, draws = evaluation.batch, evaluation.draws

        def drawn(solver: Solver) -> int:
            """Evaluations for an image; one that is clipped is drawn twice."""
            sampler = evaluation.sampler(solver)
            return sampler.steps * (1 if unclipped(sampler) is None else 2)

        for name in self.weights:
            truth = self._truth(context, name)
            known = truth.solver if truth else None
            tried = self.tried(schedule)
            inverted: Counter[Hypothesis] = Counter()
            for defense in self.defenses:
                for hypothesis, inversion in defense.inversions(tried).items():
                    inverted[hypothesis] += 1
                    for kind in (hypothesis, *defense.placebos(hypothesis)):
                        yield from inverting(defense.name, inversion, kind)
            for hypothesis in tried:
                count, solver = inverted[hypothesis], hypothesis.solver
                yield drawing(batch, (count * draws + PLAIN) * drawn(solver))
                if truth is None or known is None:
                    continue
                by = evaluation.sampler(known, truth.psi(schedule))
                if truth.controlled or by != evaluation.sampler(solver):
                    # Drawn again, as the backdoor wants it.
                    yield drawing(batch, count * draws * drawn(known))
            if known is not None and name not in OWN:  # by the true trigger
                yield drawing(batch, draws * drawn(known))

    def run(self, context: Context, state: State) -> tuple[State, Outcome]:
        findings: list[Finding] = []
        sections: list[Section] = []
        for name, label in labels(self.weights).items():
            where, params, accused = name, None, None  # one model is on the devices
            state = dataclasses.replace(state, accused=None)
            if name == "repaired":
                if state.repaired is None:
                    continue  # there was nothing to repair
                where, params = state.repaired
                label = where
            else:
                if name == "trained":
                    where, params = WEIGHTS, state.params
                else:
                    params = context.lab.load(name)
            if context.place:  # what it finds is kept apart; no label has a "+"
                label = f"{label}+{context.place + 1}"
            finding, section, accused = self._audit(context, name, label, params, where)
            state = dataclasses.replace(state, accused=accused)
            findings.append(finding)
            if parallel.is_host_zero():
                judged = finding.verdict
                logging.info("%s: %s: %s", shown(label), judged.outcome, judged.reason)
            sections.append(section)
        return state, Outcome(tuple(findings), tuple(sections))

    def _truth(self, context: Context, name: str) -> Truth | None:
        """The backdoor that a model is known to have."""
        if name in OWN:
            return context.truth
        setup = context.lab.setup
        return Truth.beside(find_weights(name), setup.schedule, setup.image_shape)

    def _audit(
        self, context: Context, name: str, label: str, params: Params, where: str
    ) -> tuple[Finding, Section, Accused]:
        """Inverts and judges one model, from the model alone.

        `where` is its name, or, for a result of the run itself, its place in the
        folder.
        """
        lab = context.lab
        source = lab.models[lab.run.folder / where if name in OWN else where]
        truth = Truth.beside(source.path, lab.schedule, lab.setup.image_shape)
        bench = Inspector(
            lab,
            context.evaluation,
            label,
            params,
            self.tried(lab.schedule),
            self.defenses[0].name,
            truth,
            # Those of a trained model have been drawn, when it was measured.
            f"audit_{label}" if context.place or name != "trained" else "true_trained",
        )
        found = {each.name: each.inspect(bench) for each in self.defenses}
        first, *others = found
        verdict = found[first].verdict
        assert verdict is not None
        finding = Finding(
            label=label,
            weights=where,
            # Process 0 has written them, and it alone writes of them.
            sha256=source.digests if parallel.is_host_zero() else {},
            remarks=() if name in OWN else source.remarks,
            verdict=verdict,
            calibration=self._calibration(context),
            hypotheses=tuple(each.name for each in bench.hypotheses),
            sought=tuple(each.sought for each in bench.hypotheses),
            unsought=tuple(
                each.sought
                for each in Audit().tried(lab.schedule)
                if each not in bench.hypotheses
            ),
            inversions=tuple(
                bench.with_truth(row)
                for each in found.values()
                for row in each.inversions
            ),
            others={
                each: judged
                for each in others
                if (judged := found[each].verdict) is not None
            },
        )
        if found[first].inversions:
            section = _page(bench, first, verdict, found, truth)
        else:
            section = _refused(bench, verdict)
        kinds = {kind.name: kind for kind in bench.hypotheses}
        best = kinds[verdict.hypothesis]
        candidate = bench.candidates.get((first, best))
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(candidate)):
            candidate = None
        accused = Accused(
            label, verdict, truth, best if candidate else None, candidate, params
        )
        return finding, as_images(section, source.shown), accused

    def _calibration(self, context: Context) -> calibration.Calibration:
        """Whose scores the detector compares with: this network's, or others'."""
        if self.detector.clean:
            return "given scores"
        known = calibration.covers(self.defenses[0], context.lab.setup)
        return "this network" if known else "another network"


def _refused(bench: Inspector, verdict: Verdict) -> Section:
    """The page of weights that denoise nothing: what they draw, and what to do."""
    (best,) = (each for each in bench.hypotheses if each.name == verdict.hypothesis)
    caption = f"draws from plain noise, {best.name}"
    shown = Section("Draws", pictures=((caption, bench.plain(best)[:SHOWN]),))
    sections = (shown, next_steps([verdict.outcome]))
    return Section(f"Audit of {bench.label}", sections=sections)


def _page(
    bench: Inspector,
    first: str,
    verdict: Verdict,
    found: dict[str, Inspection],
    truth: Truth | None,
) -> Section:
    """The page of a model: the evidence of the best trigger first."""
    ours = {kind: seen for (name, kind), seen in bench.seen.items() if name == first}
    (best,) = (kind for kind in ours if kind.name == verdict.hypothesis)
    pictures: list[tuple[str, Any]] = []
    if truth is not None:
        pictures += [("true trigger", truth.trigger), ("true target", truth.target)]
    pictures += [each for seen in bench.seen.values() for each in seen.pictures]
    curves = {k: v for seen in bench.seen.values() for k, v in seen.curves.items()}
    rows = [bench.with_truth(row) for each in found.values() for row in each.inversions]
    others = [
        {"defense": name, **judged._asdict()}
        for name, inspection in found.items()
        if name != first and (judged := inspection.verdict) is not None
    ]
    sections = [
        *ours[best].sections,
        next_steps([verdict.outcome]),
        *(
            dataclasses.replace(section, text="")  # as above
            for kind, seen in ours.items()
            if kind != best
            for section in seen.sections
        ),
        Section("Measures", table=_measures(rows)),
        *([Section("Other defenses", table=tuple(others))] if others else []),
        Section(
            "Triggers", pictures=tuple(pictures), curves=(("inversion loss", curves),)
        ),
    ]
    return Section(f"Audit of {bench.label}", sections=tuple(sections))


def _measures(rows: Sequence[Inverted]) -> tuple[dict[str, Any], ...]:
    """What was measured of each inversion, a measure a row, with its meaning."""
    columns = {f"{row.method}, {row.hypothesis}": row.row() for row in rows}
    return tuple(
        {"measure": name}
        | {column: row.get(name) for column, row in columns.items()}
        | {"meaning": meaning}
        for name, meaning in Inverted.meanings().items()
        if any(name in row for row in columns.values())
    )


# Names of other results in a report.
RESERVED = (
    SUCCESS,
    *(FRECHET + kind.name for kind in (GarmentNet, Pixels, Inception)),
    AMPLIFICATION,
    SCREENED,
    REPAIR,
)


def labels(weights: Sequence[str]) -> dict[str, str]:
    """A label of its own for each model: the last part of its path, or of its folder.

    Models that share one, or have the name of another result, are numbered. The name of
    a repair's result is that one's alone.
    """
    found: dict[str, str] = {}
    for name in weights:
        path = pathlib.Path(name)
        stem = path.stem if path.suffix == ".safetensors" else path.name
        if name != path.name and stem in (convert.FOLDER, pathlib.Path(WEIGHTS).stem):
            stem = path.absolute().parent.name  # of a run
        own = name in OWN  # no other model has these names
        if not own and stem.startswith(REPAIRED):
            stem = f"given-{stem}"
        taken = [] if own else [*OWN, *RESERVED]
        found[name] = distinct(safe_name(stem), [*found.values(), *taken])
    return found
