"""The forward process, and what a network predicts of a noisy image.

Sources: DDPM (Ho et al. 2020, arXiv 2006.11239), v prediction (Salimans and Ho 2022,
2202.00512), scores (Song et al. 2021, 2011.13456).
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Literal, NamedTuple

import chex
import jax.numpy as jnp
import numpy as np

from puredif_jax.diffusion.schedules import NoiseSchedule
from puredif_jax.types import Array, NoiseModel, Params


def lookup(table: np.ndarray | Array, t: Array) -> Array:
    """table[t] in float32, shaped `[B, 1, 1, 1]` for t `[B]` and `[]` for a scalar."""
    values = jnp.asarray(table, jnp.float32)[t]
    return values.reshape(t.shape + (1, 1, 1)) if t.ndim else values


def diffuse(schedule: NoiseSchedule, x0: Array, eps: Array, t: Array) -> Array:
    """q(x_t | x_0): s_t x_0 + v_t eps. x0, eps `[B, H, W, C]`, t `[B]`."""
    chex.assert_equal_shape([x0, eps])
    return lookup(schedule.signal, t) * x0 + lookup(schedule.noise, t) * eps


def predict_x0(schedule: NoiseSchedule, x: Array, eps: Array, t: Array) -> Array:
    """x0hat = (x_t - v_t eps) / s_t. x, eps `[B, H, W, C]`, t `[B]` or `[]`.

    s_t counts as 1e-5 or more, so that a schedule without terminal signal stays finite.
    """
    return (x - lookup(schedule.noise, t) * eps) / lookup(schedule.least_signal, t)


Prediction = Literal["epsilon", "v_prediction", "sample", "score"]


class Estimates(NamedTuple):
    """What a network makes of x_t: the noise in it and the clean image, of its shape.

    eps: the noise.
    x0: x0hat, not bounded; x_t = s_t x0 + v_t eps.
    """

    eps: Array
    x0: Array

    @classmethod
    def of(cls, schedule: NoiseSchedule, eps: Array, x: Array, t: Array) -> Estimates:
        """From the noise alone, by `predict_x0`."""
        return cls(eps, predict_x0(schedule, x, eps, t))


class Denoiser(abc.ABC):
    """A noise model that gives the noise and the image by one evaluation."""

    @abc.abstractmethod
    def estimates(self, params: Params, x: Array, t: Array) -> Estimates:
        """The noise and the image: x `[B, H, W, C]`, t `[B]`."""

    def __call__(self, params: Params, x: Array, t: Array) -> Array:
        return self.estimates(params, x, t).eps


@dataclasses.dataclass(frozen=True)
class _Converted(Denoiser):
    """The noise model of a network that predicts something else.

    Attributes:
      model: the network.
      schedule: its forward process.
    """

    model: NoiseModel
    schedule: NoiseSchedule

    def estimates(self, params: Params, x: Array, t: Array) -> Estimates:
        signal, noise = (
            lookup(table, t) for table in (self.schedule.signal, self.schedule.noise)
        )
        return self._estimates(self.model(params, x, t), x, signal, noise)

    @abc.abstractmethod
    def _estimates(
        self, out: Array, x: Array, signal: Array, noise: Array
    ) -> Estimates:
        """The noise and the image from the network's output, `out`, s_t and v_t."""


class VPrediction(_Converted):
    """The noise model of a network that predicts v = s_t eps - v_t x_0.

    eps = s_t v(x, t) + v_t x and x0hat = s_t x - v_t v(x, t) (Salimans & Ho 2022). This
    is for a variance-preserving schedule, in the network's own range, whose middle is
    0. x0hat by way of eps would lose its digits where s_t is small.
    """

    def _estimates(
        self, out: Array, x: Array, signal: Array, noise: Array
    ) -> Estimates:
        unit = self.schedule.unit**2  # v_t and x are both divided by it
        return Estimates(signal * out + unit * noise * x, signal * x - noise * out)


class SamplePrediction(_Converted):
    """The noise model of a network that predicts the clean image x_0.

    eps = (x - s_t x0(x, t)) / v_t and x0hat = x0(x, t); "sample" in diffusers. The
    image comes in the network's own range.
    """

    def _estimates(
        self, out: Array, x: Array, signal: Array, noise: Array
    ) -> Estimates:
        if self.schedule.values != (-1.0, 1.0):
            out = (out - self.schedule.values[0]) / self.schedule.unit - 1
        return Estimates((x - signal * out) / noise, out)


class ScorePrediction(_Converted):
    """The noise model of a network that predicts the score of x_t.

    The score is -eps / v_t, so eps = -v_t S(x, t) and x0hat = (x + v_t^2 S(x, t)) / s_t
    (Song et al. 2021, arXiv 2011.13456). If a network knows images in another range
    than [-1, 1], its score is per unit of that range.
    """

    def _estimates(
        self, out: Array, x: Array, signal: Array, noise: Array
    ) -> Estimates:
        eps = -noise * self.schedule.unit * out
        return Estimates(eps, (x - noise * eps) / signal)


@dataclasses.dataclass(frozen=True)
class Ranged:
    """A network that is given images in its own range in place of [-1, 1].

    Attributes:
      model: the network.
      values: its range, (low, high).
    """

    model: NoiseModel
    values: tuple[float, float]

    def __call__(self, params: Params, x: Array, t: Array) -> Array:
        low, high = self.values
        return self.model(params, (x + 1) * ((high - low) / 2) + low, t)


@dataclasses.dataclass(frozen=True, eq=False)
class Scaled:
    """A network that is given x_t times a factor of its timestep.

    Attributes:
      model: the network.
      scale: `NoiseSchedule.scale`, `[T]`.
    """

    model: NoiseModel
    scale: np.ndarray

    def __call__(self, params: Params, x: Array, t: Array) -> Array:
        return self.model(params, lookup(self.scale, t) * x, t)


@dataclasses.dataclass(frozen=True, eq=False)
class Retimed:
    """A network that is given `NoiseSchedule.times` in place of the timestep.

    Attributes:
      model: the network.
      times: what it is given at each timestep, `[T]`.
    """

    model: NoiseModel
    times: np.ndarray

    def __call__(self, params: Params, x: Array, t: Array) -> Array:
        return self.model(params, x, jnp.asarray(self.times, jnp.float32)[t])


def predicting(
    model: NoiseModel, schedule: NoiseSchedule, prediction: Prediction
) -> NoiseModel:
    """The noise model of a network, by what it is given and what it predicts."""
    if schedule.times is not None:
        model = Retimed(model, schedule.times)
    if schedule.scale is not None:
        model = Scaled(model, schedule.scale)
    elif schedule.values != (-1.0, 1.0):
        model = Ranged(model, schedule.values)
    if prediction == "score":
        return ScorePrediction(model, schedule)
    if prediction == "v_prediction":
        return VPrediction(model, schedule)
    if prediction == "sample":
        return SamplePrediction(model, schedule)
    return model


def estimates(
    model: NoiseModel, params: Params, schedule: NoiseSchedule, x: Array, t: Array
) -> Estimates:
    """eps and x0hat of a model at x `[B, H, W, C]`, all at t `[]`."""
    times = jnp.full((x.shape[0],), t)
    if isinstance(model, Denoiser):
        return model.estimates(params, x, times)
    return Estimates.of(schedule, model(params, x, times), x, t)
