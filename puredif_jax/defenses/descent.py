"""The rules by which candidates descend a loss, and how many of them there are."""

from __future__ import annotations

import dataclasses
import functools
from typing import Self

import jax
import jax.numpy as jnp
import optax

from puredif_jax.types import Array, Candidate


@dataclasses.dataclass(frozen=True)
class Descent:
    """Adam on the candidates, projected onto the images.

    Attributes:
      steps: optimiser steps.
      candidates: K, restarts optimised side by side.
      together: bound of the candidates whose gradients a device computes at once. It
        takes the largest divisor of its own number within that. Memory grows with it.
        A run takes fewer where that is faster (`stages.search.fitting`).
      scout: steps after which a run (`stages.search.invert`) goes on with the best
        candidates alone; 0 keeps all to the end, as an `inverter` by itself does.
      finalists: the most candidates that go on after the scouts. Where a backdoor is
        sharp, the true candidate overtakes the others late (docs/notebook).
      learning_rate: of Adam.
      b2: decay of Adam's second moment. Optax's 0.999 remembers the steep first steps
        longer than a descent lasts, and shrinks all later ones.
      low, high: range of the uniform initial trigger; every second candidate starts
        with its sign turned.
      bound: triggers are kept in [-bound, bound] after each step; a trigger is an
        image, and without a bound a huge one that drives the network to a constant
        wins some losses. None leaves them free. Targets are kept in [-1, 1].
      member_rate: rate of psi and gamma, where these may move, over the images' rate.
      scales: candidates start at the random trigger times one of these, in turn by
        pairs, as psi is (`Family.first`). Small ones reach low-norm triggers.
      grain: cells along a side of the random trigger, interpolated between; 0 draws
        each pixel by itself. Triggers are images, and nearer to smooth ones.
      cosine: the rate decays to a tenth by a cosine; False holds it.
    """

    steps: int = 120
    candidates: int = 1
    together: int = 8
    scout: int = 0
    finalists: int = 1
    learning_rate: float = 0.2
    b2: float = 0.9
    low: float = -1.0
    high: float = 0.0
    bound: float | None = 1.0
    member_rate: float = 0.1
    scales: tuple[float, ...] = (1.0,)
    grain: int = 0
    cosine: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "candidates", "together", "finalists", "learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, found {getattr(self, name)}")
        if not 0 <= self.scout < self.steps:
            raise ValueError(
                f"scout must lie in 0..steps-1={self.steps - 1}, found {self.scout}"
            )
        if not 0 <= self.b2 < 1:
            raise ValueError(f"b2 must lie in [0, 1), found {self.b2}")
        if self.bound is not None and self.bound <= 0:
            raise ValueError(f"bound must be above 0 or none, found {self.bound}")
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(
                f"scales must be one or more, above 0, found {self.scales}"
            )
        if self.grain < 0:
            raise ValueError(f"grain must be 0 or more, found {self.grain}")
        if not 0 <= self.member_rate <= 1:
            raise ValueError(
                f"member_rate must lie in [0, 1], found {self.member_rate}"
            )
        if self.low >= self.high:
            raise ValueError(
                f"low must lie below high, found {self.low} and {self.high}"
            )

    def times(self, factor: float) -> Self:
        """The same at `factor` of the cost.

        A longer descent takes more steps. A shorter one with several candidates has
        fewer of them, by whole pairs, and fewer steps, in equal proportion.
        """
        count = self.candidates
        if count > 1:
            count = min(count, max(2, 2 * round(count * factor**0.5 / 2)))
        share = count / self.candidates
        fewer = dataclasses.replace(
            self,
            candidates=count,
            finalists=max(1, round(self.finalists * share)),
            scout=round(self.scout * factor / share),
            steps=max(self.steps, round(self.steps * factor / share) + 1),
        )
        left = factor * self.candidate_steps - count * fewer.scout
        steps = fewer.scout + max(1, round(left / fewer.last))
        return dataclasses.replace(fewer, steps=steps)

    @property
    def last(self) -> int:
        """Candidates that are there at the end."""
        return min(self.finalists, self.candidates) if self.scout else self.candidates

    @property
    def candidate_steps(self) -> int:
        """Steps, each counted once for every candidate that takes it."""
        return self.candidates * self.scout + self.last * (self.steps - self.scout)

    def optimizer(self) -> optax.GradientTransformation:
        """The optax transformation that these numbers describe."""
        return optax.adam(self.rate(), b2=self.b2)

    def rate(self, end: float = 0.1) -> optax.ScalarOrSchedule:
        """The learning rate; with `cosine` it falls to the fraction `end` of itself."""
        if not self.cosine:
            return self.learning_rate
        return optax.cosine_decay_schedule(self.learning_rate, self.steps, alpha=end)


@dataclasses.dataclass(frozen=True)
class GradientDescent(Descent):
    """Gradient descent in place of Adam; its rate decays to 0.

    Attributes:
      momentum: of the gradients; 0 takes each by itself.
      clip: bound of a candidate's gradient over all that moves, in the L2 norm; None
        for no bound.
    """

    momentum: float = 0.0
    clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), found {self.momentum}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be above 0 or none, found {self.clip}")

    def optimizer(self) -> optax.GradientTransformation:
        """The optax transformation that these numbers describe."""
        rule = optax.sgd(self.rate(end=0.0), momentum=self.momentum or None)
        if self.clip is None:
            return rule
        return optax.chain(_clipped(self.clip), rule)


@dataclasses.dataclass(frozen=True)
class NormKeeping(Descent):
    """Adam; after each step a trigger is scaled to the norm it had before.

    delta <- (delta + u) ||delta|| / ||delta + u||, u the step of Adam. So a trigger
    that is reinforced stays as large as the one that is given.

    Raises:
      ValueError: there is a bound, which would change the norm.
    """

    bound: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bound is not None:
            raise ValueError(
                f"a descent that keeps the norm has bound=none, found {self.bound}"
            )

    def optimizer(self) -> optax.GradientTransformation:
        """The optax transformation that these numbers describe."""
        return optax.chain(super().optimizer(), optax.stateless(_norm_keeping))


def _norm_keeping(updates: Candidate, candidate: Candidate | None) -> Candidate:
    """Updates of triggers `[K, H, W, C]` that leave each one's norm."""
    assert candidate is not None
    delta = candidate.delta
    moved = delta + updates.delta

    def norm(x: Array) -> Array:
        return jnp.sqrt(jnp.sum(x**2, axis=(1, 2, 3), keepdims=True))

    ratio = norm(delta) / jnp.maximum(norm(moved), 1e-12)
    return dataclasses.replace(updates, delta=moved * ratio - delta)


def _clipped(bound: float) -> optax.GradientTransformation:
    """Clips each candidate's gradient by itself, `[K, ...]`, to a norm of `bound`."""
    one = functools.partial(
        optax.clip_by_global_norm(bound).update, state=optax.EmptyState()
    )
    return optax.stateless(lambda updates, _: jax.vmap(lambda x: one(x)[0])(updates))
