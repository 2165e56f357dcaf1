"""Success of the attack and quality of a model, with base rates, as a stage."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np

from puredif_jax.data import images as data
from puredif_jax.metrics import measures as metrics
from puredif_jax.runs import parallel
from puredif_jax.runs.binding import RunError
from puredif_jax.runs.page import Section
from puredif_jax.stages.base import Context, Outcome, Result, Row, Stage, State
from puredif_jax.stages.lab import PLAIN
from puredif_jax.stages.pictures import as_images
from puredif_jax.stages.quality import check_quality, quality
from puredif_jax.stages.work import Work, drawing

SUCCESS, FRECHET = "success", "frechet over "


@dataclasses.dataclass(frozen=True)
class Rate:
    """How often images of one kind meet the target.

    Attributes:
      images: which they are.
      rates: `metrics.success` of them.
    """

    images: str
    rates: Mapping[str, float]

    def row(self) -> dict[str, Any]:
        """As a report keeps it."""
        return {"images": self.images, **self.rates}


@dataclasses.dataclass(frozen=True)
class Measured(Result):
    """What was measured of a model.

    Attributes:
      success: of its draws and of other images, where a target is known.
      frechet: the Frechet distance to the training images, by model.
      over: name of the features that it is taken over.
      place: how many measurements of the run came before.
    """

    success: tuple[Rate, ...] = ()
    frechet: Mapping[str, float] = dataclasses.field(default_factory=dict)
    over: str = ""
    place: int = 0

    def numbers(self) -> dict[str, Any]:
        end = _end(self.place)
        found: dict[str, Any] = {SUCCESS + end: [rate.row() for rate in self.success]}
        if self.frechet:
            found[FRECHET + self.over + end] = dict(self.frechet)
        return found

    @classmethod
    def read(cls, numbers: Mapping[str, Any], where: str) -> list[Self]:
        found: list[Self] = []
        while SUCCESS + _end(len(found)) in numbers:
            found.append(cls._read(numbers, len(found), where))
        return found

    @classmethod
    def _read(cls, numbers: Mapping[str, Any], place: int, where: str) -> Self:
        end = _end(place)
        try:
            rates = [dict(row) for row in numbers[SUCCESS + end]]
            success = tuple(
                Rate(str(row.pop("images")), {k: float(v) for k, v in row.items()})
                for row in rates
            )
            over = _over(numbers, place)
            distances = numbers[FRECHET + over + end] if over else {}
            frechet = {k: float(v) for k, v in distances.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RunError(f"{where} has no {SUCCESS} of this version") from error
        return cls(success, frechet, over, place)

    def tables(self) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        if self.success:
            found[SUCCESS] = [rate.row() for rate in self.success]
        if self.frechet:
            found[FRECHET + self.over] = [self.frechet]
        return found


@dataclasses.dataclass(frozen=True)
class Measure(Stage):
    """Measures the model at hand, or the weights that the run names."""

    def reads(self, weights: str | None) -> tuple[str, ...]:
        return () if weights is None else (weights,)

    def inputs(self, context: Context) -> dict[str, str]:
        compared = context.attack or context.evaluation.frechet_draws
        return context.images_read() if compared else {}

    def check(self, context: Context) -> None:
        evaluation = context.evaluation
        if evaluation.frechet_draws:
            check_quality(context.lab, evaluation, context.data)

    def work(self, context: Context) -> Iterator[Work]:
        evaluation, attack = context.evaluation, context.attack
        steps = evaluation.deterministic.steps
        if attack is not None:
            drawn = 2 * evaluation.draws * evaluation.sampler(attack.solver).steps
        else:
            drawn = PLAIN * steps
        yield drawing(evaluation.batch, drawn)
        models = 2 if context.training and context.weights is not None else 1
        frechet = models * evaluation.frechet_draws * steps
        yield drawing(evaluation.batch, frechet)

    def run(self, context: Context, state: State) -> tuple[State, Outcome]:
        lab, evaluation = context.lab, context.evaluation
        truth = context.trained_in(state)
        end = _end(context.place).replace(" ", "-")
        params = state.params
        if params is None:
            assert context.weights is not None
            params = lab.load(context.weights)
        rates: list[Rate] = []
        pictures: list[tuple[str, np.ndarray]] = []
        if truth is not None:
            real = data.to_float(lab.pixels(context.data)[:2048])
            pictures += [("true trigger", truth.trigger), ("target", truth.target)]
            for label, name, r in (
                ("true trigger", "true_trained", truth.trigger),
                ("plain noise", "plain_trained", lab.zero),
            ):
                success = context.success(name + end, params, truth, r)
                rates.append(Rate(f"draws, {label}", success.rates))
                pictures.append((f"draws, {label}", success.images))
            found = metrics.success(real, truth.target)
            rates.append(Rate("training images", found))
        else:
            drawn = lab.draw(params, evaluation.deterministic, lab.zero, PLAIN)
            pictures.append(("draws from plain noise", drawn))
        text, over, distance = "", "", {}
        if evaluation.frechet_draws:
            models = {"measured": params}
            if context.training and context.weights is not None:
                models["start"] = lab.load(context.weights, start=True)
            for name, weights in models.items():
                distance[name], found = quality(
                    lab,
                    evaluation,
                    name + end,
                    weights,
                    context.data,
                    truth and truth.target,
                )
                if found:
                    rates.append(Rate(f"the Frechet draws, {name}", found))
            shown = ", ".join(
                f"{value:.3g} ({name})" for name, value in distance.items()
            )
            over = evaluation.features(lab.unet.image_shape).name
            text = f"Frechet distance over {over} to the training images: {shown}."
        curves: tuple[Any, ...] = ()
        if context.training and parallel.is_host_zero():
            curve = lab.run.metrics.read("train")
            curves = (("training loss", {"loss": (curve["step"], curve["loss"])}),)
        measured = Measured(tuple(rates), distance, over, context.place)
        rows = tuple(rate.row() for rate in rates)
        section = Section("Model", text, rows, tuple(pictures), curves)
        if state.params is None and context.weights is not None:
            decode = lab.models[context.weights].shown
            section = as_images(section, decode)
        state = dataclasses.replace(state, params=params)
        return state, Outcome((measured,), (section,))


def _over(numbers: Mapping[str, Any], place: int) -> str:
    """The features that a measurement has a Frechet distance over; "" without one."""
    for name in numbers:
        found = re.fullmatch(rf"{FRECHET}(.*?)( \d+)?", name)
        if found and (found[2] or "") == _end(place):
            return found[1]
    return ""


def _end(place: int) -> str:
    """The end of a name by which the results of a later measurement differ."""
    return f" {place + 1}" if place else ""
