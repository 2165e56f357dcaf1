"""What a network is to the formats that read and write its weights."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

from puredif_jax.types import Key, Params


class Network(Hashable, Protocol):
    """A frozen configuration that makes its own parameters."""

    def init(self, key: Key) -> Params:
        """Fresh parameters: a nested dict of arrays, by PyTorch's names of modules.

        The names on the way to an array, joined by "_", are PyTorch's with "_" for ".".
        The last is "kernel", "scale", "bias" or "embedding"; kernels alone lie in
        another order of axes than PyTorch's.
        """
        ...
