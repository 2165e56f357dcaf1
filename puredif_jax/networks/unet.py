"""The DDPM UNet, in the structure and order of diffusers' `UNet2DModel`.

Parameters have their names in the PyTorch state dict with "_" for ".", so weights
carry over by name. `UNet` is a frozen configuration that is itself a
`NoiseModel`; only this folder knows that it is made with Flax linen.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import flax.linen as nn
import jax.numpy as jnp

from puredif_jax.networks import fields
from puredif_jax.networks.base import ImageNetwork
from puredif_jax.networks.convolution import conv_of_upsampled
from puredif_jax.networks.layers import (
    Attention,
    GroupNorm,
    Resnet,
    conv,
    sinusoids,
    time_embedding,
)
from puredif_jax.types import Array, Key, Params

DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D")


@dataclasses.dataclass(frozen=True)
class UNet(ImageNetwork):
    """A UNet2D noise model.

    Names and meanings are as in diffusers' `UNet2DModel` configuration.

    Attributes:
      sample_size: (H, W) of the images it was made for.
      in_channels: colour channels, in and out.
      block_out_channels: width of each resolution, from high to low.
      down_block_types: "DownBlock2D" or "AttnDownBlock2D" for each resolution.
      up_block_types: "UpBlock2D" or "AttnUpBlock2D", from low to high resolution.
      layers_per_block: residual blocks in a down block (an up block has one more).
      attention_head_dim: width of a head; None for one head over all channels.
      norm_num_groups: groups of every GroupNorm.
      norm_eps: its epsilon.
      downsample_padding: 1 (symmetric) or 0 (pad right and bottom by one first).
      flip_sin_to_cos: order of the halves of the time embedding.
      freq_shift: shift in its frequencies, 10000^(-i / (half - freq_shift)).
      dropout: rate; used only when a dropout key is given.
      learned_variance: the network has as many channels again for the variance of a
        sampling step; `__call__` leaves them out.
      dtype: compute dtype, "float32" or "bfloat16".
      param_dtype: dtype in which parameters are made.
      remat: compute residual blocks again in the backward pass instead of keeping what
        is inside them: less memory, a third more time.
    """

    sample_size: tuple[int, int] = (32, 32)
    in_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 256, 256)
    down_block_types: tuple[str, ...] = (
        "DownBlock2D",
        "AttnDownBlock2D",
        "DownBlock2D",
        "DownBlock2D",
    )
    up_block_types: tuple[str, ...] = (
        "UpBlock2D",
        "UpBlock2D",
        "AttnUpBlock2D",
        "UpBlock2D",
    )
    layers_per_block: int = 2
    attention_head_dim: int | None = None
    norm_num_groups: int = 32
    norm_eps: float = 1e-6
    downsample_padding: int = 0
    flip_sin_to_cos: bool = False
    freq_shift: float = 1.0
    dropout: float = 0.0
    learned_variance: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        for name in ("in_channels", "layers_per_block", "norm_num_groups"):
            fields.check_whole(name, getattr(self, name))
        fields.check_levels(self, DOWN_BLOCKS, UP_BLOCKS)
        for width, attends in fields.attending(self):
            if width % self.norm_num_groups:
                raise ValueError(
                    f"each of block_out_channels must be a multiple of norm_num_groups="
                    f"{self.norm_num_groups}, found {width}"
                )
            if attends:
                fields.check_heads(self, width)
        fields.check_sides(self)
        half = self.block_out_channels[0] // 2
        fields.check_numbers(
            self,
            ("norm_eps", 1e-30, 1.0),
            ("freq_shift", -fields.WIDEST, half - 1),
            ("dropout", 0.0, 0.999),
        )
        fields.check_choices(
            self,
            ("downsample_padding", (0, 1)),
            ("flip_sin_to_cos", (True, False)),
            ("learned_variance", (False, True)),
            ("dtype", ("float32", "bfloat16")),
            ("param_dtype", ("float32", "bfloat16")),
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return (*self.sample_size, self.in_channels)

    def init(self, key: Key) -> Params:
        """Fresh parameters: a nested dict of arrays of `param_dtype`."""
        x = jnp.zeros((1, *self.image_shape), self.dtype)
        return _UNet2D(self).init(key, x, jnp.zeros((1,), jnp.int32))["params"]

    def __call__(
        self, params: Params, x: Array, t: Array, dropout_key: Key | None = None
    ) -> Array:
        """eps(x, t), float32 `[B, H, W, C]`, for x `[B, H, W, C]` and t `[B]`."""
        chex.assert_rank([x, t], [4, 1])
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        out: Any = _UNet2D(self).apply(
            {"params": params}, x, t, deterministic=dropout_key is None, rngs=rngs
        )
        found: Array = out[..., : self.in_channels].astype(jnp.float32)
        return found


SHIPPED = UNet(
    sample_size=(16, 16),
    in_channels=1,
    block_out_channels=(16, 32, 64),
    down_block_types=("DownBlock2D",) * 3,
    up_block_types=("UpBlock2D",) * 3,
    layers_per_block=1,
    norm_num_groups=8,
    norm_eps=1e-5,
    downsample_padding=1,
    flip_sin_to_cos=True,
    freq_shift=0.0,
)
"""The network of the models that ship with the package: 0.64 M parameters."""


class _UNet2D(nn.Module):
    config: UNet

    @nn.compact
    def __call__(self, x: Array, t: Array, deterministic: bool = True) -> Array:
        c = self.config
        widths = c.block_out_channels
        x = x.astype(c.dtype)

        temb = time_embedding(c, sinusoids(c, t).astype(c.dtype))
        groups = c.norm_num_groups
        block = nn.remat(Resnet, static_argnums=(3,)) if c.remat else Resnet

        def resnet(x: Array, width: int, name: str) -> Array:
            return block(c, width, (groups, groups), name=name)(x, temb, deterministic)

        def layer(x: Array, prefix: str, i: int, width: int, attend: bool) -> Array:
            x = resnet(x, width, f"{prefix}_resnets_{i}")
            name = f"{prefix}_attentions_{i}"
            return Attention(c, groups, name=name)(x) if attend else x

        x = conv(c, widths[0], "conv_in")(x)
        skips = [x]
        for level, width in enumerate(widths):
            prefix = f"down_blocks_{level}"
            attend = c.down_block_types[level] == "AttnDownBlock2D"
            for i in range(c.layers_per_block):
                x = layer(x, prefix, i, width, attend)
                skips.append(x)
            if level < len(widths) - 1:
                pad = 1 if c.downsample_padding else ((0, 1), (0, 1))
                name = f"{prefix}_downsamplers_0_conv"
                x = conv(c, width, name, strides=2, padding=pad)(x)
                skips.append(x)

        x = resnet(x, widths[-1], "mid_block_resnets_0")
        x = Attention(c, groups, name="mid_block_attentions_0")(x)
        x = resnet(x, widths[-1], "mid_block_resnets_1")

        for level, width in enumerate(widths[::-1]):
            prefix = f"up_blocks_{level}"
            attend = c.up_block_types[level] == "AttnUpBlock2D"
            for i in range(c.layers_per_block + 1):
                x = layer(
                    jnp.concatenate([x, skips.pop()], axis=-1), prefix, i, width, attend
                )
            if level < len(widths) - 1:
                name = f"{prefix}_upsamplers_0_conv"
                x = conv(c, width, name, convolve=conv_of_upsampled)(x)

        x = nn.silu(GroupNorm(c, groups, name="conv_norm_out")(x))
        out_channels = c.in_channels * (2 if c.learned_variance else 1)
        return conv(c, out_channels, "conv_out", zero=True)(x)
