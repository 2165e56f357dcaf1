"""Pictures of a model that draws latents, as images."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from puredif_jax.formats.base import Shown
from puredif_jax.runs.page import Section


def as_images(section: Section, shown: Shown | None) -> Section:
    """A section whose pictures are images, with all below it.

    A trigger is shown as the image whose latents it is. Differences are left out, since
    the difference of two latents is no latent.

    Args:
      section: with pictures of what a model draws.
      shown: makes images of that; None where it draws images.
    """
    if shown is None:
        return section

    def image(caption: str, x: npt.ArrayLike) -> tuple[str, np.ndarray]:
        latents = np.asarray(x, np.float32)
        whole = latents.reshape(-1, *latents.shape[-3:])
        images = shown(whole)
        return caption, images.reshape(*latents.shape[:-3], *images.shape[1:])

    def images(
        pictures: tuple[tuple[str, npt.ArrayLike], ...],
    ) -> tuple[tuple[str, np.ndarray], ...]:
        return tuple(
            image(caption, x)
            for caption, x in pictures
            if not caption.startswith("difference")
        )

    return dataclasses.replace(
        section,
        pictures=images(section.pictures),
        pairs=images(section.pairs),
        sections=tuple(as_images(below, shown) for below in section.sections),
    )
