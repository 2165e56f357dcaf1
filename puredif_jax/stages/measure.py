"""Success of the attack and quality of a model, with base rates, as a stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np

from puredif_jax.data import images as data
from puredif_jax.metrics import measures as metrics
from puredif_jax.networks.unet import SHIPPED
from puredif_jax.runs import parallel
from puredif_jax.runs.binding import RunError
from puredif_jax.runs.page import Section
from puredif_jax.stages.base import Context, Outcome, Result, Row, Stage, State
from puredif_jax.stages.lab import PLAIN
from puredif_jax.stages.pictures import as_images
from puredif_jax.stages.work import Work, drawing

_SUCCESS, _FRECHET = "success", "frechet over garment-net"


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
      frechet: the Frechet distance over garment-net to the training images, by model.
    """

    success: tuple[Rate, ...] = ()
    frechet: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def numbers(self) -> dict[str, Any]:
        found: dict[str, Any] = {_SUCCESS: [rate.row() for rate in self.success]}
        return found | ({_FRECHET: dict(self.frechet)} if self.frechet else {})

    @classmethod
    def read(cls, numbers: Mapping[str, Any], where: str) -> list[Self]:
        if _SUCCESS not in numbers:
            return []
        try:
            rates = [{k: v for k, v in row.items()} for row in numbers[_SUCCESS]]
            success = tuple(
                Rate(str(row.pop("images")), {k: float(v) for k, v in row.items()})
                for row in rates
            )
            frechet = {k: float(v) for k, v in numbers.get(_FRECHET, {}).items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RunError(f"{where} has no {_SUCCESS} of this version") from error
        return [cls(success, frechet)]

    def tables(self) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        if self.success:
            found[_SUCCESS] = [rate.row() for rate in self.success]
        if self.frechet:
            found[_FRECHET] = [self.frechet]
        return found


@dataclasses.dataclass(frozen=True)
class Measure(Stage):
    """Measures the model at hand, or the weights that the run names."""

    def reads(self, weights: str | None) -> tuple[str, ...]:
        return () if weights is None else (weights,)

    def check(self, context: Context) -> None:
        evaluation, shape = context.evaluation, context.lab.unet.image_shape
        if context.attack or evaluation.frechet_draws:
            context.data.load(shape)
        if evaluation.frechet_draws and shape != SHIPPED.image_shape:
            raise RunError(
                f"the Frechet distance is over a network for images of "
                f"{SHIPPED.image_shape}, found {shape}: set "
                "--config.evaluation.frechet_draws=0"
            )

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
        lab, evaluation, truth = context.lab, context.evaluation, context.truth
        params = state.params
        if params is None:
            assert context.weights is not None
            params = lab.load(context.weights)
        rates: list[Rate] = []
        pictures: list[tuple[str, np.ndarray]] = []
        if truth is not None:
            real = data.to_float(context.data.load(lab.unet.image_shape)[:2048])
            pictures += [("true trigger", truth.trigger), ("target", truth.target)]
            for label, name, r in (
                ("true trigger", "true_trained", truth.trigger),
                ("plain noise", "plain_trained", lab.zero),
            ):
                success = context.success(name, params, truth, r)
                rates.append(Rate(f"draws, {label}", success.rates))
                pictures.append((f"draws, {label}", success.images))
            found = metrics.success(real, truth.target)
            rates.append(Rate("training images", found))
        else:
            drawn = lab.draw(params, evaluation.deterministic, lab.zero, PLAIN)
            pictures.append(("draws from plain noise", drawn))
        text, distance = "", {}
        if evaluation.frechet_draws:
            models = {"measured": params}
            if context.training and context.weights is not None:
                models["start"] = lab.load(context.weights, start=True)
            for name, weights in models.items():
                distance[name], found = lab.frechet(
                    name,
                    weights,
                    evaluation.deterministic,
                    context.data,
                    evaluation.frechet_draws,
                    truth and truth.target,
                )
                if found:
                    rates.append(Rate(f"the Frechet draws, {name}", found))
            shown = ", ".join(
                f"{value:.3g} ({name})" for name, value in distance.items()
            )
            text = f"Frechet distance over garment-net to the training images: {shown}."
        curves: tuple[Any, ...] = ()
        if context.training and parallel.is_host_zero():
            curve = lab.run.metrics.read("train")
            curves = (("training loss", {"loss": (curve["step"], curve["loss"])}),)
        measured = Measured(tuple(rates), distance)
        rows = tuple(rate.row() for rate in rates)
        section = Section("Model", text, rows, tuple(pictures), curves)
        if state.params is None and context.weights is not None:
            decode = lab.models[context.weights].shown
            section = as_images(section, decode)
        state = dataclasses.replace(state, params=params)
        return state, Outcome((measured,), (section,))
