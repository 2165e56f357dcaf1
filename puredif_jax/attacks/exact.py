"""Closed-form denoisers of a finite image set, clean or backdoored.

For images x_1..x_N drawn with weight (1 - p) / N each, and the pair (y, r) of a
backdoor with weight p, the best noise prediction is known: a posterior mean. It is
a `NoiseModel` without training, whose parameters are the images themselves.
"""

from __future__ import annotations

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from puredif_jax.attacks.channel import Channel
from puredif_jax.diffusion.prediction import lookup
from puredif_jax.diffusion.schedules import NoiseSchedule
from puredif_jax.types import Array


@struct.dataclass
class Points:
    """The parameters of an exact denoiser.

    images: `[N, H, W, C]`.  trigger, target: `[H, W, C]`, r and y of the backdoor.
    """

    images: Array
    trigger: Array
    target: Array


@dataclasses.dataclass(frozen=True, eq=False)
class ExactDenoiser:
    """E[eps + C_t r 1{poisoned} | x_t] under the mixture of `Points`.

    With the component means m_i = s_t x_i and m_p = s_t y + H_t r, and standard
    deviations v_t and gamma v_t, the posterior weights are

      w_i ~ (1 - p)/N exp(-||x - m_i||^2 / 2 v_t^2)
      w_p ~ p prod gamma^-1 exp(-||(x - m_p) / gamma||^2 / 2 v_t^2)

    and the prediction is sum_i w_i (x - m_i)/v_t + w_p ((x - m_p)/(gamma v_t) + C_t r).
    The term ||x||^2 common to all exponents is left out and images are centred, so
    that the weights are stable in float32 down to t = 0.

    Attributes:
      schedule: the forward process.
      channel: coefficients of the attack; not read for a clean model.
      rate: p, in [0, 1); 0 for a clean model.
    """

    schedule: NoiseSchedule
    channel: Channel
    rate: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate must lie in [0, 1), found {self.rate}")

    def __call__(self, params: Points, x: Array, t: Array) -> Array:
        chex.assert_rank([params.images, x, t], [4, 4, 1])
        count, size = params.images.shape[0], params.images[0].size
        s, v, shift, response = (
            lookup(table, t).reshape(-1, 1)
            for table in (
                self.schedule.signal,
                self.schedule.noise,
                self.channel.shift,
                self.channel.response,
            )
        )
        gamma = 1.0 if self.channel.gamma is None else self.channel.gamma
        scale = np.broadcast_to(np.asarray(gamma, np.float64), x.shape[1:])
        width = jnp.asarray(scale.reshape(1, size), jnp.float32)
        centre = params.images.reshape(count, size).mean(0, keepdims=True)
        points = params.images.reshape(count, size) - centre
        trigger = params.trigger.reshape(1, size)
        poisoned = s * (params.target.reshape(1, size) - centre) + shift * trigger
        x_c = x.reshape(-1, size) - s * centre

        dot = jnp.matmul(x_c, points.T, precision="highest")
        energy = jnp.sum(points**2, -1)[None, :]
        clean_logits = (s * dot - s**2 * energy / 2) / v**2
        clean_logits += math.log((1 - self.rate) / count)
        logits = clean_logits
        if self.rate > 0:
            away = jnp.sum((x_c - poisoned) ** 2 / width**2 - x_c**2, -1, keepdims=True)
            if (scale == 1.0).all():
                away = jnp.sum(poisoned * (poisoned - 2 * x_c), -1, keepdims=True)
            volume = float(np.log(scale).sum())
            logit = math.log(self.rate) - volume - away / (2 * v**2)
            logits = jnp.concatenate([clean_logits, logit], axis=-1)
        weights = jax.nn.softmax(logits, axis=-1)

        w_clean = weights[:, :count]
        mean = jnp.matmul(w_clean, points, precision="highest")
        total = jnp.sum(w_clean, -1, keepdims=True)
        eps = (total * x_c - s * mean) / v
        if self.rate > 0:
            answer = (x_c - poisoned) / (width * v) + response * trigger
            eps += weights[:, count:] * answer
        return eps.reshape(x.shape)
