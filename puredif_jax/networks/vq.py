"""The first stage of latent diffusion: the autoencoder of diffusers' `VQModel`.

Rombach et al., "High-resolution image synthesis with latent diffusion models" (arXiv
2112.10752): an encoder E, a codebook e of K vectors, and a decoder D. A pixel z of the
latents is replaced by the nearest e_k on its way into the decoder.

diffusers' `LDMPipeline` draws so, with a UNet2DModel of the latents:

1. x_T ~ N(0, 1), `[B, h, w, C]` of the UNet's sample_size and in_channels, times
   the scheduler's `init_noise_sigma`, which is 1 for DDIM;
2. the scheduler's steps, 50 by default and eta = 0 with DDIM, lead to x_0; nothing is
   quantised on the way;
3. image = D(nearest code of x_0 / scaling_factor): `decode`, with quantisation;
4. image / 2 + 0.5, cut to [0, 1]: in our range, the image cut to [-1, 1].

So the UNet is trained on x_0 = scaling_factor E(image): `encode`, without quantisation.
Neither `encode` nor `decode` scales. Pipelines of diffusers before 0.22 did not either.

Parameters have their names in the PyTorch state dict with "_" for ".".
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from puredif_jax.networks.convolution import conv_of_upsampled
from puredif_jax.networks.fields import MOST_BLOCKS, check_whole
from puredif_jax.networks.layers import Attention, GroupNorm, conv
from puredif_jax.types import Array, Key, Params

ENCODER_BLOCKS = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
DECODER_BLOCKS = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
WIDEST_CODE = 256  # channels of a codebook vector; distances are summed one by one


@dataclasses.dataclass(frozen=True)
class VQModel:
    """A vector-quantised autoencoder of images.

    Names and meanings are as in diffusers' `VQModel` configuration; the defaults are
    the first stage of CompVis/ldm-celebahq-256.

    Attributes:
      in_channels: colour channels of an image that is encoded.
      out_channels: colour channels of a decoded image.
      down_block_types: "DownEncoderBlock2D" or "AttnDownEncoderBlock2D" for each
        resolution.
      up_block_types: "UpDecoderBlock2D" or "AttnUpDecoderBlock2D", from low to high
        resolution.
      block_out_channels: width of each resolution, from high to low.
      layers_per_block: residual blocks at a resolution of the encoder (the decoder has
        one more).
      latent_channels: what the encoder gives and the decoder takes.
      num_vq_embeddings: vectors of the codebook.
      norm_num_groups: groups of every GroupNorm.
      vq_embed_dim: channels of the codebook and so of the latents; as many as
        latent_channels if None.
      scaling_factor: factor of the latents that a UNet sees; see above.
      mid_block_add_attention: attend between the middle blocks.
      dtype: compute dtype, "float32" or "bfloat16"; distances are in float32.
      param_dtype: dtype in which parameters are made.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 3
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (128, 256, 512)
    layers_per_block: int = 2
    latent_channels: int = 3
    num_vq_embeddings: int = 8192
    norm_num_groups: int = 32
    vq_embed_dim: int | None = None
    scaling_factor: float = 0.18215
    mid_block_add_attention: bool = True
    dtype: str = "float32"
    param_dtype: str = "float32"

    # What the layers ask of a UNet, and diffusers fixes here: one head, over all.
    norm_eps: ClassVar[float] = 1e-6
    attention_head_dim: ClassVar[None] = None

    def __post_init__(self) -> None:
        widths, levels = self.block_out_channels, len(self.block_out_channels)
        for name in (
            "in_channels",
            "out_channels",
            "layers_per_block",
            "latent_channels",
            "num_vq_embeddings",
            "norm_num_groups",
        ):
            check_whole(name, getattr(self, name))
        if self.vq_embed_dim is not None:
            check_whole("vq_embed_dim", self.vq_embed_dim)
        if self.embed_dim > WIDEST_CODE:
            raise ValueError(
                f"a vector of the codebook may have 1 to {WIDEST_CODE} channels, found "
                f"{self.embed_dim}"
            )
        for width in widths:
            check_whole("each of block_out_channels", width)
            if width % self.norm_num_groups:
                raise ValueError(
                    f"each of block_out_channels must be a multiple of norm_num_groups="
                    f"{self.norm_num_groups}, found {width}"
                )
        if not 1 <= levels * self.layers_per_block <= MOST_BLOCKS:
            raise ValueError(
                f"an encoder may have 1 to {MOST_BLOCKS} blocks on its way down, found "
                f"block_out_channels={widths[:MOST_BLOCKS]} with layers_per_block="
                f"{self.layers_per_block}"
            )
        for name, valid in (("down", ENCODER_BLOCKS), ("up", DECODER_BLOCKS)):
            found = getattr(self, f"{name}_block_types")
            if len(found) != levels or not set(found) <= set(valid):
                raise ValueError(
                    f"{name}_block_types needs {levels} names out of "
                    f"{', '.join(valid)}, found {found}"
                )
        factor = self.scaling_factor
        if type(factor) not in (int, float) or not 1e-6 <= factor <= 1e6:
            raise ValueError(
                f"scaling_factor must be a number from 1e-6 to 1e6, found {factor!r}"
            )
        for name, choices in (
            ("mid_block_add_attention", (True, False)),
            ("dtype", ("float32", "bfloat16")),
            ("param_dtype", ("float32", "bfloat16")),
        ):
            found = getattr(self, name)
            if type(found) is not type(choices[0]) or found not in choices:
                raise ValueError(
                    f"{name} must be {choices[0]} or {choices[1]}, found {found}"
                )

    @property
    def factor(self) -> int:
        """How many times a side of the latents is shorter than a side of an image."""
        return 1 << (len(self.block_out_channels) - 1)

    @property
    def embed_dim(self) -> int:
        """Channels of the latents."""
        return self.latent_channels if self.vq_embed_dim is None else self.vq_embed_dim

    def latent_shape(self, image_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(h, w, D) of the latents of an image (H, W, C).

        Raises:
          ValueError: C is not in_channels, or a side is no multiple of `factor`.
        """
        height, width, channels = image_shape
        if channels != self.in_channels or height % self.factor or width % self.factor:
            raise ValueError(
                f"the first stage takes images of {self.in_channels} channels with "
                f"sides in multiples of {self.factor}, found {image_shape}"
            )
        return height // self.factor, width // self.factor, self.embed_dim

    def image_shape(self, latent_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(H, W, C) of the image that latents (h, w, D) give.

        Raises:
          ValueError: D is not the codebook's.
        """
        height, width, channels = latent_shape
        if channels != self.embed_dim:
            raise ValueError(
                f"the first stage takes latents of {self.embed_dim} channels, found "
                f"{latent_shape}"
            )
        return height * self.factor, width * self.factor, self.out_channels

    def init(self, key: Key) -> Params:
        """Fresh parameters: a nested dict of arrays of `param_dtype`."""
        keys = jax.random.split(key, 3)
        images = jnp.zeros((1, self.factor, self.factor, self.in_channels), self.dtype)
        latents = jnp.zeros((1, 1, 1, self.embed_dim), self.dtype)
        count = self.num_vq_embeddings
        codebook = jax.random.uniform(
            keys[1], (count, self.embed_dim), self.param_dtype, -1 / count, 1 / count
        )
        return {
            **_Encode(self).init(keys[0], images)["params"],
            "quantize_embedding": {"embedding": codebook},
            **_Decode(self).init(keys[2], latents)["params"],
        }

    def encode(self, params: Params, images: Array) -> Array:
        """Latents, float32 `[B, h, w, D]`, of images `[B, H, W, C]` in [-1, 1].

        They are neither quantised nor scaled.
        """
        chex.assert_rank(images, 4)
        self.latent_shape(images.shape[1:])
        out: Any = _Encode(self).apply({"params": params}, images)
        found: Array = out.astype(jnp.float32)
        return found

    def decode(self, params: Params, latents: Array) -> Array:
        """Images, float32 `[B, H, W, C]`, of latents `[B, h, w, D]`.

        Each pixel of the latents, which are not scaled, is quantised first. Images are
        not cut to [-1, 1]. The gradient passes the quantisation as if it were the
        identity, so it is the decoder's gradient at the codes; none reaches the
        codebook. Both are as in diffusers.
        """
        chex.assert_rank(latents, 4)
        self.image_shape(latents.shape[1:])
        codebook = jnp.asarray(params["quantize_embedding"]["embedding"], jnp.float32)
        latents = latents.astype(jnp.float32)
        codes = codebook[nearest(codebook, latents)]
        latents = latents + jax.lax.stop_gradient(codes - latents)
        out: Any = _Decode(self).apply({"params": params}, latents)
        found: Array = out.astype(jnp.float32)
        return found


def nearest(codebook: Array, latents: Array) -> Array:
    """argmin_k ||z - e_k||, int32 `[B, h, w]`, of z `[B, h, w, D]` and e `[K, D]`.

    Of equally near codes it is the first. The squares of z - e are summed as they are,
    one channel after the other, so that XLA keeps no array of all distances. diffusers
    takes z^2 + e^2 - 2 z e. Its rounding may choose another code where two are equally
    near to 1e-7 of z^2.
    """
    z = jax.lax.stop_gradient(latents).reshape(-1, latents.shape[-1])
    e = jax.lax.stop_gradient(codebook)
    squares = [jnp.square(z[:, i, None] - e[None, :, i]) for i in range(e.shape[1])]
    return jnp.argmin(sum(squares[1:], squares[0]), axis=-1).reshape(latents.shape[:-1])


class _Resnet(nn.Module):
    """GroupNorm, SiLU, conv, GroupNorm, SiLU, conv, + shortcut: there is no time."""

    config: Any
    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        h = conv(c, self.width, "conv1")(
            nn.silu(GroupNorm(c, c.norm_num_groups, name="norm1")(x))
        )
        h = conv(c, self.width, "conv2")(
            nn.silu(GroupNorm(c, c.norm_num_groups, name="norm2")(h))
        )
        if x.shape[-1] != self.width:
            x = conv(c, self.width, "conv_shortcut", size=1)(x)
        return x + h


def _block(
    config: Any, x: Array, prefix: str, width: int, layers: int, attend: bool
) -> Array:
    for i in range(layers):
        x = _Resnet(config, width, name=f"{prefix}_resnets_{i}")(x)
        if attend:
            x = Attention(
                config, config.norm_num_groups, name=f"{prefix}_attentions_{i}"
            )(x)
    return x


def _middle(config: Any, x: Array) -> Array:
    width = config.block_out_channels[-1]
    x = _Resnet(config, width, name="mid_block_resnets_0")(x)
    if config.mid_block_add_attention:
        x = Attention(config, config.norm_num_groups, name="mid_block_attentions_0")(x)
    return _Resnet(config, width, name="mid_block_resnets_1")(x)


def _out(config: Any, x: Array, channels: int) -> Array:
    x = nn.silu(GroupNorm(config, config.norm_num_groups, name="conv_norm_out")(x))
    return conv(config, channels, "conv_out")(x)


class _Encoder(nn.Module):
    config: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        widths = c.block_out_channels
        x = conv(c, widths[0], "conv_in")(x)
        for level, (width, kind) in enumerate(
            zip(widths, c.down_block_types, strict=True)
        ):
            prefix, attend = f"down_blocks_{level}", kind == "AttnDownEncoderBlock2D"
            x = _block(c, x, prefix, width, c.layers_per_block, attend)
            if level < len(widths) - 1:
                name, pad = f"{prefix}_downsamplers_0_conv", ((0, 1), (0, 1))
                x = conv(c, width, name, strides=2, padding=pad)(x)
        return _out(c, _middle(c, x), c.latent_channels)


class _Decoder(nn.Module):
    config: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        widths = c.block_out_channels[::-1]
        x = _middle(c, conv(c, widths[0], "conv_in")(x))
        for level, (width, kind) in enumerate(
            zip(widths, c.up_block_types, strict=True)
        ):
            prefix, attend = f"up_blocks_{level}", kind == "AttnUpDecoderBlock2D"
            x = _block(c, x, prefix, width, c.layers_per_block + 1, attend)
            if level < len(widths) - 1:
                name = f"{prefix}_upsamplers_0_conv"
                x = conv(c, width, name, convolve=conv_of_upsampled)(x)
        return _out(c, x, c.out_channels)


class _Encode(nn.Module):
    """Images to latents."""

    config: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        x = _Encoder(c, name="encoder")(x.astype(c.dtype))
        return conv(c, c.embed_dim, "quant_conv", size=1)(x)


class _Decode(nn.Module):
    """Quantised latents to images."""

    config: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        x = conv(c, c.latent_channels, "post_quant_conv", size=1)(x.astype(c.dtype))
        return _Decoder(c, name="decoder")(x)
