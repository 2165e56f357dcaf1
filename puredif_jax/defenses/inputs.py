"""Is a starting noise triggered? Statistics of x_T, and how likely plain noise is.

In deviations of the noise a plain start is z ~ N(0, 1) and a triggered one
z ~ N(r, gamma^2), whatever the process. A test gives each z a number, the larger the
more like a trigger. The same test on plain noise of one's own makes the number a
p-value.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import chi2, norm

from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.diffusion.sampling import Sampler, trajectory
from puredif_jax.diffusion.schedules import NoiseSchedule
from puredif_jax.types import Array, Key, NoiseModel, Params, Shard, unsharded


class Suspect(NamedTuple):
    """A model, and the trigger that it is suspected of.

    model, params, schedule: the model.
    delta: the trigger, `[H, W, C]`.  gamma: scale of the noise, `[]` or `[H, W, C]`.
    """

    model: NoiseModel
    params: Params
    schedule: NoiseSchedule
    delta: Array
    gamma: Array

    @property
    def mean(self) -> Array:
        """r in deviations of the noise, `[H, W, C]`."""
        return deviations(
            self.schedule, self.schedule.start(0.0 * self.delta, self.delta)
        )


def deviations(schedule: NoiseSchedule, x: Array) -> Array:
    """z of the images x from which sampling starts, of any shape."""
    zero, one = (schedule.start(np.float64(each)) for each in (0, 1))
    found: Array = (x - zero) / (one - zero)
    return found


@dataclasses.dataclass(frozen=True)
class InputTest(abc.ABC):
    """A statistic of a starting noise."""

    name: ClassVar[str]

    @abc.abstractmethod
    def __call__(
        self, suspect: Suspect, z: Array, key: Key, *, shard: Shard = unsharded
    ) -> Array:
        """The statistic of each z, `[B]` of `[B, H, W, C]`; large if triggered."""


class Likelihood(InputTest):
    """The log-likelihood ratio of N(r, gamma^2) to N(0, 1), summed over an image.

    The most powerful test where r and gamma are the true ones (Neyman and Pearson), and
    TERD's input detection (Mo et al. 2024, arXiv 2409.05294), whose threshold is 0.
    """

    name = "likelihood"

    def __call__(
        self, suspect: Suspect, z: Array, key: Key, *, shard: Shard = unsharded
    ) -> Array:
        gamma = jnp.broadcast_to(suspect.gamma, suspect.delta.shape)[None]
        away = (z - suspect.mean[None]) / gamma
        return jnp.sum(z**2 / 2 - away**2 / 2 - jnp.log(gamma), (1, 2, 3))


@dataclasses.dataclass(frozen=True)
class Whiteness(InputTest):
    """Is z plain noise? It needs neither the model nor a trigger.

    There are three kinds of scores: the energy (sum z^2, by the chi-squared
    distribution), the means of squares of 1, 2, 4, ... pixels, in each channel and in
    all together, and the products of neighbours. The statistic is -log of their least
    p-value times their number.
    """

    name = "whiteness"

    def __call__(
        self, suspect: Suspect, z: Array, key: Key, *, shard: Shard = unsharded
    ) -> Array:
        count, (height, width) = z[0].size, z.shape[1:3]
        energy = jnp.sum(z**2, (1, 2, 3))
        upper, lower = chi2.sf(energy, count), chi2.cdf(energy, count)
        logs = [jnp.log(2 * jnp.minimum(upper, lower).clip(1e-30))]
        for axis in (1, 2):
            first = jax.lax.slice_in_dim(z, 0, z.shape[axis] - 1, axis=axis)
            second = jax.lax.slice_in_dim(z, 1, None, axis=axis)
            score = jnp.sum(first * second, (1, 2, 3)) / first[0].size ** 0.5
            logs.append(_two_sided(score, 1))
        for images in (z, jnp.sum(z, 3, keepdims=True) / z.shape[3] ** 0.5):
            side = 1
            while side <= min(height, width):
                logs.append(_squares(images, side))
                side *= 2
        return -jnp.min(jnp.stack(logs), axis=0) - float(np.log(len(logs)))


def _two_sided(score: Array, count: int) -> Array:
    """log of the p-value of a score that is the largest |score| of so many."""
    return norm.logsf(jnp.abs(score)) + float(np.log(2 * count))


def _squares(images: Array, side: int) -> Array:
    """log of the p-value of the means of squares, `[B]` of `[B, H, W, C]`.

    Edges are left out.
    """
    rows, columns = (size // side for size in images.shape[1:3])
    cut = images[:, : rows * side, : columns * side]
    parts = cut.reshape(len(cut), rows, side, columns, side, -1)
    score = jnp.max(jnp.abs(jnp.sum(parts, (2, 4))), (1, 2, 3)) / side
    return _two_sided(score, rows * columns * images.shape[3])


@dataclasses.dataclass(frozen=True)
class Drift(InputTest):
    """How far early estimates are from the image drawn; it needs no trigger.

    On the path of a backdoor the model's own x0hat_t is the target plus a bias of
    (H_t - v_t C_t) r / s_t, which a plain draw lacks. The statistic is the log of

      sum_t w_t mean (x0hat_t - x0)^2 / sum_t w_t,    w_t = s_t^2 / (s_t^2 + v_t^2),

    over the first half of the path, x0 the image drawn.

    Attributes:
      sampler: a sampler under which the backdoor would fire.
    """

    sampler: Sampler = DDIM(steps=20)

    name = "drift"

    def __call__(
        self, suspect: Suspect, z: Array, key: Key, *, shard: Shard = unsharded
    ) -> Array:
        schedule = suspect.schedule
        times, _ = self.sampler.path(schedule)
        start = schedule.start(z, first=int(times[0]))
        images, chain = trajectory(
            suspect.model,
            suspect.params,
            schedule,
            self.sampler,
            shard(start),
            key,
            shard=shard,
        )
        early = times[: len(times) // 2 + 1]
        signal, noise = schedule.signal[early] ** 2, schedule.noise[early] ** 2
        weights = jnp.asarray(signal / (signal + noise), jnp.float32)
        away = jnp.mean((chain[: len(early)] - images[None]) ** 2, (2, 3, 4))
        return jnp.log(jnp.tensordot(weights, away, 1) / jnp.sum(weights))


def p_values(statistic: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """How likely plain noise has so large a statistic, `[B]`.

    (1 + the number of `plain` that are as large) / (1 + all of them). This is exact for
    any test. `plain`, `[N]`, has the test's values of N plain starts. A statistic that
    is NaN has 1 / (1 + N), as plain noise never gives one.
    """
    ranked = np.sort(plain)
    as_large = len(ranked) - np.searchsorted(ranked, statistic, side="left")
    as_large = np.where(np.isnan(statistic), 0, as_large)
    found: np.ndarray = (1 + as_large) / (1 + len(ranked))
    return found
