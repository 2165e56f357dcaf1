"""The DDPM UNet, in the structure and order of diffusers' `UNet2DModel`.

Parameter names are those of the PyTorch state dict with "_" for ".", so weights
carry over by name. `UNet` is a frozen configuration that is itself a
`NoiseModel`; that it is made with Flax linen is known to this module only.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from puredif_jax.networks.base import ImageNetwork
from puredif_jax.networks.convolution import conv_general_dilated, conv_of_upsampled
from puredif_jax.types import Array, Key, Params

DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D")
# More is a mistake, or meant to keep the reader busy.
MOST_BLOCKS = 32
WIDEST = 2**14  # of a width or a side


def _whole(name: str, found: Any) -> None:
    if type(found) is not int or not 1 <= found <= WIDEST:
        raise ValueError(
            f"{name} must be a whole number from 1 to {WIDEST}, found {found!r}"
        )


@dataclasses.dataclass(frozen=True)
class UNet(ImageNetwork):
    """A UNet2D noise model.

    Names and meanings are those of diffusers' `UNet2DModel` configuration.

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
      remat: make residual blocks anew in the backward pass instead of keeping what is
        inside them: less memory, a third more time.
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
        widths, levels = self.block_out_channels, len(self.block_out_channels)
        for name in ("in_channels", "layers_per_block", "norm_num_groups"):
            _whole(name, getattr(self, name))
        for name in ("block_out_channels", "sample_size"):
            for found in getattr(self, name):
                _whole(f"each of {name}", found)
        if self.attention_head_dim is not None:
            _whole("attention_head_dim", self.attention_head_dim)
        if not 1 <= levels * self.layers_per_block <= MOST_BLOCKS:
            raise ValueError(
                f"a network may have 1 to {MOST_BLOCKS} blocks on its way down, found "
                f"block_out_channels={widths[:MOST_BLOCKS]} with layers_per_block="
                f"{self.layers_per_block}"
            )
        for name, valid in (("down", DOWN_BLOCKS), ("up", UP_BLOCKS)):
            found = getattr(self, f"{name}_block_types")
            if len(found) != levels or not set(found) <= set(valid):
                raise ValueError(
                    f"{name}_block_types needs {levels} names out of "
                    f"{', '.join(valid)}, found {found}"
                )
        attending = [  # the middle block attends, at the last width
            kind.startswith("Attn") or also.startswith("Attn") or i == levels - 1
            for i, (kind, also) in enumerate(
                zip(self.down_block_types, reversed(self.up_block_types), strict=True)
            )
        ]
        for width, attends in zip(widths, attending, strict=True):
            if width % self.norm_num_groups:
                raise ValueError(
                    f"each of block_out_channels must be a multiple of norm_num_groups="
                    f"{self.norm_num_groups}, found {width}"
                )
            if attends and width % (self.attention_head_dim or 1):
                raise ValueError(
                    f"the width of a block with attention must be a multiple of "
                    f"attention_head_dim={self.attention_head_dim}, found {width}"
                )
        factor = 2 ** (levels - 1)
        if len(self.sample_size) != 2 or any(n % factor for n in self.sample_size):
            raise ValueError(
                f"{levels} resolutions need a sample_size of two multiples of {factor},"
                f" found {self.sample_size}"
            )
        half = widths[0] // 2
        for name, least, most in (
            ("norm_eps", 1e-30, 1.0),
            ("freq_shift", -WIDEST, half - 1),
            ("dropout", 0.0, 0.999),
        ):
            found = getattr(self, name)
            if type(found) not in (int, float) or not least <= found <= most:
                raise ValueError(
                    f"{name} must be a number from {least} to {most}, found {found!r}"
                )
        for name, choices in (
            ("downsample_padding", (0, 1)),
            ("flip_sin_to_cos", (True, False)),
            ("learned_variance", (False, True)),
            ("dtype", ("float32", "bfloat16")),
            ("param_dtype", ("float32", "bfloat16")),
        ):
            found = getattr(self, name)
            if type(found) is not type(choices[0]) or found not in choices:
                raise ValueError(
                    f"{name} must be {choices[0]} or {choices[1]}, found {found}"
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
        return out[..., : self.in_channels].astype(jnp.float32)


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


@functools.partial(jax.jit, static_argnums=(3, 4, 5), inline=True)
def _normalise(
    x: Array, scale: Array, bias: Array, groups: int, eps: float, dtype: str
) -> Array:
    """GroupNorm over `[B, H, W, C]`; statistics in float32, first of each channel.

    Under jit so that it is traced once for each shape: the norms are most of what a
    network traces. Without the barrier XLA makes the bias's gradient by a second sum
    over all pixels, of which an H100 does little at once: 80 us in 4x4 pixels.
    """
    width = x.shape[-1] // groups

    def of_groups(y: Array) -> Array:
        """Means over a group, at each of its channels: `[B, C]`."""
        means = y.mean((1, 2)).reshape(-1, groups, width).mean(-1)
        return means.repeat(width, axis=1)

    wide = x.astype(jnp.float32)
    mean = of_groups(wide)
    variance = jnp.maximum(of_groups(wide**2) - mean**2, 0.0)
    gain = jax.lax.rsqrt(variance + eps) * scale.astype(jnp.float32)[None]
    biases = jnp.broadcast_to(bias.astype(jnp.float32), gain.shape)
    shift = jax.lax.optimization_barrier(biases) - mean * gain
    return (wide * gain[:, None, None] + shift[:, None, None]).astype(dtype)


class _GroupNorm(nn.Module):
    config: UNet

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, channels = self.config, x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), c.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (channels,), c.param_dtype)

        return _normalise(x, scale, bias, c.norm_num_groups, c.norm_eps, c.dtype)


def _conv(
    config: UNet,
    width: int,
    name: str,
    size: int = 3,
    zero: bool = False,
    convolve: Callable[..., Array] = conv_general_dilated,
    **kwargs,
) -> nn.Conv:
    kwargs.setdefault("padding", size // 2)
    return nn.Conv(
        width,
        (size, size),
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        kernel_init=nn.initializers.zeros if zero else nn.linear.default_kernel_init,
        conv_general_dilated=convolve,
        name=name,
        **kwargs,
    )


def _dense(config: UNet, width: int, name: str, zero: bool = False) -> nn.Dense:
    return nn.Dense(
        width,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        kernel_init=nn.initializers.zeros if zero else nn.linear.default_kernel_init,
        name=name,
    )


class _Resnet(nn.Module):
    """GroupNorm, SiLU, conv, + time, GroupNorm, SiLU, dropout, conv, + shortcut."""

    config: UNet
    width: int

    @nn.compact
    def __call__(self, x: Array, temb: Array, deterministic: bool) -> Array:
        c = self.config
        h = nn.silu(_GroupNorm(c, name="norm1")(x))
        h = _conv(c, self.width, "conv1")(h)
        h = h + _dense(c, self.width, "time_emb_proj")(nn.silu(temb))[:, None, None, :]
        h = nn.silu(_GroupNorm(c, name="norm2")(h))
        h = nn.Dropout(c.dropout)(h, deterministic=deterministic)
        h = _conv(c, self.width, "conv2", zero=True)(h)
        if x.shape[-1] != self.width:
            x = _conv(c, self.width, "conv_shortcut", size=1)(x)
        return x + h


@jax.custom_vjp
def _scores(q: Array, k: Array) -> Array:
    """<q_i, k_j> in float32, `[B, heads, Q, K]`, of q and k `[B, Q or K, heads, D]`.

    JAX's own gradient multiplies the float32 cotangent by bfloat16, as float32: on an
    H100 that took more than half of the time of attention.
    """
    return jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)


def _scores_bwd(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    q, k = kept
    g = g.astype(q.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", g, k), jnp.einsum("bhqk,bqhd->bkhd", g, q)


_scores.defvjp(lambda q, k: (_scores(q, k), (q, k)), _scores_bwd)


class _Attention(nn.Module):
    """Self-attention over all positions, with a residual connection.

    The softmax is in float32, the products in the network's dtype. As einsums, for the
    gradient of `jax.nn.dot_product_attention` promotes bfloat16 implicitly.
    """

    config: UNet

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        batch, height, width, channels = x.shape
        head = c.attention_head_dim or channels
        h = _GroupNorm(c, name="group_norm")(x)
        q, k, v = (
            _dense(c, channels, f"to_{name}")(h).reshape(
                batch, height * width, channels // head, head
            )
            for name in "qkv"
        )
        weight = nn.softmax(_scores(q, k) / math.sqrt(head)).astype(c.dtype)
        h = jnp.einsum("bhqk,bkhd->bqhd", weight, v)
        h = h.reshape(batch, height, width, channels)
        return x + _dense(c, channels, "to_out_0", zero=True)(h)


def _time_features(config: UNet, t: Array) -> Array:
    """Sinusoidal embedding of t `[B]`: `[B, block_out_channels[0]]`, float32."""
    width = config.block_out_channels[0]
    half = width // 2
    exponent = -np.log(10000.0) * np.arange(half) / (half - config.freq_shift)
    frequency = jnp.asarray(np.exp(exponent), jnp.float32)
    angle = t.astype(jnp.float32)[:, None] * frequency[None]
    halves = [jnp.sin(angle), jnp.cos(angle)]
    if config.flip_sin_to_cos:
        halves.reverse()
    features = jnp.concatenate(halves, axis=-1)
    return jnp.pad(features, ((0, 0), (0, width % 2)))


class _UNet2D(nn.Module):
    config: UNet

    @nn.compact
    def __call__(self, x: Array, t: Array, deterministic: bool = True) -> Array:
        c = self.config
        widths = c.block_out_channels
        x = x.astype(c.dtype)

        temb = _time_features(c, t).astype(c.dtype)
        temb = _dense(c, 4 * widths[0], "time_embedding_linear_1")(temb)
        temb = _dense(c, 4 * widths[0], "time_embedding_linear_2")(nn.silu(temb))

        resnet = nn.remat(_Resnet, static_argnums=(3,)) if c.remat else _Resnet

        def layer(x: Array, prefix: str, i: int, width: int, attend: bool) -> Array:
            name = f"{prefix}_resnets_{i}"
            x = resnet(c, width, name=name)(x, temb, deterministic)
            return _Attention(c, name=f"{prefix}_attentions_{i}")(x) if attend else x

        x = _conv(c, widths[0], "conv_in")(x)
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
                x = _conv(c, width, name, strides=2, padding=pad)(x)
                skips.append(x)

        x = resnet(c, widths[-1], name="mid_block_resnets_0")(x, temb, deterministic)
        x = _Attention(c, name="mid_block_attentions_0")(x)
        x = resnet(c, widths[-1], name="mid_block_resnets_1")(x, temb, deterministic)

        for level, width in enumerate(widths[::-1]):
            prefix = f"up_blocks_{level}"
            attend = c.up_block_types[level] == "AttnUpBlock2D"
            for i in range(c.layers_per_block + 1):
                x = layer(
                    jnp.concatenate([x, skips.pop()], axis=-1), prefix, i, width, attend
                )
            if level < len(widths) - 1:
                name = f"{prefix}_upsamplers_0_conv"
                x = _conv(c, width, name, convolve=conv_of_upsampled)(x)

        x = nn.silu(_GroupNorm(c, name="conv_norm_out")(x))
        out_channels = c.in_channels * (2 if c.learned_variance else 1)
        return _conv(c, out_channels, "conv_out", zero=True)(x)
