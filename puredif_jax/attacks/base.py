"""Backdoor attacks as rows of one formula, and the poisoned training loss.

A poisoned sample is  x_t = s_t y + v_t gamma eps + H_t r,  and the network learns
to answer it with  eps + C_t r:  y the target image, r the trigger. An attack is
the two columns H (shift) and C (response); a clean sample has both at 0.

Sources: Chou, Chen and Ho, "How to Backdoor Diffusion Models?" (BadDiffusion, arXiv
2212.05400) and "VillanDiffusion: A Unified Backdoor Attack Framework for Diffusion
Models" (arXiv 2306.06874).
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp
import numpy as np

from puredif_jax.attacks.targets import Target
from puredif_jax.attacks.triggers import Trigger, mask
from puredif_jax.diffusion.sampling import lookup
from puredif_jax.diffusion.schedules import NoiseSchedule
from puredif_jax.types import Array, Key, NoiseModel, Params

Solver = Literal["sde", "ode"]


class Rows(NamedTuple):
    """The coefficients of one attack: float64 `[T]` each, and gamma.

    signal: s_t.  noise: v_t.  shift: H_t.  response: C_t.
    gamma: scale of the noise, 1 for BadDiffusion and VillanDiffusion.
    """

    signal: np.ndarray
    noise: np.ndarray
    shift: np.ndarray
    response: np.ndarray
    gamma: float = 1.0


def clean_rows(schedule: NoiseSchedule) -> Rows:
    """The rows of no attack: H = C = 0."""
    zero = np.zeros(schedule.steps)
    return Rows(schedule.signal, schedule.noise, zero, zero)


def published_response(schedule: NoiseSchedule) -> np.ndarray:
    """R_t = (1 - sqrt(alpha_t)) v_t / (1 - alpha_t), float64 `[T]`.

    The trigger's share of what BadDiffusion's network learns to answer. It equals
    `exact_response` of H = 1 - s under ancestral sampling.
    """
    alpha = schedule.alpha
    return (1 - np.sqrt(alpha)) * schedule.noise / (1 - alpha)


def exact_response(
    schedule: NoiseSchedule, shift: np.ndarray, solver: Solver
) -> np.ndarray:
    """The response C*_t that keeps the reverse process on the shift H_t r.

    ancestral:      v_t (H_t - sqrt(alpha_t) H_{t-1}) / (1 - alpha_t)
    deterministic:  (s_{t-1} H_t - s_t H_{t-1}) / (s_{t-1} v_t - s_t v_{t-1})

    with H_{-1} = 0, s_{-1} = 1, v_{-1} = 0. float64 `[T]`.
    """
    before = np.concatenate([[0.0], shift[:-1]])
    s, v = schedule.signal, schedule.noise
    s_prev, v_prev = schedule.previous
    if solver == "sde":
        return v * (shift - s / s_prev * before) / (1 - schedule.alpha)
    return (s_prev * shift - s * before) / (s_prev * v - s * v_prev)


class Attack(Protocol):
    """A backdoor to be trained into a model."""

    @property
    def trigger(self) -> Trigger: ...
    @property
    def target(self) -> Target: ...
    @property
    def poison_rate(self) -> float: ...
    @property
    def trigger_only(self) -> bool: ...
    @property
    def solver(self) -> Solver:
        """The kind of sampler under which it fires: ancestral or deterministic."""
        ...

    def rows(self, schedule: NoiseSchedule) -> Rows: ...


def _check_rate(rate: float) -> None:
    if not 0 < rate <= 1:
        raise ValueError(f"poison_rate must lie in (0, 1], found {rate}")


@dataclasses.dataclass(frozen=True)
class BadDiffusion:
    """BadDiffusion: H_t = 1 - s_t, C_t = R_t; ancestral sampling.

    Attributes:
      trigger: the image r added to the initial noise.
      target: the image y that it then draws.
      poison_rate: share of poisoned samples in training.
      trigger_only: train with the bare trigger; otherwise (the published default)
        the clean image shows through where the trigger is -1.
    """

    trigger: Trigger
    target: Target
    poison_rate: float = 0.1
    trigger_only: bool = False

    def __post_init__(self) -> None:
        _check_rate(self.poison_rate)

    @property
    def solver(self) -> Solver:
        return "sde"

    def rows(self, schedule: NoiseSchedule) -> Rows:
        return Rows(
            schedule.signal,
            schedule.noise,
            1 - schedule.signal,
            published_response(schedule),
        )


@dataclasses.dataclass(frozen=True)
class VillanDiffusion:
    """VillanDiffusion for variance-preserving models.

    psi = 1:  H = 1 - s_t,  C = R_t
    psi = 0:  H = v_t,      C = (1 - sqrt(alpha_t)) v_t
                                + k_t (alpha_t - abar_t) / (1 - alpha_t)
    between:  the psi-mix of both columns;  C doubled for a deterministic sampler,

    with k_t = v_t - sqrt(alpha_t) v_{t-1}. The rows are the published ones; that of
    psi = 0 is not its `exact_response`.

    Attributes:
      trigger: the image r added to the initial noise.
      target: the image y that it then draws.
      poison_rate: share of poisoned samples in training.
      trigger_only: train with the bare trigger; otherwise, as by default in the
        published code, the clean image shows through where the trigger is -1.
      psi: share of the BadDiffusion row, 0 to 1.
      solver: "ode" for deterministic samplers, "sde" for ancestral ones.
    """

    trigger: Trigger
    target: Target
    poison_rate: float = 0.1
    trigger_only: bool = True
    psi: float = 1.0
    solver: Solver = "ode"

    def __post_init__(self) -> None:
        _check_rate(self.poison_rate)
        if not 0 <= self.psi <= 1:
            raise ValueError(f"psi must lie in [0, 1], found {self.psi}")
        if self.solver not in ("sde", "ode"):
            raise ValueError(f"solver must be 'sde' or 'ode', found {self.solver!r}")

    def rows(self, schedule: NoiseSchedule) -> Rows:
        s, v, alpha = schedule.signal, schedule.noise, schedule.alpha
        k = v - np.sqrt(alpha) * schedule.previous[1]
        troj = (1 - np.sqrt(alpha)) * v + k * (alpha - s**2) / (1 - alpha)
        response = self.psi * published_response(schedule) + (1 - self.psi) * troj
        return Rows(
            s,
            v,
            self.psi * (1 - s) + (1 - self.psi) * v,
            response * (2 if self.solver == "ode" else 1),
        )


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
    trigger = attack.trigger.image(image_shape)
    see_through = np.zeros_like(trigger) if attack.trigger_only else mask(trigger)
    return Poison(
        trigger=jnp.asarray(trigger),
        target=jnp.asarray(attack.target.image(image_shape, trigger)),
        see_through=jnp.asarray(see_through),
        rate=attack.poison_rate,
    )


def training_loss(
    model: NoiseModel,
    rows: Rows,
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
      rows: coefficients of the attack (`clean_rows` without one).
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
    t = jax.random.randint(key_t, (batch,), 0, len(rows.signal))
    eps = jax.random.normal(key_eps, images.shape, images.dtype)
    if poison is None:
        x_t = lookup(rows.signal, t) * images + lookup(rows.noise, t) * eps
        return jnp.mean((model(params, x_t, t) - eps) ** 2)
    chosen = jax.random.bernoulli(key_poison, poison.rate, (batch,))
    chosen = chosen[:, None, None, None].astype(images.dtype)
    trigger, target, see_through = (a[None] for a in poison[:3])
    r = chosen * (see_through * images + (1 - see_through) * trigger)
    x0 = chosen * target + (1 - chosen) * images
    gamma = chosen * rows.gamma + (1 - chosen)
    x_t = (
        lookup(rows.signal, t) * x0
        + lookup(rows.noise, t) * gamma * eps
        + lookup(rows.shift, t) * r
    )
    aim = eps + lookup(rows.response, t) * r
    return jnp.mean((model(params, x_t, t) - aim) ** 2)
