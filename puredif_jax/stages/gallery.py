"""The triggers of many runs, side by side."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from puredif_jax.attacks.base import Attack
from puredif_jax.defenses.base import Inverted
from puredif_jax.files.sealed import DamagedError, read_arrays
from puredif_jax.runs.page import Section
from puredif_jax.stages.finding import Finding
from puredif_jax.stages.inspector import kept

_TEXT = (
    "One picture of each run, whose caption names its parts from left to right. The "
    "trigger of the run's own attack comes first. Of each method it shows the "
    "inversion nearest to the true trigger, or else the one its verdict rests on."
)


class Shown(NamedTuple):
    """A run that has audited models.

    name: of the run.  folder: of it.  attack: the backdoor in it, if there is one.
    findings: of its audits.
    """

    name: str
    folder: pathlib.Path
    attack: Attack | None
    findings: Sequence[Finding]


def gallery(runs: Iterable[Shown]) -> Section | None:
    """The true trigger and all that each method found, of runs that have inverted."""
    sections = [section for section in map(_triggers, runs) if section is not None]
    if not sections:
        return None
    return Section("triggers", _TEXT, sections=tuple(sections))


def _triggers(run: Shown) -> Section | None:
    images, captions = [], []
    for finding in run.findings:
        for best in _best(finding):
            place = kept(best.method, finding.label, best.hypothesis)
            try:
                arrays = read_arrays(run.folder / "results" / f"{place}.npz")
            except (DamagedError, OSError) as error:
                logging.warning("%s: left out of the pictures", error)
                continue
            known = best.relative_l2
            near = "" if known is None else f", relative L2 {known:.2g}"
            images.append(arrays["delta"])
            captions.append(f"{best.method} ({best.hypothesis}{near})")
    if not images:
        return None
    if run.attack is not None:
        images.insert(0, run.attack.images(images[0].shape)[0])
        captions.insert(0, "true trigger")
    grid = np.clip(np.stack(images), -1, 1)
    return Section(run.name, pictures=((", ".join(captions), grid),))


def _best(finding: Finding) -> list[Inverted]:
    """Of each method the inversion to show, in their order."""
    methods = dict.fromkeys(each.method for each in finding.inversions)
    return [_nearest(finding, method) for method in methods]


def _nearest(finding: Finding, method: str) -> Inverted:
    own = [each for each in finding.inversions if each.method == method]
    known = [each for each in own if each.relative_l2 is not None]
    if known:
        return min(known, key=lambda each: each.relative_l2 or 0.0)
    judged = [each for each in own if each.hypothesis == finding.verdict.hypothesis]
    return (judged or own)[0]
