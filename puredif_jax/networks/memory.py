"""Memory that does not grow with the batch: a network evaluated in slices.

Sampling and inversion fold noise draws, timesteps and candidates into one batch of
hundreds of images. `sliced` evaluates the network on a part of them at a time, inside
any vmap and gradient; `activations` tells how large a part a device can hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from puredif_jax.types import Array, NoiseModel, Params, Shard, unsharded


def sliced(model: NoiseModel, together: int, shard: Shard = unsharded) -> NoiseModel:
    """A model that evaluates another on at most `together` images at a time.

    Its axes of vmap are folded into the batch first, and under a gradient each slice
    is evaluated again in the backward pass, so that only inputs are kept. The gradient
    in x is exact; none reaches the parameters or t, so it does not train a network. The
    parameters cannot be vmapped.

    Args:
      model: the network.
      together: images at a time.
      shard: constraint on a slice.

    Raises:
      ValueError: together is below 1; when called, the parameters are vmapped.
    """
    if together < 1:
        raise ValueError(f"together must be 1 or more, found {together}")

    def one_by_one(function: Callable[..., Array]) -> Callable[..., Array]:
        def whole(params: Params, *arrays: Array) -> Array:
            return function(params, *(shard(x) for x in arrays))

        @custom_vmap
        def run(params: Params, *arrays: Array) -> Array:
            count = arrays[0].shape[0]
            if count <= together:
                return whole(params, *arrays)
            full = count - count % together
            parts = [x[:full].reshape(-1, together, *x.shape[1:]) for x in arrays]
            out: Array = jax.lax.map(lambda part: whole(params, *part), parts)
            out = out.reshape(full, *out.shape[2:])
            if full == count:
                return out
            rest = whole(params, *(x[full:] for x in arrays))
            return jnp.concatenate([out, rest])

        @run.def_vmap
        def fold(
            size: int, batched: Any, params: Params, *arrays: Array
        ) -> tuple[Array, bool]:
            if any(jax.tree.leaves(batched[0])):
                raise ValueError("a sliced model cannot be vmapped over parameters")
            spread = (
                x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
                for x, is_batched in zip(arrays, batched[1:], strict=True)
            )
            out = run(params, *(x.reshape(-1, *x.shape[2:]) for x in spread))
            return out.reshape(size, -1, *out.shape[1:]), True

        return run

    def pullback(params: Params, x: Array, t: Array, cotangent: Array) -> Array:
        found: Array = jax.vjp(lambda x: model(params, x, t), x)[1](cotangent)[0]
        return found

    forward, backward = one_by_one(model), one_by_one(pullback)

    @jax.custom_vjp
    def noise(params: Params, x: Array, t: Array) -> Array:
        return forward(params, x, t)

    noise.defvjp(
        lambda params, x, t: (forward(params, x, t), (params, x, t)),
        lambda kept, cotangent: (None, backward(*kept, cotangent), None),
    )
    return noise


def activations(
    model: NoiseModel, params: Params, image_shape: tuple[int, int, int]
) -> int:
    """Bytes that one image adds to what a gradient in the input has to keep.

    The size of all that the forward pass leaves to the backward pass, for two images
    less that for one. A compiled program needs less where it fuses. Nothing is
    compiled or run: `params` may be of `jax.ShapeDtypeStruct`.
    """

    def pullback(params: Params, x: Array, t: Array) -> Any:
        return jax.vjp(lambda x: model(params, x, t), x)[1]

    def kept(count: int) -> int:
        x = jax.ShapeDtypeStruct((count, *image_shape), jnp.float32)
        t = jax.ShapeDtypeStruct((count,), jnp.int32)
        leaves = jax.tree.leaves(jax.eval_shape(pullback, params, x, t))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    return kept(2) - kept(1)
