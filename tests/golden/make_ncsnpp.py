"""Makes ncsnpp.npz: outputs of diffusers' `UNet2DModel` of skip blocks, to check ours.

Run, in the environment of make_unet.py:

    cd tests && python -m golden.make_ncsnpp

Weights, images and times are made again from the seed by `draw`. For each NAME of
`CONFIGS` the file has `NAME_output`, float32 `[B, C, H, W]`; for these and for those of
`FULL` it has `NAME_parameters`, as unet.npz. tests/test_ncsnpp.py imports this file for
what needs NumPy only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from golden import make_unet
from golden.make_unet import SEED, Shapes, model, shapes_of

SIGMAS = (0.01, 0.9, 30.0, 380.0)
OUTPUT = Path(__file__).parent / "ncsnpp.npz"


def _blocks(kind: str, attend: str) -> tuple[str, ...]:
    """Block types of a side: one letter a level, A with attention and S without."""
    names = {"A": f"AttnSkip{kind}Block2D", "S": f"Skip{kind}Block2D"}
    return tuple(names[letter] for letter in attend)


# Arguments of `UNet2DModel`, which are also those of our `NCSNpp`.
CIFAR10: dict[str, Any] = dict(
    sample_size=(32, 32),
    in_channels=3,
    block_out_channels=(128, 256, 256, 256),
    down_block_types=_blocks("Down", "SASS"),
    up_block_types=_blocks("Up", "SSAS"),
    layers_per_block=4,
    attention_head_dim=None,
    norm_num_groups=None,
    norm_eps=1e-6,
    mid_block_scale_factor=1.41421356237,
    time_embedding_type="fourier",
    flip_sin_to_cos=True,
    freq_shift=0,
)
CELEBAHQ: dict[str, Any] = CIFAR10 | dict(
    sample_size=(256, 256),
    block_out_channels=(128, 128, 256, 256, 256, 256, 256),
    down_block_types=_blocks("Down", "SSSSASS"),
    up_block_types=_blocks("Up", "SSASSSS"),
    layers_per_block=2,
)
CONFIGS: dict[str, dict[str, Any]] = {
    # The network for CIFAR-10, smaller.
    "fourier": CIFAR10
    | dict(
        sample_size=(16, 16),
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=1,
    ),
    # A narrow level, where groups are few; an epsilon that is felt; images in [0, 1].
    "positional": CIFAR10
    | dict(
        sample_size=(8, 12),
        block_out_channels=(32, 16),
        down_block_types=_blocks("Down", "AS"),
        up_block_types=_blocks("Up", "SA"),
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=4,
        norm_eps=1e-2,
        mid_block_scale_factor=1.5,
        time_embedding_type="positional",
        flip_sin_to_cos=False,
        freq_shift=1,
        center_input_sample=True,
    ),
    # Attention at the lowest resolution, on both ways, in heads.
    "attention": CIFAR10
    | dict(
        sample_size=(8, 8),
        block_out_channels=(32, 64),
        down_block_types=_blocks("Down", "SA"),
        up_block_types=_blocks("Up", "AS"),
        layers_per_block=2,
        attention_head_dim=16,
        norm_num_groups=8,
    ),
    # One resolution: nothing is resampled, and grey images are possible.
    "single": CIFAR10
    | dict(
        sample_size=(6, 5),
        in_channels=1,
        block_out_channels=(32,),
        down_block_types=_blocks("Down", "A"),
        up_block_types=_blocks("Up", "S"),
        layers_per_block=1,
    ),
}
FULL = {"cifar10": CIFAR10, "celebahq": CELEBAHQ}
# Compared where diffusers is installed: both structures in whole, narrower.
LIVE: dict[str, dict[str, Any]] = {
    "cifar10": CIFAR10 | dict(block_out_channels=(32, 64, 64, 64)),
    "celebahq": CELEBAHQ
    | dict(sample_size=(64, 64), block_out_channels=(8, 8, 16, 32, 32, 32, 32)),
}


def draw(
    config: dict[str, Any], shapes: Shapes, seed: int
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Weights, images `[B, C, H, W]` and times `[B]` as make_unet's, from the seed.

    Frequencies have the standard deviation 16 of fresh ones. Times are standard
    deviations, and the images have these and 1.
    """
    weights, images, times = make_unet.draw(config, shapes, seed)
    if config["time_embedding_type"] == "fourier":
        times = np.asarray(SIGMAS, np.float32)
        images = images * np.sqrt(1 + times**2)[:, None, None, None]
        name = "time_proj.weight"
        weights[name] = 16 * (weights[name] - 1) / np.float32(0.2)
    return weights, images, times


def main() -> None:
    import torch

    arrays = {}
    for name, config in (CONFIGS | FULL).items():
        net = model(config)
        shapes = shapes_of(net)
        arrays[f"{name}_parameters"] = np.array(
            [f"{k} {','.join(map(str, shapes[k]))}" for k in sorted(shapes)]
        )
        if name in CONFIGS:
            weights, images, times = draw(config, shapes, SEED)
            net.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
            with torch.no_grad():
                output = net(torch.from_numpy(images), torch.from_numpy(times)).sample
            arrays[f"{name}_output"] = output.numpy()
            print(name, np.abs(output.numpy()).max((1, 2, 3)))
    np.savez_compressed(OUTPUT, **arrays)
    print(OUTPUT, OUTPUT.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
