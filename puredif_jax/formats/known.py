"""Which format a path is in, among the package's formats and a user's own."""

from __future__ import annotations

import pathlib

from puredif_jax.formats import ddim_checkpoint as ddim_checkpoint
from puredif_jax.formats import diffusers as diffusers
from puredif_jax.formats import latent as latent
from puredif_jax.formats.base import Format, formats
from puredif_jax.formats.diffusers_config import ConvertError


def format_of(path: pathlib.Path) -> Format | None:
    """The format in which a model lies at a path; None if no format knows it.

    Raises:
      ConvertError: two formats know it.
    """
    found = [each for each in formats() if each.knows(path)]
    if len(found) > 1:
        names = " and ".join(f"{each.name} ({type(each).__name__})" for each in found)
        raise ConvertError(f"{path} is {names}: only one format may know a path")
    return found[0] if found else None
