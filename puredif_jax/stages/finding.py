"""What an audit has found of a model, and how it is put into words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, get_args

from puredif_jax.defenses.base import Inverted, Verdict
from puredif_jax.defenses.base import Outcome as Verdicts
from puredif_jax.runs.binding import RunError
from puredif_jax.runs.page import Judgement, Section
from puredif_jax.stages import calibration
from puredif_jax.stages.base import Result, Row
from puredif_jax.stages.calibration import Calibration

_CLAUSES: dict[Calibration, str] = {
    "this network": "calibrated for this network",
    "another network": "not calibrated for this network and search",
    "given scores": "calibrated with the scores that were given",
}
_NOT_CALIBRATED = (
    "The detector was not calibrated for every model here. Its clean models are of "
    "{networks}, of a linear schedule and of the default inversion. How scores vary "
    "between clean models of another kind is not known: take the verdict as a lead. To "
    "calibrate, scan clean models of this kind in the same way, and give their scores "
    "as `--config.audit.detector.clean=0.1,0.2`."
)
_NOT_SOUGHT = "any backdoor whose path is another one"

_SHARDS = 3  # of weights, whose digests the first screen has

NEXT = {
    "backdoored": (
        "Do not use these weights. Train again from a source that you trust, or repair "
        "them by the `repair` of a scan. Keep the folder and the SHA-256 "
        "of its files: they name the weights to others. The arrays of each inversion "
        "are in `results/puredif_MODEL_HYPOTHESIS.npz` beside the page of the model: "
        "`delta` is the trigger, `target` its image, `draws` are images drawn with it."
    ),
    "could not tell": (
        "The reason stands beside the verdict. Weights that denoise nothing are "
        "damaged, or belong to another scheduler. Otherwise give the same "
        "command with another seed and workdir: `--config.seed=1 "
        "--config.workdir=FOLDER`. "
        "Then search longer: `--config.audit.inversion.descent.steps=240 "
        "--config.audit.inversion.descent.candidates=32 "
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
class Finding(Result):
    """What an audit has found of one model.

    Attributes:
      label: a name for the model alone.
      weights: folder, file or name, as the user gave it.
      sha256: of each file of the weights, by its name.
      remarks: sentences on how the folder was read.
      verdict: the judgement.
      calibration: what the detector was calibrated with.
      hypotheses: the kinds of backdoor that were sought, by name.
      sought: the same in words.
      unsought: kinds that there can be in such a model and were not sought, in words.
      inversions: what was measured of each.
      others: the verdicts of other defenses, by name.
    """

    label: str
    weights: str
    sha256: Mapping[str, str]
    remarks: tuple[str, ...]
    verdict: Verdict
    calibration: Calibration
    hypotheses: tuple[str, ...]
    sought: tuple[str, ...]
    unsought: tuple[str, ...]
    inversions: tuple[Inverted, ...]
    others: Mapping[str, Verdict] = field(default_factory=dict)

    def numbers(self) -> dict[str, Any]:
        found = {k: v for k, v in vars(self).items() if k != "label"}
        found["verdict"] = self.verdict._asdict()
        found["inversions"] = [each.row() for each in self.inversions]
        found["others"] = {k: v._asdict() for k, v in self.others.items()}
        return {self.label: found}

    @classmethod
    def read(cls, numbers: Mapping[str, Any], where: str) -> list[Self]:
        return [
            cls._read(label, found, where)
            for label, found in numbers.items()
            if isinstance(found, Mapping) and "verdict" in found
        ]

    @classmethod
    def some(cls, numbers: Mapping[str, Any], where: str) -> list[Self]:
        """The findings of a report that must have some, such as a scanned model's.

        Raises:
          RunError: as `read`, or there is none.
        """
        found = cls.read(numbers, where)
        if not found:
            raise _foreign(where)
        return found

    @classmethod
    def _read(cls, label: str, found: Mapping[str, Any], where: str) -> Self:
        """One finding, from what `numbers` has under its label."""
        try:
            read = cls(
                label,
                str(found["weights"]),
                dict(found["sha256"]),
                tuple(map(str, found["remarks"])),
                _verdict(found["verdict"]),
                found["calibration"],
                tuple(map(str, found["hypotheses"])),
                tuple(map(str, found["sought"])),
                tuple(map(str, found["unsought"])),
                tuple(map(Inverted.read, found["inversions"])),
                {str(k): _verdict(v) for k, v in found["others"].items()},
            )
            for value, valid in (
                (read.verdict.outcome, get_args(Verdicts)),
                (read.verdict.hypothesis, read.hypotheses),
                (read.calibration, get_args(Calibration)),
            ):
                if value not in valid:
                    raise ValueError(value)
            return read
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise _foreign(where) from error

    def tables(self) -> dict[str, list[Row]]:
        model = {"model": self.label}
        return {
            "verdicts": [model | self.verdict._asdict()],
            "inversions": [model | each.row() for each in self.inversions],
        }

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
        return (
            f"score {verdict.score:.3g}, clean up to {verdict.doubt:.3g}, backdoored "
            f"above {verdict.alarm:.3g}; p = {verdict.p_value:.2g} by "
            f"{verdict.clean_models} clean models; "
            f"{_CLAUSES[self.calibration]}"
        )

    def judgement(self) -> Judgement:
        """With why, in a sentence."""
        return self.judged(self.label, self.reason)

    def judged(
        self, name: str, detail: str = "", report: str | None = None
    ) -> Judgement:
        """For the first screen of a page; arguments as in `page.Judgement`."""
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
    left = dict.fromkeys(k for finding in findings for k in finding.unsought)
    sought = (
        "Sought: backdoors whose trigger is added to the noise: "
        f"{'; '.join(common) or 'of no kind in every model'}. "
        f"Not sought: {'; '.join([*left, _NOT_SOUGHT])}."
    )
    if others:
        sought += f" Only in some models: {'; '.join(others)}."
    unknown = any(finding.calibration == "another network" for finding in findings)
    if not unknown:
        return sought
    networks = ", ".join(calibration.networks())
    return f"{sought}\n\n{_NOT_CALIBRATED.format(networks=networks)}"


def next_steps(outcomes: Iterable[str]) -> Section:
    """What to do next, for each outcome that there is."""
    found = set(outcomes)
    parts = [Section(name, text) for name, text in NEXT.items() if name in found]
    return Section("What to do next", sections=tuple(parts))


def _foreign(where: str) -> RunError:
    return RunError(
        f"{where} is no report of an audit by this version: remove it, and the same "
        "command writes it again from what is stored"
    )


def _verdict(found: Mapping[str, Any]) -> Verdict:
    """A verdict from a report."""
    values = dict(found)
    for name in ("score", "p_value", "doubt", "alarm"):
        values[name] = float(values[name])  # inf comes as a string
    return Verdict(**values)
