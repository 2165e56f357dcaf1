"""The configuration of the first stage of latent diffusion in diffusers' format.

Every field of `VQModel` is read, known to change nothing here, or refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from puredif_jax.formats.diffusers_config import (
    ConvertError,
    Remarks,
    as_diffusers_takes,
    refuse_unknown,
)
from puredif_jax.networks.vq import VQModel

# Fields that ours has too, and what diffusers takes where a configuration is silent.
_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "latent_channels": 3,
    "num_vq_embeddings": 256,
    "norm_num_groups": 32,
    "vq_embed_dim": None,
    "scaling_factor": 0.18215,
    "mid_block_add_attention": True,
}
# Options that the network does not have, and the values that leave them off.
_OFF: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "norm_type": ("group",),
    "quantization_config": (None,),
}
# Without effect where latents are quantised and nothing is in half precision. The
# network takes images of any size.
_IGNORED = {"sample_size", "lookup_from_codebook", "force_upcast"}


def read_vq(
    config: Mapping[str, Any],
    where: str = "config.json",
    kind: str | None = None,
    remarks: Remarks | None = None,
) -> VQModel:
    """The first stage of a VQModel configuration, as diffusers builds it.

    Args:
      config: what the file holds.
      where: its name in messages.
      kind: the class that model_index.json names; the file's own class if None.
      remarks: takes what deserves a word.

    Raises:
      ConvertError: another class, an option that is not supported, or an invalid value;
        each is named.
    """
    kind = config.get("_class_name") if kind is None else kind
    if kind != "VQModel":
        raise ConvertError(
            f"{where} is of class {kind!r}: a first stage is read of VQModel only"
        )
    config = as_diffusers_takes(config, where)
    refuse_unknown(config, where, {*_DEFAULTS, *_OFF, *_IGNORED})
    if "scaling_factor" not in config and remarks is not None:
        remarks.append(
            f"{where} has no scaling_factor: it is {_DEFAULTS['scaling_factor']} as in "
            "diffusers today, but 1 in versions before 0.22, as latents may have been "
            "trained"
        )
    for name, valid in _OFF.items():
        value = config.get(name, valid[0])
        if name == "act_fn" and isinstance(value, str):
            value = value.lower()
        if value not in valid:
            raise ConvertError(
                f"{where} sets {name}={config[name]!r}, which is not supported: only "
                f"{' or '.join(map(repr, valid))} is"
            )
    fields: dict[str, Any] = {}
    for name, default in _DEFAULTS.items():
        value = config.get(name, default)
        if isinstance(default, list) != isinstance(value, (list, tuple)):
            raise ConvertError(
                f"{where} sets {name}={value!r}, which is of another kind"
            )
        fields[name] = tuple(value) if isinstance(value, list) else value
    try:
        return VQModel(**fields)
    except (TypeError, ValueError) as error:
        raise ConvertError(f"{where} is not a first stage: {error}") from error


def write_vq(network: VQModel) -> dict[str, Any]:
    """The configuration of diffusers' VQModel for a first stage of ours.

    Without quantization_config: diffusers fails to save a network that has it as None.
    """
    off = {name: values[0] for name, values in _OFF.items() if values[0] is not None}
    shared = {name: getattr(network, name) for name in _DEFAULTS}
    return {"_class_name": "VQModel", **off, **shared}
