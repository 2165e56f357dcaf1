"""The audit of a model: a trigger is sought under each hypothesis, and judged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from puredif_jax import loops, metrics, parallel
from puredif_jax.attacks import Solver
from puredif_jax.detection import Detector, Features
from puredif_jax.experiment import Experiment, Inversion
from puredif_jax.lab import SHOWN, Lab, Truth
from puredif_jax.report import Part, Section
from puredif_jax.types import Candidate, Params
from puredif_jax.unet import SHIPPED

SCOPE = (
    "A verdict is about backdoors whose trigger is added to the noise, as BadDiffusion "
    "and VillanDiffusion (psi = 1) train them; those of TrojDiff and of "
    "variance-exploding models are not sought. docs/scan.md tells what to do next."
)
COLUMNS = (
    "sde is ancestral sampling, ode deterministic. Of a backdoored model shift, "
    "memory, gain and uniformity are small; the score is -log10 of the least gain. "
    "docs/scan.md explains the columns."
)
ELSEWHERE = (
    "The clean models that calibrate are of the package's network (0.64 M parameters, "
    "grey images of 16x16) and of the default inversion; this audit is not. Scan clean "
    "models of this kind in the same way, and give their scores as "
    "audit.detector.clean."
)


class Auditor:
    """Inverts and judges models from themselves alone, as an experiment says."""

    def __init__(self, experiment: Experiment, lab: Lab) -> None:
        self.experiment = experiment
        self.lab = lab

    def audit(
        self, label: str, params: Params, truth: Truth | None, drawn: str
    ) -> Part:
        """Inverts and judges one model, from the model alone.

        Args:
          label: of the model, its own.
          params: its weights.
          truth: the backdoor that it is known to have, only compared with.
          drawn: name by which the draws of the true trigger are kept.
        """
        lab, options = self.lab, self.experiment.audit
        assert options is not None
        found: dict[Solver, Features] = {}
        rows: list[dict[str, Any]] = []
        pictures: list[tuple[str, np.ndarray]] = []
        curves: dict[str, Any] = {}
        if truth is not None:
            pictures += [("true trigger", truth.trigger), ("true target", truth.target)]
        for solver in options.hypotheses:
            for method, inversion in options.methods(solver).items():
                stage = (
                    f"{method.replace(', ', '_').replace(' ', '_')}_{label}_{solver}"
                )
                result = self._invert(stage, params, solver, inversion)
                delta = result["delta"]
                row: dict[str, Any] = {"method": method, "hypothesis": solver}
                if truth is not None:
                    row |= self._compare(drawn, stage, params, truth, solver, result)
                row["network evaluations"] = inversion.evaluations
                row["seconds"] = float(result["seconds"])
                rows.append(row)
                pictures.append((f"inverted trigger, {method}, {solver}", delta))
                if truth is not None:
                    difference = delta - truth.trigger
                    caption = f"difference from the true one, {method}, {solver}"
                    pictures.append((caption, difference))
                plain = self._plain(label, params, solver)
                measured = lab.features(
                    params,
                    solver,
                    Candidate(jnp.asarray(delta), jnp.asarray(result["target"])),
                    result["errors"].min(),
                    result["draws"][:64],
                    plain,
                )
                row |= {k: float(v) for k, v in measured._asdict().items()}
                if method != "puredif":
                    continue
                found[solver] = measured
                pictures += [
                    (f"estimated target, {solver}", result["target"]),
                    (
                        f"draws from the inverted trigger, {solver}",
                        result["draws"][:SHOWN],
                    ),
                    (f"draws from plain noise, {solver}", plain[:SHOWN]),
                ]
                curves |= self._curves(stage, solver, inversion.descent.scout)
        verdict = options.detector.judge(found)
        text = f"{verdict.outcome}: {verdict.reason} (p = {verdict.p_value:.3g})."
        doubt, alarm = options.detector.bounds
        judged = (
            f"Score {verdict.score:.3g}: up to {doubt:.3g} is clean, above {alarm:.3g} "
            "backdoored."
        )
        default = options.detector.clean == Detector().clean
        known = (self.experiment.model, options.inversion) == (SHIPPED, Inversion())
        elsewhere = [ELSEWHERE] if default and not known else []
        section = Section(
            f"Audit of {label}",
            "\n\n".join([text, judged, *elsewhere, COLUMNS, SCOPE]),
            tuple(rows),
            tuple(pictures),
            (("inversion loss", curves),),
        )
        return Part(
            {label: {"verdict": verdict._asdict(), "inversions": rows}}, section
        )

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
            return {
                "delta": candidate.delta,
                "target": candidate.target,
                "errors": errors,
                "draws": lab.draw(params, sampler, candidate.delta, evaluation.draws),
                "seconds": loops.seconds(lab, stage),
            }

        return lab.run.once(stage, compute)

    def _plain(self, label: str, params: Params, solver: Solver) -> np.ndarray:
        """64 draws of a model from plain noise."""
        lab, sampler = self.lab, self.experiment.evaluation.sampler(solver)

        def draw() -> Mapping[str, Any]:
            return {"images": lab.draw(params, sampler, lab.zero, 64)}

        return lab.run.once(f"plain_{label}_{solver}", draw)["images"]

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

        def success(name: str, r: np.ndarray) -> float:
            return lab.success(name, params, sampler, r, truth.target, draws).rate

        delta = result["delta"]
        if solver == truth.solver:  # the draws at hand are these
            own = metrics.success(result["draws"], truth.target)["mse<0.01"]
        else:
            own = success(stage, delta)
        distance = metrics.trigger_distance(delta, truth.trigger)
        return {
            "success": own,
            "success of the true trigger": success(drawn, truth.trigger),
            **{k: float(v) for k, v in distance._asdict().items()},
        }
