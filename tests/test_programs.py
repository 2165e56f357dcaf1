"""The three programs a device spends its time in, as compiled: for which platforms,
with what traffic between devices, in how much memory."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_config import TINY

from puredif_jax import attacks, parallel
from puredif_jax.attacks import VillanDiffusion
from puredif_jax.diffusion import DDIM, LinearBetas, sample, trajectory
from puredif_jax.inversion import Descent, inverter
from puredif_jax.objectives import (
    DenoisingConsistency,
    DistributionShift,
    Hypothesis,
    Sum,
)
from puredif_jax.training import Training, trainer
from puredif_jax.triggers import Box, Hat

pytestmark = pytest.mark.usefixtures("standard_promotion")

SCHEDULE = LinearBetas().tables()
TIMESTEPS, SAMPLES, BATCH, STEPS = 2, 8, 8, 5
LOSS = Sum(
    DistributionShift(timesteps=(900, 300), samples=SAMPLES),
    DenoisingConsistency(sampler=DDIM(steps=3), samples=SAMPLES),
)


def inversion(mesh, candidates: int = 4):
    """Steps of an inversion, and what they start from."""
    spread = parallel.spread(mesh, candidates)
    search = inverter(
        LOSS.bind(TINY, SCHEDULE, Hypothesis.of("ode"), spread.noise),
        Descent(candidates=candidates),
        TINY.image_shape,
        candidates=spread.candidates,
        axis=spread.axis,
    )

    def advance(params, state):
        def step(state, _):
            return search.step(params, state)

        return jax.lax.scan(step, state, None, length=STEPS)

    made = jax.jit(advance, out_shardings=parallel.replicated(mesh))
    state = jax.eval_shape(search.init, jax.random.key(0))
    return made, (parameters(mesh), everywhere(mesh, state))


def training(mesh):
    attack = VillanDiffusion(trigger=Box(), target=Hat())
    poison = attacks.poison(attack, TINY.image_shape)
    rows = attack.rows(SCHEDULE)
    loss = functools.partial(attacks.training_loss, TINY, rows, poison)
    made = trainer(loss, Training(10, batch=BATCH, warmup=2))
    state = jax.eval_shape(made.init, parameters(mesh), jax.random.key(0))
    images = jax.ShapeDtypeStruct(
        (STEPS, BATCH, *TINY.image_shape),
        jnp.float32,
        sharding=parallel.along(mesh, None, "batch"),
    )
    advance = jax.jit(lambda state, images: jax.lax.scan(made.step, state, images))
    return advance, (everywhere(mesh, state), images)


def sampling(mesh):
    shard = parallel.constrain(mesh, "batch")

    def draw(params, key):
        start = shard(jax.random.normal(key, (BATCH, *TINY.image_shape)))
        return sample(TINY, params, SCHEDULE, DDIM(STEPS), start, key, shard=shard)

    key = jax.eval_shape(jax.random.key, 0)
    return jax.jit(draw), (parameters(mesh), everywhere(mesh, key))


def everywhere(mesh, shapes):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=parallel.replicated(mesh)
        ),
        shapes,
    )


def parameters(mesh):
    return everywhere(mesh, jax.eval_shape(TINY.init, jax.random.key(0)))


PROGRAMS = {"inversion": inversion, "training": training, "sampling": sampling}


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("name", PROGRAMS)
def test_lowers_for_every_platform(name: str, devices: int) -> None:
    program, arguments = PROGRAMS[name](parallel.make_mesh(devices))
    platforms = ("cpu", "cuda", "tpu")
    exported = jax.export.export(program, platforms=platforms)(*arguments)
    assert exported.platforms == platforms and exported.nr_devices == devices


def loop_of(compiled) -> str:
    """The text of all but the entry, which runs once for all steps."""
    text = compiled.as_text()
    start = text.index("\nENTRY ")
    return text[:start] + text[text.index("\n}", start) :]


def traffic(text: str) -> dict[str, list[int]]:
    """Numbers that each collective moves, by its kind."""
    found: dict[str, list[int]] = {}
    kinds = r" = (.*?) (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\("
    for shapes, kind in re.findall(kinds, text):
        sizes = re.findall(r"f32\[([\d,]*)\]", shapes)
        count = sum(math.prod(map(int, filter(None, s.split(",")))) for s in sizes)
        found.setdefault(kind, []).append(count)
    return found


def convolved(text: str) -> set[int]:
    """Batch sizes of the forward convolutions on the whole image."""
    side = TINY.sample_size[0]
    found = re.findall(rf"f32\[(\d+),{side},{side},4\]\S* convolution\(", text)
    return {int(n) for n in found}


def test_devices_share_an_inversion_and_add_only_images() -> None:
    """Each has its part of every batch; in a step only sums over noise cross."""
    candidates = 4
    program, arguments = inversion(parallel.make_mesh(), candidates)
    loop = loop_of(program.lower(*arguments).compile())
    images = candidates * SAMPLES // 8
    assert convolved(loop) == {images, TIMESTEPS * images}
    moved = traffic(loop)
    assert set(moved) == {"all-reduce"}
    # A mean a timestep, a gradient in both images, and, a rollout step, the mean and
    # the variance forwards and the gradient in the trigger backwards.
    image = math.prod(TINY.image_shape)
    assert sum(moved["all-reduce"]) < 20 * image
    assert len(moved["all-reduce"]) <= 5


def test_devices_share_training_and_add_only_gradients() -> None:
    program, arguments = training(parallel.make_mesh())
    loop = loop_of(program.lower(*arguments).compile())
    moved = traffic(loop)
    weights = sum(x.size for x in jax.tree.leaves(parameters(parallel.make_mesh())))
    assert set(moved) == {"all-reduce"}
    assert weights <= sum(moved["all-reduce"]) <= weights + 8


def test_devices_share_sampling_and_never_meet() -> None:
    program, arguments = sampling(parallel.make_mesh())
    text = program.lower(*arguments).compile().as_text()
    assert traffic(text) == {} and convolved(text) == {BATCH // 8}


def test_memory_of_a_differentiable_rollout_is_flat_in_its_steps() -> None:
    """Without remat it grows with them."""

    def peak(steps: int, remat: bool) -> int:
        def loss(params, start):
            images, _ = trajectory(
                TINY,
                params,
                SCHEDULE,
                DDIM(steps),
                start,
                jax.random.key(0),
                remat=remat,
            )
            return jnp.mean(images**2)

        start = jax.ShapeDtypeStruct((64, *TINY.image_shape), np.float32)
        params = jax.eval_shape(TINY.init, jax.random.key(0))
        gradient = jax.jit(jax.grad(loss, argnums=1))
        sizes = gradient.lower(params, start).compile().memory_analysis()
        return sizes.temp_size_in_bytes + sizes.argument_size_in_bytes

    few = peak(5, True)
    assert peak(50, True) <= 1.3 * few
    assert peak(50, False) > 5 * few
