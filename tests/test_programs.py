"""The three programs a device spends its time in, as compiled: for which platforms,
with what traffic between devices, in how much memory."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scaling
from tiny_config import DEEP, TINY, draw_params, shapes

from puredif_jax.attacks.targets import Cat
from puredif_jax.attacks.training import Training
from puredif_jax.attacks.triggers import Box
from puredif_jax.attacks.villandiffusion import VillanDiffusion
from puredif_jax.data.images import FashionMNIST
from puredif_jax.defenses.denoising_consistency import DenoisingConsistency
from puredif_jax.defenses.descent import Descent
from puredif_jax.defenses.distribution_shift import DistributionShift
from puredif_jax.defenses.hypothesis import Fading
from puredif_jax.defenses.inversion import Inversion
from puredif_jax.defenses.objective import Sum
from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.diffusion.sampling import trajectory
from puredif_jax.networks.unet import SHIPPED
from puredif_jax.runs import parallel, weight_file
from puredif_jax.stages import programs, search, train
from puredif_jax.stages.experiment import Experiment
from puredif_jax.stages.lab import Lab
from puredif_jax.stages.perform import open_lab
from puredif_jax.types import Candidate

pytestmark = pytest.mark.usefixtures("standard_promotion")

QUICK: dict[str, str | bool] = {"xla_llvm_disable_expensive_passes": True}
CANDIDATES, SAMPLES, TIMESTEPS, ROLLOUT = 4, 8, 2, 3
LOSS = Sum(
    DistributionShift(timesteps=(900, 300), samples=SAMPLES),
    DenoisingConsistency(sampler=DDIM(steps=ROLLOUT), samples=SAMPLES),
)
PROGRAMS = {
    "inversion": lambda mesh: scaling.inversion(DEEP, mesh, CANDIDATES, LOSS),
    "training": lambda mesh: scaling.training(DEEP, mesh),
    "sampling": lambda mesh: scaling.sampling(DEEP, mesh),
}


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("name", PROGRAMS)
def test_lowers_for_every_platform(name: str, devices: int) -> None:
    program, arguments = PROGRAMS[name](parallel.make_mesh(devices))
    platforms = ("cpu", "cuda", "tpu")
    exported = jax.export.export(program, platforms=platforms)(*arguments)
    assert exported.platforms == platforms and exported.nr_devices == devices


def convolved(text: str) -> set[int]:
    """Batch sizes of the forward convolutions on the whole image."""
    side = DEEP.sample_size[0]
    found = re.findall(rf"f32\[(\d+),{side},{side},4\]\S* convolution\(", text)
    return {int(n) for n in found}


def test_devices_share_an_inversion_and_add_only_images() -> None:
    """Each has its part of every batch; in a step only sums over noise cross."""
    program, arguments = PROGRAMS["inversion"](parallel.make_mesh())
    text = program.lower(*arguments).compile().as_text()
    looped, _ = scaling.collectives(text)
    images = CANDIDATES * SAMPLES // 8
    assert convolved(text) == {images, TIMESTEPS * images}
    assert set(looped) == {"all-reduce"}
    # A mean a timestep, a gradient in both images, and, a rollout step, the mean and
    # the variance, forwards and when the step is made anew, and their gradients.
    number, size = (x / scaling.STEPS for x in looped["all-reduce"])
    assert number <= 2 + 3 * ROLLOUT
    images = TIMESTEPS + 2 + 7 * ROLLOUT
    assert size < 4 * math.prod(DEEP.image_shape) * images


class Compiled(Exception):
    """Instead of a run: the text of the program that would have been run."""


@pytest.fixture
def lab(tmp_path, monkeypatch) -> Lab:
    """On eight devices; its programs are compiled and not run."""

    def compiling(make):
        def program(*closed):
            def call(*arguments):
                raise Compiled(make(*closed).lower(*arguments).compile().as_text())

            return call

        return program

    for module, name in (
        (programs, "drawing"),
        (search, "_descending"),
        (train, "_training"),
    ):
        monkeypatch.setattr(module, name, compiling(getattr(module, name)))
    return open_lab(Experiment(str(tmp_path), TINY, chunk=scaling.STEPS))


def traffic(call: Callable[[], Any]) -> tuple[str, scaling.Counts, scaling.Counts]:
    """The text of the first program of a call; what crosses in its loops, and once."""
    with pytest.raises(Compiled) as caught:
        call()
    (text,) = caught.value.args
    return text, *scaling.collectives(text, around=scaling.STEPS)  # of a chunk


def test_a_lab_shares_its_draws(lab) -> None:
    params = draw_params(TINY)
    text, *crossed = traffic(lambda: lab.draw(params, DDIM(2), lab.zero, 64))
    assert crossed == [{}, {}] and convolved(text) == {64 // 8}


def test_a_lab_shares_the_images_of_a_training_batch(lab, tmp_path) -> None:
    start = str(tmp_path / "start.safetensors")
    params = draw_params(TINY)
    weight_file.save_weights(start, params, {})
    training = Training(steps=2, batch=16, warmup=0)
    attack = VillanDiffusion(Box(), Cat())
    images = FashionMNIST(count=64)
    _, looped, _ = traffic(lambda: train.train(lab, training, attack, images, start, 2))
    weights = sum(x.size for x in jax.tree.leaves(params))
    assert set(looped) == {"all-reduce"}
    size = looped["all-reduce"][1] / scaling.STEPS
    assert 4 * weights <= size <= 4 * (weights + 8)


@pytest.mark.parametrize("candidates", [1, 8])
def test_a_lab_shares_candidates_or_their_noise(lab, candidates) -> None:
    """A candidate a device needs no word; one on all adds a few images a step."""
    loss = DistributionShift(timesteps=(900, 300), samples=8)
    descent = Descent(steps=2, candidates=candidates)
    params = draw_params(TINY)
    text, looped, _ = traffic(
        lambda: search.invert(
            lab, "x", params, Fading(), Inversion(loss, descent, None, heldout=8)
        )
    )
    assert convolved(text) == {2 * 8 * candidates // 8}
    if candidates == 8:
        assert looped == {}
    else:
        assert set(looped) == {"all-reduce"}
        size = looped["all-reduce"][1] / scaling.STEPS
        assert size < 4 * math.prod(TINY.image_shape) * 8


def test_memory_of_a_differentiable_rollout_is_flat_in_its_steps() -> None:
    """Without remat it grows with them."""

    def peak(steps: int, remat: bool) -> int:
        def loss(params, start):
            images, _ = trajectory(
                TINY,
                params,
                scaling.SCHEDULE,
                DDIM(steps),
                start,
                jax.random.key(0),
                remat=remat,
            )
            return jnp.mean(images**2)

        start = jax.ShapeDtypeStruct((64, *TINY.image_shape), np.float32)
        params = shapes(TINY)
        gradient = jax.jit(jax.grad(loss, argnums=1))
        sizes = gradient.lower(params, start).compile().memory_analysis()
        return sizes.temp_size_in_bytes + sizes.argument_size_in_bytes

    few = peak(5, True)
    assert peak(50, True) <= 1.3 * few
    assert peak(50, False) > 5 * few


def test_memory_of_a_consistency_loss_is_flat_in_its_steps() -> None:
    """With what it keeps of each step, an image each, beside a network that ships."""

    def peak(steps: int) -> int:
        loss = DenoisingConsistency(sampler=DDIM(steps), samples=4)
        channel = Fading().channel(scaling.SCHEDULE, SHIPPED.image_shape)
        bound = loss.bind(SHIPPED, scaling.SCHEDULE, channel)
        image = jax.ShapeDtypeStruct(SHIPPED.image_shape, np.float32)
        params = shapes(SHIPPED)
        gradient = jax.jit(jax.grad(bound, argnums=1))
        key = jax.eval_shape(lambda: jax.random.key(0))
        lowered = gradient.lower(params, Candidate(image, image), key)
        sizes = lowered.compile(compiler_options=QUICK).memory_analysis()
        return sizes.temp_size_in_bytes + sizes.argument_size_in_bytes

    assert peak(50) <= 1.3 * peak(5)


def test_collectives_of_a_branch_are_counted() -> None:
    mesh = parallel.make_mesh()
    split = parallel.along(mesh, "batch")

    def program(x, flag):
        return jax.lax.cond(flag, lambda x: jnp.sum(x), lambda x: x[0], x)

    shape = jax.ShapeDtypeStruct((8,), np.float32, sharding=split)
    flag = jax.ShapeDtypeStruct((), np.bool_, sharding=parallel.replicated(mesh))
    text = jax.jit(program).lower(shape, flag).compile().as_text()
    step, once = scaling.collectives(text)
    assert step == {} and once


def test_a_loop_whose_trips_are_unknown_is_not_counted_as_one() -> None:
    mesh = parallel.make_mesh()
    split, whole = parallel.along(mesh, "batch"), parallel.replicated(mesh)

    def program(x, until):
        def body(x):
            return jax.lax.with_sharding_constraint(x + jnp.sum(x), split)

        return jax.lax.while_loop(lambda x: jnp.sum(x) < until, body, x)

    shape = jax.ShapeDtypeStruct((8,), np.float32, sharding=split)
    until = jax.ShapeDtypeStruct((), np.float32, sharding=whole)
    text = jax.jit(program).lower(shape, until).compile().as_text()
    with pytest.raises(ValueError, match="how often"):
        scaling.collectives(text)
