"""What a linear clean denoiser takes for noise in an image that is added to its input.

For clean images with covariance S, the best linear denoiser answers

  v_t (s_t^2 S + v_t^2)^-1 (x_t - s_t mean).

If an image h is added to x_t, the denoiser takes v_t (s_t^2 S + v_t^2)^-1 h for noise.
It takes the rest for a part of the image. Near T the noise is h / v_t. At low noise it
is little of h where clean images vary, and all of h where they never do.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from puredif_jax.attacks.pictures import Shape
from puredif_jax.diffusion.prediction import lookup
from puredif_jax.diffusion.schedules import NoiseSchedule
from puredif_jax.types import Array

IMAGES = 4096
"""Of which the covariance is taken, at most, evenly among all."""

MOST = 2**24
"""Numbers in all directions, which are kept at once: 64 MiB."""


class Principal(NamedTuple):
    """The covariance of clean images, by its principal components.

    variances: of the images along each, `[n]`, falling.
    directions: of length 1, at right angles to each other, `[n, H, W, C]`.
    rest: the variance in every direction at right angles to these, a scalar.
    """

    variances: Array | np.ndarray
    directions: Array | np.ndarray
    rest: Array | np.ndarray


def unknown(shape: Shape) -> Principal:
    """For images (H, W, C) whose covariance is not asked for: no variance at all."""
    zero = np.zeros((), np.float32)
    return Principal(np.zeros(0, np.float32), np.zeros((0, *shape), np.float32), zero)


def principal(images: np.ndarray) -> Principal:
    """The components of images `[N, H, W, C]`, as many as have a variance.

    Large images have only as many components as `MOST` numbers hold. The variance that
    is left is spread evenly over the other directions. In uint8 images 0..255 stand for
    -1..1.

    Raises:
      ValueError: there are fewer than two images, or one that is not finite.
    """
    if len(images) < 2:
        raise ValueError(f"a covariance needs two images or more, found {len(images)}")
    chosen = np.linspace(0, len(images) - 1, min(len(images), IMAGES)).astype(int)
    part = images[chosen]
    scale, level = (127.5, 1.0) if part.dtype == np.uint8 else (1.0, 0.0)
    part = part.astype(np.float32) / np.float32(scale) - np.float32(level)
    if not np.isfinite(part).all():
        raise ValueError("a covariance needs finite images")
    rows = part.reshape(len(part), -1)
    rows = rows - rows.mean(0)
    count, size = rows.shape
    few = size > count
    gram = (rows @ rows.T if few else rows.T @ rows).astype(np.float64) / (count - 1)
    values, vectors = np.linalg.eigh(gram)
    order = np.argsort(-values)[: max(1, MOST // size)]
    order = order[values[order] > 1e-6 * values.max(initial=1e-9)]
    directions = vectors[:, order].T.astype(np.float32)
    if few:
        directions = directions @ rows
        lengths = np.linalg.norm(directions, axis=1, keepdims=True)
        directions /= np.maximum(lengths, 1e-9)
    left = max(0.0, float(np.trace(gram) - values[order].sum()))
    return Principal(
        values[order].astype(np.float32),
        directions.reshape(-1, *images.shape[1:]),
        np.asarray(left / max(1, size - len(order)), np.float32),
    )


def noise_in(
    schedule: NoiseSchedule, known: Principal, images: Array, t: Array
) -> Array:
    """v_t (s_t^2 S + v_t^2)^-1 h of each image h, `[B, H, W, C]`.

    Args:
      schedule: the forward process.
      known: S, by its components.
      images: h, `[B, H, W, C]`.
      t: timesteps, `[B]`.
    """
    signal, noise = (lookup(x, t) for x in (schedule.signal, schedule.noise))
    s, v = (x.reshape(-1, 1) for x in (signal, noise))
    rows = images.reshape(len(images), -1)
    flat = known.directions.reshape(len(known.variances), rows.shape[1])

    def taken(variance: Array | np.ndarray) -> Array:
        return v / (s**2 * variance + v**2)

    rest = taken(known.rest.reshape(1, 1))
    own = taken(known.variances[None]) - rest
    found = rest * rows + (own * (rows @ flat.T)) @ flat
    return jnp.asarray(found.reshape(images.shape))
