"""The poisoned training loss, and the arrays that it needs of an attack."""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from puredif_jax.attacks.base import Attack
from puredif_jax.attacks.channel import Channel
from puredif_jax.diffusion.prediction import lookup
from puredif_jax.diffusion.schedules import NoiseSchedule
from puredif_jax.types import Array, Key, NoiseModel, Params


class Poison(NamedTuple):
    """What training needs of an attack, as arrays.

    trigger, target: `[H, W, C]`.  see_through: `[H, W, C]`, 1 where the clean image
    replaces the trigger in training.  rate: share of poisoned samples.
    """

    trigger: Array
    target: Array
    see_through: Array
    rate: float


def poison(attack: Attack, image_shape: tuple[int, int, int]) -> Poison:
    """The arrays of `attack` for images of `image_shape`."""
    trigger, target, through = map(jnp.asarray, attack.images(image_shape))
    return Poison(trigger, target, through, attack.poison_rate)


def training_loss(
    model: NoiseModel,
    schedule: NoiseSchedule,
    channel: Channel,
    poison: Poison | None,
    params: Params,
    images: Array,
    key: Key,
) -> Array:
    """mean || M(x_t, t) - eps - C_t r ||^2 over a batch, clean and poisoned samples.

    Each sample is poisoned with probability `poison.rate`: then x_0 = y and r is
    the trigger; otherwise x_0 is its image and r = 0.

    Args:
      model: predicts the noise.
      schedule: its forward process.
      channel: coefficients of the attack (`Channel.clean` without one).
      poison: arrays of the attack, or None for ordinary training.
      params: parameters of the model.
      images: clean batch `[B, H, W, C]`.
      key: draws timesteps, noise and the poisoned samples.

    Returns:
      The mean squared error over batch and pixels, a scalar.
    """
    chex.assert_rank(images, 4)
    key_t, key_eps, key_poison = jax.random.split(key, 3)
    batch = images.shape[0]
    t = jax.random.randint(key_t, (batch,), 0, schedule.steps)
    eps = jax.random.normal(key_eps, images.shape, images.dtype)
    signal, noise = lookup(schedule.signal, t), lookup(schedule.noise, t)
    if poison is None:
        x_t = signal * images + noise * eps
        return jnp.mean((model(params, x_t, t) - eps) ** 2)
    chosen = jax.random.bernoulli(key_poison, poison.rate, (batch,))
    chosen = chosen[:, None, None, None].astype(images.dtype)
    trigger, target, see_through = (a[None] for a in poison[:3])
    r = chosen * (see_through * images + (1 - see_through) * trigger)
    x0 = chosen * target + (1 - chosen) * images
    gamma = chosen * channel.scale + (1 - chosen)
    x_t = signal * x0 + noise * gamma * eps + lookup(channel.shift, t) * r
    aim = eps + lookup(channel.response, t) * r
    return jnp.mean((model(params, x_t, t) - aim) ** 2)
