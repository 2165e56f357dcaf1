"""The configuration of an NCSN++ in diffusers' format: a UNet2DModel of skip blocks.

`diffusers_config` reads the configuration of the other UNet2DModels. Every field is
read, known to change nothing here, or refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from puredif_jax.formats.diffusers_config import (
    OFF,
    ConvertError,
    Remarks,
    read_fields,
    write_fields,
)
from puredif_jax.networks.ncsnpp import NCSNpp

# Fields of UNet2DModel's configuration that ours has too; "sample_size" is apart.
_SHARED = (
    "in_channels block_out_channels down_block_types up_block_types layers_per_block "
    "attention_head_dim norm_num_groups norm_eps mid_block_scale_factor "
    "time_embedding_type flip_sin_to_cos freq_shift center_input_sample dropout"
).split()
# Of the other blocks' resampling; skip blocks have the FIR kernel whatever they say.
_IDLE = {"downsample_padding": 1, "downsample_type": "conv", "upsample_type": "conv"}
# Options that it does not have, and the values that leave them off.
_OFF = {k: v for k, v in OFF.items() if k not in {*_SHARED, *_IDLE}}
_IMAGE_CHANNELS = 3  # of diffusers' skip blocks


def read_ncsnpp(
    config: Mapping[str, Any],
    where: str = "config.json",
    kind: str | None = None,
    remarks: Remarks | None = None,
) -> NCSNpp:
    """The network of a UNet2DModel configuration with skip blocks, as diffusers builds
    it.

    Args:
      config: what the file holds.
      where: its name in messages.
      kind: the class that model_index.json names; the file's own class if None.
      remarks: takes what deserves a word.

    Raises:
      ConvertError: another class, an option that is not supported, or an invalid value;
        each is named.
    """
    fields = read_fields(config, where, kind, remarks, _SHARED, _OFF, _IDLE)
    inward, outward = fields["in_channels"], fields.pop("out_channels")
    if outward != inward:
        raise ConvertError(
            f"{where} has in_channels={inward} and out_channels={outward}: skip blocks "
            "need as many"
        )
    try:
        network = NCSNpp(**fields)
    except (TypeError, ValueError) as error:
        raise ConvertError(f"{where} is not a network: {error}") from error
    levels = len(network.block_out_channels)
    if remarks is not None and inward != _IMAGE_CHANNELS and levels > 1:
        remarks.append(
            f"{where} has in_channels={inward}: diffusers has skip blocks for images "
            f"of {_IMAGE_CHANNELS} channels only, so it cannot load this network"
        )
    return network


def write_ncsnpp(network: NCSNpp) -> dict[str, Any]:
    """The configuration of UNet2DModel for a network of ours.

    diffusers can load it if the images have three channels, or with one resolution.
    """
    return write_fields(network, _SHARED, _OFF) | _IDLE
