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

TIMESTEPS = (500, 400, 300, 200, 100)
"""Where memory and gain are measured: there the target shows in a noisy image."""


class Features(NamedTuple):
    """What one inverted candidate shows; scalars.

    shift: held-out relative error of the shift equation, the mean over t of
      ||shift_t - C_t delta||^2 / ||C_t delta||^2. Small where the model answers delta
      as a backdoor would.
    memory: error of the backdoor process at middle t on its one image, over that of
      the same model on images it draws itself. Small where that image was learnt.
    gain: the same error over that of the model on the same image without the trigger.
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

    shift: Array
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


def features(
    model: NoiseModel,
    params: Params,
    schedule: NoiseSchedule,
    channel: Channel,
    candidate: Candidate,
    shift: Array,
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
      shift: held-out value of `DistributionShift`, a scalar.
      triggered: draws from eps + delta, `[B, H, W, C]`, two or more.
      plain: draws from eps, `[B, H, W, C]`, two or more.
      key: of the noise.
      timesteps: where memory and gain are measured, as `NoiseSchedule.matched` reads
        them.
      shard: constraint on a noise batch.
    """
    key_eps, key_top = jax.random.split(key)
    process = channel.inside(model, schedule, candidate.delta)
    target = jnp.broadcast_to(candidate.target, plain.shape)

    def error(noise_model: NoiseModel, images: Array, t: Array, key: Key) -> Array:
        eps = shard(jax.random.normal(key, images.shape))
        times = jnp.full((images.shape[0],), t)
        x = diffuse(schedule, images, eps, times)
        return jnp.mean((noise_model(params, x, times) - eps) ** 2)

    def errors(t: Array, key: Key) -> tuple[Array, Array, Array]:
        return (
            error(process, target / channel.scale, t, key),
            error(model, plain, t, key),
            error(model, target, t, key),
        )

    at_target, own, untriggered = jax.lax.map(
        lambda pair: errors(*pair),
        (
            jnp.asarray(schedule.matched(timesteps)),
            jax.random.split(key_eps, len(timesteps)),
        ),
    )

    def ratio(first: Array, second: Array) -> Array:
        """Geometric mean over t."""
        return jnp.exp(jnp.mean(jnp.log(first / second)))

    top = schedule.steps - 1
    eps = shard(jax.random.normal(key_top, plain.shape))
    start = lookup(schedule.noise, jnp.asarray(top)) * channel.scale * eps
    start += lookup(channel.shift, jnp.asarray(top)) * candidate.delta[None]
    answer = jnp.mean(model(params, start, jnp.full((plain.shape[0],), top)) - eps, 0)
    norms = jnp.linalg.norm(answer.ravel()) * jnp.linalg.norm(candidate.delta.ravel())
    divergence = (schedule.trigger_unit * candidate.delta) ** 2 / 2
    triggered, plain = jnp.clip(triggered, -1, 1), jnp.clip(plain, -1, 1)
    return Features(
        shift=shift,
        memory=ratio(at_target, own),
        gain=ratio(at_target, untriggered),
        alignment=jnp.vdot(answer, candidate.delta) / jnp.maximum(norms, 1e-12),
        uniformity=spread(triggered) / spread(plain),
        variation=total_variation(triggered) / total_variation(plain),
        kl_mean=jnp.mean(divergence),
        kl_variance=jnp.var(divergence),
    )


class Evidence(NamedTuple):
    """How a model denoises the image of a candidate, with its trigger and without it.

    Both sides start from the same noise, so they differ by the trigger alone.

    timesteps: `[T]`.
    triggered, untriggered: `[T]`, mean squared error of the predicted noise. Their
      ratio, as a geometric mean over the timesteps, is `Features.gain`.
    with_trigger, without: `[T, N, H, W, C]`, estimates of the clean image.
    """

    timesteps: Array
    triggered: Array
    untriggered: Array
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
    target = jnp.broadcast_to(candidate.target, (draws, *candidate.target.shape))

    def at(t: Array, key: Key) -> tuple[Array, Array, Array, Array]:
        eps = shard(jax.random.normal(key, target.shape))
        times = jnp.full((draws,), t)

        def denoised(noise_model: NoiseModel, scale: Array) -> tuple[Array, Array]:
            x = diffuse(schedule, target / scale, eps, times)
            answer = noise_model(params, x, times)
            images = predict_x0(schedule, x, answer, times)[:shown] * scale
            return jnp.mean((answer - eps) ** 2), images

        first, with_trigger = denoised(process, channel.scale)
        second, without = denoised(model, jnp.ones(()))
        return first, second, with_trigger, without

    times = jnp.asarray(schedule.matched(timesteps))
    keys = jax.random.split(jax.random.split(key)[0], len(timesteps))
    return Evidence(times, *jax.lax.map(lambda pair: at(*pair), (times, keys)))


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
