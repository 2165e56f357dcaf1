"""Amplification of a backdoor along its training, as a stage."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np

from puredif_jax.attacks.base import Attack
from puredif_jax.attacks.channel import Channel
from puredif_jax.defenses.reinforcement import Reinforcement
from puredif_jax.metrics import measures as metrics
from puredif_jax.runs.binding import RunError
from puredif_jax.runs.page import Section
from puredif_jax.stages import search
from puredif_jax.stages.base import Context, Outcome, Result, Row, Stage, State
from puredif_jax.stages.lab import Lab
from puredif_jax.stages.train import trained
from puredif_jax.stages.work import Work, descending, drawing
from puredif_jax.types import Params

AMPLIFICATION = "amplification"


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What reinforcement did at one step of training.

    Attributes:
      steps: of training.
      true, reinforced: success at MSE < 1e-2 with the true trigger and the reinforced.
      norm_ratio, cosine: of the reinforced trigger, beside the true one.
      seconds: of the reinforcement.
    """

    steps: int
    true: float
    reinforced: float
    norm_ratio: float
    cosine: float
    seconds: float

    def row(self) -> dict[str, Any]:
        """As a report keeps it."""
        return {
            "training steps": self.steps,
            "success, true trigger": self.true,
            "success, reinforced": self.reinforced,
            "norm ratio": self.norm_ratio,
            "cosine": self.cosine,
            "seconds": self.seconds,
        }

    @classmethod
    def read(cls, row: Row) -> Snapshot:
        """What `row` has returned.

        Raises:
          KeyError, TypeError, ValueError: it is something else.
        """
        names = ("success, true trigger", "success, reinforced", "norm ratio")
        values = (float(row[name]) for name in (*names, "cosine", "seconds"))
        return cls(int(row["training steps"]), *values)


@dataclasses.dataclass(frozen=True)
class Amplified(Result):
    """What an amplification did.

    Attributes:
      snapshots: in the order of training.
    """

    snapshots: tuple[Snapshot, ...]

    def numbers(self) -> dict[str, Any]:
        return {AMPLIFICATION: [each.row() for each in self.snapshots]}

    @classmethod
    def read(cls, numbers: Mapping[str, Any], where: str) -> list[Self]:
        if AMPLIFICATION not in numbers:
            return []
        try:
            return [cls(tuple(map(Snapshot.read, numbers[AMPLIFICATION])))]
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{where} has no {AMPLIFICATION} of this version") from error

    def tables(self) -> dict[str, list[Row]]:
        return {AMPLIFICATION: [each.row() for each in self.snapshots]}


@dataclasses.dataclass(frozen=True)
class Amplification(Stage):
    """Reinforcement of the trigger at snapshots of the backdoor training.

    The first descent starts at the true trigger, each other at what the last has found.

    Attributes:
      snapshots: training steps at which the trigger is reinforced; rising.
      reinforcement: how.
      alternate: go on training with the reinforced trigger, which the truth file of the
        model then names.
    """

    snapshots: tuple[int, ...]
    reinforcement: Reinforcement = Reinforcement()
    alternate: bool = False

    def __post_init__(self) -> None:
        if not self.snapshots or list(self.snapshots) != sorted(set(self.snapshots)):
            raise ValueError(f"snapshots must rise, found {self.snapshots}")

    def check(self, context: Context) -> None:
        lab, attack = context.lab, context.attack
        assert attack is not None
        loss = self.reinforcement.loss(attack.solver, attack.controlled)
        try:
            loss.bind(lab.model, lab.schedule, Channel.clean(lab.schedule))
        except ValueError as error:
            raise RunError(str(error)) from error

    def work(self, context: Context) -> Iterator[Work]:
        attack, evaluation = context.attack, context.evaluation
        assert attack is not None
        count, solver = len(self.snapshots), attack.solver
        steps = evaluation.sampler(solver).steps
        yield drawing(evaluation.batch, 2 * evaluation.draws * steps * count)
        loss = self.reinforcement.loss(solver, attack.controlled)
        descent = self.reinforcement.descending(solver)
        channel = functools.partial(_channel, attack)
        yield descending(loss, channel, descent, descent.steps * count, "reinforcement")

    def run(self, context: Context, state: State) -> tuple[State, Outcome]:
        """Trains to each snapshot, reinforces the trigger there, and measures both."""
        lab, training, truth = context.lab, context.training, context.truth
        assert truth is not None and training is not None
        last, trigger = training.steps, state.trigger
        delta = truth.trigger if trigger is None else trigger
        found_at: list[Snapshot] = []
        pictures = [("true trigger", truth.trigger)]
        for snapshot in self.snapshots:
            params = trained(context, snapshot, trigger)

            def reinforce(
                params: Params = params, at: int = snapshot, start: Any = delta
            ) -> Any:
                stage, how = f"reinforce_{at}", self.reinforcement
                found = search.reinforce(lab, stage, params, how, truth, start)
                return {"delta": found, "seconds": lab.run.metrics.seconds(stage)}

            found = lab.run.once(f"reinforced_{snapshot}", reinforce)
            delta = found["delta"]
            at = "trained" if snapshot == last else str(snapshot)
            success = {
                name: context.success(f"{name}_{at}", params, truth, r)
                for name, r in (("true", truth.trigger), ("reinforced", delta))
            }
            distance = metrics.trigger_distance(delta, truth.trigger)
            found_at.append(
                Snapshot(
                    snapshot,
                    success["true"].rate,
                    success["reinforced"].rate,
                    float(distance.norm_ratio),
                    float(distance.cosine),
                    float(found["seconds"]),
                )
            )
            pictures += [
                (f"reinforced trigger, {snapshot} steps", delta),
                (
                    f"difference from the true one, {snapshot} steps",
                    delta - truth.trigger,
                ),
            ]
            pictures += [
                (f"draws, {name} trigger, {snapshot} steps", drawn.images)
                for name, drawn in success.items()
            ]
            if self.alternate and snapshot < last:
                trigger = delta
        steps = np.array([each.steps for each in found_at])
        curve = {
            "true trigger": (steps, np.array([each.true for each in found_at])),
            "reinforced": (steps, np.array([each.reinforced for each in found_at])),
        }
        text = (
            "Share of draws at MSE < 1e-2 of the target, with the true trigger and "
            "with the one reinforced on the same weights."
        )
        section = Section(
            "Amplification",
            text,
            tuple(each.row() for each in found_at),
            tuple(pictures),
            (("success over training", curve),),
        )
        state = dataclasses.replace(state, params=params, trigger=trigger)
        return state, Outcome((Amplified(tuple(found_at)),), (section,))


def _channel(attack: Attack, lab: Lab) -> Channel:
    return lab.place(attack.channel(lab.schedule, lab.unet.image_shape))
