"""What every stage of a run is: a value that works on a model and tells what it found.

A run is a tuple of stages (`Experiment.stages`). Each gets the context of the run and
the state that the stages before it have left, and hands a state on.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Self

import numpy as np

from puredif_jax.attacks.base import Attack
from puredif_jax.attacks.training import Training
from puredif_jax.data.images import ImageSet, fingerprint
from puredif_jax.defenses.base import Verdict
from puredif_jax.defenses.hypothesis import Hypothesis
from puredif_jax.runs.binding import RunError
from puredif_jax.runs.page import Judgement, Section
from puredif_jax.stages.evaluation import Evaluation
from puredif_jax.stages.lab import Lab, Success
from puredif_jax.stages.weights import Truth
from puredif_jax.stages.work import Work
from puredif_jax.types import Candidate, Params

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Context:
    """What the stages of a run share.

    Attributes:
      lab: the model and its devices, in the run folder.
      evaluation: how models are measured.
      data: images to train on and to compare with.
      weights: where training starts, or what is measured; None for fresh ones.
      training: of the model; None for none.
      attack: the backdoor put in, or the one that success is measured for.
      audited: the models of the audit, as it names them.
      place: how many stages of the same kind come before the one that runs; what it
        keeps in the run folder must be named by that.
    """

    lab: Lab
    evaluation: Evaluation
    data: ImageSet
    weights: str | None = None
    training: Training | None = None
    attack: Attack | None = None
    audited: tuple[str, ...] = ()
    place: int = 0

    @property
    def truth(self) -> Truth | None:
        """The backdoor that the attack makes, if there is one.

        Raises:
          RunError: the attack is not defined for the model.
        """
        if self.attack is None:
            return None
        try:
            return Truth.of(self.attack, self.lab.schedule, self.lab.unet.image_shape)
        except ValueError as error:
            raise RunError(str(error)) from error

    def trained_in(self, state: State) -> Truth | None:
        """The backdoor that the training has put in, by the trigger that came last.

        Raises:
          RunError: as `truth`.
        """
        truth = self.truth
        if truth is None or state.trigger is None:
            return truth
        return truth._replace(trigger=state.trigger)

    def images_read(self) -> dict[str, str]:
        """The fingerprint of the training images, as in `Stage.inputs`."""
        pixels = self.lab.pixels(self.data)
        return {"the training images": fingerprint(pixels)}

    def success(
        self, name: str, params: Params, truth: Truth, trigger: np.ndarray
    ) -> Success:
        """How draws with a trigger meet the true target, by the backdoor's sampler."""
        return self.lab.success(
            name,
            params,
            self.evaluation.sampler(truth.solver, truth.psi(self.lab.schedule)),
            trigger,
            truth.target,
            self.evaluation.draws,
            truth.inside,
        )


class Accused(NamedTuple):
    """A model that was audited, and the trigger that fits it best.

    label: of the model, as in `Finding`.
    verdict: the judgement.
    truth: the backdoor that it is known to have, only to compare with.
    hypothesis, candidate: the best trigger with its image, as numpy; None where weights
      that denoise nothing were not inverted.
    params: the weights.
    """

    label: str
    verdict: Verdict
    truth: Truth | None
    hypothesis: Hypothesis | None
    candidate: Candidate | None
    params: Params


@dataclasses.dataclass(frozen=True)
class State:
    """What a stage leaves to the next.

    Attributes:
      params: weights of the model at hand; None before there are any.
      repaired: the model that was repaired: its folder within the run's, and its
        weights.
      trigger: the last one that was trained with, if that is not the attack's own.
      accused: the model that was audited last.
    """

    params: Params | None = None
    trigger: np.ndarray | None = None
    repaired: tuple[str, Params] | None = None
    accused: Accused | None = None


class Result(abc.ABC):
    """What a stage has found, as data: for report.json, and for tables of many runs."""

    @abc.abstractmethod
    def numbers(self) -> dict[str, Any]:
        """What it adds to the `numbers` of a report."""

    @classmethod
    @abc.abstractmethod
    def read(cls, numbers: Mapping[str, Any], where: str) -> list[Self]:
        """All that are in the `numbers` of a report named `where`.

        Raises:
          RunError: one is damaged, or was written by another version of the package.
        """

    @abc.abstractmethod
    def tables(self) -> dict[str, list[Row]]:
        """Its rows in the tables of many runs, by the name of the table."""

    def judgement(self) -> Judgement | None:
        """For the first screen of a page, where it judges a model."""
        return None


def results(numbers: Mapping[str, Any], where: str) -> list[Result]:
    """All results in the `numbers` of a report, of every kind that is known.

    If a kind was defined again, the last one counts.

    Raises:
      RunError: one cannot be read.
    """
    kinds = list(Result.__subclasses__())
    known: dict[tuple[str, str], type[Result]] = {}
    for kind in kinds:  # it grows by those below
        kinds += kind.__subclasses__()
        if "read" in vars(kind):  # otherwise its parent has read them
            known[kind.__module__, kind.__qualname__] = kind
    return [found for kind in known.values() for found in kind.read(numbers, where)]


class Outcome(NamedTuple):
    """What a stage gives: results, and the parts of the page on them."""

    results: tuple[Result, ...] = ()
    sections: tuple[Section, ...] = ()

    def and_then(self, other: Outcome) -> Outcome:
        """Of this and of what comes after it."""
        return Outcome(self.results + other.results, self.sections + other.sections)


@dataclasses.dataclass(frozen=True)
class Stage(abc.ABC):
    """A part of a run."""

    def reads(self, weights: str | None) -> tuple[str, ...]:
        """Names or paths of weights that it reads; `weights` are the run's own."""
        return ()

    def inputs(self, context: Context) -> dict[str, str]:
        """Fingerprints of what else it reads, by what that is called in a message."""
        return {}

    def check(self, context: Context) -> None:
        """Refuses what is wrong, before any long work.

        Raises:
          InputError: one sentence that names it.
        """
        return None

    def work(self, context: Context) -> Iterator[Work]:
        """The steps that it will take, for `--cost`."""
        return iter(())

    @abc.abstractmethod
    def run(self, context: Context, state: State) -> tuple[State, Outcome]:
        """Does it, resuming what the run folder already holds."""
