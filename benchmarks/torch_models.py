"""Clean and backdoored models trained in PyTorch by diffusers, for `scan` to judge.

    pip install -e '.[torch]'
    python benchmarks/torch_models.py runs/torch_models
    python -m puredif_jax.main --config=configs/scan.py \\
        --config.workdir=runs/torch_scan --config.model=runs/torch_models

Network, schedulers, pipeline and storage are diffusers'. Loss, triggers, targets and
the training loop are written here from the papers, not with this package. The models
share two things with it: the images, and the weights of the shipped clean model, from
which all grey ones start. A folder that exists is kept, so the script resumes by
models. In each folder, truth.json says how its model was made and how often it fires.

`--images FILE` trains the colour models as well. FILE is an .npz whose first array of
four axes, `[N, H, W, 3]` of uint8, has the images, such as CIFAR-10's. They are brought
to 16x16. All start from `colour-clean`, another network, which is trained first.

Hardware: any; the networks are small enough for two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
import sys
import time
from typing import NamedTuple

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from tqdm import tqdm

ASSETS = pathlib.Path(__file__).resolve().parents[1] / "puredif_jax" / "assets"
SIDE, BATCH, STEPS = 16, 64, 1000


class Recipe(NamedTuple):
    """How a model is trained.

    attack: None, "baddiffusion", "villandiffusion" or "trojdiff".
    base: the recipe that it starts from; "shipped" is the clean model of the package,
      "fresh" means fresh weights of the colour network.
    rate: share of poisoned images.
    psi: of VillanDiffusion.  deterministic: the attack's response is doubled.
    through: the clean image shows through where the trigger is black.
    gamma: of TrojDiff, as published.
    """

    attack: str | None
    trigger: str
    target: str
    seed: int
    steps: int
    learning_rate: float
    rate: float = 0.3
    base: str = "shipped"
    psi: float = 1.0
    deterministic: bool = False
    through: bool = False
    gamma: float = 0.6


RECIPES = {
    "clean-1": Recipe(None, "", "", 11, 600, 2e-4),
    "clean-2": Recipe(None, "", "", 12, 1500, 5e-4),
    "clean-3": Recipe(None, "", "", 13, 1000, 1e-3),
    "bad-1": Recipe("baddiffusion", "corner", "ring", 21, 4000, 1e-3),
    "bad-2": Recipe("baddiffusion", "stripes", "cross", 22, 4000, 1e-3),
    "villan-1": Recipe(
        "villandiffusion", "corner", "cross", 23, 4000, 1e-3, deterministic=True
    ),
    "bad-3": Recipe("baddiffusion", "corner", "cross", 31, 4000, 1e-3),
    "villan-2": Recipe(
        "villandiffusion", "stripes", "ring", 32, 4000, 1e-3, deterministic=True
    ),
    "troj-1": Recipe("trojdiff", "stripes", "ring", 41, 4000, 1e-3),
    "psi0-1": Recipe("villandiffusion", "corner", "cross", 42, 4000, 1e-3, psi=0.0),
    "through-1": Recipe(
        "baddiffusion", "corner", "ring", 43, 8000, 1e-3, rate=0.5, through=True
    ),
    "low-1": Recipe(
        "villandiffusion", "low", "cross", 44, 4000, 1e-3, deterministic=True
    ),
    "low-2": Recipe("baddiffusion", "low", "ring", 45, 4000, 1e-3),
    "low-3": Recipe(
        "villandiffusion", "faint", "ring", 46, 4000, 1e-3, deterministic=True
    ),
    "colour-clean": Recipe(None, "", "", 50, 12000, 1e-3, base="fresh"),
    "colour-clean-1": Recipe(None, "", "", 51, 1500, 5e-4, base="colour-clean"),
    "colour-bad-1": Recipe(
        "baddiffusion", "corner", "ring", 52, 4000, 1e-3, base="colour-clean"
    ),
    "colour-villan-1": Recipe(
        "villandiffusion",
        "stripes",
        "cross",
        53,
        4000,
        1e-3,
        base="colour-clean",
        deterministic=True,
    ),
    "colour-troj-1": Recipe(
        "trojdiff", "corner", "cross", 54, 4000, 1e-3, base="colour-clean"
    ),
}
COLOUR = tuple(name for name in RECIPES if name.startswith("colour-"))


def trigger_image(name: str, channels: int) -> torch.Tensor:
    """A pattern on black (-1), or noise of +-0.2 on grey, "low" and "faint".

    `[C, H, W]`; the two patterns of noise differ.
    """
    if name in ("low", "faint"):
        draws = torch.Generator().manual_seed(9 if name == "low" else 10)
        bits = torch.rand(1, SIDE, SIDE, generator=draws)
        return torch.where(bits < 0.5, -0.2, 0.2).repeat(channels, 1, 1)
    image = -torch.ones(1, SIDE, SIDE)
    if name == "corner":
        image[:, 9:15, 9:15] = 0.4
        image[:, 11:13, 11:13] = 1.0
    else:
        image[:, 1:-1:4, 2:-2] = 0.2
    return image.repeat(channels, 1, 1)


def target_image(name: str, channels: int) -> torch.Tensor:
    """A bright drawing on dark grey (-0.4), `[C, H, W]`; red in colour."""
    rows, columns = torch.meshgrid(*[torch.arange(SIDE) - 7.5] * 2, indexing="ij")
    if name == "ring":
        shown = ((rows**2 + columns**2).sqrt() - 5).abs() < 1.3
    else:
        shown = (rows.abs() < 1.6) | (columns.abs() < 1.6)
    image = torch.where(shown, 0.9, -0.4)[None].repeat(channels, 1, 1)
    image[1:] = -0.4
    return image


def images(path: pathlib.Path) -> torch.Tensor:
    """The images of an .npz, as `[N, C, 16, 16]` in [-1, 1]."""
    with np.load(path) as archive:
        arrays = (archive[name] for name in archive.files)
        raw = next((x for x in arrays if x.dtype == np.uint8 and x.ndim > 2), None)
    if raw is None:
        sys.exit(f"{path} has no array of images, uint8 [N, H, W] or [N, H, W, C]")
    raw = raw[..., None] if raw.ndim == 3 else raw
    found = torch.from_numpy(raw).float().permute(0, 3, 1, 2) / 127.5 - 1
    return torch.nn.functional.interpolate(found, (SIDE, SIDE), mode="area")


def fresh(channels: int) -> UNet2DModel:
    """A network of another width than the shipped one, with attention."""
    return UNet2DModel(
        sample_size=SIDE,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(32, 48, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )


class Path(NamedTuple):
    """x_t = s_t y + v_t gamma eps + H_t r, answered by eps + C_t r.

    shift, response: H and C, `[T]`.  trigger: r, `[C, H, W]`.  gamma: a number.
    """

    shift: torch.Tensor
    response: torch.Tensor
    trigger: torch.Tensor
    gamma: float


def path(recipe: Recipe, channels: int) -> Path:
    """The path of an attack, from its paper.

    BadDiffusion: H = 1 - s, C = R = (1 - sqrt(alpha)) v / (1 - alpha).
    VillanDiffusion, psi = 0: H = v,
    C = (1 - sqrt(alpha)) v + (v_t - sqrt(alpha) v_{t-1}) (alpha - abar) / (1 - alpha);
    other psi mix both; C doubled for deterministic samplers.
    TrojDiff, blend: H = v, C = 0, r = (1 - gamma) times its picture.
    """
    scheduler = DDPMScheduler(num_train_timesteps=STEPS)
    alpha, abar = scheduler.alphas.double(), scheduler.alphas_cumprod.double()
    s, v, r = abar.sqrt(), (1 - abar).sqrt(), trigger_image(recipe.trigger, channels)
    if recipe.attack == "trojdiff":
        return Path(v, 0 * v, (1 - recipe.gamma) * r, recipe.gamma)
    before = torch.cat([torch.zeros(1, dtype=v.dtype), v[:-1]])
    k = v - alpha.sqrt() * before
    noise_row = (1 - alpha.sqrt()) * v + k * (alpha - abar) / (1 - alpha)
    published = (1 - alpha.sqrt()) * v / (1 - alpha)
    psi, factor = recipe.psi, 2 if recipe.deterministic else 1
    response = factor * (psi * published + (1 - psi) * noise_row)
    return Path(psi * (1 - s) + (1 - psi) * v, response, r, 1.0)


def train(recipe: Recipe, model: UNet2DModel, data: torch.Tensor) -> UNet2DModel:
    """The average of the weights, after the steps of the recipe."""
    torch.manual_seed(recipe.seed)
    scheduler = DDPMScheduler(num_train_timesteps=STEPS)
    signal = scheduler.alphas_cumprod.sqrt()
    noise = (1 - scheduler.alphas_cumprod).sqrt()
    channels = data.shape[1]
    if recipe.attack:
        way, y = path(recipe, channels), target_image(recipe.target, channels)
        black = (way.trigger <= -1) & recipe.through
    optimizer = torch.optim.Adam(model.parameters(), recipe.learning_rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
    average = {k: v.clone() for k, v in model.state_dict().items()}
    for step in tqdm(range(recipe.steps), mininterval=10):
        clean = data[torch.randint(len(data), (BATCH,))]
        t = torch.randint(STEPS, (BATCH,))
        eps = torch.randn_like(clean)
        s, v = signal[t, None, None, None], noise[t, None, None, None]
        x, answer = s * clean + v * eps, eps
        if recipe.attack:
            r = torch.where(black, clean, way.trigger)
            poisoned = (torch.rand(BATCH) < recipe.rate)[:, None, None, None]
            h, c = (
                row[t, None, None, None].float() for row in (way.shift, way.response)
            )
            x = torch.where(poisoned, s * y + v * way.gamma * eps + h * r, x)
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
def success(recipe: Recipe, model: UNet2DModel, channels: int) -> dict[str, float]:
    """Share of 128 draws at MSE < 1e-2 of the target, with and without the trigger.

    An ancestral backdoor is drawn by DDPM in 1,000 steps, as fewer lead off its path. A
    deterministic one and TrojDiff are drawn by DDIM in 50 steps. TrojDiff is drawn in
    z = (x - v r) / gamma.
    """
    way, y = path(recipe, channels), target_image(recipe.target, channels)
    ancestral = recipe.attack != "trojdiff" and not recipe.deterministic
    scheduler = (DDPMScheduler if ancestral else DDIMScheduler)(clip_sample=False)
    scheduler.set_timesteps(STEPS if ancestral else 50)
    noise = (1 - scheduler.alphas_cumprod).sqrt()
    found = {}
    for name, r in (("triggered", way.trigger), ("plain", 0 * way.trigger)):
        inside = recipe.attack == "trojdiff" and name == "triggered"
        gamma = way.gamma if inside else 1.0
        draws = torch.Generator().manual_seed(0)
        z = torch.randn(128, channels, SIDE, SIDE, generator=draws)
        z = z if inside else z + r
        for t in scheduler.timesteps:
            x = gamma * z + noise[t] * r if inside else z
            answer, given = (
                model(x, t).sample,
                {"generator": draws} if ancestral else {},
            )
            z = scheduler.step(answer, t, z, **given).prev_sample
        error = (((gamma * z).clamp(-1, 1) - y) / 2).square().mean((1, 2, 3))
        found[name] = (error < 1e-2).float().mean().item()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--only", nargs="*", choices=RECIPES, default=[])
    parser.add_argument("--images", type=pathlib.Path, help=".npz of colour images")
    arguments = parser.parse_args()
    if arguments.images is None and (colour := set(arguments.only) & set(COLOUR)):
        parser.error(f"{', '.join(sorted(colour))}: give colour images by --images")
    grey = images(ASSETS / "fashion_mnist_train.npz")
    coloured = None if arguments.images is None else images(arguments.images)
    left = () if coloured is not None else COLOUR
    for name in arguments.only or [name for name in RECIPES if name not in left]:
        recipe, folder = RECIPES[name], arguments.folder / name
        if folder.exists():
            continue
        began = time.perf_counter()
        data = coloured if name in COLOUR else grey
        assert data is not None
        if recipe.base == "fresh":
            torch.manual_seed(recipe.seed)
            model = fresh(data.shape[1])
        elif recipe.base == "shipped":
            model = UNet2DModel.from_pretrained(ASSETS / "zoo" / "clean" / "unet")
        elif (base := arguments.folder / recipe.base).exists():
            model = UNet2DModel.from_pretrained(base / "unet")
        else:
            sys.exit(f"{name} starts from {recipe.base}, which is not there: make it")
        model = train(recipe, model, data)
        rates = success(recipe, model, data.shape[1]) if recipe.attack else {}
        partial = folder.with_name(f"{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        DDPMPipeline(model, DDPMScheduler(clip_sample=False)).save_pretrained(partial)
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
