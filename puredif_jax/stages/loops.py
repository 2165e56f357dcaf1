"""The long loops of an experiment on one model: training, survey, descent.

Each resumes from its latest checkpoint and ends in the same arrays, bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from puredif_jax.attacks import base as attacks
from puredif_jax.attacks.base import Attack, Solver
from puredif_jax.attacks.training import Training, TrainState, trainer
from puredif_jax.data import batches
from puredif_jax.data import images as data
from puredif_jax.defenses.inversion import (
    Descent,
    InversionState,
    Inverter,
    Refresh,
    inverter,
    keep,
)
from puredif_jax.defenses.objectives import (
    Bindable,
    DistributionShift,
    Hypothesis,
    estimated_target,
)
from puredif_jax.defenses.reinforcement import Reinforcement
from puredif_jax.defenses.survey import Survey
from puredif_jax.runs import checkpoint, parallel
from puredif_jax.runs.parallel import Spread
from puredif_jax.runs.report import progress
from puredif_jax.runs.run import compiling
from puredif_jax.stages.lab import Lab
from puredif_jax.stages.weights import Truth
from puredif_jax.types import Array, Candidate, Key, Params, Shard


def train(
    lab: Lab,
    training: Training,
    attack: Attack | None,
    images: data.ImageSet,
    start: str | None,
    until: int,
    trigger: np.ndarray | None = None,
) -> Params:
    """The moving average of the weights at step `until`, trained on to it.

    Each `until` is kept as a snapshot, so that an earlier one is read back.

    Args:
      lab: the model and its devices.
      training: hyperparameters.
      attack: the backdoor, or None.
      images: the clean set.
      start: weights at step 0; None for fresh ones.
      until: step to reach.
      trigger: replaces that of the attack from the last snapshot on.
    """
    run, unet = lab.run, lab.unet
    rows = attack.rows(lab.schedule) if attack else attacks.clean_rows(lab.schedule)
    poison = attacks.poison(attack, unet.image_shape) if attack else None

    def made(trigger: Array | None):
        chosen = None
        if poison is not None and trigger is not None:
            chosen = poison._replace(trigger=trigger)
        loss = functools.partial(attacks.training_loss, lab.network, rows, chosen)
        return trainer(loss, training)

    def advance(state: TrainState, batches: Array, trigger: Array | None, count: Array):
        return _steps(made(trigger).step, state, count, lab.chunk, batches)

    key_init, key_train = jax.random.split(lab.key)

    def fresh(params: Params) -> TrainState:
        return made(None if poison is None else poison.trigger).init(params, key_train)

    def begin() -> TrainState:
        if before is not None:  # the trigger is another from there on
            return before
        init = jax.jit(unet.init)
        return fresh(init(key_init) if start is None else lab.load(start))

    name = ("train", training, attack, lab.chunk)
    program = lab.program(name, lambda: jax.jit(advance, donate_argnums=0))
    if poison is not None:
        chosen = poison.trigger if trigger is None else trigger
        trigger = run.replicate(np.asarray(chosen))
    shapes = jax.eval_shape(fresh, jax.eval_shape(unet.init, key_init))
    snapshots = run.folder / "checkpoints" / "snapshots"
    with checkpoint.Checkpoints(snapshots, keep=None) as kept:
        found = kept.restore_last(run.place(shapes), until)
    first, before = found or (0, None)
    if before is not None and first == until:
        return before.ema_params
    pixels = images.load(unet.image_shape)
    sharding = parallel.along(run.mesh, None, "batch")

    def several(state: TrainState, first: int, last: int):
        chosen = batches.order(len(pixels), lab.seed, first, last, training.batch)
        count = last - first

        def rows(index: Any) -> np.ndarray:
            taken = data.to_float(pixels[chosen[:, index[1]]])
            rest = [(0, lab.chunk - count), *[(0, 0)] * (taken.ndim - 1)]
            return np.pad(taken, rest)  # of one shape: one program for any count

        # A host makes the images of its own devices only.
        shape = (lab.chunk, training.batch, *unet.image_shape)
        batch = jax.make_array_from_callback(shape, sharding, rows)
        return program(state, batch, trigger, np.int32(count))

    state = run.loop("train", several, begin, shapes, until, lab.chunk, first)
    with checkpoint.Checkpoints(snapshots, keep=None) as kept:
        kept.save(until, state)
    return state.ema_params


def _steps(
    step: Callable[..., tuple[Any, Any]],
    state: Any,
    count: Array | int,
    most: int,
    inputs: Any = None,
) -> tuple[Any, Any]:
    """`count` steps of (state, input) -> (state, info); one program for any count.

    So a result is the same bit for bit wherever the calls of a loop end.

    Args:
      step: what is repeated.
      state: before the first step.
      count: of steps; traced.
      most: bound of it, and the rows of `inputs`.
      inputs: arrays with a row for each step, or None.

    Returns:
      The state, and the infos, `[most, ...]`: those of steps not taken are 0.
    """

    def row(i: Array | int) -> Any:
        at = functools.partial(jax.lax.dynamic_index_in_dim, index=i, keepdims=False)
        return jax.tree.map(at, inputs)

    def body(i: Array, both: tuple[Any, Any]) -> tuple[Any, Any]:
        state, infos = both
        state, info = step(state, row(i))
        put = jax.lax.dynamic_update_index_in_dim
        return state, jax.tree.map(lambda x, y: put(x, y, i, 0), infos, info)

    step = jax.jit(step, inline=True)  # traced once, here
    _, info = jax.eval_shape(step, state, row(0))
    infos = jax.tree.map(lambda x: jnp.zeros((most, *x.shape), x.dtype), info)
    return jax.lax.fori_loop(0, count, body, (state, infos))


def reinforce(
    lab: Lab, stage: str, params: Params, reinforcement: Reinforcement, truth: Truth
) -> np.ndarray:
    """The known trigger, reinforced on these weights; `[H, W, C]`."""

    def make(hypothesis: Hypothesis, spread: Spread) -> Inverter:
        del hypothesis  # that of the truth
        start = Candidate(jnp.asarray(truth.trigger), jnp.asarray(truth.target))
        return reinforcement.inverter(
            lab.model, lab.schedule, truth.solver, start, spread.noise
        )

    hypothesis = Hypothesis.of(truth.solver)
    name = ("reinforce", reinforcement, truth.solver)  # the start is not in a step
    descent = _Descent(lab, name, make, params, hypothesis)
    steps = reinforcement.descending(truth.solver).steps
    state = descent.run(stage, descent.first, steps)
    return parallel.gather(state.candidate.delta)[0]


def invert(
    lab: Lab,
    stage: str,
    params: Params,
    solver: Solver,
    loss: Bindable,
    descent: Descent,
    survey: Survey | None,
    heldout: int,
) -> tuple[Candidate, np.ndarray]:
    """Seeks a trigger under one hypothesis.

    The first `survey.starts` candidates start where the triggers of the survey meet,
    the others at random. A loss that does not seek the target leaves it where it
    started: then it is estimated for the candidates that are judged.

    Returns the candidate with the least shift error on held-out noise, as numpy,
    and those errors, `[K]`.
    """
    hypothesis = Hypothesis.of(solver)

    def estimate(hypothesis: Hypothesis, shard: Shard) -> Refresh:
        return estimated_target(lab.model, lab.schedule, hypothesis, shard)

    def make(hypothesis: Hypothesis, spread: Spread) -> Inverter:
        bound = loss.bind(lab.model, lab.schedule, hypothesis, spread.noise)
        return inverter(
            bound,
            descent,
            lab.unet.image_shape,
            refresh=estimate(hypothesis, spread.noise),
            candidates=spread.candidates,
            axis=spread.axis,
        )

    estimated = not (loss.seeks_target or descent.refresh)

    def judge():
        def error(params, hypothesis, candidate, key) -> tuple[Array, Array]:
            if estimated:
                show = estimate(hypothesis, lab.shard)
                target = show(params, candidate, jax.random.fold_in(key, 1))
                candidate = dataclasses.replace(candidate, target=target)
            shift = DistributionShift(samples=heldout)
            bound = shift.bind(lab.model, lab.schedule, hypothesis, lab.shard)
            return bound(params, candidate, key), candidate.target

        return jax.jit(error, out_shardings=parallel.replicated(lab.run.mesh))

    program = lab.program(("heldout", heldout, estimated), judge)
    key = jax.random.fold_in(lab.key, 303)

    def judged(found: Candidate) -> tuple[np.ndarray, np.ndarray]:
        """Errors and targets of the candidates, each by itself: one program."""
        each = (
            jax.tree.map(lambda x, k=k: x[k], found)
            for k in range(found.delta.shape[0])
        )
        pairs = [
            parallel.gather(program(params, hypothesis, candidate, key))
            for candidate in each
        ]
        errors, targets = map(np.array, zip(*pairs, strict=True))
        return np.where(np.isnan(errors), np.inf, errors), targets  # never the least

    search = _Descent(lab, ("invert", loss, descent), make, params, hypothesis)
    begin, steps = search.first, descent.steps
    if survey is not None:
        count = min(survey.starts, descent.candidates)
        met = _survey(lab, stage, params, hypothesis, survey, count)

        def begin() -> InversionState:
            first = search.first()
            candidate = jax.tree.map(
                lambda met, random: jnp.concatenate([met, random[count:]]),
                met,
                first.candidate,
            )
            return dataclasses.replace(first, candidate=candidate)

    if descent.scout:
        scouts = search.run(f"{stage}_scouts", begin, descent.scout)
        order = np.argsort(judged(scouts.candidate)[0], kind="stable")
        steps -= descent.scout

        def begin() -> InversionState:
            return keep(scouts, order[: descent.last])

    state = search.run(stage, begin, steps)
    errors, targets = judged(state.candidate)
    best = int(np.argmin(errors))
    delta = parallel.gather(state.candidate.delta)[best]
    return Candidate(delta, targets[best]), errors


def seconds(lab: Lab, stage: str) -> float:
    """What the survey and the steps of an inversion or a reinforcement took.

    Of all calls together, without steps that a killed one did not store; host 0 knows.
    """
    return lab.run.metrics.seconds(f"{stage}_survey", f"{stage}_scouts", stage)


class _Descent:
    """An inverter on one model as a resumable loop; compiled once for both hypotheses.

    `make` gives the inverter of a hypothesis on the devices; `name` says which it is
    among those of the lab.
    """

    def __init__(
        self,
        lab: Lab,
        name: Any,
        make: Callable[[Hypothesis, Spread], Inverter],
        params: Params,
        hypothesis: Hypothesis,
    ) -> None:
        def advance(
            params: Params, hypothesis: Hypothesis, state: InversionState, count: Array
        ):
            candidates = state.candidate.delta.shape[0]
            step = make(hypothesis, parallel.spread(lab.run.mesh, candidates)).step
            return _steps(lambda state, _: step(params, state), state, count, lab.chunk)

        self._lab, self._params, self._hypothesis = lab, params, hypothesis
        self._make = make
        name = (name, lab.chunk)
        self._advance = lab.program(
            name,
            lambda: jax.jit(
                advance,
                donate_argnums=2,
                out_shardings=parallel.replicated(lab.run.mesh),
            ),
        )

    def first(self) -> InversionState:
        """The state at step 0, as the inverter makes it."""
        key = jax.random.fold_in(self._lab.key, 202)
        return self._make(self._hypothesis, Spread()).init(key)

    def run(
        self, stage: str, begin: Callable[[], InversionState], steps: int
    ) -> InversionState:
        """The state `steps` after that of `begin`."""

        def advance(state: InversionState, start: int, stop: int):
            count = np.int32(stop - start)
            return self._advance(self._params, self._hypothesis, state, count)

        shapes = jax.eval_shape(begin)
        lab = self._lab
        return lab.run.loop(stage, advance, begin, shapes, steps, lab.chunk)


def _survey(
    lab: Lab,
    stage: str,
    params: Params,
    hypothesis: Hypothesis,
    survey: Survey,
    count: int,
) -> Candidate:
    """What `Survey.propose` returns, drawn with progress and computed once."""
    model, schedule, shape = lab.model, lab.schedule, lab.unet.image_shape

    def programs() -> tuple[Any, Any]:
        spread = parallel.spread(lab.run.mesh, survey.together)

        def draw(params, hypothesis, triggers: Array, keys: Key) -> Array:
            return survey.draw(
                model,
                params,
                schedule,
                hypothesis,
                triggers,
                keys,
                shard=spread.noise,
                axis=spread.axis,
            )

        starts = parallel.spread(lab.run.mesh, count)

        def choose(params, hypothesis, triggers, images, key) -> Candidate:
            found, _ = survey.candidates(triggers, images, count)
            return survey.choose_sign(
                model,
                params,
                schedule,
                hypothesis,
                found,
                key,
                shard=starts.noise,
                axis=starts.axis,
            )

        whole = parallel.replicated(lab.run.mesh)
        return jax.jit(draw, out_shardings=whole), jax.jit(choose, out_shardings=whole)

    def compute() -> Mapping[str, Any]:
        draw, choose = lab.program(("survey", survey, count), programs)
        begun = survey.begin(shape, jax.random.fold_in(lab.key, 505))
        triggers, keys, key_sign = lab.run.replicate(begun)
        images = []
        began = time.perf_counter()
        with progress(
            survey.triggers, 0, f"{stage}_survey", parallel.is_host_zero()
        ) as bar:
            for i in range(0, survey.triggers, survey.together):
                group = slice(i, i + survey.together)
                with compiling(f"{stage}_survey", i == 0):
                    drawn = draw(params, hypothesis, triggers[group], keys[group])
                    images.append(parallel.gather(drawn))
                bar.update(survey.together)
                parallel.safe_point()
        pool = lab.run.replicate(np.concatenate(images))
        found = parallel.gather(choose(params, hypothesis, triggers, pool, key_sign))
        if parallel.is_host_zero():
            metrics, name = lab.run.metrics, f"{stage}_survey"
            metrics.rewind(name, 0)
            took = time.perf_counter() - began
            metrics.write(name, survey.triggers, seconds=took)
        return {"delta": found.delta, "target": found.target}

    found = lab.run.once(f"{stage}_survey", compute)
    return Candidate(jnp.asarray(found["delta"]), jnp.asarray(found["target"]))
