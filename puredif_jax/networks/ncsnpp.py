"""NCSN++, in the structure and order of diffusers' `UNet2DModel` with skip blocks.

The network of Song et al., "Score-based generative modeling through stochastic
differential equations" (arXiv 2011.13456). Beside its features runs the image itself,
made smaller on the way down and larger on the way up, and each level adds to both.
Names of parameters, and the configuration as a `NoiseModel`, are as in `unet`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from puredif_jax.networks import fields
from puredif_jax.networks.base import ImageNetwork
from puredif_jax.networks.layers import (
    Attention,
    GroupNorm,
    Resnet,
    conv,
    sinusoids,
    time_embedding,
)
from puredif_jax.networks.resampling import fir_downsample, fir_upsample
from puredif_jax.types import Array, Key, Params

DOWN_BLOCKS = ("SkipDownBlock2D", "AttnSkipDownBlock2D")
UP_BLOCKS = ("SkipUpBlock2D", "AttnSkipUpBlock2D")
# What the skip blocks of diffusers have, whatever a configuration says.
SCALE = math.sqrt(2)  # by which the sum of a block and its input is divided
ATTENTION_GROUPS = 32  # of the norm before attention
FREQUENCIES = 16.0  # standard deviation of those of the Fourier features


def _groups(channels: int) -> int:
    return min(channels // 4, 32)


def _joined_groups(kind: str, before: int, skip: int) -> int:
    """Groups of the norm over two inputs; with attention diffusers divides one only."""
    if kind == "AttnSkipUpBlock2D":
        return min(before + skip // 4, 32)
    return _groups(before + skip)


def _own_groups(config: NCSNpp, channels: int) -> int:
    """Groups of the norms that `norm_num_groups` is for."""
    return config.norm_num_groups or _groups(channels)


def _norms(config: NCSNpp) -> Iterator[tuple[int, int]]:
    """Channels and groups of every norm."""
    widths, layers = config.block_out_channels, config.layers_per_block
    skips = [widths[0]]
    for level, (width, kind) in enumerate(
        zip(widths, config.down_block_types, strict=True)
    ):
        yield skips[-1], _groups(skips[-1])
        yield width, _groups(width)
        if kind.startswith("Attn"):
            yield width, ATTENTION_GROUPS
        skips += [width] * (layers + (level < len(widths) - 1))
    for width in (widths[0], widths[-1]):
        yield width, _own_groups(config, width)
    before = widths[-1]
    for width, kind in zip(widths[::-1], config.up_block_types, strict=True):
        for _ in range(layers + 1):
            skip = skips.pop()
            yield before + skip, _joined_groups(kind, before, skip)
            before = width
        if kind.startswith("Attn"):
            yield width, ATTENTION_GROUPS


@dataclasses.dataclass(frozen=True)
class NCSNpp(ImageNetwork):
    """An NCSN++ score model.

    Names and meanings are as in diffusers' `UNet2DModel` configuration. The defaults
    are the network that VillanDiffusion trains on CIFAR-10. With more than one
    resolution diffusers takes images of three channels only.

    Attributes:
      sample_size: (H, W) of the images it was made for.
      in_channels: colour channels, in and out.
      block_out_channels: width of each resolution, from high to low.
      down_block_types: "SkipDownBlock2D" or "AttnSkipDownBlock2D" for each resolution.
      up_block_types: "SkipUpBlock2D" or "AttnSkipUpBlock2D", from low to high
        resolution. A width with attention is a multiple of 32.
      layers_per_block: residual blocks in a down block (an up block has one more).
      attention_head_dim: width of a head; None for one head over all channels.
      norm_num_groups: groups of the norms in the middle and of the last norm; None for
        min(channels // 4, 32), which all other norms have.
      norm_eps: epsilon of every GroupNorm.
      mid_block_scale_factor: by which the sums in the middle are divided.
      time_embedding_type: "fourier" for sines and cosines of log t at random
        frequencies, which no training moves, and an output divided by t; "positional"
        for sines and cosines of t at the frequencies of `UNet`, and no division.
      flip_sin_to_cos: order of the halves of a positional embedding.
      freq_shift: shift in its frequencies, 10000^(-i / (half - freq_shift)).
      center_input_sample: takes images in [0, 1]: 2 x - 1 goes in.
      dropout: rate; used only when a dropout key is given.
      dtype: compute dtype, "float32" or "bfloat16".
      param_dtype: dtype in which parameters are made; the frequencies are float32.
      remat: compute residual blocks again in the backward pass instead of keeping what
        is inside them: less memory, a third more time.
    """

    sample_size: tuple[int, int] = (32, 32)
    in_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 256, 256)
    down_block_types: tuple[str, ...] = (
        "SkipDownBlock2D",
        "AttnSkipDownBlock2D",
        "SkipDownBlock2D",
        "SkipDownBlock2D",
    )
    up_block_types: tuple[str, ...] = (
        "SkipUpBlock2D",
        "SkipUpBlock2D",
        "AttnSkipUpBlock2D",
        "SkipUpBlock2D",
    )
    layers_per_block: int = 4
    attention_head_dim: int | None = None
    norm_num_groups: int | None = None
    norm_eps: float = 1e-6
    mid_block_scale_factor: float = 1.41421356237
    time_embedding_type: str = "fourier"
    flip_sin_to_cos: bool = True
    freq_shift: float = 0.0
    center_input_sample: bool = False
    dropout: float = 0.0
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        for name in ("in_channels", "layers_per_block"):
            fields.check_whole(name, getattr(self, name))
        if self.norm_num_groups is not None:
            fields.check_whole("norm_num_groups", self.norm_num_groups)
        fields.check_levels(self, DOWN_BLOCKS, UP_BLOCKS)
        for channels, groups in _norms(self):
            if groups < 1 or channels % groups:
                raise ValueError(
                    f"a norm of this network has {channels} channels in {groups} "
                    "groups: give a number of groups that divides the channels"
                )
        for width, attends in fields.attending(self):
            if attends:
                fields.check_heads(self, width)
        fields.check_sides(self)
        half = self.block_out_channels[0] // 2
        fields.check_numbers(
            self,
            ("norm_eps", 1e-30, 1.0),
            ("mid_block_scale_factor", 1e-3, 1e3),
            ("freq_shift", -fields.WIDEST, half - 1),
            ("dropout", 0.0, 0.999),
        )
        fields.check_choices(
            self,
            ("time_embedding_type", ("fourier", "positional")),
            ("flip_sin_to_cos", (True, False)),
            ("center_input_sample", (False, True)),
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
        return _NCSNpp(self).init(key, x, jnp.ones((1,), jnp.int32))["params"]

    def __call__(
        self, params: Params, x: Array, t: Array, dropout_key: Key | None = None
    ) -> Array:
        """What diffusers' model returns as `sample`, float32 `[B, H, W, C]`.

        With Fourier features it is the score of x, after the division by sigma: for a
        trained network about -eps / sigma in x = y + sigma eps.

        Args:
          params: the parameters.
          x: `[B, H, W, C]`.
          t: `[B]`, what the scheduler gives the network: with Fourier features sigma,
            above 0.
          dropout_key: drops features if given.
        """
        chex.assert_rank([x, t], [4, 1])
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        out: Any = _NCSNpp(self).apply(
            {"params": params}, x, t, deterministic=dropout_key is None, rngs=rngs
        )
        whole: Array = out.astype(jnp.float32)
        if self.time_embedding_type == "positional":
            return whole
        found: Array = whole / t.astype(jnp.float32)[:, None, None, None]
        return found


SMALL = NCSNpp(
    sample_size=(16, 16),
    in_channels=1,
    block_out_channels=(16, 32, 64),
    down_block_types=("SkipDownBlock2D",) * 3,
    up_block_types=("SkipUpBlock2D",) * 3,
    layers_per_block=1,
)
"""For grey images of 16x16 pixels on a few CPU cores."""


class _Frequencies(nn.Module):
    """Sines and cosines of 2 pi w log t, `[B, 2 F]` float32, for t `[B]`."""

    count: int

    @nn.compact
    def __call__(self, t: Array) -> Array:
        drawn = nn.initializers.normal(FREQUENCIES)
        weight = self.param("weight", drawn, (self.count,), jnp.float32)
        weight = jax.lax.stop_gradient(weight)
        angle = jnp.log(t.astype(jnp.float32))[:, None] * weight[None] * 2 * math.pi
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class _NCSNpp(nn.Module):
    """The network without the division by t."""

    config: NCSNpp

    @nn.compact
    def __call__(self, x: Array, t: Array, deterministic: bool = True) -> Array:
        c = self.config
        widths, last = c.block_out_channels, len(c.block_out_channels) - 1
        x = x.astype(c.dtype)
        if c.center_input_sample:
            x = 2 * x - 1

        if c.time_embedding_type == "fourier":
            features = _Frequencies(widths[0], name="time_proj")(t)
        else:
            features = sinusoids(c, t)
        temb = time_embedding(c, features.astype(c.dtype))
        block = nn.remat(Resnet, static_argnums=(3,)) if c.remat else Resnet

        def resnet(
            x: Array,
            width: int,
            name: str,
            first: int | None = None,
            resample: Callable[[Array], Array] | None = None,
        ) -> Array:
            groups = (first or _groups(x.shape[-1]), _groups(width))
            layer = block(c, width, groups, resample, name=name)
            return layer(x, temb, deterministic) / SCALE

        def attend(x: Array, prefix: str, i: int, kind: str) -> Array:
            if not kind.startswith("Attn"):
                return x
            layer = Attention(c, ATTENTION_GROUPS, name=f"{prefix}_attentions_{i}")
            return layer(x) / SCALE

        image, x = x, conv(c, widths[0], "conv_in")(x)
        skips = [x]
        for level, width in enumerate(widths):
            prefix, kind = f"down_blocks_{level}", c.down_block_types[level]
            for i in range(c.layers_per_block):
                x = resnet(x, width, f"{prefix}_resnets_{i}")
                x = attend(x, prefix, i, kind)
                skips.append(x)
            if level < last:
                name = f"{prefix}_resnet_down"
                x = resnet(x, width, name, resample=fir_downsample)
                image = fir_downsample(image)
                x = x + conv(c, width, f"{prefix}_skip_conv", size=1)(image)
                skips.append(x)

        groups, scale = _own_groups(c, widths[-1]), c.mid_block_scale_factor

        def middle(x: Array, i: int) -> Array:
            name = f"mid_block_resnets_{i}"
            layer = block(c, widths[-1], (groups, groups), name=name)
            return layer(x, temb, deterministic) / scale

        x = Attention(c, groups, name="mid_block_attentions_0")(middle(x, 0)) / scale
        x = middle(x, 1)

        drawn: Array | None = None
        for level, width in enumerate(widths[::-1]):
            prefix, kind = f"up_blocks_{level}", c.up_block_types[level]
            for i in range(c.layers_per_block + 1):
                skip = skips.pop()
                first = _joined_groups(kind, x.shape[-1], skip.shape[-1])
                x = jnp.concatenate([x, skip], axis=-1)
                x = resnet(x, width, f"{prefix}_resnets_{i}", first)
            x = attend(x, prefix, 0, kind)
            if drawn is not None:
                drawn = fir_upsample(drawn)
            if level < last:
                h = GroupNorm(c, _groups(width), name=f"{prefix}_skip_norm")(x)
                name = f"{prefix}_skip_conv"
                h = conv(c, c.in_channels, name, zero=True)(nn.silu(h))
                drawn = h if drawn is None else drawn + h
                name = f"{prefix}_resnet_up"
                x = resnet(x, width, name, resample=fir_upsample)

        x = GroupNorm(c, _own_groups(c, widths[0]), name="conv_norm_out")(x)
        x = conv(c, c.in_channels, "conv_out", zero=True)(nn.silu(x))
        return x if drawn is None else x + drawn
