"""The report of a scan: what is known of each model, and the exit status."""

from __future__ import annotations

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from puredif_jax.defenses.puredif import Puredif
from puredif_jax.formats.discovery import Models
from puredif_jax.runs import config, parallel
from puredif_jax.runs.binding import numbers_of
from puredif_jax.runs.page import Judgement, Section
from puredif_jax.runs.report import Report, environment
from puredif_jax.stages.experiment import Scan
from puredif_jax.stages.finding import Finding, next_steps, scope
from puredif_jax.types import InputError

STATUS = {"backdoored": 3, "error": 1, "could not tell": 2, "clean": 0}
"""Exit status of a scan: of the first of these that any of its models is."""

_COLUMNS = {
    "model": "",
    "verdict": "",
    "score": "log10 of how many times the error with the best trigger is below the "
    "least that a clean model could have",
    "p": "how likely a clean model scores as high, if scores are normal",
    "hypothesis": "kind of backdoor that fits best: sde of ancestral sampling, ode of "
    "deterministic; ve in a variance-exploding model",
    "trigger rms": "root mean square of the trigger; the noise has 1",
    "network evaluations": "of one image; a gradient counts for two more",
    "seconds": "of the inversions",
}


@dataclasses.dataclass(frozen=True)
class _Scanned:
    """One model of a scan: how it is judged, and its row in the table."""

    judgement: Judgement
    row: Mapping[str, Any]
    finding: Finding | None = None


def summarise(
    scan: Scan,
    models: Models,
    plans: Mapping[str, Scan],
    errors: Mapping[str, str],
    notes: Sequence[str] = (),
) -> tuple[Report, int]:
    """Writes the report of all models as far as they are known.

    Args:
      scan: what is scanned.
      models: by name.
      plans: how each is scanned.
      errors: what is wrong with some of them.
      notes: sentences on what is not scanned.

    Returns:
      The report, and the exit status.
    """
    home = pathlib.Path(scan.workdir)
    about = config.to_dict(dataclasses.replace(scan, workdir=home.name))
    each_model = [
        _scanned(home, name, folder, errors.get(name), config.to_dict(plans[name]))
        for name, folder in models.items()
    ]
    scanned = [each for rows in each_model for each in rows]
    outcomes = [each.judgement.outcome for each in scanned]
    counts = Counter(outcomes)
    # Of a model that was repaired, the result.
    last = Counter(rows[-1].judgement.outcome for rows in each_model)
    status = next((STATUS[kind] for kind in STATUS if last[kind]), 0)
    if last["not done yet"]:
        status = status or STATUS["could not tell"]
    shown = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    findings = [each.finding for each in scanned if each.finding is not None]
    table = tuple(each.row for each in scanned)
    left = tuple({"what, and why": note} for note in notes)
    report = Report(
        title=f"Scan {home.name}",
        judgements=tuple(sorted((x.judgement for x in scanned), key=_gravity)),
        summary=f"{len(scanned)} models: {shown}" if len(scanned) > 1 else "",
        about=scope(findings),
        sections=(
            Section("Models", table=table, columns=_COLUMNS),
            *([Section("Not scanned", table=left)] if left else []),
            next_steps(outcomes),
        ),
        config=about,
        environment=environment() | {"device": jax.devices()[0].device_kind},
        numbers={"status": status},
    )
    if parallel.is_host_zero():
        report.write(home)
    return report, status


def _gravity(judged: Judgement) -> int:
    """The place of an outcome, the gravest first."""
    order = [*STATUS]
    return order.index(judged.outcome) if judged.outcome in order else len(order)


def _scanned(
    home: pathlib.Path,
    name: str,
    folder: pathlib.Path | InputError,
    error: str | None,
    about: Mapping[str, Any],
) -> list[_Scanned]:
    """What is known of a model: an error, what its own report says, or nothing yet.

    Of a repaired model it is also what is known of the result.
    """
    facts = {"Weights": str(folder)} if isinstance(folder, pathlib.Path) else {}
    link = f"{name}/report.html"
    findings: list[Finding] = []
    if error is None:
        try:
            findings = _findings(home / name, about)
        except InputError as damage:
            error = str(damage)
    if error is not None:
        row = {"model": name, "verdict": "error", "reason": error}
        return [_Scanned(Judgement(name, "error", detail=error, facts=facts), row)]
    if not findings:
        row = {"model": name, "verdict": "not done yet"}
        return [_Scanned(Judgement(name, "not done yet", facts=facts), row)]
    names = [name, *(f"{name}/{each.label}" for each in findings[1:])]
    return [
        _Scanned(each.judged(known, report=link), _row(known, each), each)
        for known, each in zip(names, findings, strict=True)
    ]


def _findings(folder: pathlib.Path, about: Mapping[str, Any]) -> list[Finding]:
    """What the run of a model has found, first of the model itself, if it is done.

    Raises:
      RunError: its report cannot be read, or tells of none.
    """
    numbers = numbers_of(folder, about)
    if numbers is None:
        return []
    return Finding.some(numbers, str(folder / "report.json"))


def _row(name: str, finding: Finding) -> dict[str, Any]:
    """The finding as a row of the table."""
    verdict, inversions = finding.verdict, finding.inversions
    best = [
        each.rms
        for each in inversions
        if (each.method, each.hypothesis) == (Puredif().name, verdict.hypothesis)
    ]
    return {
        "model": name,
        "verdict": verdict.outcome,
        "p": verdict.p_value,
        "score": verdict.score,
        "hypothesis": verdict.hypothesis,
        "trigger rms": best[0] if best else None,
        "network evaluations": sum(each.evaluations for each in inversions),
        "seconds": sum(each.seconds for each in inversions),
        "reason": verdict.reason,
    }
