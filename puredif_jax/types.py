"""Names shared by the whole package: array aliases and the protocols of the core.

Conventions everywhere: images are NHWC float32 in [-1, 1]; timesteps are int32
in 0..T-1; keys are typed (`jax.random.key`); `t = -1` stands for the clean end
of the chain, where the signal is 1 and the noise 0.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import Any, Protocol

import jax
from flax import struct

Array = jax.Array
Key = jax.Array
Params = Any


# Printable by Unicode's word, and yet nothing on a screen: fillers of scripts that pad
# syllables, the empty Braille cell, variation selectors and their like.
_BLANK = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"
    + "".join(map(chr, [*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)]))
)
_MARKS = 3  # that a letter may carry, one above the other


def shown(text: str, most: int = 1000) -> str:
    """A stranger's text as it goes to a terminal, a log, a bar or a page.

    The result is one line of visible characters. These are escaped as in Python's
    source: control characters, ANSI codes, line breaks, direction marks, characters
    without a mark on the screen, surrogates of names that are not UTF-8, and more
    combining marks than a letter carries.

    Args:
      text: anything.
      most: characters of it to show, 20 or more. Of a longer one " ... " stands for
        the middle.
    """
    if len(text) > most:
        head = most // 2
        text = f"{text[:head]} ... {text[len(text) - (most - head - 5) :]}"
    marks, parts = 0, []
    for x in text:
        marks = marks + 1 if unicodedata.category(x) in ("Mn", "Me") else 0
        seen = x.isprintable() and x not in _BLANK and marks <= _MARKS
        parts.append(x if seen else x.encode("unicode_escape").decode())
    return "".join(parts)


class InputError(ValueError):
    """Something a user gave is wrong; the message is one sentence for that user.

    What a stranger's file says may be in it, so it comes as `shown`.
    """

    def __str__(self) -> str:
        return shown(super().__str__())


class NoiseModel(Protocol):
    """A network, or a closed form, that predicts the noise in its input."""

    def __call__(self, params: Params, x: Array, t: Array, /) -> Array:
        """Returns eps(x, t): `[B, H, W, C]` from x `[B, H, W, C]` and t `[B]`."""
        ...


@struct.dataclass
class Member:
    """Which channel of a family a backdoor has (`defenses.family`).

    psi: share of the first row of the family, `[]`.
    gamma: scale of the noise, `[H, W, C]`.
    """

    psi: Array
    gamma: Array


@struct.dataclass
class Candidate:
    """An estimate of a backdoor: its trigger and the image that it yields.

    delta: `[H, W, C]`, added to the initial noise: in units of images in [-1, 1], or in
      deviations of the noise where the signal stays.
    target: `[H, W, C]`, the image that the model then draws.
    member: its channel, where a family of them is searched.
    """

    delta: Array
    target: Array
    member: Member | None = None


class Objective(Protocol):
    """A loss on a candidate: pure, scalar, differentiable in the candidate."""

    def __call__(self, params: Params, candidate: Candidate, key: Key, /) -> Array: ...


Shard = Callable[[Array], Array]


def unsharded(x: Array) -> Array:
    """The identity: the constraint of a program that runs on one device."""
    return x
