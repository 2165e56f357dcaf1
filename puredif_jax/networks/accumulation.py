"""Gradients of a batch that are computed a few images at a time, and added up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from puredif_jax.types import Array, BatchLoss, Params


@dataclasses.dataclass(frozen=True)
class Accumulation:
    """Takes a batch apart: a device computes the gradient of a few images at a time.

    The mean and its gradient are the whole batch's, up to rounding. Forward and
    backward pass of a part follow each other, so that memory, and on a CPU the caches,
    hold what one part needs.

    Attributes:
      together: bound of the images that a device takes at once. It takes the largest
        divisor of its own number within that.
      mesh: of the devices over which the batch is split along its first axis; None for
        one device.

    Raises:
      ValueError: together is below 1.
    """

    together: int
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        if self.together < 1:
            raise ValueError(f"together must be 1 or more, found {self.together}")

    def __call__(self, loss: BatchLoss) -> BatchLoss:
        """The same loss, whose gradient in the parameters is computed by parts.

        No gradient reaches the batch. The gradient comes with the value, in one pass,
        so it has no gradient of its own.
        """

        both = jax.value_and_grad(loss)

        @jax.custom_vjp
        def mean(params: Params, batch: Any) -> Array:
            value: Array = self._on_devices(loss)(params, batch)
            return value

        def forward(params: Params, batch: Any) -> tuple[Array, Params]:
            value, grads = self._on_devices(both)(params, batch)
            return value, grads

        def backward(grads: Params, cotangent: Array) -> tuple[Params, None]:
            return jax.tree.map(lambda x: cotangent * x, grads), None

        mean.defvjp(forward, backward)

        def chosen(params: Params, batch: Any) -> Array:
            count = len(jax.tree.leaves(batch)[0])
            devices = 1 if self.mesh is None else self.mesh.size
            if count % devices or self._size(count // devices) == count // devices:
                return loss(params, batch)
            return mean(params, batch)

        return chosen

    def _size(self, own: int) -> int:
        """How many of a device's images it takes at once."""
        return next(n for n in range(min(self.together, own), 0, -1) if own % n == 0)

    def _on_devices(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The mean of a function over the parts of all devices.

        Each device adds up its own parts before any two devices exchange something.
        """

        def own(params: Params, batch: Any) -> Any:
            count = len(jax.tree.leaves(batch)[0])
            size = self._size(count)

            def add(total: Any, part: Any) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, total, function(params, part)), None

            parts = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), batch)
            like = jax.eval_shape(function, params, jax.tree.map(lambda x: x[0], parts))
            zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
            total, _ = jax.lax.scan(add, zero, parts)
            return jax.tree.map(lambda x: x * size / count, total)

        mesh = self.mesh
        if mesh is None or mesh.size == 1:
            return own
        names = mesh.axis_names

        def all_devices(params: Params, batch: Any) -> Any:
            return jax.lax.pmean(own(params, batch), names)

        return jax.shard_map(
            all_devices,
            mesh=mesh,
            in_specs=(P(), P(names)),
            out_specs=P(),
            check_vma=False,  # a gradient is exchanged once, not after each part
        )
