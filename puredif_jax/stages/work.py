"""Steps that a run will take, each with a program to measure one of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp

from puredif_jax.attacks.channel import Channel
from puredif_jax.defenses.denoising_consistency import ESTIMATE
from puredif_jax.defenses.descent import Descent
from puredif_jax.defenses.family import Family
from puredif_jax.defenses.hypothesis import Hypothesis
from puredif_jax.defenses.inversion import GLANCE, Inversion
from puredif_jax.defenses.objective import Loss
from puredif_jax.stages.lab import Lab
from puredif_jax.stages.search import inverter_of
from puredif_jax.types import Params

Step = Callable[[Params, Any], Any]


class Work(NamedTuple):
    """Steps of one kind in a run.

    name: what one step is.
    times: how many there are.
    evaluations: of the network on one image in a step; with its gradient three.
    key: programs of the same name and key on the same model are the same.
    program: (lab, weights) -> the step, and a state before it.
    """

    name: str
    times: float
    evaluations: int
    key: Any
    program: Callable[[Lab, Params], tuple[Step, Any]]


def drawing(batch: int, images: float) -> Work:
    def program(lab: Lab, params: Params) -> tuple[Step, Any]:
        def step(params: Params, x: Any) -> Any:
            return lab.model(params, lab.setup.shard(x), jnp.zeros((batch,), jnp.int32))

        return step, jnp.zeros((batch, *lab.unet.image_shape))

    name = f"network evaluation of {batch} images"
    return Work(name, images / batch, batch, None, program)


def descending(
    loss: Loss,
    channel: Callable[[Lab], Channel | Family],
    descent: Descent,
    times: float,
    name: str,
) -> Work:
    """The step of all candidates, as `stages.search` compiles it."""

    def program(lab: Lab, params: Params) -> tuple[Step, Any]:
        plain = dataclasses.replace(descent, scout=0)
        count = descent.candidates
        search = inverter_of(lab.setup, loss, plain, channel(lab), candidates=count)

        def step(params: Params, state: Any) -> Any:
            return search.step(params, state)[0]

        return step, search.init(lab.key)

    count = descent.candidates
    name = f"step of {name}, {count} candidate{'s' * (count > 1)}"
    key = loss, descent.together
    return Work(name, times, 3 * loss.evaluations * count, key, program)


def inverting(
    method: str, inversion: Inversion, hypothesis: Hypothesis
) -> Iterator[Work]:
    for phase in inversion.phases:
        yield from _searching(method, phase, hypothesis)


def _searching(
    method: str, inversion: Inversion, hypothesis: Hypothesis
) -> Iterator[Work]:
    """The steps of one search, without the searches that refine it."""
    descent, loss = inversion.descent, inversion.loss
    name = f"inversion by {method}"

    def channel(lab: Lab) -> Family:
        return lab.family(hypothesis)

    if descent.scout:
        final = dataclasses.replace(descent, candidates=descent.last)
        yield descending(loss, channel, descent, descent.scout, name)
        yield descending(loss, channel, final, descent.steps - descent.scout, name)
    else:
        yield descending(loss, channel, descent, descent.steps, name)
    images, times = inversion.judge.evaluations, inversion.judged
    yield drawing(images, times * images)
    if inversion.leaps:
        yield drawing(GLANCE.evaluations, inversion.leap_evaluations)
    if not loss.seeks_target:
        yield drawing(ESTIMATE.samples, times * ESTIMATE.evaluations)
    if (starts := inversion.starts(hypothesis)) is not None:
        yield drawing(starts.images, starts.evaluations)
        count = starts.led(descent.candidates)
        yield drawing(ESTIMATE.samples, count * ESTIMATE.evaluations)
