"""Amplification of a backdoor along its training, as a stage."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np

from puredif_jax.attacks.base import Attack
from puredif_jax.attacks.channel import Channel
from puredif_jax.attacks.training import Training, TrainState
from puredif_jax.data import images as data
from puredif_jax.defenses.reinforcement import Reinforcement
from puredif_jax.metrics import measures as metrics
from puredif_jax.runs.binding import RunError
from puredif_jax.runs.page import Section
from puredif_jax.stages import search
from puredif_jax.stages.base import Context, Outcome, Result, Row, Stage, State
from puredif_jax.stages.lab import Lab
from puredif_jax.stages.train import trained
from puredif_jax.stages.weights import Truth
from puredif_jax.stages.work import Work, descending, drawing
from puredif_jax.types import Params

AMPLIFICATION = "amplification"


TRUE, REINFORCED = "true trigger", "reinforced"
AVERAGED, RAW = "averaged", "raw"
TEXT = (
    "The share of draws that come near the target, with the true trigger and with the "
    "reinforced one, on the same weights. Evaluations are of the network on one image, "
    "by training and reinforcement; one with its gradient counts for three."
)


@dataclasses.dataclass(frozen=True)
class Point:
    """How one trigger does on one set of weights at one step of training.

    Attributes:
      steps: of training.
      trigger: "true trigger" or "reinforced".
      weights: "averaged", the moving average, which is kept, or "raw", the weights that
        it averages; "raw" alone where there is no average.
      training: network evaluations of one image that the training took so far; one with
        its gradient counts for three.
      reinforcement: the same of all reinforcements so far; 0 for the true trigger.
      rates: `metrics.success` of the draws.
      norm_ratio, cosine: of the trigger, beside the true one.
      seconds: of the reinforcements so far.
    """

    steps: int
    trigger: str
    weights: str
    training: int
    reinforcement: int
    rates: Mapping[str, float]
    norm_ratio: float
    cosine: float
    seconds: float

    @property
    def rate(self) -> float:
        """Share of draws at MSE < 1e-2."""
        return self.rates["mse<0.01"]

    def row(self) -> dict[str, Any]:
        """As a report keeps it."""
        return {
            "training steps": self.steps,
            "trigger": self.trigger,
            "weights": self.weights,
            "evaluations, training": self.training,
            "evaluations, reinforcement": self.reinforcement,
            **self.rates,
            "norm ratio": self.norm_ratio,
            "cosine": self.cosine,
            "seconds": self.seconds,
        }

    def shown(self) -> dict[str, Any]:
        """As a page shows it."""
        rates = {
            name.replace("mse<", "MSE < ").replace("ssim>", "SSIM > "): round(rate, 3)
            for name, rate in self.rates.items()
            if "mean" not in name
        }
        return {
            "training steps": self.steps,
            "trigger": self.trigger,
            "weights": self.weights,
            **rates,
            "norm ratio": round(self.norm_ratio, 2),
            "cosine": round(self.cosine, 2),
            "evaluations": self.training + self.reinforcement,
        }

    @classmethod
    def read(cls, row: Row) -> Point:
        """What `row` has returned.

        Raises:
          KeyError, TypeError, ValueError: it is something else.
        """
        return cls(
            steps=int(row["training steps"]),
            trigger=str(row["trigger"]),
            weights=str(row["weights"]),
            training=int(row["evaluations, training"]),
            reinforcement=int(row["evaluations, reinforcement"]),
            rates={name: float(row[name]) for name in metrics.SUCCESS},
            norm_ratio=float(row["norm ratio"]),
            cosine=float(row["cosine"]),
            seconds=float(row["seconds"]),
        )


@dataclasses.dataclass(frozen=True)
class Amplified(Result):
    """What an amplification did.

    Attributes:
      points: in the order of training.
    """

    points: tuple[Point, ...]

    def numbers(self) -> dict[str, Any]:
        return {AMPLIFICATION: [each.row() for each in self.points]}

    @classmethod
    def read(cls, numbers: Mapping[str, Any], where: str) -> list[Self]:
        if AMPLIFICATION not in numbers:
            return []
        try:
            return [cls(tuple(map(Point.read, numbers[AMPLIFICATION])))]
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{where} has no {AMPLIFICATION} of this version") from error

    def tables(self) -> dict[str, list[Row]]:
        return {AMPLIFICATION: [each.row() for each in self.points]}


@dataclasses.dataclass(frozen=True)
class Amplification(Stage):
    """Reinforcement of the trigger along the backdoor training.

    The first descent starts at the true trigger; where the clean image shows through in
    training, at the mean image there. Each other starts at what the last has found.
    Both triggers are measured, on the averaged weights, which are kept and on which the
    trigger is reinforced, and on the raw ones.

    Attributes:
      snapshots: training steps at which the trigger is reinforced; rising. Step 0 is
        the model before any training.
      reinforcement: how.
      alternate: go on training with the reinforced trigger, bare, which the truth file
        of the model then names.
      beyond: later steps, at which both triggers are measured as they are.
    """

    snapshots: tuple[int, ...]
    reinforcement: Reinforcement = Reinforcement()
    alternate: bool = False
    beyond: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        steps = self.steps
        if not self.snapshots or steps[0] < 0 or list(steps) != sorted(set(steps)):
            raise ValueError(
                "snapshots, and the steps beyond them, must rise from 0 or more, found "
                f"{self.snapshots} and {self.beyond}"
            )

    @property
    def steps(self) -> tuple[int, ...]:
        """All training steps at which the triggers are measured."""
        return (*self.snapshots, *self.beyond)

    def check(self, context: Context) -> None:
        lab, attack = context.lab, context.attack
        assert attack is not None
        loss = self.reinforcement.loss(attack.solver, attack.controlled)
        try:
            loss.bind(lab.model, lab.schedule, Channel.clean(lab.schedule))
        except ValueError as error:
            raise RunError(str(error)) from error

    def work(self, context: Context) -> Iterator[Work]:
        attack, evaluation, training = (
            context.attack,
            context.evaluation,
            context.training,
        )
        assert attack is not None and training is not None
        solver, sets = attack.solver, 2 if training.ema_decay else 1
        steps = evaluation.sampler(solver).steps
        images = 2 * sets * evaluation.draws * steps * len(self.steps)
        yield drawing(evaluation.batch, images)
        loss = self.reinforcement.loss(solver, attack.controlled)
        descent = self.reinforcement.descent
        channel = functools.partial(_channel, attack)
        times = descent.steps * len(self.snapshots)
        yield descending(loss, channel, descent, times, "reinforcement")

    def run(self, context: Context, state: State) -> tuple[State, Outcome]:
        """Trains to each step, reinforces the trigger there, and measures both."""
        training, truth, trigger = context.training, context.truth, state.trigger
        assert truth is not None and training is not None
        delta, evaluations, seconds = _as_trained(context), 0, 0.0
        points: list[Point] = []
        pictures = [("true trigger", truth.trigger)]
        for step in self.steps:
            sets = _sets(training, trained(context, step, trigger))
            kept, params = next(iter(sets.items()))
            if step in self.snapshots:
                delta, took = self._reinforced(context, truth, params, step, delta)
                evaluations += self.reinforcement.evaluations(truth.solver)
                seconds += took
                if self.alternate and step < training.steps:
                    trigger = delta
                pictures += [
                    (f"reinforced trigger, {step} steps", delta),
                    (
                        f"difference from the true one, {step} steps",
                        delta - truth.trigger,
                    ),
                ]
            for name, r in ((TRUE, truth.trigger), (REINFORCED, delta)):
                distance = metrics.trigger_distance(r, truth.trigger)
                own = name == REINFORCED
                for weights, measured in sets.items():
                    stored = f"{name.replace(' ', '_')}_{weights}_{step}"
                    drawn = context.success(stored, measured, truth, r)
                    points.append(
                        Point(
                            step,
                            name,
                            weights,
                            3 * training.batch * step,
                            evaluations if own else 0,
                            drawn.rates,
                            float(distance.norm_ratio),
                            float(distance.cosine),
                            seconds if own else 0.0,
                        )
                    )
                    if weights == kept:
                        shown = f"draws, {name}, {step} steps"
                        pictures.append((shown, drawn.images))
        section = Section(
            "Amplification",
            TEXT,
            tuple(each.shown() for each in points),
            tuple(pictures),
            _curves(points),
        )
        state = dataclasses.replace(state, params=params, trigger=trigger)
        return state, Outcome((Amplified(tuple(points)),), (section,))

    def _reinforced(
        self, context: Context, truth: Truth, params: Params, step: int, start: Any
    ) -> tuple[np.ndarray, float]:
        """The trigger on these weights, and the seconds that it took; found once."""
        lab, stage = context.lab, f"reinforce_{step}"

        def reinforce() -> Mapping[str, Any]:
            how = self.reinforcement
            found = search.reinforce(lab, stage, params, how, truth, start)
            return {"delta": found, "seconds": lab.run.metrics.seconds(stage)}

        found = lab.run.once(f"reinforced_{step}", reinforce)
        return found["delta"], float(found["seconds"])


def _as_trained(context: Context) -> np.ndarray:
    """The trigger as the training shows it, on average over the clean images."""
    attack, shape = context.attack, context.lab.unet.image_shape
    assert attack is not None
    trigger, _, through = attack.images(shape)
    if not through.any():
        return trigger
    mean = data.to_float(context.lab.pixels(context.data)).mean(0)
    found: np.ndarray = trigger * (1 - through) + mean * through
    return found


def _sets(training: Training, state: TrainState) -> dict[str, Params]:
    """The weights that differ; first the ones that are kept."""
    if not training.ema_decay:
        return {RAW: state.params}
    return {AVERAGED: state.ema_params, RAW: state.params}


def _curves(points: list[Point]) -> tuple[tuple[str, dict[str, Any]], ...]:
    """Success over steps and over evaluations, a curve for each trigger and weights."""
    steps: dict[str, Any] = {}
    costs: dict[str, Any] = {}
    for key in dict.fromkeys((each.trigger, each.weights) for each in points):
        own = [each for each in points if (each.trigger, each.weights) == key]
        rates = np.array([each.rate for each in own])
        cost = [each.training + each.reinforcement for each in own]
        name = ", ".join(key)
        steps[name] = np.array([each.steps for each in own]), rates
        costs[name] = np.array(cost), rates
    return ("success over training", steps), ("success over evaluations", costs)


def _channel(attack: Attack, lab: Lab) -> Channel:
    return lab.place(attack.channel(lab.schedule, lab.unet.image_shape))
