"""Trigger inversion: optax descent on K candidates at once, as (init, step)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from puredif_jax.defenses.blocks import Blocks
from puredif_jax.defenses.denoising_consistency import ESTIMATE
from puredif_jax.defenses.denoising_error import DenoisingError
from puredif_jax.defenses.descent import Descent
from puredif_jax.defenses.family import Family
from puredif_jax.defenses.hypothesis import Hypothesis
from puredif_jax.defenses.objective import Loss
from puredif_jax.defenses.spectrum import Spectrum
from puredif_jax.defenses.starts import Starts
from puredif_jax.types import (
    Array,
    Candidate,
    Key,
    Member,
    Objective,
    Params,
    Shard,
    unsharded,
)


@struct.dataclass
class InversionState:
    """What inversion carries: arrays only.

    candidate: both images with a leading axis of candidates, `[K, H, W, C]`.
    opt_state: of the optimiser, over that tree.  rate: factors of its updates, `[K]`.
    key: root of all randomness.  step: steps done.
    """

    candidate: Candidate
    opt_state: optax.OptState
    rate: Array
    key: Key
    step: Array


class InversionInfo(NamedTuple):
    """Diagnostics of one step, `[K]` each; not carried."""

    loss: Array
    grad_norm: Array
    trigger_norm: Array


class Inverter(NamedTuple):
    """init(key) -> state;  step(params, state) -> (state, info)."""

    init: Callable[[Key], InversionState]
    step: Callable[[Params, InversionState], tuple[InversionState, InversionInfo]]


def starting(state: InversionState, first: Candidate, rate: float) -> InversionState:
    """The state with `first`, `[N, H, W, C]`, as its first candidates, at `rate`.

    Adam's first steps are as long as any: they would throw a good start out of a narrow
    basin.
    """
    count = first.delta.shape[0]
    candidate = jax.tree.map(
        lambda start, x: jnp.concatenate([start, x[count:]]), first, state.candidate
    )
    rates = state.rate.at[:count].set(rate)
    return dataclasses.replace(state, candidate=candidate, rate=rates)


def keep(state: InversionState, chosen: Sequence[int] | np.ndarray) -> InversionState:
    """The state of the chosen candidates alone; their optimiser goes on as it was."""
    chosen = np.asarray(chosen)
    candidate, opt_state, rate = jax.tree.map(
        lambda x: x[chosen] if x.ndim else x,
        (state.candidate, state.opt_state, state.rate),
    )
    return dataclasses.replace(
        state, candidate=candidate, opt_state=opt_state, rate=rate
    )


GLANCE = DenoisingError(samples=4)
"""By which a scout at another size is judged, on fewer draws than `Inversion.judge`."""


@dataclasses.dataclass(frozen=True)
class Inversion:
    """How a trigger is sought, under one hypothesis.

    Attributes:
      loss: what is minimised.
      descent: optimiser, candidates and bounds.
      blocks: where the first candidates start under hypotheses that narrow the noise
        (`Hypothesis.narrows`); the others, and with none all, start at random.
      spectrum: where the first candidates start under the other hypotheses.
      leap: a factor. Each scout is also tried at so many times its size, within the
        bound, at the least and the most psi, with the image to which it then leads. It
        goes on from there where the error is less: a descent can have found the
        direction of a trigger and be stuck at half its size. 0 for none.
      heldout: noise draws at each timestep on which the scouts that go on, and the kept
        candidate, are chosen.
      refined: a further search that starts from what this one has found, with an
        optimiser of its own; None for no other.
    """

    loss: Loss = DenoisingError()
    descent: Descent = Descent(
        candidates=16,
        scout=30,
        finalists=4,
        scales=(1.0, 1.0, 1.0, 1.0, 1.0, 0.1, 0.1, 0.1),
        grain=4,
    )
    blocks: Blocks | None = Blocks()
    spectrum: Spectrum | None = Spectrum()
    leap: float = 2.5
    heldout: int = 64
    refined: Inversion | None = None

    def __post_init__(self) -> None:
        if self.heldout < 1:
            raise ValueError(f"heldout must be 1 or more, found {self.heldout}")
        if self.leap < 0:
            raise ValueError(f"leap must be 0 or more, found {self.leap}")
        if any(each.blocks or each.spectrum for each in self.phases[1:]):
            raise ValueError(
                "a search that refines another starts where that has ended: set its "
                "blocks and spectrum to none"
            )

    @property
    def phases(self) -> tuple[Inversion, ...]:
        """This search and those that refine what it finds, in order."""
        return (self, *(self.refined.phases if self.refined else ()))

    @property
    def judge(self) -> DenoisingError:
        """The loss by which candidates are compared on held-out noise.

        A search by another loss than `DenoisingError` is judged by that one's default.
        """
        loss = self.loss if isinstance(self.loss, DenoisingError) else DenoisingError()
        return dataclasses.replace(loss, samples=self.heldout)

    @property
    def leaps(self) -> bool:
        """Whether scouts are tried at another size."""
        return self.leap > 0 and self.descent.scout > 0 and self.loss.seeks_member

    @property
    def leap_evaluations(self) -> int:
        """Network evaluations of one image that the leaps take."""
        if not self.leaps:
            return 0
        each = GLANCE.evaluations + GLANCE.samples * ESTIMATE.sampler.steps
        return 2 * self.descent.candidates * each

    def larger(self, family: Family, candidate: Candidate) -> tuple[Candidate, ...]:
        """A candidate at another size, with the least and with the most psi.

        Its image is the old one: what it leads to is to be estimated.
        """
        member = candidate.member
        assert member is not None  # a loss that seeks it gives it
        delta = self.leap * candidate.delta
        if (bound := self.descent.bound) is not None:
            delta = jnp.clip(delta, -bound, bound)
        return tuple(
            Candidate(delta, candidate.target, Member(psi, member.gamma))
            for psi in jnp.asarray(family.psi, jnp.float32)
        )

    def starts(self, hypothesis: Hypothesis) -> Starts | None:
        """What finds first candidates under a hypothesis; None if all are random."""
        found = self.blocks if hypothesis.narrows else self.spectrum
        if found is None or not self.loss.seeks_member:
            return None
        return found if found.led(self.descent.candidates) else None

    def within(self, gradients: int, hypothesis: Hypothesis) -> Inversion:
        """The same search at the cost of so many gradients on an image, or just below.

        Steps change in proportion, in each phase. At a smaller cost so do candidates,
        the draws of starts and those on which candidates are compared.
        """
        wanted = 3 * gradients
        low, high = 0.0, 2 * wanted / self.evaluations(hypothesis)
        for _ in range(30):  # the cost rises with the factor, by whole steps
            middle = (low + high) / 2
            if self._times(middle).evaluations(hypothesis) > wanted:
                high = middle
            else:
                low = middle
        return self._times(low)

    def _times(self, factor: float) -> Inversion:
        """The same search at about `factor` of the cost."""
        fewer = min(1.0, factor)
        return dataclasses.replace(
            self,
            descent=self.descent.times(factor),
            blocks=self.blocks and self.blocks.times(fewer),
            spectrum=self.spectrum and self.spectrum.times(fewer),
            heldout=max(1, round(self.heldout * fewer)),
            refined=self.refined and self.refined._times(factor),
        )

    def evaluations(self, hypothesis: Hypothesis) -> int:
        """Network evaluations of one image; one with its gradient counts for three.

        All of them count: the starts with their images, the descent, the leaps, and the
        comparison of candidates on held-out noise.
        """
        starts = self.starts(hypothesis)
        values = 3 * self.descent.candidate_steps * self.loss.evaluations
        if starts is not None:
            led = starts.led(self.descent.candidates)
            values += starts.evaluations + led * ESTIMATE.evaluations
        values += self.leap_evaluations + self.judged * self.judge.evaluations
        if not self.loss.seeks_target:
            values += self.judged * ESTIMATE.evaluations
        return values + (self.refined.evaluations(hypothesis) if self.refined else 0)

    @property
    def judged(self) -> int:
        """How often a candidate is compared with others on held-out noise.

        The scouts once; the others at three quarters of their steps and at the end.
        """
        scouts = self.descent.candidates if self.descent.scout else 0
        return scouts + 2 * self.descent.last

    @property
    def images(self) -> int:
        """Most images that the network may see at once."""
        together = min(self.descent.together, self.descent.candidates)
        most = [together * self.loss.evaluations, self.judge.evaluations]
        most += [each.images for each in (self.blocks, self.spectrum) if each]
        return max(most + ([self.refined.images] if self.refined else []))


def inverter(
    objective: Objective,
    descent: Descent,
    image_shape: tuple[int, int, int],
    start: Candidate | None = None,
    candidates: Shard = unsharded,
    axis: str | None = None,
    groups: int = 1,
    family: Family | None = None,
) -> Inverter:
    """Makes the two functions of an inversion.

    Args:
      objective: (params, candidate, key) -> scalar, of one candidate.
      descent: hyperparameters.
      image_shape: (H, W, C).
      start: one for all K, `[H, W, C]` (reinforcement starts at the known trigger). If
        it has no member, each takes its first of `family`. None for random ones.
      candidates, axis, groups: how they lie on the devices, see `parallel.Spread`.
      family: in which each candidate moves, from its first member; None where the
        channel is fixed.

    Returns:
      `init` and `step`, neither of them jitted. The objective is vmapped over
      candidates with shared parameters, so they fold into the batch. The key of step
      n is `fold_in(state.key, n)`: a resumed run repeats the same draws.
    """
    optimizer = descent.optimizer()

    def bounded(candidate: Candidate) -> Candidate:
        delta = candidate.delta
        if (bound := descent.bound) is not None:
            delta = jnp.clip(delta, -bound, bound)
        target = jnp.clip(candidate.target, -1, 1)
        candidate = dataclasses.replace(candidate, delta=delta, target=target)
        return candidate if family is None else family.within(candidate)

    def slower(updates: Candidate, rate: Array) -> Candidate:
        """Each candidate at its own rate, and psi and gamma at theirs."""
        updates = jax.vmap(optax.tree.scale)(rate, updates)
        member = optax.tree.scale(descent.member_rate, updates.member)
        return dataclasses.replace(updates, member=member)

    def on_devices(state: InversionState) -> InversionState:
        candidate, opt_state, rate = jax.tree.map(
            lambda x: candidates(x) if x.ndim else x,
            (state.candidate, state.opt_state, state.rate),
        )
        return dataclasses.replace(
            state, candidate=candidate, opt_state=opt_state, rate=rate
        )

    def init(key: Key) -> InversionState:
        key_start, key_run = jax.random.split(key)
        count = descent.candidates
        shape = (count, *image_shape)
        if start is None:
            coarse: tuple[int, ...] = shape
            if descent.grain:
                cells = (min(side, descent.grain) for side in image_shape[:2])
                coarse = (count, *cells, image_shape[2])
            delta = jax.random.uniform(
                key_start, coarse, minval=descent.low, maxval=descent.high
            )
            delta = jax.image.resize(delta, shape, "linear")
            number = np.arange(count)
            scale = np.asarray(descent.scales)[number // 2 % len(descent.scales)]
            scale = np.where(number % 2, -scale, scale).astype(np.float32)
            delta = delta * scale[:, None, None, None]
            candidate = Candidate(delta=delta, target=jnp.zeros(shape))
        else:
            # Its dtype spelt out: a weak one changes in a step, which compiles twice.
            candidate = jax.tree.map(
                lambda x: jnp.broadcast_to(jnp.asarray(x, x.dtype), (count, *x.shape)),
                start,
            )
        if family is not None and candidate.member is None:
            members = [family.first(image_shape, i) for i in range(count)]
            member = jax.tree.map(lambda *each: jnp.stack(each), *members)
            candidate = dataclasses.replace(candidate, member=member)
        return InversionState(
            candidate=candidate,
            opt_state=optimizer.init(candidate),
            rate=jnp.ones((count,)),
            key=key_run,
            step=jnp.zeros((), jnp.int32),
        )

    def slopes(params: Params, candidate: Candidate, keys: Key) -> tuple[Array, Any]:
        """Losses and gradients, `[K, ...]`; a device takes `together` at a time."""
        each = jax.vmap(
            jax.value_and_grad(objective, argnums=1),
            in_axes=(None, 0, 0),
            spmd_axis_name=axis,
        )
        own = keys.shape[0] // groups  # candidates of a group of devices
        size = next(n for n in range(min(descent.together, own), 0, -1) if own % n == 0)
        if size == own:
            return each(params, candidate, keys)

        def split(x: Array) -> Array:
            x = x.reshape(groups, own // size, size, *x.shape[1:]).swapaxes(0, 1)
            return x.reshape(own // size, groups * size, *x.shape[3:])

        def joined(x: Array) -> Array:
            x = x.reshape(own // size, groups, size, *x.shape[2:]).swapaxes(0, 1)
            return x.reshape(keys.shape[0], *x.shape[3:])

        parts = jax.tree.map(split, (candidate, keys))
        loss, grads = jax.lax.map(lambda part: each(params, *part), parts)
        return joined(loss), jax.tree.map(joined, grads)

    def step(
        params: Params, state: InversionState
    ) -> tuple[InversionState, InversionInfo]:
        key, _ = jax.random.split(jax.random.fold_in(state.key, state.step))
        state = on_devices(state)
        candidate = state.candidate
        count = candidate.delta.shape[0]  # fewer than K after the scouts
        loss, grads = slopes(params, candidate, jax.random.split(key, count))
        updates, opt_state = optimizer.update(grads, state.opt_state, candidate)
        candidate = bounded(optax.apply_updates(candidate, slower(updates, state.rate)))
        info = InversionInfo(
            loss=loss,
            grad_norm=jax.vmap(optax.tree.norm)(grads),
            trigger_norm=jax.vmap(lambda x: jnp.linalg.norm(x.ravel()))(
                candidate.delta
            ),
        )
        state = dataclasses.replace(
            state, candidate=candidate, opt_state=opt_state, step=state.step + 1
        )
        return on_devices(state), info

    return Inverter(init, step)
