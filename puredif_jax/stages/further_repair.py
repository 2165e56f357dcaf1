"""A further repair, where an earlier one has left something."""

from __future__ import annotations

import dataclasses

from puredif_jax.stages.audit import Audit
from puredif_jax.stages.base import Context, Outcome, Stage, State
from puredif_jax.stages.repair import Repair


@dataclasses.dataclass(frozen=True)
class FurtherRepair(Stage):
    """Repairs the result of a repair that its audit does not call clean.

    What is left of a backdoor may react to another trigger than the one that was
    trained out. The audit of the result has found that trigger.

    Attributes:
      repair: how.
      audit: of the new result.
    """

    repair: Repair
    audit: Audit

    def run(self, context: Context, state: State) -> tuple[State, Outcome]:
        """Does nothing where there is no result, or where it is clean."""
        accused = state.accused
        if state.repaired is None or accused is None:
            return state, Outcome()
        if accused.verdict.outcome == "clean" or accused.candidate is None:
            return state, Outcome()
        here = dataclasses.replace(context, place=context.place + 1)
        state, repaired = self.repair.of(here, state, accused)
        state, audited = self.audit.run(here, state)
        results = (*repaired.results, *audited.results)
        return state, Outcome(results, (*repaired.sections, *audited.sections))
