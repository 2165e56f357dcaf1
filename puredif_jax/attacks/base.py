"""What every attack has: its images, its share of the samples and its channel.

Sources of the attacks: Chou, Chen and Ho, "How to Backdoor Diffusion Models?"
(BadDiffusion, arXiv 2212.05400) and "VillanDiffusion: A Unified Backdoor Attack
Framework for Diffusion Models" (arXiv 2306.06874); Chen, Song and Li, "TrojDiff: Trojan
Attacks on Diffusion Models with Diverse Targets" (arXiv 2303.05762).
"""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar

import numpy as np

from puredif_jax.attacks.channel import Channel
from puredif_jax.attacks.pictures import Shape
from puredif_jax.attacks.targets import Hat, Target
from puredif_jax.attacks.triggers import Box, Trigger, mask
from puredif_jax.diffusion.schedules import NoiseSchedule
from puredif_jax.diffusion.solver import Solver


@dataclasses.dataclass(frozen=True)
class Attack(abc.ABC):
    """A backdoor to be trained into a model.

    A kind of attack says what its `channel` is and under which `solver` it fires.

    Attributes:
      trigger: the image r added to the initial noise.
      target: the image y that it then draws.
      poison_rate: share of poisoned samples in training.
      trigger_only: train with the bare trigger; otherwise the clean image shows through
        where the trigger is -1.
      controlled: the attacker draws by samplers of his own, the ordinary ones inside
        the channel; otherwise by ordinary samplers of the model.
    """

    trigger: Trigger = Box()
    target: Target = Hat()
    poison_rate: float = 0.1
    trigger_only: bool = True
    controlled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.poison_rate <= 1:
            raise ValueError(
                f"poison_rate must lie in (0, 1], found {self.poison_rate}"
            )

    @property
    @abc.abstractmethod
    def solver(self) -> Solver:
        """The kind of sampler under which it fires."""

    @abc.abstractmethod
    def channel(self, schedule: NoiseSchedule, shape: Shape) -> Channel:
        """H, C and gamma, in float64.

        Args:
          schedule: the forward process of the model.
          shape: (H, W, C) of its images.

        Raises:
          ValueError: the attack is not defined on this process.
        """

    def images(self, shape: Shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The trigger r, the target y and the places where a clean image shows through.

        float32 `[H, W, C]` each; the last is 1 where the clean image replaces r.

        Raises:
          ValueError: the images do not exist in this shape, or one is of another
            shape or not of finite numbers.
        """
        trigger = _drawn(self.trigger, self.trigger.image(shape), shape)
        through = np.zeros_like(trigger) if self.trigger_only else mask(trigger)
        target = _drawn(self.target, self.target.image(shape, trigger), shape)
        return trigger, target, through


def _drawn(by: Trigger | Target, image: np.ndarray, shape: Shape) -> np.ndarray:
    """Checks an image that a trigger or a target has drawn; returns it in float32."""
    image, name = np.asarray(image, np.float32), type(by).__name__
    if image.shape != tuple(shape):
        raise ValueError(
            f"{name} drew an image of {image.shape} for a model of images of "
            f"{tuple(shape)}: its `image` must draw in the shape that it is given"
        )
    if not np.isfinite(image).all():
        raise ValueError(f"{name} drew an image that is not of finite numbers")
    return image


def require_fading(schedule: NoiseSchedule, who: str) -> None:
    """Raises ValueError on a process whose signal stays, where H = 1 - s is 0."""
    if not schedule.fades:
        raise ValueError(
            f"{who} needs a process whose signal fades, found one whose signal stays "
            f"at {schedule.signal[-1]:.3g}: take VillanDiffusionVE, or another "
            "`schedule`"
        )
