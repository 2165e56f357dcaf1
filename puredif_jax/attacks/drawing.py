"""Draws of a model with a trigger in its noise."""

from __future__ import annotations

import dataclasses

from puredif_jax.attacks.channel import Channel
from puredif_jax.diffusion.prediction import Denoiser, Estimates
from puredif_jax.diffusion.sampling import Clip, Sampler, bounded, sample, unclipped
from puredif_jax.diffusion.schedules import NoiseSchedule
from puredif_jax.types import Array, Key, NoiseModel, Params, Shard, unsharded


@dataclasses.dataclass(frozen=True, eq=False)
class _Clipped(Denoiser):
    """A denoiser inside a channel whose image is bounded in the unit of images."""

    model: Denoiser
    scale: Array
    clip: Clip

    def estimates(self, params: Params, x: Array, t: Array) -> Estimates:
        found = self.model.estimates(params, x, t)
        return found._replace(x0=bounded(found.x0 * self.scale, self.clip) / self.scale)


def draw(
    model: NoiseModel,
    params: Params,
    schedule: NoiseSchedule,
    sampler: Sampler,
    eps: Array,
    delta: Array,
    key: Key,
    *,
    inside: Channel | None = None,
    shard: Shard = unsharded,
) -> Array:
    """Images from noise eps with the trigger delta: `[B, H, W, C]`, unclipped.

    Args:
      model, params, schedule: the model.
      sampler: of the reverse process.
      eps: standard noise, `[B, H, W, C]`.
      delta: the trigger, `[H, W, C]`; 0 for none.
      key: randomness of stochastic samplers.
      inside: sample in the variable z of this channel, with its noise model, and return
        gamma z. So draws who controls the sampler: TrojDiff's own DDPM and DDIM are the
        ordinary ones there. A bound of the sampler holds for gamma x0hat. None: the
        model itself, from eps + delta.
      shard: constraint put on the batch at each step.
    """
    first = int(sampler.path(schedule)[0][0])
    if inside is None:
        start = schedule.start(eps, delta[None], first)
        return sample(model, params, schedule, sampler, start, key, shard=shard)
    process = inside.inside(model, schedule, delta)
    if (free := unclipped(sampler)) is not None:
        process = _Clipped(process, inside.scale, getattr(sampler, "clip", None))
        sampler = free
    start = schedule.start(eps, first=first)
    drawn = sample(process, params, schedule, sampler, start, key, shard=shard)
    return drawn * inside.scale
