"""Weights by name or path: where they lie, and their known backdoor."""

from __future__ import annotations

import importlib.resources
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from puredif_jax.attacks.base import Attack
from puredif_jax.attacks.channel import Channel
from puredif_jax.attacks.pictures import Shape
from puredif_jax.diffusion.schedules import NoiseSchedule
from puredif_jax.diffusion.solver import Solver
from puredif_jax.files.whole import expanded
from puredif_jax.formats.weight_sets import TRUTH, TRUTH_IMAGES, TRUTH_TABLES
from puredif_jax.runs import parallel, weight_file
from puredif_jax.runs.binding import RunError
from puredif_jax.types import InputError

ASSETS = pathlib.Path(str(importlib.resources.files("puredif_jax") / "assets"))
WEIGHTS = "weights.safetensors"  # in a run, those of the model that it has trained
ZOO = ASSETS / "zoo"  # models that ship, as diffusers folders


def find_weights(name: str) -> pathlib.Path:
    """The folder of a shipped model's name, or a path.

    Raises:
      RunError: there is neither.
    """
    shipped = sorted(path.name for path in ZOO.iterdir())
    if name in shipped:
        return ZOO / name
    path = expanded(name)
    if not path.exists():
        raise RunError(
            f"no weights {name!r}: give a path, or a shipped model "
            f"({', '.join(shipped)})"
        )
    return path


class Truth(NamedTuple):
    """The backdoor that a model is known to have, to compare with; never an input.

    solver: the kind of sampler under which it fires.
    controlled: whether the attacker draws inside the channel.
    trigger, target: r and y, `[H, W, C]`.
    channel: H, C and gamma.
    """

    solver: Solver
    controlled: bool
    trigger: np.ndarray
    target: np.ndarray
    channel: Channel

    @classmethod
    def of(cls, attack: Attack, schedule: NoiseSchedule, image_shape: Shape) -> Truth:
        """The truth of an attack on models of a process."""
        trigger, target, _ = attack.images(image_shape)
        channel = attack.channel(schedule, image_shape)
        return cls(attack.solver, attack.controlled, trigger, target, channel)

    def psi(self, schedule: NoiseSchedule) -> float | None:
        """The share of 1 - s_t in H_t, beside v_t, to two decimals.

        By least squares, within [0, 1]. None where the signal of the process stays, or
        where the attacker draws inside the channel.
        """
        if not schedule.fades or self.controlled:
            return None
        noise = schedule.noise * schedule.unit
        whole = noise - (1 - schedule.signal)
        left = noise - np.asarray(self.channel.shift, np.float64)
        return round(float(np.clip(whole @ left / (whole @ whole), 0, 1)), 2)

    @property
    def inside(self) -> Channel | None:
        """The channel, where draws with the trigger run inside it."""
        return self.channel if self.controlled else None

    @classmethod
    def beside(
        cls, weights: pathlib.Path, schedule: NoiseSchedule, image_shape: Shape
    ) -> Truth | None:
        """What the truth file beside weights, or in their folder, says, if any.

        A file that cannot be read is named in the log and left out. No verdict rests
        on it.
        """
        path = truth_path(weights)
        if not parallel.agreed(path.is_file()):
            return None
        image = jax.ShapeDtypeStruct(image_shape, jnp.float32)
        table = jax.ShapeDtypeStruct((schedule.steps,), jnp.float32)
        shapes = dict.fromkeys(TRUTH_IMAGES, image) | dict.fromkeys(TRUTH_TABLES, table)
        try:
            found = weight_file.load_weights(path, shapes)
            about = weight_file.read_metadata(path)
            solver = Solver.named(about.get("solver", ""))
        except (InputError, ValueError) as error:
            text = f"{path}: {error}" if type(error) is ValueError else str(error)
            logging.warning("no comparison with the truth: %s", text)
            return None
        gamma = None if (found["gamma"] == 1).all() else found["gamma"]
        channel = Channel(found["shift"], found["response"], gamma)
        controlled = about.get("controlled") == "yes"
        return cls(solver, controlled, found["trigger"], found["target"], channel)

    def save(self, weights: pathlib.Path) -> None:
        """Writes the truth file beside weights, or into their folder.

        Raises:
          WriteError: it cannot be written.
        """
        arrays = {
            "trigger": self.trigger,
            "target": self.target,
            "gamma": np.broadcast_to(self.channel.scale, (1, *self.trigger.shape))[0],
            "shift": self.channel.shift,
            "response": self.channel.response,
        }
        stored = {name: np.asarray(x, np.float32) for name, x in arrays.items()}
        controlled = "yes" if self.controlled else "no"
        about = {"solver": self.solver.name, "controlled": controlled}
        weight_file.save_weights(truth_path(weights), stored, about)


def truth_path(weights: pathlib.Path) -> pathlib.Path:
    """The truth file beside weights, or in their folder."""
    if weights.is_dir():
        return weights / TRUTH
    return weights.with_suffix(f".{TRUTH}")
