"""How a model denoises on the path of a candidate, and what a clean one could do."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from puredif_jax.attacks.channel import Channel
from puredif_jax.attacks.exact import ExactDenoiser, Points
from puredif_jax.diffusion.prediction import diffuse, lookup, predict_x0
from puredif_jax.diffusion.schedules import NoiseSchedule
from puredif_jax.types import (
    Array,
    Candidate,
    Key,
    NoiseModel,
    Params,
    Shard,
    unsharded,
)

HIGH = (999, 900, 800)
MIDDLE = (700, 600, 500, 400, 300, 200, 100)
"""Where memory is measured: there the target shows in a noisy image."""

TIMESTEPS = HIGH + MIDDLE
"""Where gain is measured."""

LEAST = 0.15
"""Dimensions below which an error says no more."""


class Errors(NamedTuple):
    """How a model denoises on the path of a candidate, and what a clean one could do.

    Each is in dimensions: the squared error of the predicted noise, summed over an
    image. A clean model can explain a path in two ways, `moved` and `single`. Where one
    of them does, the path is no backdoor. Where the path itself belongs to one image
    (`lone`), `known` takes the place of both.

    timesteps: `[T]`.
    triggered: of eps + C_t delta from x_t = s_t y + v_t gamma eps + H_t delta.
    untriggered: of eps from s_t y + v_t eps, for comparison. It explains nothing, since
      training with y among the clean images lowers it.
    moved: of eps from s_t y + v_t eps + (H_t - v_t C_t) delta. The model would know the
      image that a clean model sees in x_t.
    single: of (x_t - s_t z) / v_t from x_t, z the one image for all t that fits best.
      The trigger would be noise of another mean, which leads to one known image.
    along, aside: of eps + C_t d from s_t y + v_t gamma eps + H_t d, d a part of delta
      in place of the whole (`parts`). Which image it is, a clean model learns from the
      part along the image. It learns little from the part orthogonal to that. `along`
      is inf where that part leads away from the image.
    known: of eps + C_t delta from x_t, by the best denoiser of some images that the
      model draws and of y. It knows y, and takes x_t for y where x_t is near it.
    lone: `Hypothesis.lone`, whether `single` and `moved` say nothing.
    floor: a bound of the network's own error, the least of `triggered` and
      `untriggered` at any t; at least `LEAST`. Above that it is no more than
      `triggered`, so whoever raises it changes a ratio by a factor of 2 at most.
    """

    timesteps: Array
    triggered: Array
    untriggered: Array
    moved: Array
    single: Array
    along: Array
    aside: Array
    known: Array
    lone: Array
    floor: Array

    @property
    def explained(self) -> Array:
        """The least of the errors of clean explanations, `[T]`."""
        seen = jnp.minimum(self.moved, self.single)
        return jnp.where(self.lone, self.known, seen)

    @property
    def ratios(self) -> Array:
        """Error on the path over the least explanation, `[T]`."""
        return self.over(self.explained)

    def over(self, other: Array) -> Array:
        """Error on the path over another, `[T]`, both above the floor."""
        return (self.triggered + self.floor) / (other + self.floor)


def levels(timesteps: np.ndarray) -> np.ndarray:
    """True where a timestep occurs for the first time, bool `[T]`.

    A schedule that ends at less noise than the standard one has its last timestep for
    several levels (`NoiseSchedule.matched`). It counts once.
    """
    first = np.zeros(len(timesteps), bool)
    first[np.unique(timesteps, return_index=True)[1]] = True
    return first


def single_image(
    seen: Array, spread: Array, weight: Array, floor: Array, counted: np.ndarray
) -> Array:
    """The error of the one image that explains all denoised ones best, `[T]`.

    e_t(z) = weight_t (||seen_t - z||^2 + spread_t), for the z within [-1, 1] that
    minimises sum_t log(e_t + floor) over the t that count. It is found by reweighting
    ten times, from the image of each t.

    Args:
      seen: mean of the denoised images at each t, `[T, H, W, C]`.
      spread: their variance, summed over an image, `[T]`.
      weight: s_t^2 / v_t^2, `[T]`.
      floor: a scalar.
      counted: which t count, bool `[T]`.
    """

    share = jnp.asarray(counted, seen.dtype)

    def error(z: Array) -> Array:
        return weight * (jnp.sum((seen - z[None]) ** 2, (1, 2, 3)) + spread)

    def nearer(z: Array, _: None) -> tuple[Array, None]:
        weights = share * weight / (error(z) + floor)
        return jnp.tensordot(weights / weights.sum(), seen, 1).clip(-1, 1), None

    def from_one(z: Array) -> Array:
        return error(jax.lax.scan(nearer, z.clip(-1, 1), None, length=10)[0])

    found = jax.vmap(from_one)(seen)
    return found[jnp.argmin(jnp.log(found + floor) @ share)]


class Parts(NamedTuple):
    """A trigger in two parts, `[H, W, C]` each, whose sum it is.

    With u = y - mean_i x_i, y its image and x_i draws:

    along: <delta, u> u / ||u||^2, the part that leads to the image, or away from it.
    aside: the rest, orthogonal to u.
    """

    along: Array
    aside: Array


def parts(delta: Array, target: Array, plain: Array) -> Parts:
    """The parts of a trigger by its image, `[H, W, C]`, and draws `[N, H, W, C]`."""
    u = target - plain.mean(0)
    along = jnp.vdot(delta, u) * u / jnp.maximum(jnp.vdot(u, u), 1e-12)
    return Parts(along, delta - along)


def errors(
    model: NoiseModel,
    params: Params,
    schedule: NoiseSchedule,
    channel: Channel,
    candidate: Candidate,
    plain: Array,
    lone: Array,
    key: Key,
    *,
    draws: int,
    shard: Shard = unsharded,
) -> Errors:
    """Measures a candidate on fresh noise, the same for all of its errors.

    Args:
      model, params, schedule: the model.
      channel: of the kind of backdoor that is assumed.
      candidate: the inverted trigger and its image, `[H, W, C]` each.
      plain: images that the model draws from eps, `[N, H, W, C]`.
      lone: of the hypothesis, as in `Errors`; a scalar.
      key: of the noise.
      draws: of noise at each timestep.
      shard: constraint on a noise batch.
    """
    drawn = jnp.clip(plain, -1, 1)
    split = parts(candidate.delta, candidate.target, drawn)
    leads = jnp.vdot(split.along, candidate.target - drawn.mean(0)) > 0
    deltas = jnp.stack([candidate.delta, *split])[:, None]
    shape = (draws, *candidate.delta.shape)
    y = jnp.broadcast_to(candidate.target, shape)
    images = jnp.concatenate([drawn, candidate.target[None]])
    nothing = jnp.zeros_like(candidate.target)
    mixture = ExactDenoiser(schedule, Channel.clean(schedule))
    points = Points(images, nothing, nothing)

    def total(x: Array) -> Array:
        return jnp.sum(x**2) / draws

    def at(t: Array, key: Key) -> tuple[Array, ...]:
        eps = shard(jax.random.normal(key, shape))
        times = jnp.full((draws,), t)
        response = lookup(channel.response, t)
        shift, v = lookup(channel.shift, t), lookup(schedule.noise, t)
        zero, moved = jnp.zeros_like(shift), shift - v * response
        path = channel.noisy(schedule, y, eps, deltas[0], times)
        answer = model(params, path, times)
        aim = eps + response * deltas[0]

        def error(case: tuple[Array, ...]) -> Array:
            """Of the noise and a part of the answer, one batch at a time."""
            delta, shift, response, scale = case
            x = diffuse(schedule, y, scale * eps, times) + shift * delta
            return total(model(params, x, times) - eps - response * delta)

        scale = channel.scale * jnp.ones_like(deltas[0])
        one = jnp.ones_like(scale)
        cases = (
            jnp.stack([*deltas[1:], deltas[0], deltas[0]]),
            jnp.stack([shift, shift, zero, moved]),
            jnp.stack([response, response, zero, zero]),
            jnp.stack([scale, scale, one, one]),
        )
        along, aside, untriggered, unshifted = jax.lax.map(error, cases)
        estimates = predict_x0(schedule, path, answer, times)
        mean = estimates.mean(0)
        return (
            total(answer - aim),
            untriggered,
            unshifted,
            jnp.where(leads, along, jnp.inf),
            aside,
            total(mixture(points, path, times) - aim),
            mean,
            total(estimates - mean[None]),
        )

    times = schedule.matched(TIMESTEPS)
    keys = jax.random.split(key, len(times))
    triggered, untriggered, moved, along, aside, known, seen, spread = jax.lax.map(
        lambda pair: at(*pair), (jnp.asarray(times), keys)
    )
    floor = jnp.maximum(jnp.minimum(triggered, untriggered).min(), LEAST)
    weight = jnp.asarray((schedule.signal / schedule.noise)[times] ** 2, jnp.float32)
    single = single_image(seen, spread, weight, floor, levels(times))
    found = triggered, untriggered, moved, single, along, aside, known
    return Errors(jnp.asarray(times), *found, jnp.asarray(lone), floor)
