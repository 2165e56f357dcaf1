"""Makes unet.npz: outputs of diffusers' `UNet2DModel`, to check ours.

Run, in an environment of its own (the package does not need PyTorch):

    pip install torch==2.13.0 diffusers==0.42.1 safetensors accelerate
    python tests/golden/make_unet.py

Weights, images and times are not stored: `draw` makes them again from the seed. For
each configuration NAME the file has `NAME_output`, float32 `[B, C, H, W]`, and
`NAME_parameters`, one "name d0,d1,..." for each entry of the state dict, sorted.
tests/test_unet.py imports this file for `CONFIGS` and `draw`, which need NumPy only.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

SEED = 20260
TIMES = (0, 1, 250, 999)
FULL_IMAGES = slice(2, 3)  # of those that are drawn, what the large networks see
OUTPUT = Path(__file__).parent / "unet.npz"


def _blocks(kind: str, attend: str) -> tuple[str, ...]:
    """Block types of a side: one letter a level, A with attention and P plain."""
    names = {"A": f"Attn{kind}Block2D", "P": f"{kind}Block2D"}
    return tuple(names[letter] for letter in attend)


# Arguments of `UNet2DModel`, which are also those of `puredif_jax.networks.unet.UNet`.
CONFIGS: dict[str, dict[str, Any]] = {
    # google/ddpm-cifar10-32, narrower.
    "cifar10": dict(
        sample_size=(32, 32),
        in_channels=3,
        block_out_channels=(32, 64, 64, 64),
        down_block_types=_blocks("Down", "PAPP"),
        up_block_types=_blocks("Up", "PPAP"),
        layers_per_block=2,
        attention_head_dim=None,
        norm_num_groups=8,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    ),
    "plain": dict(
        sample_size=(16, 16),
        in_channels=1,
        block_out_channels=(16, 32, 64),
        down_block_types=_blocks("Down", "PPP"),
        up_block_types=_blocks("Up", "PPP"),
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=8,
        norm_eps=1e-5,
        downsample_padding=1,
        flip_sin_to_cos=True,
        freq_shift=0,
    ),
    # Attention at the lowest and highest resolution; an epsilon that is felt.
    "attention": dict(
        sample_size=(16, 12),
        in_channels=3,
        block_out_channels=(16, 24, 32),
        down_block_types=_blocks("Down", "APA"),
        up_block_types=_blocks("Up", "AAP"),
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=4,
        norm_eps=1e-2,
        downsample_padding=1,
        flip_sin_to_cos=True,
        freq_shift=1,
    ),
    # google/ddpm-ema-celebahq-256, smaller and narrower.
    "celebahq": dict(
        sample_size=(32, 32),
        in_channels=3,
        block_out_channels=(16, 16, 32, 32, 64, 64),
        down_block_types=_blocks("Down", "PPPPAP"),
        up_block_types=_blocks("Up", "PAPPPP"),
        layers_per_block=2,
        attention_head_dim=None,
        norm_num_groups=8,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    ),
}

# The public checkpoints of the field in their full width; 256-pixel ones at 32 pixels.
FULL: dict[str, dict[str, Any]] = {
    # google/ddpm-cifar10-32: 35.7 M parameters.
    "ddpm-cifar10-32": CONFIGS["cifar10"]
    | dict(block_out_channels=(128, 256, 256, 256), norm_num_groups=32),
    # google/ddpm-ema-celebahq-256, -church-256 and -bedroom-256: 113.7 M parameters.
    "ddpm-ema-256": CONFIGS["celebahq"]
    | dict(block_out_channels=(128, 128, 256, 256, 512, 512), norm_num_groups=32),
    # The butterflies of diffusers' tutorials, with their defaults.
    "butterflies-32": dict(
        sample_size=(32, 32),
        in_channels=3,
        block_out_channels=(64, 128, 128, 256),
        down_block_types=_blocks("Down", "PPAA"),
        up_block_types=_blocks("Up", "AAPP"),
        layers_per_block=2,
        attention_head_dim=8,
        norm_num_groups=32,
        norm_eps=1e-5,
        downsample_padding=1,
        flip_sin_to_cos=True,
        freq_shift=0,
    ),
}
FULL["butterflies-128"] = FULL["butterflies-32"] | dict(
    block_out_channels=(128, 128, 256, 256, 512, 512),
    down_block_types=_blocks("Down", "PPPPAP"),
    up_block_types=_blocks("Up", "PAPPPP"),
)

Shapes = dict[str, tuple[int, ...]]


def draw(
    config: dict[str, Any], shapes: Shapes, seed: int
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Weights by PyTorch name, images `[B, C, H, W]`, times `[B]`, from the seed.

    Kernels have variance 1 / fan-in, biases and the scales' distance from 1 have
    standard deviation 0.1 and 0.2: nothing vanishes, nothing grows much.
    """
    rng = np.random.default_rng(seed)
    weights = {}
    for name in sorted(shapes):
        value = rng.standard_normal(shapes[name])
        if name.endswith("bias"):
            value = 0.1 * value
        elif len(shapes[name]) == 1:
            value = 1 + 0.2 * value
        else:
            value = value / math.sqrt(math.prod(shapes[name][1:]))
        weights[name] = value.astype(np.float32)
    batch = (len(TIMES), config["in_channels"], *config["sample_size"])
    images = rng.standard_normal(batch).astype(np.float32)
    return weights, images, np.asarray(TIMES, np.int32)


def model(config: dict[str, Any]):
    """The `UNet2DModel` of a configuration, in evaluation mode."""
    import diffusers
    import torch

    torch.set_num_threads(1)
    return diffusers.UNet2DModel(**config, out_channels=config["in_channels"]).eval()


def shapes_of(net) -> Shapes:
    return {name: tuple(value.shape) for name, value in net.state_dict().items()}


def main() -> None:
    import torch

    arrays = {}
    for name, config in (CONFIGS | FULL).items():
        net = model(config)
        shapes = shapes_of(net)
        weights, images, times = draw(config, shapes, SEED)
        net.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
        with torch.no_grad():
            if name in FULL:
                images, times = images[FULL_IMAGES], times[FULL_IMAGES]
            output = net(torch.from_numpy(images), torch.from_numpy(times)).sample
        arrays[f"{name}_output"] = output.numpy()
        arrays[f"{name}_parameters"] = np.array(
            [f"{k} {','.join(map(str, shapes[k]))}" for k in sorted(shapes)]
        )
        print(name, sum(v.size for v in weights.values()), output.std().item())
    np.savez_compressed(OUTPUT, **arrays)
    print(OUTPUT, OUTPUT.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
