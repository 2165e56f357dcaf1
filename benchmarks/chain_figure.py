"""Draws the shipped BadDiffusion model with its trigger and without, step by step.

    python benchmarks/chain_figure.py [FOUND.npz]

Writes docs/figures: chain.webp, an animation of two chains from one noise, and
chain.png, the same at ten timesteps; trigger.png, the true trigger and its target.
FOUND.npz is what a scan found, `results/puredif_baddiffusion_sde.npz`; found.png shows
both pairs.

Hardware: any. Duration: a minute on a CPU core.
"""

from __future__ import annotations

import pathlib
import sys

import jax
import numpy as np
from PIL import Image

from puredif_jax.attacks.baddiffusion import BadDiffusion
from puredif_jax.attacks.targets import Shoe
from puredif_jax.attacks.triggers import StopSign
from puredif_jax.diffusion.path_keeping import PathKeeping
from puredif_jax.diffusion.prediction import predicting
from puredif_jax.diffusion.sampling import trajectory
from puredif_jax.formats.diffusers import read_folder
from puredif_jax.stages.weights import ZOO

FIGURES = pathlib.Path(__file__).parents[1] / "docs" / "figures"
SCALE, GAP, DRAWS, STEPS = 6, 2, 5, 50


def tiled(rows: np.ndarray) -> Image.Image:
    """`[R, N, H, W, 1]` in [-1, 1] as rows of pictures."""
    count, width, high, wide, _ = rows.shape
    page = np.full((count * (high + GAP) - GAP, width * (wide + GAP) - GAP), 255)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            top, left = i * (high + GAP), j * (wide + GAP)
            pixels = np.clip((image[..., 0] + 1) * 127.5, 0, 255)
            page[top : top + high, left : left + wide] = pixels
    found = Image.fromarray(page.astype(np.uint8))
    return found.resize((page.shape[1] * SCALE, page.shape[0] * SCALE), Image.NEAREST)


def main() -> None:
    folder = read_folder(ZOO / "baddiffusion")
    assert folder.spec.scheduling is not None
    schedule = folder.spec.scheduling.betas.tables()
    shape = folder.spec.network.image_shape
    model = predicting(folder.spec.network, schedule, "epsilon")
    trigger, target, _ = BadDiffusion(StopSign(), Shoe()).images(shape)
    eps = np.asarray(jax.random.normal(jax.random.key(1), (DRAWS, *shape)))

    @jax.jit
    def chain(start: jax.Array) -> tuple[jax.Array, jax.Array]:
        sampler = PathKeeping(STEPS)
        key = jax.random.key(2)
        return trajectory(model, folder.params, schedule, sampler, start, key)

    paths = []
    for added in (0.0, 1.0):
        images, steps = chain(schedule.start(eps + added * trigger[None]))
        paths.append(np.concatenate([np.asarray(steps), np.asarray(images)[None]]))
    both = np.stack(paths, 1)  # steps, plain or triggered, draws
    FIGURES.mkdir(exist_ok=True)
    frames = [tiled(each) for each in both]
    lengths = [60] * (len(frames) - 1) + [2500]
    rest = {"save_all": True, "append_images": frames[1:], "loop": 0}
    frames[0].save(FIGURES / "chain.webp", duration=lengths, lossless=True, **rest)
    chosen = np.linspace(0, len(both) - 1, 10).astype(int)
    tiled(both[chosen, :, 0].swapaxes(0, 1)).save(FIGURES / "chain.png")
    pair = np.stack([trigger, target])
    tiled(pair[None]).save(FIGURES / "trigger.png")
    if sys.argv[1:]:
        with np.load(sys.argv[1], allow_pickle=False) as arrays:
            found = np.stack([arrays["delta"], arrays["target"]])
        tiled(np.concatenate([pair, found])[None]).save(FIGURES / "found.png")


if __name__ == "__main__":
    main()
