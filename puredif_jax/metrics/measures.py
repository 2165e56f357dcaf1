"""Measures of triggers, of draws and of image sets.

Pixel errors of draws are in [0, 1]; triggers are compared as they are, in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from puredif_jax.types import Array

MSE_THRESHOLDS = (1e-3, 1e-2, 1e-1)
SSIM_THRESHOLD = 0.8
_RATES = tuple(f"mse<{limit:g}" for limit in MSE_THRESHOLDS)
SUCCESS = (*_RATES, f"ssim>{SSIM_THRESHOLD:g}", "mean_mse", "mean_ssim")
"""The names of what `success` returns."""


class TriggerDistance(NamedTuple):
    """How far an inverted trigger is from the true one; scalars.

    relative_l2: ||delta - r|| / ||r||.  cosine: <delta, r> / (||delta|| ||r||).
    mse: mean (delta - r)^2.  max_error: max |delta - r|; both of images in [-1, 1].
    norm_ratio: ||delta|| / ||r||.
    """

    relative_l2: Array
    cosine: Array
    mse: Array
    max_error: Array
    norm_ratio: Array


def trigger_distance(delta: ArrayLike, trigger: ArrayLike) -> TriggerDistance:
    """Compares two triggers `[H, W, C]` of equal shape; the second must not be 0."""
    delta, trigger = jnp.asarray(delta), jnp.asarray(trigger)
    chex.assert_equal_shape([delta, trigger])
    error = delta - trigger
    norm, norm_r = jnp.linalg.norm(delta.ravel()), jnp.linalg.norm(trigger.ravel())
    return TriggerDistance(
        relative_l2=jnp.linalg.norm(error.ravel()) / norm_r,
        cosine=jnp.vdot(delta, trigger) / jnp.maximum(norm * norm_r, 1e-12),
        mse=jnp.mean(error**2),
        max_error=jnp.max(jnp.abs(error)),
        norm_ratio=norm / norm_r,
    )


def to_unit(images: ArrayLike) -> Array:
    """Images in [-1, 1] to [0, 1], clipped as they would be when saved."""
    return jnp.clip((jnp.asarray(images) + 1) / 2, 0, 1)


def mse(images: ArrayLike, target: ArrayLike) -> Array:
    """Mean squared error to a target in [0, 1] units: `[B]`.

    images `[B, H, W, C]` and target `[H, W, C]`, both in [-1, 1].
    """
    return jnp.mean((to_unit(images) - to_unit(target)[None]) ** 2, axis=(1, 2, 3))


def ssim(
    images: ArrayLike, target: ArrayLike, window: int = 11, sigma: float = 1.5
) -> Array:
    """Structural similarity (Wang et al. 2004) to a target: `[B]`.

    Gaussian window of `window` pixels (of the image, where that is smaller), without
    padding, averaged over positions and channels; c1 = 0.01^2, c2 = 0.03^2 for a data
    range of 1. Inputs as for `mse`.
    """
    x = to_unit(jnp.asarray(images))
    window = min(window, *x.shape[1:3])
    offsets = np.arange(window) - (window - 1) / 2
    kernel = np.exp(-(offsets**2) / (2 * sigma**2))
    kernel /= kernel.sum()

    def bands(length: int) -> Array:
        """The blur of one axis as a matrix `[length - window + 1, length]`."""
        rows = [
            np.roll(np.pad(kernel, (0, length - window)), i)
            for i in range(length - window + 1)
        ]
        return jnp.asarray(np.stack(rows), jnp.float32)

    over_rows, over_columns = bands(x.shape[1]), bands(x.shape[2])

    def blur(x: Array) -> Array:
        return jnp.einsum(
            "ph,qw,bhwc->bpqc", over_rows, over_columns, x, precision="highest"
        )

    y = jnp.broadcast_to(to_unit(target)[None], x.shape)
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    index = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    index /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return jnp.mean(index, axis=(1, 2, 3))


def success(images: ArrayLike, target: ArrayLike) -> dict[str, float]:
    """Attack success of draws `[B, H, W, C]` against a target `[H, W, C]`.

    Returns the rates at MSE < 1e-3, 1e-2 and 1e-1 and SSIM > 0.8, side by side (the
    field has no standard threshold), and the means of both measures.
    """
    error = np.asarray(mse(images, target))
    similarity = np.asarray(ssim(images, target))
    found = (
        *((error < limit).mean() for limit in MSE_THRESHOLDS),
        (similarity > SSIM_THRESHOLD).mean(),
        error.mean(),
        similarity.mean(),
    )
    return dict(zip(SUCCESS, map(float, found), strict=True))


class Moments(NamedTuple):
    """The moments of the features of a set of images, float64.

    mean: `[F]`.  covariance: `[F, F]`, with N - 1 in the denominator.
    """

    mean: np.ndarray
    covariance: np.ndarray


def moments(features: np.ndarray) -> Moments:
    """The moments of features `[N, F]`.

    Raises:
      ValueError: there are fewer than two rows.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(
            "moments need features [N, F] of two rows or more, found shape "
            f"{features.shape}"
        )
    wide = np.asarray(features, np.float64)
    return Moments(wide.mean(0), np.atleast_2d(np.cov(wide, rowvar=False)))


def frechet_distance(first: Moments, second: Moments) -> float:
    """||m1 - m2||^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    In float64; NaN where a moment is. It is the FID of Heusel et al. 2017 only if the
    features are from their Inception network; name the network beside the number.

    Raises:
      ValueError: the widths differ.
    """
    (mean_1, cov_1), (mean_2, cov_2) = first, second
    if mean_1.shape != mean_2.shape:
        raise ValueError(
            "frechet_distance needs moments of one width, found "
            f"{mean_1.shape} and {mean_2.shape}"
        )
    if not all(np.isfinite(each).all() for each in (*first, *second)):
        return float("nan")
    values, vectors = np.linalg.eigh(cov_1)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ cov_2 @ root)
    distance = np.sum((mean_1 - mean_2) ** 2) + np.trace(cov_1) + np.trace(cov_2)
    return float(distance - 2 * np.sum(np.sqrt(np.maximum(cross, 0))))


def auc(positive: ArrayLike, negative: ArrayLike) -> float:
    """Area under the ROC curve: share of pairs in which the positive scores higher.

    Ties count for a half (Mann-Whitney). positive `[n]`, negative `[m]`, scores of
    backdoored and of clean models.
    """
    high, low = np.asarray(positive)[:, None], np.asarray(negative)[None]
    return float(np.mean((high > low) + 0.5 * (high == low)))


def share_interval(count: int, total: int) -> tuple[float, float]:
    """95 % interval of Wilson (1927) for a share, seen `count` times of `total`.

    (p + z^2/2n +- z sqrt(p (1 - p) / n + z^2/4n^2)) / (1 + z^2/n), z = 1.96.

    Raises:
      ValueError: nothing was seen.
    """
    if total < 1:
        raise ValueError(f"a share needs a total of 1 or more, found {total}")
    p, z2 = count / total, 1.959964**2 / total
    middle = p + z2 / 2
    half = (z2 * (p * (1 - p) + z2 / 4)) ** 0.5
    return float((middle - half) / (1 + z2)), float((middle + half) / (1 + z2))


def true_positive_rate(
    positive: ArrayLike, negative: ArrayLike, false_positives: float = 0.01
) -> float:
    """Share of positives above a threshold that so few negatives exceed.

    The threshold is the least that at most `false_positives` of `negative` exceed.
    positive `[n]`, negative `[m]`.

    Raises:
      ValueError: `false_positives` is not in [0, 1).
    """
    if not 0 <= false_positives < 1:
        raise ValueError(f"false_positives must lie in [0, 1), found {false_positives}")
    ranked = np.sort(np.asarray(negative))
    allowed = int(np.floor(false_positives * len(ranked)))
    return float(np.mean(np.asarray(positive) > ranked[len(ranked) - 1 - allowed]))


def bootstrap(
    statistic: Callable[..., float],
    *samples: ArrayLike,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % interval of a statistic of samples, by the percentiles of resampled ones.

    Each sample, `[n]` or `[n, ...]`, is resampled with replacement by itself (Efron
    1979). Where every resample has the same value, as an AUC of 1, so has the interval.
    """
    rng, arrays = np.random.default_rng(seed), [np.asarray(x) for x in samples]
    found = [
        statistic(*(x[rng.integers(0, len(x), len(x))] for x in arrays))
        for _ in range(resamples)
    ]
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)
