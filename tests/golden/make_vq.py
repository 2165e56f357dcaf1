"""Makes vq.npz: outputs of diffusers' `VQModel`, to check ours.

Run, in an environment of its own (the package does not need PyTorch):

    pip install torch==2.13.0 diffusers==0.42.1 safetensors accelerate
    python tests/golden/make_vq.py

Weights, images and latents are not stored: `draw` makes them again from the seed. For
each configuration NAME the file has `NAME_latents`, what `encode` makes of the images,
float32 `[B, D, h, w]`; `NAME_indices`, the codes of the drawn latents, int32
`[B, h, w]`; `NAME_images`, what `decode` makes of these, float32 `[B, C, H, W]`;
and `NAME_parameters`, one "name d0,d1,..." for each entry of the state dict, sorted.
tests/test_vq.py imports this file for what needs NumPy only.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

SEED = 20261
OUTPUT = Path(__file__).parent / "vq.npz"


def _blocks(kind: str, attend: str) -> tuple[str, ...]:
    """Block types of a side: one letter a level, A with attention and P plain."""
    name = {"Down": "DownEncoderBlock2D", "Up": "UpDecoderBlock2D"}[kind]
    return tuple({"A": f"Attn{name}", "P": name}[letter] for letter in attend)


# Arguments of `VQModel`, which are also those of `puredif_jax.networks.vq.VQModel`.
CONFIGS: dict[str, dict[str, Any]] = {
    # CompVis/ldm-celebahq-256, narrower.
    "celebahq": dict(
        in_channels=3,
        out_channels=3,
        down_block_types=_blocks("Down", "PPP"),
        up_block_types=_blocks("Up", "PPP"),
        block_out_channels=(16, 32, 64),
        layers_per_block=2,
        latent_channels=3,
        num_vq_embeddings=64,
        norm_num_groups=8,
        vq_embed_dim=None,
        mid_block_add_attention=True,
    ),
    # Attention on both ways; no two counts of channels alike.
    "attention": dict(
        in_channels=1,
        out_channels=2,
        down_block_types=_blocks("Down", "APA"),
        up_block_types=_blocks("Up", "AAP"),
        block_out_channels=(8, 16, 24),
        layers_per_block=1,
        latent_channels=5,
        num_vq_embeddings=20,
        norm_num_groups=4,
        vq_embed_dim=4,
        mid_block_add_attention=True,
    ),
    "plain": dict(
        in_channels=3,
        out_channels=3,
        down_block_types=_blocks("Down", "P"),
        up_block_types=_blocks("Up", "P"),
        block_out_channels=(8,),
        layers_per_block=1,
        latent_channels=2,
        num_vq_embeddings=1,
        norm_num_groups=2,
        vq_embed_dim=6,
        mid_block_add_attention=False,
    ),
}
# Of the images: (B, H, W).
BATCHES = {"celebahq": (2, 32, 32), "attention": (3, 16, 24), "plain": (2, 6, 5)}
# CompVis/ldm-celebahq-256 in its full width, on one image of 32 pixels.
FULL: dict[str, dict[str, Any]] = {
    "ldm-celebahq-256": CONFIGS["celebahq"]
    | dict(
        block_out_channels=(128, 256, 512), num_vq_embeddings=8192, norm_num_groups=32
    )
}
BATCHES["ldm-celebahq-256"] = (1, 32, 32)

Shapes = dict[str, tuple[int, ...]]


def draw(
    name: str, shapes: Shapes, seed: int = SEED
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Weights by PyTorch name, images `[B, C, H, W]`, latents `[B, D, h, w]`.

    Kernels have variance 1 / fan-in, biases and the scales' distance from 1 have
    standard deviation 0.1 and 0.2. Codebook and latents are N(0, 1).
    """
    config, (batch, height, width) = (CONFIGS | FULL)[name], BATCHES[name]
    rng = np.random.default_rng(seed)
    weights = {}
    for key in sorted(shapes):
        value = rng.standard_normal(shapes[key], np.float32)
        if key.endswith("bias"):
            value = 0.1 * value
        elif len(shapes[key]) == 1:
            value = 1 + 0.2 * value
        elif key != "quantize.embedding.weight":
            value = value / math.sqrt(math.prod(shapes[key][1:]))
        weights[key] = value.astype(np.float32)
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    images = (batch, config["in_channels"], height, width)
    channels = config["vq_embed_dim"] or config["latent_channels"]
    latents = (batch, channels, height // factor, width // factor)
    return weights, *(rng.standard_normal(x, np.float32) for x in (images, latents))


def model(config: dict[str, Any]):
    """The `VQModel` of a configuration, in evaluation mode."""
    import diffusers
    import torch

    torch.set_num_threads(1)
    return diffusers.VQModel(**config).eval()


def shapes_of(net) -> Shapes:
    return {name: tuple(value.shape) for name, value in net.state_dict().items()}


def main() -> None:
    import torch

    arrays = {}
    for name, config in (CONFIGS | FULL).items():
        net = model(config)
        shapes = shapes_of(net)
        weights, images, latents = draw(name, shapes)
        net.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
        with torch.no_grad():
            encoded = net.encode(torch.from_numpy(images)).latents
            z = torch.from_numpy(latents)
            indices = net.quantize(z)[2][2].reshape(len(z), *z.shape[2:])
            decoded = net.decode(z).sample
        arrays[f"{name}_latents"] = encoded.numpy()
        arrays[f"{name}_indices"] = indices.numpy().astype(np.int32)
        arrays[f"{name}_images"] = decoded.numpy()
        arrays[f"{name}_parameters"] = np.array(
            [f"{k} {','.join(map(str, shapes[k]))}" for k in sorted(shapes)]
        )
        count = sum(v.size for v in weights.values())
        print(name, count, encoded.std().item(), decoded.std().item())
    np.savez_compressed(OUTPUT, **arrays)
    print(OUTPUT, OUTPUT.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
