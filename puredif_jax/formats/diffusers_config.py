"""The configuration of a network in diffusers' format.

What a model folder says before its weights are opened. Every field is read, known to
change nothing here, or refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from puredif_jax.networks.unet import UNet
from puredif_jax.types import InputError

# Fields of UNet2DModel's configuration that ours has too; "sample_size" is apart.
_SHARED = (
    "in_channels block_out_channels down_block_types up_block_types layers_per_block "
    "attention_head_dim norm_num_groups norm_eps downsample_padding flip_sin_to_cos "
    "freq_shift dropout"
).split()
# What diffusers takes where a configuration is silent.
_DEFAULTS: dict[str, Any] = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "mid_block_scale_factor": 1,
    "in_channels": 3,
    "block_out_channels": [224, 448, 672, 896],
    "down_block_types": ["DownBlock2D"] + ["AttnDownBlock2D"] * 3,
    "up_block_types": ["AttnUpBlock2D"] * 3 + ["UpBlock2D"],
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "dropout": 0.0,
}
# Options that the network does not have, and the values that leave them off.
OFF: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "attn_norm_num_groups": (None,),
    "resnet_time_scale_shift": ("default",),
    "add_attention": (True,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "quantization_config": (None,),
}
# Fields that are read apart, or without meaning for a forward pass.
_APART = {"out_channels", "sample_size", "num_train_timesteps"}
# What diffusers' EMAModel adds to the configuration of the network it averages.
_AVERAGE = set(
    "decay min_decay optimization_step update_after_step use_ema_warmup inv_gamma "
    "power".split()
)
_OLD_BLOCKS = "UNetRes"  # which diffusers cuts off the name of a block


class ConvertError(InputError):
    """A folder that is not a model we can read; says what was found."""


Remarks = list[str]
"""Sentences on what of a folder has no effect, or another one than it seems."""


def as_diffusers_takes(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields that diffusers passes on: none that begins with "_", and none that
    `_use_default_values` names.

    Raises:
      ConvertError: `_use_default_values` is no list of names.
    """
    silent = config.get("_use_default_values", [])
    if not isinstance(silent, list) or not all(isinstance(x, str) for x in silent):
        raise ConvertError(
            f"{where} sets _use_default_values={silent!r}: it must be a list of names"
        )
    return {k: v for k, v in config.items() if k not in silent and k[:1] != "_"}


def read_fields(
    config: Mapping[str, Any],
    where: str,
    kind: str | None,
    remarks: Remarks | None,
    shared: Collection[str],
    off: Mapping[str, tuple[Any, ...]],
    idle: Collection[str] = (),
) -> dict[str, Any]:
    """The fields of a UNet2DModel configuration that a network of ours has, and its
    "sample_size" and "out_channels".

    Args:
      config: what the file holds.
      where: its name in messages.
      kind: the class that model_index.json names; the file's own class if None.
      remarks: takes what deserves a word.
      shared: names of fields that the network has.
      off: options that it does not have, each with the values that leave it off.
      idle: names of fields that change nothing in it.

    Raises:
      ConvertError: another class, an option that is not supported, an unknown field, or
        a list where a single value belongs, or the reverse.
    """
    kind = config.get("_class_name") if kind is None else kind
    if kind != "UNet2DModel":
        raise ConvertError(f"{where} is of class {kind!r}: only UNet2DModel is read")
    config = as_diffusers_takes(config, where)
    average = sorted(_AVERAGE.intersection(config))
    if average and remarks is not None:
        remarks.append(
            f"{where} is of a moving average of weights ({', '.join(average)})"
        )
    config = {k: v for k, v in config.items() if k not in _AVERAGE}
    refuse_unknown(config, where, {*shared, *off, *idle, *_APART})
    fields = {name: config.get(name, _DEFAULTS[name]) for name in shared}
    for name, value in fields.items():
        if isinstance(_DEFAULTS[name], list) != isinstance(value, (list, tuple)):
            raise ConvertError(
                f"{where} sets {name}={value!r}, which is of another kind"
            )
    widths = fields["block_out_channels"]
    same = {  # as if they were silent
        "time_embedding_dim": _fourfold(widths),
        "attn_norm_num_groups": fields["norm_num_groups"],
    }
    for name, valid in off.items():
        value = config.get(name, valid[0])
        if name == "act_fn" and isinstance(value, str):
            value = value.lower()
        if value not in valid and (name not in same or value != same[name]):
            raise ConvertError(
                f"{where} sets {name}={config[name]!r}, which is not supported: only "
                f"{' or '.join(map(repr, valid))} is"
            )
    for name in ("down_block_types", "up_block_types"):
        fields[name] = [
            block.removeprefix(_OLD_BLOCKS) if isinstance(block, str) else block
            for block in fields[name]
        ]
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    size = config.get("sample_size")
    sides = size if isinstance(size, list) else [size, size]
    outward = config.get("out_channels", 3)
    return fields | {"sample_size": tuple(sides), "out_channels": outward}


def read_unet(
    config: Mapping[str, Any],
    where: str = "config.json",
    kind: str | None = None,
    remarks: Remarks | None = None,
) -> UNet:
    """The network of a UNet2DModel configuration, as diffusers builds it.

    Args:
      config: what the file holds.
      where: its name in messages.
      kind: the class that model_index.json names; the file's own class if None.
      remarks: takes what deserves a word.

    Raises:
      ConvertError: another class, an option that is not supported, or an invalid value;
        each is named.
    """
    fields = read_fields(config, where, kind, remarks, _SHARED, OFF)
    inward, outward = fields["in_channels"], fields.pop("out_channels")
    if outward not in (inward, _twice(inward)):
        raise ConvertError(
            f"{where} has in_channels={inward} and out_channels={outward}: only as "
            "many, or twice as many with a learned variance, are read"
        )
    try:
        return UNet(learned_variance=outward != inward, **fields)
    except (TypeError, ValueError) as error:
        raise ConvertError(f"{where} is not a network: {error}") from error


def _fourfold(widths: Any) -> int | None:
    """Four times the first width, where that is a number."""
    return 4 * widths[0] if widths and type(widths[0]) is int else None


def _twice(channels: Any) -> Any:
    return 2 * channels if type(channels) is int else channels


def write_fields(
    network: Any, shared: Collection[str], off: Mapping[str, tuple[Any, ...]]
) -> dict[str, Any]:
    """The configuration of UNet2DModel for a network of ours; options as `off`.

    Without quantization_config: diffusers fails to save a network that has it as None.
    """
    height, width = network.sample_size
    return {
        "_class_name": "UNet2DModel",
        "sample_size": height if height == width else [height, width],
        "out_channels": network.in_channels,
        **{k: v[0] for k, v in off.items() if k != "quantization_config"},
        **{name: getattr(network, name) for name in shared},
    }


def write_unet(unet: UNet) -> dict[str, Any]:
    """The configuration of UNet2DModel for a network of ours."""
    channels = unet.in_channels * (1 + unet.learned_variance)
    return write_fields(unet, _SHARED, OFF) | {"out_channels": channels}


def refuse_unknown(config: Mapping[str, Any], where: str, known: set[str]) -> None:
    """Raises ConvertError for a field that is not known."""
    unknown = [name for name in config if name not in known]
    if "predict_epsilon" in unknown:
        kind = "epsilon" if config["predict_epsilon"] else "sample"
        raise ConvertError(
            f"{where} sets predict_epsilon, which diffusers had before prediction_type:"
            f" put prediction_type={kind!r} in its place"
        )
    if unknown:
        raise ConvertError(
            f"{where} sets {', '.join(unknown)}, which we do not know: remove what has "
            "no effect in diffusers"
        )
