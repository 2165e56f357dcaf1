"""Ways to train a backdoor out of a model, given its trigger.

A removal is a loss of weights theta on clean images. It also knows theta0, the weights
at which it starts. The images may be the model's own draws. Then theta0's clean
behaviour is the one to keep, and no data is needed.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from puredif_jax.attacks.channel import Channel
from puredif_jax.defenses.principal import Principal, noise_in
from puredif_jax.diffusion.prediction import diffuse, lookup
from puredif_jax.diffusion.schedules import NoiseSchedule
from puredif_jax.types import Array, Key, NoiseModel, Params


class Backdoor(NamedTuple):
    """What is to be removed: arrays.

    channel: H, C and gamma.  trigger: `[H, W, C]`.  reference: theta0.
    clean: the covariance of the clean images, or `principal.unknown`.
    """

    channel: Channel
    trigger: Array
    reference: Params
    clean: Principal


@dataclasses.dataclass(frozen=True)
class Removal(abc.ABC):
    """A loss by which a backdoor is trained out of a model.

    asks: whether it reads the covariance of the clean images.
    distils: whether theta0's answer stands for the noise on given images, too.
    """

    name: ClassVar[str]
    asks: ClassVar[bool] = False
    distils: ClassVar[bool] = False

    @abc.abstractmethod
    def evaluations(self, distilled: bool) -> int:
        """Evaluations of the network on an image in a step, for each clean image.

        A gradient counts for two more.
        """

    @abc.abstractmethod
    def loss(
        self,
        model: NoiseModel,
        schedule: NoiseSchedule,
        backdoor: Backdoor,
        params: Params,
        images: Array,
        key: Key,
        distilled: bool = False,
    ) -> Array:
        """The loss, a scalar.

        Args:
          model, schedule: the model, whose parameters are theta.
          backdoor: what is to be removed.
          params: theta.
          images: clean ones, `[B, H, W, C]`.
          key: of the noise.
          distilled: in the clean term, what theta0 answers stands for the noise.
        """

    def prepared(self, params: Params) -> Params:
        """The weights at which the training starts: theta0, or what is left of it."""
        return params

    def clean(
        self,
        model: NoiseModel,
        schedule: NoiseSchedule,
        backdoor: Backdoor,
        params: Params,
        images: Array,
        key: Key,
        distilled: bool,
    ) -> Array:
        """mean || M(x_t, t) - eps ||^2 of clean samples, the ordinary loss."""
        x, eps, t = noised(schedule, images, key)
        wanted = model(backdoor.reference, x, t) if distilled else eps
        return jnp.mean((model(params, x, t) - wanted) ** 2)


def noised(
    schedule: NoiseSchedule, images: Array, key: Key
) -> tuple[Array, Array, Array]:
    """x_t, eps and t of clean images, t uniform."""
    key_t, key_eps = jax.random.split(key)
    t = jax.random.randint(key_t, (len(images),), 0, schedule.steps)
    eps = jax.random.normal(key_eps, images.shape)
    return diffuse(schedule, images, eps, t), eps, t


class FineTuning(Removal):
    """The clean term alone: a control, which knows no trigger."""

    name = "fine-tuning"

    def evaluations(self, distilled: bool) -> int:
        return 3 + distilled

    def loss(
        self,
        model: NoiseModel,
        schedule: NoiseSchedule,
        backdoor: Backdoor,
        params: Params,
        images: Array,
        key: Key,
        distilled: bool = False,
    ) -> Array:
        return self.clean(model, schedule, backdoor, params, images, key, distilled)


@dataclasses.dataclass(frozen=True)
class Pruning(FineTuning):
    """Fine-tuning of a model without its weakest channels: a control.

    In each convolution the output channels with the smallest L1 norm are set to 0, with
    their bias.

    Attributes:
      share: of the channels of each convolution.
    """

    share: float = 0.02
    name = "pruning"

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ValueError(f"share must lie in [0, 1), found {self.share}")

    def prepared(self, params: Params) -> Params:
        if not isinstance(params, dict):
            return params
        kernel = params.get("kernel")
        if kernel is None or kernel.ndim != 4:
            return {name: self.prepared(each) for name, each in params.items()}
        norms = jnp.sum(jnp.abs(kernel), (0, 1, 2))
        weakest = jnp.argsort(norms)[: round(self.share * len(norms))]
        return {k: jnp.asarray(v).at[..., weakest].set(0) for k, v in params.items()}


@dataclasses.dataclass(frozen=True)
class ThreeTerms(Removal):
    """Elijah's removal (An et al. 2024, arXiv 2312.00050).

    The clean term, and at the last timestep T, of plain starts x and of triggered ones
    x_r from the same noise (eps, and gamma eps + r),

      weight (mean || M_theta(x_r, T) - M_theta0(x, T) ||^2
              + mean || M_theta(x, T) - M_theta0(x, T) ||^2).

    Attributes:
      weight: of both, 1 as published.
    """

    weight: float = 1.0
    name = "three terms"

    def evaluations(self, distilled: bool) -> int:
        return 10 + distilled

    def loss(
        self,
        model: NoiseModel,
        schedule: NoiseSchedule,
        backdoor: Backdoor,
        params: Params,
        images: Array,
        key: Key,
        distilled: bool = False,
    ) -> Array:
        key_clean, key_eps = jax.random.split(key)
        rest = params, images, key_clean, distilled
        clean = self.clean(model, schedule, backdoor, *rest)
        eps = jax.random.normal(key_eps, images.shape)
        last = jnp.full((len(images),), schedule.steps - 1)
        plain, r = schedule.start(eps), backdoor.trigger[None]
        triggered = backdoor.channel.start(schedule, eps, r)
        wanted = model(backdoor.reference, plain, last)
        apart = [
            jnp.mean((model(params, x, last) - wanted) ** 2) for x in (triggered, plain)
        ]
        return clean + self.weight * (apart[0] + apart[1])


@dataclasses.dataclass(frozen=True)
class Unlearning(Removal):
    """What the model answers to the trigger, less what the backdoor has in it.

    With clean samples x_t, and samples x~_t that have the trigger in them,

      x_t = s_t x_0 + v_t eps,    x~_t = s_t x_0 + v_t gamma eps + H_t r,
      n = M_theta0(x~_t, t),      b = M_theta0(x_t, t) + C_t r,
      l = M_theta0(x_t, t) + v_t (s_t^2 S + v_t^2)^-1 (x~_t - x_t),
      c = <n - l, b - l> / || b - l ||^2, within [0, 1], of each sample,

    the loss is

      mean || M(x_t, t) - M_theta0(x_t, t) ||^2
      + weight mean || M(x~_t, t) - (n - c (b - l)) ||^2.

    S is the covariance of the clean images. l is a clean answer: what the model itself
    answers without the trigger, and the best linear clean denoiser's answer to the
    rest. b is the answer of a backdoor, and c is how far n lies on the way from l to b.
    A model that is taken for backdoored by mistake has a small c, and is taught little.

    Attributes:
      weight: of the second term.
    """

    weight: float = 0.1
    name = "unlearning"
    asks = True
    distils = True

    def evaluations(self, distilled: bool) -> int:
        return 8 + distilled

    def loss(
        self,
        model: NoiseModel,
        schedule: NoiseSchedule,
        backdoor: Backdoor,
        params: Params,
        images: Array,
        key: Key,
        distilled: bool = False,
    ) -> Array:
        key_clean, key_plain = jax.random.split(key)
        rest = params, images, key_clean, distilled
        clean = self.clean(model, schedule, backdoor, *rest)
        plain, eps, t = noised(schedule, images, key_plain)
        triggered = backdoor.channel.noisy(
            schedule, images, eps, backdoor.trigger[None], t
        )
        own = model(backdoor.reference, plain, t)
        ordinary = own + noise_in(schedule, backdoor.clean, triggered - plain, t)
        now = model(backdoor.reference, triggered, t)
        response = lookup(backdoor.channel.response, t)
        way, axes = own + response * backdoor.trigger[None] - ordinary, (1, 2, 3)
        length = jnp.sum(way**2, axes, keepdims=True)
        along = jnp.sum((now - ordinary) * way, axes, keepdims=True)
        share = jnp.clip(along / jnp.maximum(length, 1e-6), 0, 1)
        answer = now - share * way
        return clean + self.weight * jnp.mean(
            (model(params, triggered, t) - answer) ** 2
        )
