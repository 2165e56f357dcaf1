"""The program of a repair: steps that train a backdoor out of a model."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax

from puredif_jax.attacks.training import (
    Trainer,
    TrainInfo,
    Training,
    TrainState,
    trainer,
)
from puredif_jax.defenses.removal import Backdoor, Removal
from puredif_jax.stages.programs import KEPT, repeated
from puredif_jax.stages.setup import Setup
from puredif_jax.types import Array

Made = Callable[[Backdoor], Trainer]


def removal_trainer(
    setup: Setup, removal: Removal, training: Training, distilled: bool
) -> Made:
    """The trainer of a repair, given what is to be removed."""

    def made(backdoor: Backdoor) -> Trainer:
        loss = functools.partial(
            removal.loss, setup.whole, setup.schedule, backdoor, distilled=distilled
        )
        return trainer(loss, training)

    return made


@functools.lru_cache(KEPT)
def removing(
    setup: Setup, removal: Removal, training: Training, distilled: bool, chunk: int
) -> Callable[..., tuple[TrainState, TrainInfo]]:
    """Steps of a repair, from a state, images, a backdoor and how many steps."""
    made = removal_trainer(setup, removal, training, distilled)

    def advance(
        state: TrainState, images: Array, backdoor: Backdoor, count: Array
    ) -> tuple[TrainState, TrainInfo]:
        return repeated(made(backdoor).step, state, count, chunk, images)

    return jax.jit(advance, donate_argnums=0)
