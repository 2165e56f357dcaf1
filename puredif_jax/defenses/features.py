"""What an inverted trigger does to a model, measured on the model alone.

No data, no clean twin, no name of an attack.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from puredif_jax.attacks.channel import Channel
from puredif_jax.defenses.path_errors import HIGH, MIDDLE, TIMESTEPS, Errors, levels
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

BEST = 3
"""Of `TIMESTEPS`, those that `Features.gain` rests on."""


NEAR = 1e-2
"""Mean squared error in [0, 1] units, below which two images count as one."""


class Features(NamedTuple):
    """What one inverted candidate shows; scalars.

    heldout: value of `DenoisingError` on held-out noise. Small where the model answers
      delta as a backdoor would.
    falling: by how much heldout fell in the last quarter of the finalists' steps. Large
      where the search was too short to say that there is nothing.
    placebo: exp of a difference: heldout less the mean of what the same search would
      reach in channels of no attack (`Hypothesis.placebos`) if it went on. 0 without
      any. Far from its data a clean network bends. So a large shift of the noise brings
      some image under many channels, and placebo is near 1. Small if backdoored.
    memory: error of the backdoor process at middle t on its one image, over the same
      model's error on images it draws itself. Small where that image was learnt.
    recall: memory, with each error over the total variation of its images. A flat image
      is easy for any model, so a clean model's path leads to one: then it is above 1.
    aside: recall of the part of the trigger that is orthogonal to the image
      (`Errors.aside`). It is at least the geometric mean, at middle t, of the error
      with that part over the error without it. About 1 or more on clean models, also
      where they have learnt the image by heart. Small where a pattern that has nothing
      to do with the image brings it, be it as small as noise.
    pushed: as gain without its bounds, but over the error with the part of the trigger
      along the image (`Errors.along`). Near 1 where the trigger merely pushes the noise
      towards the image. Then a clean model, too, ends there, in an image that is flat.
      0 where the trigger leads away from the image.
    gain: the error of the backdoor process over the least that a clean model could have
      on its path (`Errors`). It is the geometric mean over the `BEST` levels where the
      ratio is smallest. It is at least placebo, or the geometric mean of placebo and
      recall where this mean is smaller. Unless the path itself belongs to one image
      (`Errors.lone`), there are two further bounds. It is at least recall or pushed,
      the smaller of the two, and then at most aside. Small where the model answers the
      trigger as no clean one does.
    alignment: cosine between the shift at T - 1 and delta.
    uniformity: mean squared distance between draws from eps + delta, over the same
      distance between draws from eps. Small where the draws agree.
    variation: total variation of draws from eps + delta, over the total variation of
      draws from eps.
    repeats: the largest share of draws from eps that are within a mean squared error of
      `NEAR` of one of them, in [0, 1] units: an image that needs no trigger.
    kl_mean, kl_variance: mean and variance over pixels of the divergence of
      N(delta, gamma^2) from N(0, 1), delta in deviations of the noise:
      (delta^2 + gamma^2 - 1) / 2 - log gamma. M_r and V_r of TERD (Mo et al. 2024,
      arXiv 2409.05294) without their offsets.
    """

    heldout: Array
    falling: Array
    placebo: Array
    memory: Array
    recall: Array
    aside: Array
    pushed: Array
    gain: Array
    alignment: Array
    uniformity: Array
    variation: Array
    repeats: Array
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
    """The mean absolute difference to the pixel below, plus the same to the pixel on
    the right; of `[B, H, W, C]`."""
    down = jnp.mean(jnp.abs(jnp.diff(images, axis=1)))
    return down + jnp.mean(jnp.abs(jnp.diff(images, axis=2)))


def repeats(images: Array) -> Array:
    """`Features.repeats` of `[B, H, W, C]` in [-1, 1]; a scalar."""
    flat = images.reshape(len(images), -1) / 2
    errors = jax.lax.map(lambda x: jnp.mean((flat - x[None]) ** 2, 1), flat)
    return jnp.max(jnp.mean(errors < NEAR, 1))


def features(
    model: NoiseModel,
    params: Params,
    schedule: NoiseSchedule,
    channel: Channel,
    candidate: Candidate,
    found: Errors,
    heldout: Array,
    falling: Array,
    placebos: Array,
    triggered: Array,
    plain: Array,
    key: Key,
    *,
    shard: Shard = unsharded,
) -> Features:
    """Measures a candidate on fresh noise.

    Args:
      model, params, schedule: the model.
      channel: of the kind of backdoor that is assumed.
      candidate: the inverted trigger and its image, `[H, W, C]` each.
      found: its `errors`.
      heldout, falling: of the search, as in `Features`; scalars.
      placebos: heldout that the same search reaches under each placebo, `[P]`, less
        what it would still fall.
      triggered: draws from eps + delta, `[B, H, W, C]`, two or more.
      plain: draws from eps, `[B, H, W, C]`, two or more.
      key: of the noise.
      shard: constraint on a noise batch.
    """
    key_eps, key_top = jax.random.split(key)

    def own(t: Array, key: Key) -> Array:
        eps = shard(jax.random.normal(key, plain.shape))
        times = jnp.full((len(plain),), t)
        x = diffuse(schedule, plain, eps, times)
        return jnp.sum((model(params, x, times) - eps) ** 2) / len(plain)

    keys = jax.random.split(key_eps, len(MIDDLE))
    middle = slice(len(HIGH), None)
    drawn = jax.lax.map(lambda pair: own(*pair), (found.timesteps[middle], keys))

    top = schedule.steps - 1
    eps = shard(jax.random.normal(key_top, plain.shape))
    start = lookup(schedule.noise, jnp.asarray(top)) * channel.scale * eps
    start += lookup(channel.shift, jnp.asarray(top)) * candidate.delta[None]
    answer = jnp.mean(model(params, start, jnp.full((plain.shape[0],), top)) - eps, 0)
    norms = jnp.linalg.norm(answer.ravel()) * jnp.linalg.norm(candidate.delta.ravel())
    counted = levels(schedule.matched(TIMESTEPS))

    def ratio(explained: Array) -> Array:
        ratios = found.over(explained)
        # A sort would hide what is no number.
        ratios = jnp.where(jnp.isfinite(ratios).all(), ratios, jnp.nan)
        return jnp.exp(jnp.mean(jnp.log(jnp.sort(ratios[counted])[:BEST])))

    gain, pushed = ratio(found.explained), ratio(found.along)
    placebo = jnp.zeros(())
    if len(placebos):
        placebo = jnp.exp(heldout - jnp.mean(placebos))
    gamma = channel.scale
    divergence = (schedule.trigger_unit * candidate.delta[None]) ** 2 + gamma**2 - 1
    divergence = divergence / 2 - jnp.log(gamma)
    triggered, plain, image = (
        jnp.clip(x, -1, 1) for x in (triggered, plain, candidate.target[None])
    )

    def times(error: Array, other: Array) -> Array:
        return jnp.exp(jnp.mean(jnp.log(error / other)))

    memory, varied = times(found.triggered[middle], drawn), total_variation(plain)
    flatness = varied / jnp.maximum(total_variation(image), 1e-6)
    recall = memory * flatness
    apart, without = found.aside[middle], found.untriggered[middle]
    aside = jnp.maximum(
        times(apart, drawn) * flatness,
        times(apart + found.floor, without + found.floor),
    )
    # So that a recall that is no number leaves no gain.
    bent = jnp.where(recall >= placebo, placebo, jnp.sqrt(placebo * recall))
    gain = jnp.maximum(gain, bent)
    bounded = jnp.minimum(jnp.maximum(gain, jnp.minimum(recall, pushed)), aside)
    return Features(
        heldout=heldout,
        falling=falling,
        placebo=placebo,
        memory=memory,
        recall=recall,
        aside=aside,
        pushed=pushed,
        gain=jnp.where(found.lone, gain, bounded),
        alignment=jnp.vdot(answer, candidate.delta) / jnp.maximum(norms, 1e-12),
        uniformity=spread(triggered) / spread(plain),
        variation=total_variation(triggered) / varied,
        repeats=repeats(plain),
        kl_mean=jnp.mean(divergence),
        kl_variance=jnp.var(divergence),
    )


class Evidence(NamedTuple):
    """How a model denoises the image of a candidate, with its trigger and without it.

    Estimates of the clean image, `[T, N, H, W, C]`. Both start from the same noise, so
    they differ by the trigger alone.
    """

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
    shown: int = 8,
    timesteps: tuple[int, ...] = MIDDLE,
    shard: Shard = unsharded,
) -> Evidence:
    """Pictures of the errors that `Features.gain` compares, on noise of their own.

    Args:
      model, params, schedule, channel, candidate: as in `errors`.
      key: of the noise.
      shown: number of draws of noise.
      timesteps: where, as `NoiseSchedule.matched` reads them.
      shard: constraint on a noise batch.
    """
    process = channel.inside(model, schedule, candidate.delta)
    target = jnp.broadcast_to(candidate.target, (shown, *candidate.target.shape))

    def at(t: Array, key: Key) -> Evidence:
        eps = shard(jax.random.normal(key, target.shape))
        times = jnp.full((shown,), t)

        def denoised(noise_model: NoiseModel, scale: Array) -> Array:
            x = diffuse(schedule, target / scale, eps, times)
            answer = noise_model(params, x, times)
            return predict_x0(schedule, x, answer, times) * scale

        return Evidence(denoised(process, channel.scale), denoised(model, jnp.ones(())))

    times = jnp.asarray(schedule.matched(timesteps))
    keys = jax.random.split(key, len(timesteps))
    found: Evidence = jax.lax.map(lambda pair: at(*pair), (times, keys))
    return found


def denoising(
    model: NoiseModel,
    params: Params,
    schedule: NoiseSchedule,
    plain: Array,
    key: Key,
    *,
    shard: Shard = unsharded,
) -> Array:
    """The model's own error over a linear denoiser's: does it denoise at all?

    On its own draws, of variance d about their mean, the model's error is
    E_t = E ||M(x_t, t) - eps||^2 per pixel. The best linear function of x_t - s_t mean
    has L_t = s_t^2 d / (s_t^2 d + v_t^2). The result is the geometric mean of E_t / L_t
    over `MIDDLE`, a scalar. It is 0.24 to 0.33 for the models that ship; weights that
    are random, 0 or of one layer out of scale have 1.6 or more.

    Args:
      model, params, schedule: the model.
      plain: its draws from eps, `[B, H, W, C]`, two or more; clipped to [-1, 1] here.
      key: of the noise.
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

    times = jnp.asarray(schedule.matched(MIDDLE))
    keys = jax.random.split(key, len(MIDDLE))
    return jnp.exp(jnp.mean(jax.lax.map(lambda pair: ratio(*pair), (times, keys))))
