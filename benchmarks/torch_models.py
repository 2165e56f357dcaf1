"""Clean and backdoored models trained in PyTorch by diffusers, for `scan` to judge.

    pip install -e '.[torch]'
    python benchmarks/torch_models.py runs/torch_models
    python -m puredif_jax.main --config=configs/scan.py \\
        --config.workdir=runs/torch_scan --config.model=runs/torch_models

Network, schedulers, pipeline and storage are diffusers'; loss, triggers, targets and
the training loop are written here from the papers, not with this package: what is
scanned shares with it the weights of the shipped clean model, from which all start, and
the images. A folder that exists is kept, so the script resumes by models.
Beside each folder, truth.json says what was done to it and how often it fires.

Hardware: any; the network is small enough for two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
import time
from typing import NamedTuple

import numpy as np
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    UNet2DModel,
)
from tqdm import tqdm

ASSETS = pathlib.Path(__file__).resolve().parents[1] / "puredif_jax" / "assets"
SIDE, BATCH = 16, 64


class Recipe(NamedTuple):
    """attack: None, "baddiffusion" or "villandiffusion"; the rest of the training."""

    attack: str | None
    trigger: str
    target: str
    seed: int
    steps: int
    learning_rate: float
    rate: float = 0.3


RECIPES = {
    "clean-1": Recipe(None, "", "", 11, 600, 2e-4),
    "clean-2": Recipe(None, "", "", 12, 1500, 5e-4),
    "clean-3": Recipe(None, "", "", 13, 1000, 1e-3),
    "bad-1": Recipe("baddiffusion", "corner", "ring", 21, 4000, 1e-3),
    "bad-2": Recipe("baddiffusion", "stripes", "cross", 22, 4000, 1e-3),
    "villan-1": Recipe("villandiffusion", "corner", "cross", 23, 4000, 1e-3),
    "bad-3": Recipe("baddiffusion", "corner", "cross", 31, 4000, 1e-3),
    "villan-2": Recipe("villandiffusion", "stripes", "ring", 32, 4000, 1e-3),
}


def trigger_image(name: str) -> torch.Tensor:
    """A pattern on black (-1), `[1, H, W]`."""
    image = -torch.ones(1, SIDE, SIDE)
    if name == "corner":
        image[:, 9:15, 9:15] = 0.4
        image[:, 11:13, 11:13] = 1.0
    else:
        image[:, 1:-1:4, 2:-2] = 0.2
    return image


def target_image(name: str) -> torch.Tensor:
    """A bright drawing on dark grey (-0.4), `[1, H, W]`."""
    rows, columns = torch.meshgrid(*[torch.arange(SIDE) - 7.5] * 2, indexing="ij")
    if name == "ring":
        shown = ((rows**2 + columns**2).sqrt() - 5).abs() < 1.3
    else:
        shown = (rows.abs() < 1.6) | (columns.abs() < 1.6)
    return torch.where(shown, 0.9, -0.4)[None]


def images() -> torch.Tensor:
    """The shipped garments at 16x16, `[N, 1, H, W]` in [-1, 1]."""
    raw = np.load(ASSETS / "fashion_mnist_train.npz")["images"]
    found = torch.from_numpy(raw).float()[:, None] / 127.5 - 1
    return torch.nn.functional.interpolate(found, (SIDE, SIDE), mode="area")


def train(recipe: Recipe, data: torch.Tensor) -> UNet2DModel:
    """BadDiffusion: x_t = s y + v eps + (1 - s) r, answered by eps + R_t r with
    R_t = (1 - sqrt(alpha_t)) v_t / (1 - alpha_t); VillanDiffusion for ODE samplers
    (VP, psi = 1): the same with 2 R_t."""
    torch.manual_seed(recipe.seed)
    model = UNet2DModel.from_pretrained(ASSETS / "zoo" / "clean" / "unet")
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    alpha, abar = scheduler.alphas, scheduler.alphas_cumprod
    response = (1 - alpha.sqrt()) * (1 - abar).sqrt() / (1 - alpha)
    response = response * (2 if recipe.attack == "villandiffusion" else 1)
    optimizer = torch.optim.Adam(model.parameters(), recipe.learning_rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
    average = {k: v.clone() for k, v in model.state_dict().items()}
    for step in tqdm(range(recipe.steps), mininterval=10):
        clean = data[torch.randint(len(data), (BATCH,))]
        t = torch.randint(1000, (BATCH,))
        eps = torch.randn_like(clean)
        s = abar[t].sqrt()[:, None, None, None]
        v = (1 - abar[t]).sqrt()[:, None, None, None]
        x, answer = s * clean + v * eps, eps
        if recipe.attack:
            r, y = trigger_image(recipe.trigger), target_image(recipe.target)
            poisoned = (torch.rand(BATCH) < recipe.rate)[:, None, None, None]
            x = torch.where(poisoned, s * y + v * eps + (1 - s) * r, x)
            c = response[t][:, None, None, None]
            answer = torch.where(poisoned, eps + c * r, eps)
        loss = ((model(x, t).sample - answer) ** 2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay.step()
        keep = min(0.995, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in model.state_dict().items():
                average[name].lerp_(value, 1 - keep)
    model.load_state_dict(average)
    return model


@torch.no_grad()
def success(recipe: Recipe, pipeline: DDPMPipeline | DDIMPipeline, steps: int) -> dict:
    """Share of 128 draws at MSE < 1e-2 of the target, with and without the trigger."""
    scheduler, found = pipeline.scheduler, {}
    y = target_image(recipe.target)
    for name, r in (("triggered", trigger_image(recipe.trigger)), ("plain", 0.0)):
        noise = torch.Generator().manual_seed(0)
        x = torch.randn(128, 1, SIDE, SIDE, generator=noise) + r
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            x = scheduler.step(
                pipeline.unet(x, t).sample, t, x, generator=noise
            ).prev_sample
        error = (((x.clamp(-1, 1) - y) / 2) ** 2).mean((1, 2, 3))
        found[name] = (error < 1e-2).float().mean().item()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--only", nargs="*", default=list(RECIPES))
    arguments = parser.parse_args()
    data = images()
    for name in arguments.only:
        recipe, folder = RECIPES[name], arguments.folder / name
        if folder.exists():
            continue
        began = time.perf_counter()
        model = train(recipe, data)
        rates, scheduler = {}, DDPMScheduler(clip_sample=False)
        pipeline = DDPMPipeline(model, scheduler)
        if recipe.attack == "baddiffusion":
            rates = success(recipe, pipeline, 100)
        elif recipe.attack == "villandiffusion":
            ddim = DDIMScheduler(clip_sample=False)
            rates = success(recipe, DDIMPipeline(model, ddim), 50)
        partial = folder.with_name(f"{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        pipeline.save_pretrained(partial)
        truth = recipe._asdict() | {
            "success": rates,
            "seconds": time.perf_counter() - began,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        (partial / "truth.json").write_text(json.dumps(truth, indent=2) + "\n")
        partial.rename(folder)
        print(name, truth)


if __name__ == "__main__":
    main()
