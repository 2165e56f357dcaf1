"""Where random triggers meet: starts for inversion, found by drawing.

Far from the true trigger a well-trained backdoored model answers like a clean one, so
descent from a random start has no slope to follow. But a backdoor fires in a wide
basin: of random smooth triggers some lie in it, and then all of them draw one image,
whatever the noise and whatever the trigger. An image on which draws of different
triggers agree is a candidate for the target, and the mean of these triggers a start
for the trigger. Clean models, too, have such images, those to which an extreme trigger
saturates; the losses of inversion tell them apart.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from puredif_jax.attacks.channel import Channel
from puredif_jax.defenses.denoising_consistency import denoised
from puredif_jax.defenses.distribution_shift import DistributionShift
from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.diffusion.schedules import NoiseSchedule
from puredif_jax.types import (
    Array,
    Candidate,
    Key,
    NoiseModel,
    Params,
    Shard,
    unsharded,
)


@dataclasses.dataclass(frozen=True)
class Survey:
    """Random triggers, and how closely their draws must agree.

    Attributes:
      starts: most candidates of an inversion that start here; the others start at
        random, which finds backdoors whose target is not among the images that recur.
      triggers: number of random triggers; a multiple of `together`.
      grids: sides of the coarse grids of random values that triggers are drawn from,
        alike many from each.
      draws: images for each.
      together: triggers sampled at once.
      radii: mean squared errors, in [0, 1] pixels, below which two draws agree, rising;
        a larger one counts where nothing agrees by those before it.
      apart: least error between two candidates for the target.
      sampler: of the draws, through the channel.
    """

    starts: int = 4
    triggers: int = 192
    grids: tuple[int, ...] = (2, 3, 4, 6)
    draws: int = 8
    together: int = 8
    radii: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    apart: float = 2e-2
    sampler: DDIM = DDIM(steps=10)

    def __post_init__(self) -> None:
        if self.starts < 1:
            raise ValueError(f"starts must be 1 or more, found {self.starts}")
        if min(self.grids, default=0) < 1:
            raise ValueError(f"grids must be sides >= 1, found {self.grids}")
        if self.together < 1 or self.triggers % self.together or self.triggers < 2:
            raise ValueError(
                "triggers must be a multiple of together, and two or more, found "
                f"triggers={self.triggers}, together={self.together}"
            )
        if not self.radii or list(self.radii) != sorted(self.radii):
            raise ValueError(f"radii must rise, one or more, found {self.radii}")
        if self.draws < 1:
            raise ValueError(f"draws must be 1 or more, found {self.draws}")

    @property
    def evaluations(self) -> int:
        """How often the network is evaluated on one image, the signs left out."""
        return self.triggers * self.draws * self.sampler.steps

    def propose(
        self,
        model: NoiseModel,
        params: Params,
        schedule: NoiseSchedule,
        channel: Channel,
        image_shape: tuple[int, int, int],
        count: int,
        key: Key,
        *,
        shard: Shard = unsharded,
    ) -> Candidate:
        """The starts of an inversion: `count` targets and their triggers.

        The whole survey as one program: `begin`, `draw` by groups of `together`,
        `candidates`, `choose_sign`. Returns `[K, H, W, C]` each.
        """
        triggers, keys, key_sign = self.begin(image_shape, key)

        def draw(group: tuple[Array, Key]) -> Array:
            return self.draw(model, params, schedule, channel, *group, shard=shard)

        groups = jax.tree.map(
            lambda x: x.reshape(-1, self.together, *x.shape[1:]), (triggers, keys)
        )
        images = jax.lax.map(draw, groups)
        images = images.reshape(-1, *images.shape[2:])
        found, _ = self.candidates(triggers, images, count)
        return self.choose_sign(
            model, params, schedule, channel, found, key_sign, shard=shard
        )

    def begin(
        self, image_shape: tuple[int, int, int], key: Key
    ) -> tuple[Array, Key, Key]:
        """The random triggers, `[M, H, W, C]`; the keys of their draws, `[M]`; and one
        for `choose_sign`."""
        key_triggers, key_draws, key_sign = jax.random.split(key, 3)
        triggers = self.random_triggers(image_shape, key_triggers)
        return triggers, jax.random.split(key_draws, self.triggers), key_sign

    def random_triggers(self, image_shape: tuple[int, int, int], key: Key) -> Array:
        """`[M, H, W, C]` in [-1, 1]: a smooth pattern of random strength and level.

        clip(a u + b, -1, 1), u a grid uniform in [-1, 1] enlarged to the image, a
        uniform in [0, 1], b uniform in [-1, 1].
        """
        kinds = []
        for i, side in enumerate(self.grids):
            keys = jax.random.split(jax.random.fold_in(key, i), 3)
            count = len(range(i, self.triggers, len(self.grids)))
            values = jax.random.uniform(
                keys[0], (count, side, side, image_shape[2]), minval=-1.0
            )
            pattern = jax.image.resize(values, (count, *image_shape), "linear")
            strength = jax.random.uniform(keys[1], (count, 1, 1, 1))
            level = jax.random.uniform(keys[2], (count, 1, 1, 1), minval=-1.0)
            kinds.append(jnp.clip(strength * pattern + level, -1, 1))
        return jnp.concatenate(kinds)

    def draw(
        self,
        model: NoiseModel,
        params: Params,
        schedule: NoiseSchedule,
        channel: Channel,
        triggers: Array,
        keys: Key,
        *,
        shard: Shard = unsharded,
        axis: str | None = None,
    ) -> Array:
        """Images of each of `[m, H, W, C]`: `[m, draws, H, W, C]`, clipped to [-1, 1].

        All are sampled at once; `keys`, `[m]`, are those of `begin`. The triggers lie
        along `axis` of the devices, the draws of each as `shard` says.
        """

        def one(trigger: Array, key: Key) -> Array:
            chain = denoised(
                model,
                params,
                schedule,
                channel,
                self.sampler,
                trigger,
                self.draws,
                key,
                shard=shard,
            )
            return jnp.clip(chain[-1], -1, 1)

        return jax.vmap(one, spmd_axis_name=axis)(triggers, keys)

    def candidates(
        self, triggers: Array, images: Array, count: int
    ) -> tuple[Candidate, Array]:
        """The `count` images on which most triggers agree, and their triggers.

        The density of a draw is the number of other triggers that have a draw within
        a radius: the first of `radii` by which any draws agree. The densest draw is
        taken, then the densest of those at least `apart` from it, and so on; where no
        two agree, one that is `apart` from the others, and the first where none is.

        Args:
          triggers: `[M, H, W, C]`.
          images: their draws, `[M, draws, H, W, C]`.
          count: K.

        Returns:
          The candidates, `[K, H, W, C]` each: the mean of the triggers that agree,
          and the mean of their draws; and the densities, `[K]`.
        """
        number, draws = images.shape[:2]
        flat = images.reshape(number * draws, -1)
        # A draw that is not finite agrees with none, and adds nothing to a mean.
        finite = jnp.isfinite(flat).all(axis=-1)
        flat = jnp.where(finite[:, None], flat, 0.0)
        energy = jnp.sum(flat**2, axis=-1)
        product = jnp.matmul(flat, flat.T, precision="highest")
        distance = energy[:, None] + energy[None, :] - 2 * product
        distance = jnp.maximum(distance, 0) / (4 * flat.shape[-1])
        owner = jnp.repeat(jnp.arange(number), draws)
        other = owner[:, None] != owner[None, :]
        apart = other & jnp.outer(finite, finite)
        near = distance[None] < jnp.asarray(self.radii)[:, None, None]
        near &= apart[None]
        by_trigger = near.reshape(len(self.radii), number * draws, number, draws)
        by_trigger = by_trigger.any(axis=-1)
        density = by_trigger.sum(axis=-1)
        closed = jnp.where(finite, 0, -1).astype(density.dtype)

        def take(open_: Array, _: None) -> tuple[Array, tuple[Candidate, Array]]:
            agree = (density > 0) & open_[None]
            r = jnp.argmax(agree.any(axis=-1))
            r = jnp.where(agree.any(), r, len(self.radii) - 1)
            best = jnp.argmax(jnp.where(open_, density[r] + 1, closed))
            own = jnp.arange(number) == owner[best]
            chosen = (by_trigger[r, best] | own).astype(triggers.dtype)
            delta = jnp.tensordot(chosen / chosen.sum(), triggers, 1)
            close = near[r, best] | (jnp.arange(number * draws) == best)
            close = close.astype(flat.dtype)
            target = (close / close.sum()) @ flat
            open_ &= distance[best] > self.apart
            found = Candidate(delta, target.reshape(images.shape[2:]))
            return open_, (found, density[r, best])

        _, (found, densities) = jax.lax.scan(take, finite, None, length=count)
        return found, densities

    def choose_sign(
        self,
        model: NoiseModel,
        params: Params,
        schedule: NoiseSchedule,
        channel: Channel,
        found: Candidate,
        key: Key,
        *,
        shard: Shard = unsharded,
        axis: str | None = None,
    ) -> Candidate:
        """Candidates `[K, H, W, C]` with the sign that fits `DistributionShift` better.

        A trigger opposite to the true one may lead to the target as well, since the
        chain then drifts to the other side.
        """
        turned = dataclasses.replace(found, delta=-found.delta)
        loss = DistributionShift(samples=self.draws).bind(
            model, schedule, channel, shard
        )
        as_found, as_turned = (
            jax.vmap(loss, in_axes=(None, 0, None), spmd_axis_name=axis)(params, c, key)
            for c in (found, turned)
        )
        better = (as_turned < as_found)[:, None, None, None]
        return dataclasses.replace(
            found, delta=jnp.where(better, turned.delta, found.delta)
        )
