"""A small network for Frechet distances between sets of garment images.

"garment-net": three 3x3 convolutions of stride 2 (16, 32, 64 channels) with ReLU, a
mean over positions (the 64 features) and a linear layer to the 10 classes. It is
trained on the shipped Fashion-MNIST images at 16x16. Distances over its features
compare models of this package with each other; they are not FID.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from puredif_jax.types import Array, Key, Params

NAME = "garment-net"
WIDTHS = (16, 32, 64)
CLASSES = 10


def init(key: Key) -> Params:
    """Fresh parameters for images `[B, 16, 16, 1]`."""
    params = {}
    before = 1
    for i, width in enumerate(WIDTHS):
        key, key_i = jax.random.split(key)
        scale = (2 / (9 * before)) ** 0.5
        kernel = scale * jax.random.normal(key_i, (3, 3, before, width))
        params[f"conv_{i}"] = {"kernel": kernel, "bias": jnp.zeros(width)}
        before = width
    kernel = before**-0.5 * jax.random.normal(key, (before, CLASSES))
    params["head"] = {"kernel": kernel, "bias": jnp.zeros(CLASSES)}
    return params


def embed(params: Params, images: Array) -> Array:
    """Features `[B, 64]` of images `[B, H, W, 1]` in [-1, 1]."""
    x = jnp.clip(images, -1, 1)
    for i in range(len(WIDTHS)):
        layer = params[f"conv_{i}"]
        x = lax.conv_general_dilated(
            x,
            layer["kernel"],
            (2, 2),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = jax.nn.relu(x + layer["bias"][None, None, None])
    return x.mean((1, 2))


def classify(params: Params, images: Array) -> Array:
    """Logits `[B, 10]` over the classes of Fashion-MNIST."""
    head = params["head"]
    found: Array = embed(params, images) @ head["kernel"] + head["bias"][None]
    return found
