"""What an audit has found of a model, and how it is put into words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from puredif_jax.defenses.detector import Outcome, Verdict
from puredif_jax.runs.binding import RunError
from puredif_jax.runs.page import Judgement, Section

Calibration = Literal["this network", "another network", "given scores"]
"""Whose clean models the detector knows: its own of the network at hand, its own of
another one, or those that the user has given."""

_CLAUSES: dict[Calibration, str] = {
    "this network": "calibrated for this network",
    "another network": "not calibrated for this network and search",
    "given scores": "calibrated with the scores that were given",
}
_NOT_CALIBRATED = (
    "The detector was not calibrated for every model here. Its clean models are of the "
    "package's network (0.64 M parameters, grey images of 16x16), of a linear schedule "
    "and of the default inversion. How scores vary between clean models of another "
    "kind is not known: take the verdict as a lead. To calibrate, scan clean models of "
    "this kind in the same way, and give their scores as "
    "`--config.audit.detector.clean=0.1,0.2`."
)
_NOT_SOUGHT = (
    "Not sought: TrojDiff, VillanDiffusion with psi below 1, and backdoors of "
    "variance-exploding models."
)

_SHARDS = 3  # of weights, whose digests the first screen has

MEASURES = {
    "score": "-log10 of gain. The verdict rests on the largest score",
    "gain": "error of the model on the image with the trigger, over its error on the "
    "same image without. Small if backdoored",
    "memory": "the same error with the trigger, over the error of the model on its own "
    "draws. Small if backdoored",
    "shift": "error of the equation by which triggers are sought. Small if backdoored",
    "contrast": "standard deviation of the image, of a range of 2. An image near 0 is "
    "flat, and easy for every model",
    "uniformity": "how much draws with the trigger differ, over plain draws. Small on "
    "many clean models as well",
    "uniformity, unclipped": "the same where x0 is not clipped while sampling",
    "variation": "total variation of draws with the trigger, over that of plain draws",
    "alignment": "cosine of the trigger and the shift that it causes near T. Near 1 on "
    "clean models as well",
    "kl_mean": "mean of trigger^2 / 2, a statistic of TERD",
    "kl_variance": "variance of trigger^2 / 2, a statistic of TERD",
    "success": "share of draws at MSE < 1e-2 of the true target",
    "success of the true trigger": "the same with the true trigger",
    "success, unclipped": "success where x0 is not clipped while sampling. Attacks are "
    "trained and measured so",
    "success of the true trigger, unclipped": "the same with the true trigger",
    "relative_l2": "distance to the true trigger, over the norm of the true one",
    "cosine": "of the inverted and the true trigger",
    "mse": "mean squared difference from the true trigger",
    "max_error": "largest difference from the true trigger",
    "norm_ratio": "norm of the inverted trigger over that of the true one",
    "network evaluations": "of one image; a gradient counts for two more",
    "seconds": "of the inversion",
}
"""What an audit measures of a trigger, in the order of the page, and what it means."""

NEXT = {
    "backdoored": (
        "Do not use these weights. Train again from a source that you "
        "trust; this package does not repair a model. Keep the folder and the SHA-256 "
        "of its files: they name the weights to others. The arrays of each inversion "
        "are in `results/puredif_*.npz` beside the page of the model: `delta` is the "
        "trigger, `target` its image, `draws` are images drawn with it."
    ),
    "could not tell": (
        "The score lies between clean and backdoored models, an inversion ended in no "
        "finite numbers, or the weights denoise nothing. Weights that denoise nothing "
        "are damaged, or belong to another scheduler. Otherwise give the same command "
        "with another seed and workdir: `--config.seed=1 --config.workdir=FOLDER`. "
        "Then search longer: `--config.audit.inversion.descent.steps=240 "
        "--config.audit.inversion.descent.candidates=16 "
        "--config.audit.inversion.descent.finalists=8`. The detector is not calibrated "
        "for a longer search: scan clean models of the same kind in the same way, and "
        "compare the scores."
    ),
    "clean": (
        "No trigger of the kinds that were sought unlocks an image. This is "
        "no proof: a search can miss a trigger. If the model matters, give the same "
        "command with other seeds, each in another workdir: `--config.seed=1 "
        "--config.workdir=FOLDER`. One verdict of backdoored outweighs the others."
    ),
    "error": (
        "Nothing is known of this model. Mend what the sentence beside it "
        "names, and give the same command again: it goes on with what is not done."
    ),
    "not done yet": (
        "The scan goes on, or was interrupted: the same command goes "
        "on with what is not done."
    ),
}
"""What to do next, by the outcome."""


@dataclass(frozen=True)
class Finding:
    """What an audit has found of one model.

    Attributes:
      weights: folder, file or name, as the user gave it.
      sha256: of each file of the weights, by its name.
      remarks: sentences on how the folder was read.
      verdict: the judgement.
      calibration: what the detector was calibrated with.
      hypotheses: the kinds of backdoor that were sought, by name.
      sought: the same in words.
      inversions: what was measured, a row for each inversion.
    """

    weights: str
    sha256: Mapping[str, str]
    remarks: tuple[str, ...]
    verdict: Verdict
    calibration: Calibration
    hypotheses: tuple[str, ...]
    sought: tuple[str, ...]
    inversions: tuple[Mapping[str, Any], ...]

    def numbers(self) -> dict[str, Any]:
        """As `report.json` keeps it."""
        return {**vars(self), "verdict": self.verdict._asdict()}

    @classmethod
    def read(cls, numbers: Mapping[str, Any], where: str) -> Finding:
        """What `numbers` has returned, from a report named `where`.

        Raises:
          RunError: it is damaged, or was written by another version of the package.
        """
        try:
            verdict = dict(numbers["verdict"])
            for name in ("score", "p_value", "doubt", "alarm"):
                verdict[name] = float(verdict[name])  # inf comes as a string
            found = cls(
                str(numbers["weights"]),
                dict(numbers["sha256"]),
                tuple(map(str, numbers["remarks"])),
                Verdict(**verdict),
                numbers["calibration"],
                tuple(map(str, numbers["hypotheses"])),
                tuple(map(str, numbers["sought"])),
                tuple(map(dict, numbers["inversions"])),
            )
            for value, valid in (
                (found.verdict.outcome, get_args(Outcome)),
                (found.verdict.hypothesis, found.hypotheses),
                (found.calibration, get_args(Calibration)),
            ):
                if value not in valid:
                    raise ValueError(value)
            return found
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(
                f"{where} is no report of an audit by this version: remove it, and the "
                "same command writes it again from what is stored"
            ) from error

    @property
    def reason(self) -> str:
        """Why, in a sentence; empty where `sure` has said it."""
        if self._unscored:
            return ""
        reason = self.verdict.reason
        return f"{reason[:1].upper()}{reason[1:]}."

    @property
    def _unscored(self) -> bool:
        """Whether something else than the score decides."""
        verdict = self.verdict
        return verdict.outcome == "could not tell" and not verdict.score > verdict.doubt

    @property
    def sure(self) -> str:
        """How sure the verdict is, in a clause."""
        verdict = self.verdict
        if self._unscored:
            return f"{verdict.reason}; {_CLAUSES[self.calibration]}"
        beaten = round(verdict.p_value * (verdict.clean_models + 1)) - 1
        return (
            f"score {verdict.score:.3g}, clean up to {verdict.doubt:.3g}, backdoored "
            f"above {verdict.alarm:.3g}; p = {verdict.p_value:.3g}, {beaten} of "
            f"{verdict.clean_models} clean models score as high; "
            f"{_CLAUSES[self.calibration]}"
        )

    def judgement(
        self, name: str, detail: str = "", report: str | None = None
    ) -> Judgement:
        """For the first screen of a page; arguments as of `page.Judgement`."""
        facts, files = {"Weights": self.weights}, list(self.sha256.items())
        facts |= {f"SHA-256 of {file}": digest for file, digest in files[:_SHARDS]}
        if (more := len(files) - _SHARDS) > 0:
            facts["More files"] = f"{more}; report.json has their digests"
        if self.remarks:
            facts["As it was read"] = "; ".join(self.remarks)
        return Judgement(name, self.verdict.outcome, self.sure, detail, facts, report)


def scope(findings: Sequence[Finding]) -> str:
    """What was sought and what was not, and whether the detector was calibrated."""
    if not findings:
        return ""
    lists = [finding.sought for finding in findings]
    common = [kind for kind in lists[0] if all(kind in each for each in lists)]
    others = dict.fromkeys(k for each in lists for k in each if k not in common)
    sought = (
        "Sought: backdoors whose trigger is added to the noise: "
        f"{'; '.join(common) or 'of no kind in every model'}. {_NOT_SOUGHT}"
    )
    if others:
        sought += f" Only in some models: {'; '.join(others)}."
    unknown = any(finding.calibration == "another network" for finding in findings)
    return "\n\n".join([sought, *([_NOT_CALIBRATED] if unknown else [])])


def next_steps(outcomes: Iterable[str]) -> Section:
    """What to do next, for each outcome that there is."""
    found = set(outcomes)
    parts = [Section(name, text) for name, text in NEXT.items() if name in found]
    return Section("What to do next", sections=tuple(parts))
