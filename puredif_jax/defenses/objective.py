"""What every loss of trigger inversion is: a pure (params, candidate, key) -> scalar.

A backdoor is a second diffusion process inside the model (`attacks.channel`). The
losses ask how well its noise model e, made with a candidate for r, denoises the one
image y. The channel comes from a `Hypothesis`, never from the attack itself. A `bind`
method closes over what is static and returns the loss.
"""

from __future__ import annotations

import abc
import dataclasses

import jax

from puredif_jax.defenses.family import Channels
from puredif_jax.diffusion.schedules import NoiseSchedule
from puredif_jax.types import (
    Array,
    Candidate,
    Key,
    NoiseModel,
    Objective,
    Params,
    Shard,
    unsharded,
)


@dataclasses.dataclass(frozen=True)
class Loss(abc.ABC):
    """The configuration of a loss."""

    @property
    @abc.abstractmethod
    def evaluations(self) -> int:
        """How often one value of the loss evaluates the network on one image."""

    @property
    @abc.abstractmethod
    def seeks_target(self) -> bool:
        """Whether its gradient reaches the target of the candidate."""

    @property
    def seeks_member(self) -> bool:
        """Whether its gradient reaches the channel of the candidate."""
        return True

    @abc.abstractmethod
    def bind(
        self,
        model: NoiseModel,
        schedule: NoiseSchedule,
        channel: Channels,
        shard: Shard = unsharded,
    ) -> Objective:
        """The loss of one model.

        Args:
          model, schedule: the model, and its forward process.
          channel: of the kind of backdoor that is assumed, or the family of them.
          shard: constraint on a noise batch.

        Raises:
          ValueError: a timestep that is named is not in 0..999.
        """


def check_timesteps(timesteps: tuple[int, ...], weights: tuple[float, ...]) -> None:
    if not timesteps or min(timesteps) < 0:
        raise ValueError(f"timesteps must be a set of indices >= 0, found {timesteps}")
    if weights and (
        len(weights) != len(timesteps) or min(weights) < 0 or sum(weights) == 0
    ):
        raise ValueError(
            f"weights must be empty or {len(timesteps)} numbers >= 0 of a sum above 0, "
            f"found {weights}"
        )


def check_samples(samples: int, least: int = 1) -> None:
    if samples < least:
        raise ValueError(f"samples must be {least} or more, found {samples}")


@dataclasses.dataclass(frozen=True)
class Sum(Loss):
    """first_weight first + second_weight second, each with a key of its own.

    Attributes:
      first, second: the losses.
      first_weight, second_weight: their factors.
    """

    first: Loss
    second: Loss
    first_weight: float = 1.0
    second_weight: float = 1.0

    @property
    def evaluations(self) -> int:
        return self.first.evaluations + self.second.evaluations

    @property
    def seeks_target(self) -> bool:
        return self.first.seeks_target or self.second.seeks_target

    @property
    def seeks_member(self) -> bool:
        return self.first.seeks_member or self.second.seeks_member

    def bind(
        self,
        model: NoiseModel,
        schedule: NoiseSchedule,
        channel: Channels,
        shard: Shard = unsharded,
    ) -> Objective:
        first = self.first.bind(model, schedule, channel, shard)
        second = self.second.bind(model, schedule, channel, shard)

        def loss(params: Params, candidate: Candidate, key: Key) -> Array:
            key_1, key_2 = jax.random.split(key)
            return self.first_weight * first(
                params, candidate, key_1
            ) + self.second_weight * second(params, candidate, key_2)

        return loss
