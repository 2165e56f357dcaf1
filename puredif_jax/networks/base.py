"""What a network is to the formats that read its weights, and to what is done with it.

Each is a frozen configuration that makes its own parameters.
"""

from __future__ import annotations

import abc
from collections.abc import Hashable
from typing import Protocol

from puredif_jax.types import Array, Key, Params


class Network(Hashable, Protocol):
    """A frozen configuration that makes its own parameters."""

    def init(self, key: Key) -> Params:
        """Fresh parameters: a nested dict of arrays, by PyTorch's names of modules.

        The names on the way to an array, joined by "_", are PyTorch's with "_" for ".".
        The last is "kernel", "scale", "weight", "bias" or "embedding"; kernels alone
        lie in another order of axes than PyTorch's.
        """
        ...


class ImageNetwork(abc.ABC):
    """A `Network` of images and timesteps, by which a diffusion model draws.

    It is a frozen dataclass. If it has a field `remat`, that computes blocks again in
    the backward pass instead of keeping what is inside them.
    """

    @property
    @abc.abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of what goes in and of what comes out."""

    @abc.abstractmethod
    def init(self, key: Key) -> Params:
        """Fresh parameters, as in `Network`."""

    @abc.abstractmethod
    def __call__(self, params: Params, x: Array, t: Array, /) -> Array:
        """Returns `[B, H, W, C]`, float32, from x `[B, H, W, C]` and t `[B]`."""
