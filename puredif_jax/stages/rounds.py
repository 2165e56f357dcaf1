"""Repair and audit by turns, as long as the audit calls the result backdoored."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from puredif_jax.stages.audit import Audit
from puredif_jax.stages.base import Context, Outcome, Stage, State
from puredif_jax.stages.repair import Repair
from puredif_jax.stages.work import Work


@dataclasses.dataclass(frozen=True)
class Rounds(Stage):
    """Repairs the model that was audited, and audits the result.

    A result that is called backdoored is repaired again, by the trigger that its audit
    has found: a model may have a second backdoor. A result with the verdict "could not
    tell" is left as it is, since a further repair did not help there
    (docs/notebook/2026-11-30-rounds.md).

    Attributes:
      repair: how, and at most how often.
      audit: of each result.
    """

    repair: Repair
    audit: Audit

    def inputs(self, context: Context) -> dict[str, str]:
        return self.repair.inputs(context)

    def check(self, context: Context) -> None:
        self.repair.check(context)
        self.audit.check(context)

    def work(self, context: Context) -> Iterator[Work]:
        """Of the first round."""
        yield from self.repair.work(context)
        yield from self.audit.work(context)

    def run(self, context: Context, state: State) -> tuple[State, Outcome]:
        state, whole = self.repair.run(context, state)
        for number in range(self.repair.rounds):
            if number:
                accused = state.accused
                if accused is None or accused.candidate is None:
                    break
                if accused.verdict.outcome != "backdoored":
                    break
                here = dataclasses.replace(context, place=number)
                state, outcome = self.repair.of(here, state, accused)
                whole = whole.and_then(outcome)
            if state.repaired is None:
                break
            state, outcome = self.audit.run(context, state)
            whole = whole.and_then(outcome)
        return state, whole
