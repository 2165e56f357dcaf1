"""The search for a trigger on one model: survey and descent, as resumable loops.

Each resumes from its latest checkpoint and ends in the same arrays, bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from puredif_jax.attacks.channel import Channel
from puredif_jax.defenses.denoising_consistency import estimated_target
from puredif_jax.defenses.family import Family
from puredif_jax.defenses.hypothesis import Hypothesis
from puredif_jax.defenses.inversion import (
    Descent,
    Inversion,
    InversionInfo,
    InversionState,
    Inverter,
    inverter,
    keep,
)
from puredif_jax.defenses.objective import Loss
from puredif_jax.defenses.reinforcement import Reinforcement
from puredif_jax.defenses.survey import Survey
from puredif_jax.runs import parallel
from puredif_jax.runs.report import progress
from puredif_jax.runs.run import compiling
from puredif_jax.stages.lab import Lab
from puredif_jax.stages.programs import KEPT, repeated
from puredif_jax.stages.setup import Setup, Stream
from puredif_jax.stages.weights import Truth
from puredif_jax.types import Array, Candidate, Key, Params


def reinforce(
    lab: Lab, stage: str, params: Params, reinforcement: Reinforcement, truth: Truth
) -> np.ndarray:
    """The known trigger, reinforced on these weights; `[H, W, C]`."""
    loss = reinforcement.loss(truth.solver, truth.controlled)
    descent = reinforcement.descending(truth.solver)
    start = Candidate(jnp.asarray(truth.trigger), jnp.asarray(truth.target))
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

    The first `survey.starts` candidates start where the triggers of the survey meet,
    the others at random. A loss that does not seek the target leaves it where it
    started: then it is estimated for the candidates that are judged.

    Candidates are compared on held-out noise by `inversion.judge`.
    """
    loss, descent, survey = inversion.loss, inversion.descent, inversion.survey
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

    search = _Search(lab, loss, descent, params, family)
    begin, steps = search.first, descent.steps
    if survey is not None:
        count = min(survey.starts, descent.candidates)
        channel = lab.channel(hypothesis)
        met = _survey(lab, stage, params, channel, survey, count)

        def begin() -> InversionState:
            first = search.first()
            random = first.candidate
            candidate = dataclasses.replace(
                random,
                delta=jnp.concatenate([met.delta, random.delta[count:]]),
                target=jnp.concatenate([met.target, random.target[count:]]),
            )
            return dataclasses.replace(first, candidate=candidate)

    if descent.scout:
        scouts = search.run(f"{stage}_scouts", begin, descent.scout)
        order = np.argsort(judged(scouts.candidate)[0], kind="stable")
        steps -= descent.scout

        def begin() -> InversionState:
            return keep(scouts, order[: descent.last])

    last = -(-steps // 4)
    before = search.run(stage, begin, steps - last) if steps > last else begin()
    early = judged(before.candidate)[0].min()
    state = search.run(f"{stage}_end", lambda: before, last)
    errors, targets = judged(state.candidate)
    best = int(np.argmin(errors))
    found = jax.tree.map(lambda x: x[best], parallel.gather(state.candidate))
    found = dataclasses.replace(found, target=targets[best])
    least = errors[best]
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


def seconds(lab: Lab, stage: str) -> float:
    """What the survey and the steps of an inversion or a reinforcement took.

    Of all calls together, without steps that a killed one did not store; host 0 knows.
    """
    parts = (f"{stage}_survey", f"{stage}_scouts", stage, f"{stage}_end")
    return lab.run.metrics.seconds(*parts)


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
        descent,
        setup.image_shape,
        start=start,
        candidates=spread.candidates,
        axis=spread.axis,
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
        """The state `steps` after that of `begin`."""

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


@functools.lru_cache(KEPT)
def _surveying(
    setup: Setup, survey: Survey, count: int
) -> tuple[Callable[..., Array], Callable[..., Candidate]]:
    """The draws of a group of triggers, and the choice of starts from all of them."""
    spread = parallel.spread(setup.mesh, survey.together)
    starts = parallel.spread(setup.mesh, count)

    def draw(params: Params, channel: Channel, triggers: Array, keys: Key) -> Array:
        return survey.draw(
            setup.model,
            params,
            setup.schedule,
            channel,
            triggers,
            keys,
            shard=spread.noise,
            axis=spread.axis,
        )

    def choose(
        params: Params, channel: Channel, triggers: Array, images: Array, key: Key
    ) -> Candidate:
        found, _ = survey.candidates(triggers, images, count)
        return survey.choose_sign(
            setup.model,
            params,
            setup.schedule,
            channel,
            found,
            key,
            shard=starts.noise,
            axis=starts.axis,
        )

    whole = parallel.replicated(setup.mesh)
    return jax.jit(draw, out_shardings=whole), jax.jit(choose, out_shardings=whole)


def _survey(
    lab: Lab,
    stage: str,
    params: Params,
    channel: Channel,
    survey: Survey,
    count: int,
) -> Candidate:
    """What `Survey.propose` returns, drawn with progress and computed once."""

    def compute() -> Mapping[str, Any]:
        draw, choose = _surveying(lab.setup, survey, count)
        begun = survey.begin(lab.setup.image_shape, lab.stream(Stream.SURVEY))
        triggers, keys, key_sign = lab.run.replicate(begun)
        images = []
        began = time.perf_counter()
        with progress(
            survey.triggers, 0, f"{stage}_survey", parallel.is_host_zero()
        ) as bar:
            for i in range(0, survey.triggers, survey.together):
                group = slice(i, i + survey.together)
                with compiling(f"{stage}_survey", i == 0):
                    drawn = draw(params, channel, triggers[group], keys[group])
                    images.append(parallel.gather(drawn))
                bar.update(survey.together)
                parallel.safe_point()
        pool = lab.run.replicate(np.concatenate(images))
        found = parallel.gather(choose(params, channel, triggers, pool, key_sign))
        if parallel.is_host_zero():
            metrics, name = lab.run.metrics, f"{stage}_survey"
            metrics.rewind(name, 0)
            took = time.perf_counter() - began
            metrics.write(name, survey.triggers, seconds=took)
        return {"delta": found.delta, "target": found.target}

    found = lab.run.once(f"{stage}_survey", compute)
    return Candidate(jnp.asarray(found["delta"]), jnp.asarray(found["target"]))
