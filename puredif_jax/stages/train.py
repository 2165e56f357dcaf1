"""Training of one model as a resumable loop, clean or with a backdoor."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from puredif_jax.attacks.base import Attack
from puredif_jax.attacks.channel import Channel
from puredif_jax.attacks.poisoning import Poison, poison, training_loss
from puredif_jax.attacks.training import (
    Trainer,
    TrainInfo,
    Training,
    TrainState,
    trainer,
)
from puredif_jax.data import images as data
from puredif_jax.data.batches import order
from puredif_jax.formats import diffusers as convert
from puredif_jax.formats.base import Model, Spec
from puredif_jax.formats.diffusers_config import ConvertError
from puredif_jax.formats.scheduling import Scheduling
from puredif_jax.runs import checkpoint, parallel, weight_file
from puredif_jax.runs.binding import RunError
from puredif_jax.runs.run import wait_for
from puredif_jax.stages.base import Context, Outcome, Stage, State
from puredif_jax.stages.lab import Lab
from puredif_jax.stages.programs import KEPT, repeated
from puredif_jax.stages.setup import Setup
from puredif_jax.stages.weights import WEIGHTS, Truth, truth_path
from puredif_jax.stages.work import Step, Work
from puredif_jax.types import Array, Params


def train(
    lab: Lab,
    training: Training,
    attack: Attack | None,
    images: data.ImageSet,
    start: str | None,
    until: int,
    trigger: np.ndarray | None = None,
) -> TrainState:
    """The training at step `until`, trained on to it.

    Each `until` is kept as a snapshot, so that an earlier one is read back.

    Args:
      lab: the model and its devices.
      training: hyperparameters.
      attack: the backdoor, or None.
      images: the clean set.
      start: weights at step 0; None for fresh ones.
      until: step to reach.
      trigger: replaces the attack's own from the last snapshot on; trained bare.
    """
    run, unet = lab.run, lab.unet
    state: TrainState
    made = trainer_of(lab.setup, training, attack)
    key_init, key_train = jax.random.split(lab.key)

    def fresh(params: Params) -> TrainState:
        return made(None).init(params, key_train)

    def begin() -> TrainState:
        if first:  # the trigger is another from there on
            with checkpoint.Checkpoints(snapshots, keep=None) as kept:
                found = kept.restore_last(run.place(shapes), first)
            assert found is not None  # it was there just now
            before: TrainState = found[1]
            return before
        init = jax.jit(unet.init)
        params: Params = init(key_init) if start is None else lab.load(start, True)
        return fresh(params)

    program = _training(lab.setup, training, attack, lab.chunk)
    poisoned = None
    if attack is not None:
        own = poison(attack, unet.image_shape)
        if trigger is not None:  # which no clean image shows through
            bare = jnp.zeros_like(own.see_through)
            own = own._replace(trigger=jnp.asarray(trigger), see_through=bare)
        poisoned = run.replicate(jax.tree.map(np.float32, own))
    shapes = jax.eval_shape(fresh, jax.eval_shape(unet.init, key_init))
    snapshots = run.folder / "checkpoints" / "snapshots"
    with checkpoint.Checkpoints(snapshots, keep=None) as kept:
        found = kept.restore_last(run.place(shapes), until)
    first = 0 if found is None else found[0]
    if found is not None and first == until:
        state = found[1]
        return state
    del found  # a whole state on all devices
    pixels = lab.pixels(images)

    def several(
        state: TrainState, first: int, last: int
    ) -> tuple[TrainState, TrainInfo]:
        batch = batches(lab, pixels, training.batch, first, last)
        return program(state, batch, poisoned, np.int32(last - first))

    state = run.loop(
        "train",
        several,
        begin,
        shapes,
        until,
        lab.chunk,
        first,
        remedy="set a smaller training.learning_rate, in another workdir",
    )
    with checkpoint.Checkpoints(snapshots, keep=None) as kept:
        kept.save(until, state)
    return state


def batches(lab: Lab, pixels: np.ndarray, size: int, first: int, last: int) -> Array:
    """The images of steps first..last-1, float32 `[chunk, size, H, W, C]`.

    Split over the devices along the second axis. Steps beyond the last have zeros, so
    that one program serves any count.

    Args:
      lab: the model and its devices.
      pixels: all images, `[N, H, W, C]`: uint8, or float32 in [-1, 1].
      size: images a step.
      first, last: the steps.
    """
    chosen = order(len(pixels), lab.seed, first, last, size)

    def rows(index: Any) -> np.ndarray:
        taken = pixels[chosen[:, index[1]]]
        taken = data.to_float(taken) if taken.dtype == np.uint8 else taken
        rest = [(0, lab.chunk - (last - first)), *[(0, 0)] * (taken.ndim - 1)]
        return np.pad(taken, rest)

    # A host makes the images of its own devices only.
    shape = (lab.chunk, size, *lab.unet.image_shape)
    sharding = parallel.along(lab.run.mesh, None, "batch")
    return jax.make_array_from_callback(shape, sharding, rows)


Made = Callable[[Poison | None], Trainer]


def trainer_of(setup: Setup, training: Training, attack: Attack | None) -> Made:
    """The trainer of a model, clean or poisoned, by the arrays that it is given."""
    channel, poisoned = Channel.clean(setup.schedule), None
    if attack is not None:
        channel = attack.channel(setup.schedule, setup.image_shape)
        poisoned = poison(attack, setup.image_shape)

    def made(given: Poison | None) -> Trainer:
        chosen = poisoned if given is None else given
        loss = functools.partial(
            training_loss, setup.whole, setup.schedule, channel, chosen
        )
        return trainer(loss, training)

    return made


@functools.lru_cache(KEPT)
def _training(
    setup: Setup, training: Training, attack: Attack | None, chunk: int
) -> Callable[..., tuple[TrainState, TrainInfo]]:
    made = trainer_of(setup, training, attack)

    def advance(
        state: TrainState, batches: Array, poisoned: Poison | None, count: Array
    ) -> tuple[TrainState, TrainInfo]:
        return repeated(made(poisoned).step, state, count, chunk, batches)

    return jax.jit(advance, donate_argnums=0)


@dataclasses.dataclass(frozen=True)
class Train(Stage):
    """Trains the model to its last step, clean or with the attack, and keeps it."""

    def reads(self, weights: str | None) -> tuple[str, ...]:
        return () if weights is None else (weights,)

    def inputs(self, context: Context) -> dict[str, str]:
        return context.images_read()

    def check(self, context: Context) -> None:
        network, devices = context.lab.unet, context.lab.run.mesh.size
        training = context.training
        assert training is not None
        if training.batch % devices:
            raise RunError(
                f"training.batch must be a multiple of the {devices} devices (or set "
                f"fewer `devices`), found {training.batch}"
            )
        dtype = getattr(network, "param_dtype", "float32")
        if dtype != "float32":
            raise RunError(
                "training steps are too small for parameters of bfloat16, found "
                f"model.param_dtype={dtype}: set it to float32 "
                "(model.dtype may be bfloat16)"
            )
        if dropout := getattr(network, "dropout", 0):
            raise RunError(
                f"training has no dropout, found model.dropout={dropout}: set it to 0"
            )
        context.lab.pixels(context.data)

    def work(self, context: Context) -> Iterator[Work]:
        training, attack = context.training, context.attack
        assert training is not None

        def program(lab: Lab, params: Params) -> tuple[Step, Any]:
            made = trainer_of(lab.setup, training, attack)(None)
            images = np.zeros((training.batch, *lab.unet.image_shape), np.float32)
            split = parallel.put(images, parallel.along(lab.run.mesh, "batch"))

            def step(params: Params, state: Any) -> Any:
                state, images = state
                return made.step(state, images)[0], images

            return step, (made.init(params, lab.key), split)

        kind = type(attack).__name__ if attack else "clean"
        name = f"training step of {training.batch} images ({kind})"
        yield Work(name, training.steps, 3 * training.batch, None, program)

    def run(self, context: Context, state: State) -> tuple[State, Outcome]:
        training = context.training
        assert training is not None
        params = trained(context, training.steps, state.trigger).ema_params
        save(context, params, context.trained_in(state))
        return dataclasses.replace(state, params=params), Outcome()


def trained(context: Context, until: int, trigger: np.ndarray | None) -> TrainState:
    """The training at a step that comes after the last call's step."""
    assert context.training is not None
    return train(
        context.lab,
        context.training,
        context.attack,
        context.data,
        context.weights,
        until,
        trigger,
    )


def save(context: Context, params: Params, truth: Truth | None) -> None:
    """Writes the trained model, and a folder of diffusers where that can hold it.

    Its truth file, if it has a backdoor, lies beside each.
    """
    lab = context.lab
    host = parallel.gather(params)
    if parallel.is_host_zero():
        _write(lab, host, truth)
    parallel.agreed(True)  # it is there before any process reads it
    wait_for(lab.run.folder / WEIGHTS)
    if truth is not None:
        wait_for(truth_path(lab.run.folder / WEIGHTS))


def _write(lab: Lab, host: Any, truth: Truth | None) -> None:
    setup, top = lab.setup, lab.run.folder
    about = {"experiment": json.dumps(lab.run.about, sort_keys=True)}
    weight_file.save_weights(top / WEIGHTS, host, about)
    if truth is not None:
        truth.save(top / WEIGHTS)
    scheduling = Scheduling(setup.process, setup.prediction, clip=None)
    model = Model(Spec(setup.network, scheduling), host)
    try:
        convert.write_folder(top / convert.FOLDER, model)
    except ConvertError as error:
        logging.info("no folder of diffusers is written: %s", error)
        return
    if truth is not None:
        truth.save(top / convert.FOLDER)
