"""Which network of ours a configuration of diffusers' UNet2DModel describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from puredif_jax.formats.diffusers_config import (
    ConvertError,
    Remarks,
    as_diffusers_takes,
    read_unet,
    write_unet,
)
from puredif_jax.formats.ncsnpp_config import read_ncsnpp, write_ncsnpp
from puredif_jax.networks.ncsnpp import NCSNpp
from puredif_jax.networks.unet import UNet


def read_network(
    config: Mapping[str, Any],
    where: str = "config.json",
    kind: str | None = None,
    remarks: Remarks | None = None,
) -> UNet | NCSNpp:
    """The network of a UNet2DModel configuration: an NCSN++ if a block of it has skip
    connections of the image, else a UNet.

    Args:
      config: what the file holds.
      where: its name in messages.
      kind: the class that model_index.json names; the file's own class if None.
      remarks: takes what deserves a word.

    Raises:
      ConvertError: as `read_unet` and `read_ncsnpp`.
    """
    taken = as_diffusers_takes(config, where)
    blocks = [taken.get(f"{way}_block_types") for way in ("down", "up")]
    try:
        read = read_ncsnpp if "Skip" in f"{blocks}" else read_unet
        return read(config, where, kind, remarks)
    except RecursionError as error:
        raise ConvertError(f"{where} has lists within lists, too deep") from error


def write_network(network: UNet | NCSNpp) -> dict[str, Any]:
    """The configuration of UNet2DModel for a network of ours."""
    if isinstance(network, NCSNpp):
        return write_ncsnpp(network)
    return write_unet(network)
