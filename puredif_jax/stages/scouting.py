"""Where the candidates of a search begin, and at which size its scouts go on."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from puredif_jax.defenses.denoising_consistency import estimated_target
from puredif_jax.defenses.family import Family
from puredif_jax.defenses.inversion import GLANCE, Inversion, InversionState
from puredif_jax.defenses.starts import Starts
from puredif_jax.runs import parallel
from puredif_jax.runs.report import progress
from puredif_jax.runs.run import compiling
from puredif_jax.stages.lab import Lab
from puredif_jax.stages.programs import KEPT
from puredif_jax.stages.setup import Setup, Stream
from puredif_jax.types import Array, Candidate, Key, Params


def first_candidates(
    lab: Lab,
    stage: str,
    params: Params,
    family: Family,
    starts: Starts,
    count: int,
) -> Candidate:
    """The first candidates, with the images they lead to.

    They are found with a progress bar, and stored. A call that is interrupted asks the
    model again.
    """
    shape, label = lab.setup.image_shape, f"{stage}_starts"

    def compute() -> Mapping[str, Any]:
        program, key = _answering(lab.setup, starts), lab.stream(Stream.STARTS)
        total, most = starts.count(shape), starts.together
        answers = []
        began = time.perf_counter()
        with progress(total, 0, label, parallel.is_host_zero()) as bar:
            for start in range(0, total, most):
                rows = np.arange(start, start + most).clip(max=total - 1)
                group = lab.run.replicate(rows.astype(np.int32))
                with compiling(label, start == 0):
                    found = program(params, family, group, key)
                    answers.append(parallel.gather(found))
                bar.update(min(most, total - start))
                parallel.safe_point()
        if parallel.is_host_zero():
            metrics = lab.run.metrics
            metrics.rewind(label, 0)
            metrics.write(label, total, seconds=time.perf_counter() - began)
        every = lab.run.replicate(np.concatenate(answers)[:total])
        leads = _leading(lab.setup, starts, count)(every, key)
        return {"leads": parallel.gather(leads)}

    leads = jnp.asarray(lab.run.once(label, compute, ("leads",))["leads"])
    found = starts.candidates(leads, count, family, shape)
    images = _showing(lab.setup)(params, family, found, lab.stream(Stream.HELDOUT))
    return dataclasses.replace(found, target=images)


@functools.lru_cache(KEPT)
def _answering(setup: Setup, starts: Starts) -> Callable[..., Array]:
    """What a model answers to a group of inputs."""

    def answers(params: Params, family: Family, numbers: Array, key: Key) -> Array:
        return starts.answers(
            setup.model,
            params,
            setup.schedule,
            family,
            numbers,
            setup.image_shape,
            key,
            shard=setup.shard,
        )

    return jax.jit(answers, out_shardings=parallel.replicated(setup.mesh))


@functools.lru_cache(KEPT)
def _leading(setup: Setup, starts: Starts, count: int) -> Callable[..., Array]:
    """What so many candidates are made of, from all answers."""

    def leads(answers: Array, key: Key) -> Array:
        return starts.leads(answers, count, setup.image_shape, key)

    return jax.jit(leads, out_shardings=parallel.replicated(setup.mesh))


@functools.lru_cache(KEPT)
def _showing(setup: Setup) -> Callable[..., Array]:
    """The images to which candidates lead, one after another."""

    def show(params: Params, family: Family, found: Candidate, key: Key) -> Array:
        image = estimated_target(setup.model, setup.schedule, family, setup.shard)
        images: Array = jax.lax.map(lambda each: image(params, each, key), found)
        return images

    return jax.jit(show, out_shardings=parallel.replicated(setup.mesh))


def leap(
    lab: Lab,
    params: Params,
    family: Family,
    inversion: Inversion,
    scouts: InversionState,
    errors: np.ndarray,
) -> tuple[InversionState, np.ndarray]:
    """The scouts, each at the size at which its error is least, and these errors.

    The optimiser of a scout that leaps goes on as it was: its memory is of ten steps.

    Args:
      errors: of the scouts as they are, `[K]`.
    """
    program, key = _leaping(lab.setup, inversion), lab.stream(Stream.HELDOUT)
    found = jax.tree.map(np.array, parallel.gather(scouts.candidate))
    least = errors.copy()
    for k in range(len(errors)):
        own = jax.tree.map(lambda x, k=k: x[k], scouts.candidate)
        others, tried = parallel.gather(program(params, family, own, key))
        best = int(np.argmin(np.where(np.isnan(tried), np.inf, tried)))
        if tried[best] < least[k]:
            least[k] = tried[best]
            jax.tree.map(
                lambda x, other, k=k, best=best: x.__setitem__(k, other[best]),
                found,
                others,
            )
    return dataclasses.replace(scouts, candidate=lab.run.replicate(found)), least


@functools.lru_cache(KEPT)
def _leaping(
    setup: Setup, inversion: Inversion
) -> Callable[..., tuple[Candidate, Array]]:
    """A scout at other sizes, `[N, ...]`, and the errors there, `[N]`."""

    def leaps(
        params: Params, family: Family, candidate: Candidate, key: Key
    ) -> tuple[Candidate, Array]:
        error = GLANCE.bind(setup.model, setup.schedule, family, setup.shard)
        image = estimated_target(
            setup.model, setup.schedule, family, setup.shard, GLANCE.samples
        )

        def tried(each: Candidate) -> tuple[Candidate, Array]:
            target = image(params, each, jax.random.fold_in(key, 1))
            each = dataclasses.replace(each, target=target)
            return each, error(params, each, key)

        leapt = inversion.larger(family, candidate)
        every = jax.tree.map(lambda *x: jnp.stack(x), *leapt)
        found: tuple[Candidate, Array] = jax.lax.map(tried, every)
        return found

    return jax.jit(leaps, out_shardings=parallel.replicated(setup.mesh))
