"""Features of FID's Inception network, by weights that a user has."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from puredif_jax.attacks.pictures import Shape
from puredif_jax.files.sealed import digest
from puredif_jax.files.whole import expanded
from puredif_jax.metrics import inception
from puredif_jax.metrics import measures as metrics
from puredif_jax.runs import parallel, weight_file
from puredif_jax.runs.binding import RunError
from puredif_jax.runs.report import progress
from puredif_jax.stages.embedding import Embedding
from puredif_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Inception(Embedding):
    """The 2,048 features of the FID (Heusel et al. 2017, arXiv 1706.08500).

    Grey images are shown in three equal channels. Images are cut to 8 bits first, as
    tools that read PNG files see them.

    Attributes:
      weights: a safetensors file, as docs/images.md makes it of pytorch-fid's.
      batch: images that the network sees at once.
    """

    weights: str
    batch: int = 32

    name = inception.NAME

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch must be 1 or more, found {self.batch}")

    def check(self) -> None:
        self._params()

    def fits(self, shape: Shape) -> bool:
        return shape[2] in (1, 3)

    def width(self, shape: Shape) -> int:
        return inception.WIDTH

    @property
    def identity(self) -> str:
        """With a part of the digest of the weights."""
        return f"{self.name} {digest(self._params())[:16]}"

    def _params(self) -> Params:
        path = expanded(self.weights)
        if path.suffix != ".safetensors":
            raise RunError(
                f"the weights of Inception are a .safetensors file, found {path}: "
                "docs/images.md tells how to make it"
            )
        return weight_file.load_weights(path, inception.shapes())

    def features(self, images: np.ndarray) -> np.ndarray:
        params = jax.device_put(self._params())
        program = jax.jit(inception.features)
        found = []
        with progress(len(images), 0, self.name, parallel.is_host_zero()) as bar:
            for start in range(0, len(images), self.batch):
                part = images[start : start + self.batch]
                last = np.repeat(part[-1:], self.batch - len(part), axis=0)
                x = np.concatenate([part, last])  # of one size: compiled once
                shown = jnp.round(metrics.to_unit(x) * 255) / 127.5 - 1
                shown = jnp.broadcast_to(shown, (*shown.shape[:3], 3))
                found.append(np.asarray(program(params, shown))[: len(part)])
                bar.update(len(part))
                parallel.safe_point()
        return np.concatenate(found)
