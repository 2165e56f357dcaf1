"""The search for a trigger on one model: starts, scouts and descent, resumable.

Each resumes from its latest checkpoint and ends in the same arrays, bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from puredif_jax.attacks.channel import Channel
from puredif_jax.defenses.denoising_consistency import estimated_target
from puredif_jax.defenses.descent import Descent
from puredif_jax.defenses.family import Family
from puredif_jax.defenses.hypothesis import Hypothesis
from puredif_jax.defenses.inversion import (
    Inversion,
    InversionInfo,
    InversionState,
    Inverter,
    inverter,
    keep,
    starting,
)
from puredif_jax.defenses.objective import Loss
from puredif_jax.defenses.reinforcement import Reinforcement
from puredif_jax.runs import parallel
from puredif_jax.stages.lab import Lab
from puredif_jax.stages.programs import KEPT, repeated
from puredif_jax.stages.scouting import first_candidates, leap
from puredif_jax.stages.setup import Setup, Stream
from puredif_jax.stages.weights import Truth
from puredif_jax.types import Array, Candidate, Key, Params


def reinforce(
    lab: Lab,
    stage: str,
    params: Params,
    reinforcement: Reinforcement,
    truth: Truth,
    trigger: np.ndarray,
) -> np.ndarray:
    """A trigger, reinforced on these weights; `[H, W, C]`.

    Args:
      lab: the model and its devices.
      stage: name of the descent.
      params: the weights.
      reinforcement: how.
      truth: the backdoor; its target is what the trigger shall lead to.
      trigger: where the descent starts, `[H, W, C]`.
    """
    psi, descent = truth.psi(lab.schedule), reinforcement.descent
    loss = reinforcement.loss(truth.solver, truth.controlled, psi)
    start = Candidate(jnp.asarray(trigger), jnp.asarray(truth.target))
    search = _Search(lab, loss, descent, params, lab.place(truth.channel), start)
    state = search.run(stage, search.first, descent.steps)
    delta: np.ndarray = parallel.gather(state.candidate.delta)[0]
    return delta


class Found(NamedTuple):
    """What a search has found.

    candidate: the best on held-out noise, as numpy.
    errors: held-out values of all, `[K]`.
    falling: by how much the least of them fell in the last quarter of the steps.
    """

    candidate: Candidate
    errors: np.ndarray
    falling: float


def invert(
    lab: Lab,
    stage: str,
    params: Params,
    hypothesis: Hypothesis,
    inversion: Inversion,
) -> Found:
    """Seeks a trigger under one hypothesis.

    The first candidates start at the best of `inversion.starts`, the others at random.
    A loss that does not seek the target leaves it where it started: then it is
    estimated for the candidates that are judged.

    Candidates are compared on held-out noise by `inversion.judge`. The best goes on
    with the search that refines it, if there is one.
    """
    found: Found | None = None
    for name, phase in _phases(stage, inversion):
        found = _found(lab, name, params, hypothesis, phase, found)
    assert found is not None  # there is a first phase
    return found


def _phases(stage: str, inversion: Inversion) -> Iterator[tuple[str, Inversion]]:
    """A search and those that refine it, each with a name for what it stores."""
    for number, phase in enumerate(inversion.phases):
        yield f"{stage}_refined_{number}" if number else stage, phase


def _found(
    lab: Lab,
    stage: str,
    params: Params,
    hypothesis: Hypothesis,
    inversion: Inversion,
    earlier: Found | None,
) -> Found:
    """What one search finds, from where the one before ended."""
    loss, descent = inversion.loss, inversion.descent
    start = None if earlier is None else jax.tree.map(jnp.asarray, earlier.candidate)
    starts = inversion.starts(hypothesis) if start is None else None
    family = lab.family(hypothesis, moving=loss.seeks_member)
    program = _judging(lab.setup, inversion.judge, not loss.seeks_target)
    key = lab.stream(Stream.HELDOUT)

    def judged(found: Candidate) -> tuple[np.ndarray, np.ndarray]:
        """Errors and targets of the candidates, each by itself: one program."""
        each = (
            jax.tree.map(lambda x, k=k: x[k], found)
            for k in range(found.delta.shape[0])
        )
        pairs = [
            parallel.gather(program(params, family, candidate, key))
            for candidate in each
        ]
        errors, targets = map(np.array, zip(*pairs, strict=True))
        return np.where(np.isnan(errors), np.inf, errors), targets  # never the least

    search = _Search(lab, loss, descent, params, family, start)
    begin, steps = search.first, descent.steps
    if starts is not None:
        count = starts.led(descent.candidates)
        best = first_candidates(lab, stage, params, family, starts, count)

        def begin() -> InversionState:
            return starting(search.first(), best, starts.rate)

    if descent.scout:
        scouts = search.run(f"{stage}_scouts", begin, descent.scout)
        errors, _ = judged(scouts.candidate)
        if inversion.leaps:
            scouts, errors = leap(lab, params, family, inversion, scouts, errors)
        order = np.argsort(errors, kind="stable")
        steps -= descent.scout

        def begin() -> InversionState:
            return keep(scouts, order[: descent.last])

    last = -(-steps // 4)
    before = search.run(stage, begin, steps - last) if steps > last else begin()
    early = judged(before.candidate)[0].min()
    state = search.run(f"{stage}_end", lambda: before, last)
    errors, targets = judged(state.candidate)
    least_at = int(np.argmin(errors))
    found = jax.tree.map(lambda x: x[least_at], parallel.gather(state.candidate))
    found = dataclasses.replace(found, target=targets[least_at])
    least = errors[least_at]
    falling = float(early - least) if np.isfinite((early, least)).all() else np.inf
    return Found(found, errors, falling)


@functools.lru_cache(KEPT)
def _judging(
    setup: Setup, judge: Loss, estimated: bool
) -> Callable[..., tuple[Array, Array]]:
    """What `judge` finds of a candidate on held-out noise, and its target."""

    def error(
        params: Params, family: Family, candidate: Candidate, key: Key
    ) -> tuple[Array, Array]:
        if estimated:
            show = estimated_target(setup.model, setup.schedule, family, setup.shard)
            target = show(params, candidate, jax.random.fold_in(key, 1))
            candidate = dataclasses.replace(candidate, target=target)
        bound = judge.bind(setup.model, setup.schedule, family, setup.shard)
        return bound(params, candidate, key), candidate.target

    return jax.jit(error, out_shardings=parallel.replicated(setup.mesh))


def seconds(lab: Lab, stage: str, inversion: Inversion) -> float:
    """What the starts and the steps of an inversion took.

    All calls count, without steps that a killed one did not store; host 0 knows.
    """
    ends = ("_starts", "_scouts", "", "_end")
    parts = [f"{x}{end}" for x, _ in _phases(stage, inversion) for end in ends]
    return lab.run.metrics.seconds(*parts)


def fitting(descent: Descent, mesh: Mesh) -> Descent:
    """With as many candidates at once as suit the devices, within its bound.

    One on a CPU: the images of one stay in its caches between forward and backward
    pass. Its losses and gradients stay the same.
    """
    if mesh.devices.flat[0].platform != "cpu":
        return descent
    return dataclasses.replace(descent, together=1)


def inverter_of(
    setup: Setup,
    loss: Loss,
    descent: Descent,
    channels: Channel | Family,
    start: Candidate | None = None,
    candidates: int = 1,
) -> Inverter:
    """The inverter of a model, laid out for so many candidates on its devices."""
    spread = parallel.spread(setup.mesh, candidates)
    return inverter(
        loss.bind(setup.model, setup.schedule, channels, spread.noise),
        fitting(descent, setup.mesh),
        setup.image_shape,
        start=start,
        candidates=spread.candidates,
        axis=spread.axis,
        groups=spread.groups,
        family=channels if isinstance(channels, Family) else None,
    )


@functools.lru_cache(KEPT)
def _descending(
    setup: Setup, loss: Loss, descent: Descent, chunk: int
) -> Callable[..., tuple[InversionState, InversionInfo]]:
    def advance(
        params: Params, channels: Channel | Family, state: InversionState, count: Array
    ) -> tuple[InversionState, InversionInfo]:
        number = state.candidate.delta.shape[0]
        step = inverter_of(setup, loss, descent, channels, candidates=number).step
        return repeated(lambda state, _: step(params, state), state, count, chunk)

    whole = parallel.replicated(setup.mesh)
    return jax.jit(advance, donate_argnums=2, out_shardings=whole)


class _Search:
    """An inverter on one model as a resumable loop."""

    def __init__(
        self,
        lab: Lab,
        loss: Loss,
        descent: Descent,
        params: Params,
        channels: Channel | Family,
        start: Candidate | None = None,
    ) -> None:
        self._lab, self._params, self._channels = lab, params, channels
        self._inverter = inverter_of(lab.setup, loss, descent, channels, start)
        self._advance = _descending(lab.setup, loss, descent, lab.chunk)

    def first(self) -> InversionState:
        """The state at step 0, as the inverter makes it."""
        return self._inverter.init(self._lab.stream(Stream.DESCENT))

    def run(
        self, stage: str, begin: Callable[[], InversionState], steps: int
    ) -> InversionState:
        """The state that `begin` makes, after `steps` steps."""

        def advance(
            state: InversionState, start: int, stop: int
        ) -> tuple[InversionState, InversionInfo]:
            count = np.int32(stop - start)
            return self._advance(self._params, self._channels, state, count)

        shapes = jax.eval_shape(begin)
        lab = self._lab
        found: InversionState = lab.run.loop(
            stage, advance, begin, shapes, steps, lab.chunk
        )
        return found
