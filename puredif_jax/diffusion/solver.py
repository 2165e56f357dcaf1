"""Kinds of reverse process: what each asks of a backdoor, and what each is called."""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar, TypeVar

import numpy as np

from puredif_jax.diffusion.schedules import NoiseSchedule

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Solver(abc.ABC):
    """The kind of sampler under which a backdoor fires.

    Attributes:
      name: short, for files and tables.
      title: the same in a word of prose.
      factor: of the published response of a backdoor.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    factor: ClassVar[float]

    @classmethod
    def named(cls, name: str) -> Solver:
        """The kind of this name.

        Raises:
          ValueError: there is none.
        """
        kinds = {kind.name: kind for kind in cls.__subclasses__()}
        if name not in kinds:
            raise ValueError(f"a solver is one of {', '.join(kinds)}, found {name!r}")
        return kinds[name]()

    @abc.abstractmethod
    def response(self, schedule: NoiseSchedule, shift: np.ndarray) -> np.ndarray:
        """C*_t, the response that keeps a reverse process on the shift H_t r.

        Args:
          schedule: the forward process.
          shift: H, float64 `[T]`; H_{-1} is 0.

        Returns:
          float64 `[T]`.
        """

    @abc.abstractmethod
    def pick(self, ancestral: _T, deterministic: _T) -> _T:
        """The one of two values that is for this kind."""


class Ancestral(Solver):
    """Samplers that add noise on their way, such as DDPM's; an SDE.

    C*_t = v_t (H_t - sqrt(alpha_t) H_{t-1}) / w_t,  w_t = v_t^2 - alpha_t v_{t-1}^2.

    It holds for variance-preserving and variance-exploding processes alike: w is
    1 - alpha_t for the former and sigma_t^2 - sigma_{t-1}^2 for the latter.
    """

    name = "sde"
    title = "ancestral"
    factor = 1.0

    def response(self, schedule: NoiseSchedule, shift: np.ndarray) -> np.ndarray:
        before = np.concatenate([[0.0], shift[:-1]])
        v, ratio = schedule.noise, schedule.signal / schedule.previous[0]
        found: np.ndarray = v * (shift - ratio * before) / schedule.added
        return found

    def pick(self, ancestral: _T, deterministic: _T) -> _T:
        return ancestral


class Deterministic(Solver):
    """Samplers that add none, such as DDIM's; an ODE.

    C*_t = (s_{t-1} H_t - s_t H_{t-1}) / (s_{t-1} v_t - s_t v_{t-1}).
    """

    name = "ode"
    title = "deterministic"
    factor = 2.0

    def response(self, schedule: NoiseSchedule, shift: np.ndarray) -> np.ndarray:
        before = np.concatenate([[0.0], shift[:-1]])
        s, v = schedule.signal, schedule.noise
        s_prev, v_prev = schedule.previous
        found: np.ndarray = (s_prev * shift - s * before) / (s_prev * v - s * v_prev)
        return found

    def pick(self, ancestral: _T, deterministic: _T) -> _T:
        return deterministic
