"""The layers that the networks share, in the structure of diffusers'."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from puredif_jax.networks.convolution import conv_general_dilated
from puredif_jax.types import Array


class Layers(Protocol):
    """The fields of a network that its layers read, as in `UNet`."""

    @property
    def block_out_channels(self) -> tuple[int, ...]: ...
    @property
    def attention_head_dim(self) -> int | None: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def flip_sin_to_cos(self) -> bool: ...
    @property
    def freq_shift(self) -> float: ...
    @property
    def dropout(self) -> float: ...
    @property
    def dtype(self) -> str: ...
    @property
    def param_dtype(self) -> str: ...


@functools.partial(jax.jit, static_argnums=(3, 4, 5), inline=True)
def normalise(
    x: Array, scale: Array, bias: Array, groups: int, eps: float, dtype: str
) -> Array:
    """GroupNorm over `[B, H, W, C]`; statistics in float32, first of each channel.

    It is under jit so that it is traced once for each shape: the norms are most of what
    a network traces. Without the barrier XLA makes the bias's gradient by a second sum
    over all pixels. An H100 does little of that at once: it takes 80 us in 4x4 pixels.
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
    found: Array = wide * gain[:, None, None] + shift[:, None, None]
    return found.astype(dtype)


class GroupNorm(nn.Module):
    config: Layers
    groups: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, channels = self.config, x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), c.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (channels,), c.param_dtype)

        found: Array = normalise(x, scale, bias, self.groups, c.norm_eps, c.dtype)
        return found


def conv(
    config: Layers,
    width: int,
    name: str,
    size: int = 3,
    zero: bool = False,
    convolve: Callable[..., Array] = conv_general_dilated,
    **kwargs: Any,
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


def dense(config: Layers, width: int, name: str, zero: bool = False) -> nn.Dense:
    return nn.Dense(
        width,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        kernel_init=nn.initializers.zeros if zero else nn.linear.default_kernel_init,
        name=name,
    )


class Resnet(nn.Module):
    """GroupNorm, SiLU, conv, + time, GroupNorm, SiLU, dropout, conv, + shortcut.

    Attributes:
      config: the network.
      width: channels of the result.
      groups: groups of the first norm and of the second.
      resample: makes the image larger or smaller, after the first SiLU and in the
        shortcut, which has a convolution then.
    """

    config: Layers
    width: int
    groups: tuple[int, int]
    resample: Callable[[Array], Array] | None = None

    @nn.compact
    def __call__(self, x: Array, temb: Array, deterministic: bool) -> Array:
        c = self.config
        h = nn.silu(GroupNorm(c, self.groups[0], name="norm1")(x))
        if self.resample is not None:
            x, h = self.resample(x), self.resample(h)
        h = conv(c, self.width, "conv1")(h)
        h = h + dense(c, self.width, "time_emb_proj")(nn.silu(temb))[:, None, None, :]
        h = nn.silu(GroupNorm(c, self.groups[1], name="norm2")(h))
        h = nn.Dropout(c.dropout)(h, deterministic=deterministic)
        h = conv(c, self.width, "conv2", zero=True)(h)
        if x.shape[-1] != self.width or self.resample is not None:
            x = conv(c, self.width, "conv_shortcut", size=1)(x)
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


class Attention(nn.Module):
    """Self-attention over all positions, with a residual connection.

    The softmax is in float32, the products in the network's dtype. They are einsums,
    since the gradient of `jax.nn.dot_product_attention` promotes bfloat16 implicitly.
    """

    config: Layers
    groups: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        batch, height, width, channels = x.shape
        head = c.attention_head_dim or channels
        h = GroupNorm(c, self.groups, name="group_norm")(x)
        q, k, v = (
            dense(c, channels, f"to_{name}")(h).reshape(
                batch, height * width, channels // head, head
            )
            for name in "qkv"
        )
        weight = nn.softmax(_scores(q, k) / math.sqrt(head)).astype(c.dtype)
        h = jnp.einsum("bhqk,bkhd->bqhd", weight, v)
        h = h.reshape(batch, height, width, channels)
        return x + dense(c, channels, "to_out_0", zero=True)(h)


def sinusoids(config: Layers, t: Array) -> Array:
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


def time_embedding(config: Layers, features: Array) -> Array:
    """The embedding of the time for every residual block, of features `[B, F]`."""
    width = 4 * config.block_out_channels[0]
    temb = dense(config, width, "time_embedding_linear_1")(features)
    return dense(config, width, "time_embedding_linear_2")(nn.silu(temb))
