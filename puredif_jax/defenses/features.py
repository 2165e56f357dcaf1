"""What an inverted trigger does to a model, measured on the model alone.

No data, no clean twin, no name of an attack.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from puredif_jax.attacks.channel import Channel
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

TIMESTEPS = (700, 600, 500, 400, 300, 200, 100)
"""Where memory and gain are measured: there the target shows in a noisy image."""

BEST = 3
"""Of them, those that `Features.gain` rests on."""

LEAST = 0.05
"""Dimensions below which an error says no more."""


class Features(NamedTuple):
    """What one inverted candidate shows; scalars.

    heldout: value of `DenoisingError` on held-out noise. Small where the model answers
      delta as a backdoor would.
    memory: error of the backdoor process at middle t on its one image, over that of
      the same model on images it draws itself. Small where that image was learnt.
    gain: the same error over the least that explains the path without a trigger
      (`Errors`), the geometric mean over the `BEST` levels where the ratio is smallest.
      Small where the trigger unlocks an image that the model does not know otherwise;
      a flat image, which is easy for every model, gains little.
    alignment: cosine between the shift at T - 1 and delta.
    uniformity: mean squared distance between draws from eps + delta, over that
      between draws from eps. Small where the draws agree.
    variation: total variation of the former draws over that of the latter.
    kl_mean, kl_variance: mean and variance over pixels of delta^2 / 2, delta in
      deviations of the noise: the divergence of N(delta, 1) from N(0, 1). M_r and V_r
      of TERD (Mo et al. 2024, arXiv 2409.05294) without their offsets.
    """

    heldout: Array
    memory: Array
    gain: Array
    alignment: Array
    uniformity: Array
    variation: Array
    kl_mean: Array
    kl_variance: Array


def spread(images: Array) -> Array:
    """Mean squared distance per pixel between two images of `[B, H, W, C]`."""
    return 2 * jnp.mean(jnp.var(images, axis=0, ddof=1))


def spread_ratio(triggered: np.ndarray, plain: np.ndarray) -> float:
    """`Features.uniformity` of draws `[B, H, W, C]`, clipped to [-1, 1] first."""
    pair = (jnp.clip(jnp.asarray(x), -1, 1) for x in (triggered, plain))
    return float(jnp.divide(*map(spread, pair)))


def total_variation(images: Array) -> Array:
    """Mean absolute difference to the pixel below, and to the right, of
    `[B, H, W, C]`: their sum."""
    down = jnp.mean(jnp.abs(jnp.diff(images, axis=1)))
    return down + jnp.mean(jnp.abs(jnp.diff(images, axis=2)))


class Errors(NamedTuple):
    """How a model denoises on the path of a candidate, and without its trigger.

    In dimensions: squared errors of the predicted noise, summed over an image. A clean
    model can explain a path in three ways; where one of them does, it is no backdoor.

    timesteps: `[T]`.
    triggered: of eps + C_t delta from x_t = s_t y + v_t gamma eps + H_t delta.
    untriggered: of eps from s_t y + v_t eps. The model knows y without the trigger.
    moved: of eps from s_t y + v_t eps + (H_t - v_t C_t) delta. It knows the image that
      a clean model sees in x_t.
    single: of (x_t - s_t z) / v_t from x_t, z the one image for all t that fits best.
      The trigger is noise of another mean, which leads to one image that it knows. A
      channel whose own path does so, as that of deterministic sampling in a
      variance-exploding model, cannot be told from a clean model by this.
    floor: of eps near T, where any denoiser is exact but for its network's own error;
      at least `LEAST`.
    """

    timesteps: Array
    triggered: Array
    untriggered: Array
    moved: Array
    single: Array
    floor: Array

    @property
    def explained(self) -> Array:
        """The least of the errors of clean explanations, `[T]`."""
        return jnp.minimum(jnp.minimum(self.untriggered, self.moved), self.single)

    @property
    def ratios(self) -> Array:
        """Error with the trigger over the least without, both above the floor."""
        return (self.triggered + self.floor) / (self.explained + self.floor)


def single_image(seen: Array, spread: Array, weight: Array, floor: Array) -> Array:
    """The error of the one image that explains all denoised ones best, `[T]`.

    e_t(z) = weight_t (||seen_t - z||^2 + spread_t), for the z within [-1, 1] that
    minimises sum_t log(e_t + floor): by reweighting, from the image of each t, ten
    times.

    Args:
      seen: mean of the denoised images at each t, `[T, H, W, C]`.
      spread: their variance, summed over an image, `[T]`.
      weight: s_t^2 / v_t^2, `[T]`.
      floor: a scalar.
    """

    def error(z: Array) -> Array:
        return weight * (jnp.sum((seen - z[None]) ** 2, (1, 2, 3)) + spread)

    def nearer(z: Array, _: None) -> tuple[Array, None]:
        weights = weight / (error(z) + floor)
        return jnp.tensordot(weights / weights.sum(), seen, 1).clip(-1, 1), None

    def from_one(z: Array) -> Array:
        return error(jax.lax.scan(nearer, z.clip(-1, 1), None, length=10)[0])

    found = jax.vmap(from_one)(seen)
    return found[jnp.argmin(jnp.mean(jnp.log(found + floor), axis=1))]


def errors(
    model: NoiseModel,
    params: Params,
    schedule: NoiseSchedule,
    channel: Channel,
    candidate: Candidate,
    key: Key,
    *,
    draws: int,
    timesteps: tuple[int, ...] = TIMESTEPS,
    shard: Shard = unsharded,
) -> Errors:
    """Measures a candidate on fresh noise, the same for all of its errors.

    Args:
      model, params, schedule, channel, candidate: as in `features`.
      key: of the noise.
      draws: of noise at each timestep.
      timesteps: where, as `NoiseSchedule.matched` reads them.
      shard: constraint on a noise batch.
    """
    delta = candidate.delta[None]
    shape = (draws, *candidate.delta.shape)
    y = jnp.broadcast_to(candidate.target, shape)

    def total(x: Array) -> Array:
        return jnp.sum(x**2) / draws

    def at(t: Array, key: Key) -> tuple[Array, ...]:
        eps = shard(jax.random.normal(key, shape))
        times = jnp.full((draws,), t)
        response = lookup(channel.response, t)
        path = channel.noisy(schedule, y, eps, delta, times)
        plain = diffuse(schedule, y, eps, times)
        moved = lookup(channel.shift, t) - lookup(schedule.noise, t) * response
        answer = model(params, path, times)
        images = predict_x0(schedule, path, answer, times)
        mean = images.mean(0)
        return (
            total(answer - eps - response * delta),
            total(model(params, plain, times) - eps),
            total(model(params, plain + moved * delta, times) - eps),
            mean,
            total(images - mean[None]),
        )

    times = schedule.matched((*timesteps, 999))
    keys = jax.random.split(key, len(times))
    found = jax.lax.map(lambda pair: at(*pair), (jnp.asarray(times), keys))
    floor = jnp.maximum(found[1][-1], LEAST)
    triggered, untriggered, moved, seen, spread = (each[:-1] for each in found)
    weight = (schedule.signal / schedule.noise)[times[:-1]] ** 2
    weight = jnp.asarray(weight, jnp.float32)
    single = single_image(seen, spread, weight, floor)
    at_t = jnp.asarray(times[:-1])
    return Errors(at_t, triggered, untriggered, moved, single, floor)


def features(
    model: NoiseModel,
    params: Params,
    schedule: NoiseSchedule,
    channel: Channel,
    candidate: Candidate,
    heldout: Array,
    triggered: Array,
    plain: Array,
    key: Key,
    *,
    timesteps: tuple[int, ...] = TIMESTEPS,
    shard: Shard = unsharded,
) -> Features:
    """Measures a candidate on fresh noise.

    Args:
      model, params, schedule: the model.
      channel: of the kind of backdoor that is assumed.
      candidate: the inverted trigger and its image, `[H, W, C]` each.
      heldout: held-out value of `DenoisingError`, a scalar.
      triggered: draws from eps + delta, `[B, H, W, C]`, two or more.
      plain: draws from eps, `[B, H, W, C]`, two or more.
      key: of the noise.
      timesteps: where memory and gain are measured, as `NoiseSchedule.matched` reads
        them.
      shard: constraint on a noise batch.
    """
    key_eps, key_top = jax.random.split(key)
    found = errors(
        model,
        params,
        schedule,
        channel,
        candidate,
        key_eps,
        draws=len(plain),
        timesteps=timesteps,
        shard=shard,
    )

    def own(t: Array, key: Key) -> Array:
        eps = shard(jax.random.normal(key, plain.shape))
        times = jnp.full((len(plain),), t)
        x = diffuse(schedule, plain, eps, times)
        return jnp.sum((model(params, x, times) - eps) ** 2) / len(plain)

    keys = jax.random.split(key_eps, len(timesteps))
    drawn = jax.lax.map(lambda pair: own(*pair), (found.timesteps, keys))

    top = schedule.steps - 1
    eps = shard(jax.random.normal(key_top, plain.shape))
    start = lookup(schedule.noise, jnp.asarray(top)) * channel.scale * eps
    start += lookup(channel.shift, jnp.asarray(top)) * candidate.delta[None]
    answer = jnp.mean(model(params, start, jnp.full((plain.shape[0],), top)) - eps, 0)
    norms = jnp.linalg.norm(answer.ravel()) * jnp.linalg.norm(candidate.delta.ravel())
    # A sort would hide what is no number.
    ratios = jnp.where(jnp.isfinite(found.ratios).all(), found.ratios, jnp.nan)
    divergence = (schedule.trigger_unit * candidate.delta) ** 2 / 2
    triggered, plain = jnp.clip(triggered, -1, 1), jnp.clip(plain, -1, 1)
    return Features(
        heldout=heldout,
        memory=jnp.exp(jnp.mean(jnp.log(found.triggered / drawn))),
        gain=jnp.exp(jnp.mean(jnp.log(jnp.sort(ratios)[:BEST]))),
        alignment=jnp.vdot(answer, candidate.delta) / jnp.maximum(norms, 1e-12),
        uniformity=spread(triggered) / spread(plain),
        variation=total_variation(triggered) / total_variation(plain),
        kl_mean=jnp.mean(divergence),
        kl_variance=jnp.var(divergence),
    )


class Evidence(NamedTuple):
    """How a model denoises the image of a candidate, with its trigger and without it.

    errors: from which `Features.gain` is computed.
    with_trigger, without: `[T, N, H, W, C]`, estimates of the clean image. Both start
      from the same noise, so they differ by the trigger alone.
    """

    errors: Errors
    with_trigger: Array
    without: Array


def evidence(
    model: NoiseModel,
    params: Params,
    schedule: NoiseSchedule,
    channel: Channel,
    candidate: Candidate,
    key: Key,
    *,
    draws: int,
    shown: int = 8,
    timesteps: tuple[int, ...] = TIMESTEPS,
    shard: Shard = unsharded,
) -> Evidence:
    """What `Features.gain` is computed from, by timestep, and pictures of it.

    Args:
      model, params, schedule, channel, candidate: as in `features`.
      key: the one given to `features`, for the same noise.
      draws: of noise at each timestep; as many as `features` had plain draws.
      shown: of them, how many are pictured.
      timesteps: where.
      shard: constraint on a noise batch.
    """
    process = channel.inside(model, schedule, candidate.delta)
    target = jnp.broadcast_to(candidate.target, (shown, *candidate.target.shape))
    key_eps, key_shown = jax.random.split(key)

    def at(t: Array, key: Key) -> tuple[Array, Array]:
        eps = shard(jax.random.normal(key, target.shape))
        times = jnp.full((shown,), t)

        def denoised(noise_model: NoiseModel, scale: Array) -> Array:
            x = diffuse(schedule, target / scale, eps, times)
            answer = noise_model(params, x, times)
            return predict_x0(schedule, x, answer, times) * scale

        return denoised(process, channel.scale), denoised(model, jnp.ones(()))

    found = errors(
        model,
        params,
        schedule,
        channel,
        candidate,
        key_eps,
        draws=draws,
        timesteps=timesteps,
        shard=shard,
    )
    keys = jax.random.split(key_shown, len(timesteps))
    pictures = jax.lax.map(lambda pair: at(*pair), (found.timesteps, keys))
    return Evidence(found, *pictures)


def denoising(
    model: NoiseModel,
    params: Params,
    schedule: NoiseSchedule,
    plain: Array,
    key: Key,
    *,
    timesteps: tuple[int, ...] = TIMESTEPS,
    shard: Shard = unsharded,
) -> Array:
    """The model's own error over a linear denoiser's: does it denoise at all?

    On its own draws, of variance d about their mean, the model's error is
    E_t = E ||M(x_t, t) - eps||^2 per pixel. The best linear function of x_t - s_t mean
    has L_t = s_t^2 d / (s_t^2 d + v_t^2). The result is the geometric mean of E_t / L_t
    over t, a scalar. It is 0.24 to 0.33 for the models that ship; weights that are
    random, 0 or of one layer out of scale have 1.6 or more.

    Args:
      model, params, schedule: the model.
      plain: its draws from eps, `[B, H, W, C]`, two or more; clipped to [-1, 1] here.
      key: of the noise.
      timesteps: where, as `NoiseSchedule.matched` reads them.
      shard: constraint on a noise batch.
    """
    images = jnp.clip(plain, -1, 1)
    variance = jnp.mean(jnp.var(images, axis=0))

    def ratio(t: Array, key: Key) -> Array:
        eps = shard(jax.random.normal(key, images.shape))
        times = jnp.full((images.shape[0],), t)
        x = diffuse(schedule, images, eps, times)
        error = jnp.mean((model(params, x, times) - eps) ** 2)
        signal = lookup(schedule.signal, t) ** 2 * variance
        linear = signal / (signal + lookup(schedule.noise, t) ** 2)
        return jnp.log(error) - jnp.log(linear)

    times = jnp.asarray(schedule.matched(timesteps))
    keys = jax.random.split(key, len(timesteps))
    return jnp.exp(jnp.mean(jax.lax.map(lambda pair: ratio(*pair), (times, keys))))
