"""Compiled programs on one model, each made once for what it is made of.

Arguments of a function here, with the `Setup`, are all that its program closes over.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from puredif_jax.attacks.channel import Channel
from puredif_jax.attacks.drawing import draw
from puredif_jax.defenses.features import (
    Evidence,
    Features,
    denoising,
    evidence,
    features,
)
from puredif_jax.defenses.path_errors import Errors, errors
from puredif_jax.diffusion.sampling import Sampler
from puredif_jax.stages.setup import Setup
from puredif_jax.types import Array, Candidate, Key, Params

KEPT = 4  # programs of a kind; of what is dropped the memory comes back


@functools.lru_cache(KEPT)
def drawing(setup: Setup, sampler: Sampler) -> Callable[..., Array]:
    def drawn(
        params: Params, delta: Array, sign: Array, key: Key, inside: Channel | None
    ) -> Array:
        key_start, key_chain = jax.random.split(key)
        shape = (setup.batch, *setup.image_shape)
        return draw(
            setup.model,
            params,
            setup.schedule,
            sampler,
            sign * jax.random.normal(key_start, shape),
            delta,
            key_chain,
            inside=inside,
            shard=setup.shard,
        )

    return jax.jit(drawn)


@functools.lru_cache(KEPT)
def measuring(setup: Setup) -> Callable[..., Features]:
    def measure(
        params: Params,
        channel: Channel,
        candidate: Candidate,
        found: Errors,
        heldout: Array,
        falling: Array,
        placebos: Array,
        triggered: Array,
        plain: Array,
        key: Key,
    ) -> Features:
        return features(
            setup.model,
            params,
            setup.schedule,
            channel,
            candidate,
            found,
            heldout,
            falling,
            placebos,
            triggered,
            plain,
            key,
            shard=setup.shard,
        )

    return jax.jit(measure)


@functools.lru_cache(KEPT)
def erring(setup: Setup, draws: int) -> Callable[..., Errors]:
    def measure(
        params: Params,
        channel: Channel,
        candidate: Candidate,
        plain: Array,
        lone: Array,
        key: Key,
    ) -> Errors:
        return errors(
            setup.model,
            params,
            setup.schedule,
            channel,
            candidate,
            plain,
            lone,
            key,
            draws=draws,
            shard=setup.shard,
        )

    return jax.jit(measure)


@functools.lru_cache(KEPT)
def showing(setup: Setup) -> Callable[..., Evidence]:
    def denoise(
        params: Params, channel: Channel, candidate: Candidate, key: Key
    ) -> Evidence:
        return evidence(
            setup.model,
            params,
            setup.schedule,
            channel,
            candidate,
            key,
            shard=setup.shard,
        )

    return jax.jit(denoise)


@functools.lru_cache(KEPT)
def judging_denoiser(setup: Setup) -> Callable[..., Array]:
    def measure(params: Params, plain: Array, key: Key) -> Array:
        return denoising(
            setup.model, params, setup.schedule, plain, key, shard=setup.shard
        )

    return jax.jit(measure)


def repeated(
    step: Callable[..., tuple[Any, Any]],
    state: Any,
    count: Array | int,
    most: int,
    inputs: Any = None,
) -> tuple[Any, Any]:
    """`count` steps of (state, input) -> (state, info); one program for any count.

    So a result is the same bit for bit wherever the calls of a loop end.

    Args:
      step: what is repeated.
      state: before the first step.
      count: of steps; traced.
      most: bound of `count`, and the rows of `inputs`.
      inputs: arrays with a row for each step, or None.

    Returns:
      The state, and the infos, `[most, ...]`, which are 0 for steps not taken.
    """

    def row(i: Array | int) -> Any:
        at = functools.partial(jax.lax.dynamic_index_in_dim, index=i, keepdims=False)
        return jax.tree.map(at, inputs)

    def body(i: Array, both: tuple[Any, Any]) -> tuple[Any, Any]:
        state, infos = both
        state, info = step(state, row(i))
        put = jax.lax.dynamic_update_index_in_dim
        return state, jax.tree.map(lambda x, y: put(x, y, i, 0), infos, info)

    step = jax.jit(step, inline=True)  # traced once, here
    _, info = jax.eval_shape(step, state, row(0))
    infos = jax.tree.map(lambda x: jnp.zeros((most, *x.shape), x.dtype), info)
    both: tuple[Any, Any] = jax.lax.fori_loop(0, count, body, (state, infos))
    return both
