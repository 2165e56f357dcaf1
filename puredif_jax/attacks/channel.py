"""A backdoor as one value: where its path lies, and how a model answers on it.

A poisoned sample is  x_t = s_t y + v_t gamma eps + H_t r,  and the model answers it
with  eps + C_t r:  y the target image, r the trigger. In the variable

  z_t = (x_t - H_t r) / gamma

it is an ordinary diffusion of the image y / gamma, whose noise model is

  e(z, t) = M(gamma z + H_t r, t) - C_t r,

so all that is known of diffusion, every sampler too, applies to it.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import struct

from puredif_jax.diffusion.prediction import Denoiser, Estimates, diffuse, lookup
from puredif_jax.diffusion.schedules import NoiseSchedule
from puredif_jax.types import Array, Candidate, NoiseModel, Params


@struct.dataclass
class Channel:
    """The coefficients (H, C, gamma) of a backdoor, or of what is assumed of one.

    A pytree, so that one compiled program serves every kind. NumPy arrays in it are
    constants of the programs that close over them.

    shift: H, `[T]`.  response: C, `[T]`.
    gamma: scale of the noise, `[]`, or `[H, W, C]` where it differs over the image;
      None for 1.
    """

    shift: Array | np.ndarray
    response: Array | np.ndarray
    gamma: Array | np.ndarray | float | None = None

    @classmethod
    def clean(cls, schedule: NoiseSchedule) -> Channel:
        """The channel without a backdoor: H = C = 0."""
        zero = np.zeros(schedule.steps)
        return cls(zero, zero)

    @property
    def power(self) -> float:
        """The power of a linear denoiser's error by which a search divides: 1."""
        return 1.0

    def at(self, candidate: Candidate) -> Channel:
        """The channel of a candidate: this one, which has no free numbers."""
        return self

    @property
    def scale(self) -> Array:
        """gamma in float32, `[]`, or `[1, H, W, C]` to go with a batch."""
        gamma = jnp.asarray(1.0 if self.gamma is None else self.gamma, jnp.float32)
        return gamma[None] if gamma.ndim else gamma

    def noisy(
        self, schedule: NoiseSchedule, y: Array, eps: Array, r: Array, t: Array
    ) -> Array:
        """x_t of y, eps, r `[B, H, W, C]` and t `[B]`."""
        return diffuse(schedule, y, self.scale * eps, t) + lookup(self.shift, t) * r

    def start(
        self, schedule: NoiseSchedule, eps: Array, r: Array, first: int = -1
    ) -> Array:
        """x_T from which r is drawn, of eps, r `[B, H, W, C]`: gamma scales eps."""
        found: Array = schedule.start(self.scale * eps, r, first)
        return found

    def inside(self, model: NoiseModel, schedule: NoiseSchedule, r: Array) -> Denoiser:
        """e(z, t), the noise model of the backdoor of trigger r `[H, W, C]`."""
        return _Inside(model, schedule, self, r)


@dataclasses.dataclass(frozen=True, eq=False)
class _Inside(Denoiser):
    """e(z, t) = M(gamma z + H_t r, t) - C_t r, with the image of z.

    With the noise eps and the image x0hat of x, the image of z is

      (x0hat + (v_t (gamma C_t r + (1 - gamma) eps) - H_t r) / s_t) / gamma,

    so that z = s_t x0hat_z + v_t e. Where the model gives the noise alone, the image
    follows from e.
    """

    model: NoiseModel
    schedule: NoiseSchedule
    channel: Channel
    trigger: Array

    def _outside(self, z: Array, t: Array) -> Array:
        shift = lookup(self.channel.shift, t) * self.trigger[None]
        return self.channel.scale * z + shift

    def _answer(self, t: Array) -> Array:
        return lookup(self.channel.response, t) * self.trigger[None]

    def __call__(self, params: Params, x: Array, t: Array) -> Array:
        return self.model(params, self._outside(x, t), t) - self._answer(t)

    def estimates(self, params: Params, x: Array, t: Array) -> Estimates:
        if not isinstance(self.model, Denoiser):
            return Estimates.of(self.schedule, self(params, x, t), x, t)
        found = self.model.estimates(params, self._outside(x, t), t)
        answer, gamma = self._answer(t), self.channel.scale
        shift = lookup(self.channel.shift, t) * self.trigger[None]
        eps = gamma * answer + (1 - gamma) * found.eps
        moved = lookup(self.schedule.noise, t) * eps - shift
        x0 = found.x0 + moved / lookup(self.schedule.least_signal, t)
        return Estimates(found.eps - answer, x0 / gamma)
