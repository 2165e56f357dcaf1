"""Names shared by the whole package: array aliases and the protocols of the core.

Conventions everywhere: images are NHWC float32 in [-1, 1]; timesteps are int32
in 0..T-1; keys are typed (`jax.random.key`); `t = -1` stands for the clean end
of the chain, where the signal is 1 and the noise 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
from flax import struct

Array = jax.Array
Key = jax.Array
Params = Any


class InputError(ValueError):
    """Something a user gave is wrong; the message is one sentence for that user.

    What a stranger's file says may be in it, so control characters come escaped, and
    the message is cut in its middle to 1,000 characters.
    """

    def __str__(self) -> str:
        text = super().__str__()
        shown = text if len(text) <= 1000 else f"{text[:500]} ... {text[-495:]}"
        return "".join(x if x.isprintable() else ascii(x)[1:-1] for x in shown)


class NoiseModel(Protocol):
    """A network, or a closed form, that predicts the noise in its input."""

    def __call__(self, params: Params, x: Array, t: Array, /) -> Array:
        """Returns eps(x, t): `[B, H, W, C]` from x `[B, H, W, C]` and t `[B]`."""
        ...


@struct.dataclass
class Candidate:
    """An estimate of a backdoor: its trigger and the image that it yields.

    delta: `[H, W, C]`, added to the initial noise, in image units.
    target: `[H, W, C]`, the image that the model then draws.
    """

    delta: Array
    target: Array


class Objective(Protocol):
    """A loss on a candidate: pure, scalar, differentiable in the candidate."""

    def __call__(self, params: Params, candidate: Candidate, key: Key, /) -> Array: ...


Shard = Callable[[Array], Array]


def unsharded(x: Array) -> Array:
    """The identity: the constraint of a program that runs on one device."""
    return x
