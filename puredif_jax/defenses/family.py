"""Channels between which a search can move, by two numbers that it may learn."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from flax import struct

from puredif_jax.attacks.channel import Channel
from puredif_jax.attacks.pictures import Shape
from puredif_jax.types import Array, Candidate, Member


class Channels(Protocol):
    """One channel, or a family of them.

    power: the power of a linear denoiser's error by which a search divides
      (`DenoisingError`).
    """

    @property
    def power(self) -> Array | np.ndarray | float: ...

    def at(self, candidate: Candidate) -> Channel:
        """The channel of a candidate."""
        ...


@struct.dataclass
class Family:
    """H = psi H_1 + (1 - psi) H_0, the same for C, and noise of scale gamma.

    A pytree of one structure for every kind of backdoor, so that one compiled program
    serves all. A number whose range is a point stays there.

    shifts, responses: (H_1, H_0) and (C_1, C_0), `[2, T]` each.
    psi: (least, most), `[2]`. Searches begin at most, middle and least in turn.
    gamma: (least, most, first), `[3]`, or `[3, H, W, C]` where it differs by pixel.
    power: as in `Channels`, a scalar.
    """

    shifts: Array | np.ndarray
    responses: Array | np.ndarray
    psi: Array | np.ndarray
    gamma: Array | np.ndarray
    power: Array | np.ndarray | float = 1.0

    @classmethod
    def only(cls, channel: Channel) -> Family:
        """The family of one channel."""
        gamma = 1.0 if channel.gamma is None else np.asarray(channel.gamma)
        return cls(
            np.stack([channel.shift] * 2),
            np.stack([channel.response] * 2),
            np.ones(2),
            np.stack([gamma] * 3),
        )

    def first(self, shape: Shape, number: int = 0) -> Member:
        """Where a search begins.

        Args:
          shape: (H, W, C) of the images.
          number: of the candidate. Both candidates of a pair have one psi.
        """
        least, most = jnp.asarray(self.psi, jnp.float32)
        share = (1.0, 0.5, 0.0)[number // 2 % 3]
        gamma = jnp.broadcast_to(jnp.asarray(self.gamma, jnp.float32)[2], shape)
        return Member(least + share * (most - least), gamma)

    def at(self, candidate: Candidate) -> Channel:
        """The channel of a candidate; without a `member`, the channel of `first`."""
        member = candidate.member
        if member is None:
            member = self.first(candidate.delta.shape)  # type: ignore[arg-type]
        # Not as a product of matrices, whose precision a GPU or a TPU lowers.
        shift, response = (
            member.psi * table[0] + (1 - member.psi) * table[1]
            for table in (self.shifts, self.responses)
        )
        return Channel(shift, response, member.gamma)

    def within(self, candidate: Candidate) -> Candidate:
        """The candidate with psi and gamma in their range."""
        if candidate.member is None:
            return candidate
        psi = jnp.clip(candidate.member.psi, self.psi[0], self.psi[1])
        gamma = jnp.clip(candidate.member.gamma, self.gamma[0], self.gamma[1])
        return dataclasses.replace(candidate, member=Member(psi, gamma))
