"""Training of a noise model, clean or poisoned, as a pair of pure functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from puredif_jax.types import Array, Key, Params


@struct.dataclass
class TrainState:
    """Everything that training carries from step to step.

    params: the network.  ema_params: their moving average, the model that is kept.
    opt_state: of the optimiser.  key: root of all randomness.  step: steps done.
    """

    params: Params
    ema_params: Params
    opt_state: optax.OptState
    key: Key
    step: Array


class TrainInfo(NamedTuple):
    """Diagnostics of one step: scalars."""

    loss: Array
    grad_norm: Array


@dataclasses.dataclass(frozen=True)
class Training:
    """Adam with linear warm-up, cosine decay and gradient clipping.

    Attributes:
      steps: optimiser steps in all.
      batch: images a step, over all devices.
      learning_rate: peak, reached after the warm-up; decays to 0 by a cosine.
      warmup: steps of linear warm-up.
      clip: bound on the global norm of the gradient.
      ema_decay: of the moving average, reached by min(ema_decay, (1 + n) / (10 + n))
        after n steps, so that the average of a short training forgets where it began;
        0 keeps the parameters themselves.
      cosine: decay to 0 by a cosine; False holds the rate after the warm-up.
    """

    steps: int
    batch: int = 128
    learning_rate: float = 2e-4
    warmup: int = 500
    clip: float = 1.0
    ema_decay: float = 0.0
    cosine: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "learning_rate", "clip"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, found {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), found {self.ema_decay}")
        if not 0 <= self.warmup <= self.steps:
            raise ValueError(
                f"warmup must lie in 0..steps={self.steps}, found {self.warmup}"
            )

    def optimizer(self) -> optax.GradientTransformation:
        """The optax transformation that these numbers describe."""
        if self.cosine and self.warmup < self.steps:
            rate = optax.warmup_cosine_decay_schedule(
                0.0, self.learning_rate, self.warmup, self.steps
            )
        elif self.warmup:
            rate = optax.linear_schedule(0.0, self.learning_rate, self.warmup)
        else:
            rate = self.learning_rate
        return optax.chain(optax.clip_by_global_norm(self.clip), optax.adam(rate))


Loss = Callable[[Params, Array, Key], Array]


class Trainer(NamedTuple):
    """init(params, key) -> state;  step(state, images) -> (state, info)."""

    init: Callable[[Params, Key], TrainState]
    step: Callable[[TrainState, Array], tuple[TrainState, TrainInfo]]


def trainer(loss: Loss, training: Training) -> Trainer:
    """Makes the two functions of a training run.

    Args:
      loss: (params, images `[B, H, W, C]`, key) -> scalar.
      training: hyperparameters.

    Returns:
      `init` and `step`, neither of them jitted. The key of step n is
      `fold_in(state.key, n)`, so a resumed run repeats the same draws.
    """
    optimizer = training.optimizer()

    def init(params: Params, key: Key) -> TrainState:
        return TrainState(
            params=params,
            ema_params=jax.tree.map(jnp.copy, params),
            opt_state=optimizer.init(params),
            key=key,
            step=jnp.zeros((), jnp.int32),
        )

    def step(state: TrainState, images: Array) -> tuple[TrainState, TrainInfo]:
        key = jax.random.fold_in(state.key, state.step)
        value, grads = jax.value_and_grad(loss)(state.params, images, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        n = state.step.astype(jnp.float32)
        decay = jnp.minimum(training.ema_decay, (1 + n) / (10 + n))
        ema = optax.incremental_update(params, state.ema_params, 1 - decay)
        info = TrainInfo(loss=value, grad_norm=optax.tree.norm(grads))
        state = dataclasses.replace(
            state,
            params=params,
            ema_params=ema,
            opt_state=opt_state,
            step=state.step + 1,
        )
        return state, info

    return Trainer(init, step)
