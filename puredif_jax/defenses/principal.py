"""What a linear clean denoiser takes for noise in an image that is added to its input.

Of clean images with covariance S, the best linear denoiser answers

  v_t (s_t^2 S + v_t^2)^-1 (x_t - s_t mean),

so of an image h that is added to x_t it takes v_t (s_t^2 S + v_t^2)^-1 h for noise, and
the rest for a part of the image. Near T that is h / v_t. At low noise it is little of
what clean images vary in, and all of what they never have.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from puredif_jax.diffusion.prediction import lookup
from puredif_jax.diffusion.schedules import NoiseSchedule
from puredif_jax.types import Array

IMAGES = 4096
"""Of which the covariance is taken, at most, evenly among all."""

MOST = 2**24
"""Numbers in all directions, which are kept at once: 64 MiB."""


class Principal(NamedTuple):
    """Principal components of clean images.

    variances: of the images along each, `[n]`, falling.
    directions: of length 1, at right angles to each other, `[n, H, W, C]`.
    """

    variances: Array
    directions: Array


def principal(images: np.ndarray) -> Principal:
    """The components of images `[N, H, W, C]`, as many as have a variance.

    Of large images only as many as `MOST` numbers hold.

    Raises:
      ValueError: there are fewer than two images.
    """
    if len(images) < 2:
        raise ValueError(f"a covariance needs two images or more, found {len(images)}")
    chosen = np.linspace(0, len(images) - 1, min(len(images), IMAGES)).astype(int)
    rows = np.asarray(images[chosen], np.float64).reshape(len(chosen), -1)
    rows -= rows.mean(0)
    count, size = rows.shape
    if size <= count:
        values, vectors = np.linalg.eigh(rows.T @ rows / (count - 1))
        directions = vectors.T
    else:
        values, vectors = np.linalg.eigh(rows @ rows.T / (count - 1))
        directions = vectors.T @ rows
        directions /= np.maximum(
            np.linalg.norm(directions, axis=1, keepdims=True), 1e-9
        )
    order = np.argsort(-values)[: max(1, MOST // size)]
    order = order[values[order] > 1e-6 * values.max(initial=1e-9)]
    return Principal(
        values[order].astype(np.float32),
        directions[order].reshape(-1, *images.shape[1:]).astype(np.float32),
    )


def noise_in(
    schedule: NoiseSchedule, known: Principal, image: Array, t: Array
) -> Array:
    """v_t (s_t^2 S + v_t^2)^-1 image, `[B, H, W, C]`.

    Args:
      schedule: the forward process.
      known: S, by its components.
      image: h, `[H, W, C]`.
      t: timesteps, `[B]`.
    """
    signal, noise = (lookup(x, t) for x in (schedule.signal, schedule.noise))
    flat = known.directions.reshape(len(known.variances), image.size)
    power = (signal**2).reshape(-1, 1) * known.variances[None]
    part = power / (power + (noise**2).reshape(-1, 1))  # that is taken for image
    shown = (part * (flat @ image.reshape(-1))[None]) @ flat
    found: Array = (image[None] - shown.reshape(-1, *image.shape)) / noise
    return jnp.asarray(found)
