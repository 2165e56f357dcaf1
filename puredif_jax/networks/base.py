"""What every network of the package offers, whatever it is made of."""

from __future__ import annotations

from typing import Protocol

from puredif_jax.types import Array, Key, Params


class Network(Protocol):
    """A frozen configuration that is itself a `NoiseModel`.

    It is a hashable value, so it may be a static argument of a program. Its parameters
    lie in one folder of names: those of PyTorch's state dict with "_" for ".".
    """

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an image that goes in and of what comes out."""
        ...

    def __hash__(self) -> int: ...

    def init(self, key: Key) -> Params:
        """Fresh parameters: a nested dict of arrays."""
        ...

    def __call__(self, params: Params, x: Array, t: Array, /) -> Array:
        """Returns `[B, H, W, C]`, float32, from x `[B, H, W, C]` and t `[B]`."""
        ...
