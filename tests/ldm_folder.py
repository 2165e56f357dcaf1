"""A small folder of latent diffusion on disk, as diffusers' `LDMPipeline` reads it.

In the layout of CompVis/ldm-celebahq-256: a first stage, a UNet of its latents, and the
schedule of latent diffusion; with random weights.

    python tests/ldm_folder.py FOLDER    writes one
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import safetensors.numpy
from tiny_config import draw_params

from puredif_jax.formats.diffusers_config import write_unet
from puredif_jax.formats.diffusers_layout import SCHEDULER
from puredif_jax.formats.state_dict import to_torch
from puredif_jax.formats.vq_config import write_vq
from puredif_jax.formats.weight_sets import WEIGHTS
from puredif_jax.networks.unet import UNet
from puredif_jax.networks.vq import VQModel
from puredif_jax.types import Params

FIRST_STAGE = VQModel(
    block_out_channels=(8, 8, 16),
    layers_per_block=1,
    num_vq_embeddings=32,
    norm_num_groups=4,
    scaling_factor=0.5,
)
LATENTS = UNet(  # of images of 32 pixels
    sample_size=(8, 8),
    in_channels=3,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    attention_head_dim=8,
    norm_num_groups=4,
    norm_eps=1e-5,
    downsample_padding=1,
    flip_sin_to_cos=True,
    freq_shift=0.0,
)
SCHEDULE = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.0195,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0015,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "trained_betas": None,
}
PIPELINE = {
    "_class_name": "LDMPipeline",
    "scheduler": ["diffusers", "DDIMScheduler"],
    "unet": ["diffusers", "UNet2DModel"],
    "vqvae": ["diffusers", "VQModel"],
}


def write_ldm(
    folder: pathlib.Path, vq: VQModel = FIRST_STAGE, unet: UNet = LATENTS, seed: int = 0
) -> tuple[Params, Params]:
    """Writes the folder; returns the parameters of the first stage and of the UNet."""

    def write(name: str, value: dict[str, Any]) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{json.dumps(value, indent=2)}\n")

    write("model_index.json", PIPELINE)
    write(f"scheduler/{SCHEDULER}", SCHEDULE)
    write("vqvae/config.json", write_vq(vq))
    write("unet/config.json", write_unet(unet))
    drawn = draw_params(vq, seed, 0.3), draw_params(unet, seed + 1, 0.3)
    for name, params in zip(("vqvae", "unet"), drawn, strict=True):
        path = folder / name / WEIGHTS
        safetensors.numpy.save_file(to_torch(params), path, {"format": "pt"})
    return drawn


if __name__ == "__main__":
    write_ldm(pathlib.Path(sys.argv[1]))
