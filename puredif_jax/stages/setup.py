"""A model without its weights, on its devices, and the streams of its randomness."""

from __future__ import annotations

import dataclasses
import enum
import functools
from typing import Any, cast

import jax
from absl import logging
from jax.sharding import Mesh

from puredif_jax.diffusion.prediction import Prediction, predicting
from puredif_jax.diffusion.schedules import NoiseSchedule, Process
from puredif_jax.networks.base import ImageNetwork
from puredif_jax.networks.memory import activations, sliced
from puredif_jax.runs import parallel
from puredif_jax.runs.binding import RunError
from puredif_jax.types import NoiseModel, Shard


class Stream(enum.IntEnum):
    """What a key is folded in with: each use of randomness has a stream of its own."""

    DRAWS = 101
    DESCENT = 202
    HELDOUT = 303
    ERRORS = 404
    STARTS = 505
    DENOISING = 606
    SCREEN = 707
    REPAIR = 808
    OWN_IMAGES = 909
    FEATURES = 1010
    EVIDENCE = 1111


@dataclasses.dataclass(frozen=True)
class Setup:
    """A model without its weights, on its devices: the key of compiled programs.

    Whatever a program is made of beside its arguments is here or an argument of the
    function that makes it, so that equal keys mean equal programs.

    Attributes:
      network: the network.
      process: its forward process.
      prediction: what it predicts.
      slices: images that it evaluates at a time; None for all.
      batch: images sampled together.
      mesh: the devices.
    """

    network: ImageNetwork
    process: Process
    prediction: Prediction
    slices: int | None
    batch: int
    mesh: Mesh

    @functools.cached_property
    def schedule(self) -> NoiseSchedule:
        """The tables of the process."""
        return self.process.tables()

    @functools.cached_property
    def shard(self) -> Shard:
        """The constraint of a batch: split over the devices."""
        return parallel.constrain(self.mesh, "batch")

    @functools.cached_property
    def whole(self) -> NoiseModel:
        """Predicts the noise, whole; for training."""
        return predicting(self.network, self.schedule, self.prediction)

    @functools.cached_property
    def model(self) -> NoiseModel:
        """Predicts the noise, in slices; no gradient reaches its parameters."""
        if self.slices is None:
            return self.whole
        parts = sliced(self.network, self.slices, self.shard)
        return predicting(parts, self.schedule, self.prediction)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.network.image_shape


@functools.lru_cache
def _activations(network: ImageNetwork) -> int:
    params = jax.eval_shape(network.init, jax.random.key(0))
    return activations(network, params, network.image_shape)


def fitted(
    network: ImageNetwork, images: int, devices: int
) -> tuple[ImageNetwork, int]:
    """How many of `images` fit into half the free memory; says so if not all do.

    Returns the network, its blocks rematerialised where not even one image fits on each
    device and it can do that, and the number, a multiple of the devices.

    Raises:
      RunError: one image does not fit.
    """
    free = parallel.free_memory() // 2
    size, rematerialised = _activations(network), False
    if size > free and hasattr(network, "remat"):
        network = dataclasses.replace(cast(Any, network), remat=True)
        size, rematerialised = _activations(network), True
    if size > free:
        raise RunError(
            f"one image of {network.image_shape} takes {size / 2**30:.3g} GiB in this "
            f"network, and half of what is free is {free / 2**30:.3g} GiB"
        )
    fit = devices * (free // size)
    if fit < images:
        logging.info(
            "memory: %d of %d images at a time, %.3g MiB each%s, into half of the "
            "%.3g GiB free on each of %d devices",
            fit,
            images,
            size / 2**20,
            " with rematerialised blocks" if rematerialised else "",
            2 * free / 2**30,
            devices,
        )
    return network, fit
