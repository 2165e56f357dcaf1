"""Samplers: reverse processes on grids of timesteps, each run as one `lax.scan`.

Sources: spacings (Lin et al. 2024, arXiv 2305.08891), dynamic thresholding (Saharia et
al. 2022, 2205.11487).
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any, Literal, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np

from puredif_jax.diffusion.prediction import Estimates, estimates, lookup
from puredif_jax.diffusion.schedules import NoiseSchedule
from puredif_jax.types import Array, Key, NoiseModel, Params, Shard, unsharded


@dataclasses.dataclass(frozen=True)
class Sampler(abc.ABC):
    """A reverse process on a grid of timesteps.

    A multistep sampler remembers something of the steps before, a tree of arrays; the
    memory of the others is ().
    """

    @property
    @abc.abstractmethod
    def steps(self) -> int:
        """Model evaluations."""

    @abc.abstractmethod
    def path(self, schedule: NoiseSchedule) -> tuple[np.ndarray, np.ndarray]:
        """(t, t_prev) of each step, from high t to low, int32 `[n]`; -1 is clean.

        Raises:
          ValueError: the schedule has no such grid.
        """

    def keeping(self, psi: float | None) -> Sampler:
        """This sampler, on the path of a backdoor of `psi` if it keeps one's path."""
        return self

    def begin(self, x: Array) -> Any:
        """The memory before the first step, from images like x."""
        return ()

    @abc.abstractmethod
    def step(
        self,
        schedule: NoiseSchedule,
        found: Estimates,
        x: Array,
        t: Array,
        t_prev: Array,
        key: Key,
        memory: Any,
    ) -> tuple[Array, Any]:
        """x at t_prev, and the memory, from x at t, what the network makes of it and
        the memory; t, t_prev scalars."""


Spacing = Literal["leading", "linspace", "trailing"]
Variance = Literal["fixed_small", "fixed_large"]


def grid(
    schedule: NoiseSchedule, steps: int, spacing: Spacing = "leading", offset: int = 0
) -> np.ndarray:
    """The timesteps of a strided sampler, rising, int32 `[steps]`.

    The three spacings of diffusers (Lin et al. 2024, table 2), for n steps out of T:
    leading: 0, k, 2k, ... with k = T // n, plus offset; linspace: n from 0 to T - 1,
    rounded; trailing: down from T - 1 by T / n, rounded, where that makes n of them.

    Raises:
      ValueError: steps is not in 1..T, or a timestep is not in 0..T-1.
    """
    total = schedule.steps
    if not 1 <= steps <= total:
        raise ValueError(f"a sampler needs 1 to {total} steps, found {steps}")
    found: np.ndarray
    if spacing == "leading":
        found = np.arange(steps) * (total // steps) + offset
    elif spacing == "linspace":
        found = np.linspace(0, total - 1, steps).round()
    elif spacing == "trailing":
        found = np.round(np.arange(total, 0, -total / steps))[::-1] - 1
        if len(found) != steps:
            raise ValueError(
                f"trailing spacing of {total} timesteps by {total}/{steps} rounds to "
                f"{len(found)}, as in diffusers: {steps} steps cannot be had"
            )
    else:
        valid = ", ".join(get_args(Spacing))
        raise ValueError(f"spacing must be one of {valid}, found {spacing!r}")
    if not 0 <= found[0] <= found[-1] < total:
        raise ValueError(
            f"timesteps must lie in 0..{total - 1}, found {found[0]:g} to "
            f"{found[-1]:g} by steps={steps}, spacing={spacing!r}, offset={offset}"
        )
    return found.astype(np.int32)


def to_next(rising: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The path on which each timestep leads to the one below, the last to clean."""
    before = np.concatenate([[-1], rising[:-1]]).astype(np.int32)
    return rising[::-1], before[::-1]


def endpoints(
    schedule: NoiseSchedule, t: Array, t_prev: Array
) -> tuple[Array, Array, Array, Array]:
    """(s_t, v_t, s_prev, v_prev) with s_{-1} = 1, v_{-1} = 0."""
    signal = np.concatenate([schedule.signal, [1.0]])
    noise = np.concatenate([schedule.noise, [0.0]])
    return (
        lookup(signal, t),
        lookup(noise, t),
        lookup(signal, t_prev),
        lookup(noise, t_prev),
    )


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Dynamic thresholding of x0hat (Saharia et al. 2022, section 2.3).

    With q the quantile of |x0hat| over all pixels of an image, and b = q within
    1..most: x0hat is clipped to [-b, b] and divided by b. "thresholding" in diffusers.

    Attributes:
      ratio: which quantile.
      most: the largest b.
    """

    ratio: float = 0.995
    most: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.ratio <= 1 <= self.most < math.inf):
            raise ValueError(
                "a threshold needs 0 <= ratio <= 1 <= most, found "
                f"ratio={self.ratio} and most={self.most}"
            )

    def __call__(self, x0: Array) -> Array:
        """x0hat `[B, H, W, C]`, bounded."""
        q = jnp.quantile(jnp.abs(x0), self.ratio, axis=(1, 2, 3), keepdims=True)
        bound = jnp.clip(q, 1.0, self.most)
        return jnp.clip(x0, -bound, bound) / bound


Clip = float | Threshold | None


def bounded(x0: Array, clip: Clip) -> Array:
    if isinstance(clip, Threshold):
        return clip(x0)
    return x0 if clip is None else jnp.clip(x0, -clip, clip)


def unclipped(sampler: Sampler) -> Sampler | None:
    """The same sampler without a bound on x0hat; None if it has none."""
    if getattr(sampler, "clip", None) is None:
        return None
    free: Sampler = dataclasses.replace(cast(Any, sampler), clip=None)
    return free


def trajectory(
    model: NoiseModel,
    params: Params,
    schedule: NoiseSchedule,
    sampler: Sampler,
    start: Array,
    key: Key,
    *,
    remat: bool = False,
    shard: Shard = unsharded,
) -> tuple[Array, Array]:
    """Runs the reverse process from `start` as one `lax.scan`.

    Args:
      model: predicts the noise.
      params: its parameters.
      schedule: the forward process that the model was trained on.
      sampler: the rule of one step and the number n of steps.
      start: x_T, `[B, H, W, C]`; add a trigger here.
      key: randomness of stochastic samplers.
      remat: recompute the network in the backward pass, so that memory stays
        nearly flat in the number of steps when the chain is differentiated.
      shard: constraint put on the batch at each step.

    Returns:
      The images `[B, H, W, C]`, unclipped, and the estimate x0hat (unbounded) at each
      step, `[n, B, H, W, C]`, from high t to low.
    """
    t_all, n_all = map(jnp.asarray, sampler.path(schedule))

    def body(
        carry: tuple[Array, Any], pair: tuple[Array, Array]
    ) -> tuple[tuple[Array, Any], Array]:
        (x, memory), (t, t_prev) = carry, pair
        found = estimates(model, params, schedule, x, t)
        step_key = jax.random.fold_in(key, t)
        x_prev, memory = sampler.step(schedule, found, x, t, t_prev, step_key, memory)
        return (shard(x_prev), memory), found.x0

    if remat:
        body = jax.checkpoint(body, prevent_cse=False)
    first = (shard(start), sampler.begin(start))
    (images, _), x0 = jax.lax.scan(body, first, (t_all, n_all))
    return images, x0


def sample(
    model: NoiseModel,
    params: Params,
    schedule: NoiseSchedule,
    sampler: Sampler,
    start: Array,
    key: Key,
    *,
    shard: Shard = unsharded,
) -> Array:
    """The images of `trajectory`: `[B, H, W, C]`, unclipped. Arguments as there.

    Call it in a compiled program: eagerly, the estimates of all steps are kept, too.
    """
    return trajectory(model, params, schedule, sampler, start, key, shard=shard)[0]
