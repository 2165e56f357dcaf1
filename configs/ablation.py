"""One factor of the inversion at a time, on the shipped backdoors.

    python -m puredif_jax.main --config=configs/ablation.py

Each change of the default on two models with three seeds, each under the model's own
hypothesis. Started twice, the two calls share the runs.

Hardware: two CPU cores. Duration: 3 hours. docs/notebook/2026-11-25-claims.md has the
table of an earlier search.
"""

import dataclasses
import re

from puredif_jax.defenses.denoising_consistency import DenoisingConsistency
from puredif_jax.defenses.denoising_error import DenoisingError
from puredif_jax.defenses.distribution_shift import DistributionShift
from puredif_jax.defenses.hypothesis import Fading
from puredif_jax.defenses.inversion import Inversion
from puredif_jax.defenses.objective import Sum
from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.diffusion.solver import Ancestral, Deterministic
from puredif_jax.networks.unet import SHIPPED
from puredif_jax.stages.audit import Audit
from puredif_jax.stages.evaluation import Evaluation
from puredif_jax.stages.experiment import Experiment, Sweep

BASE, LOSS = Inversion(), DenoisingError()
SHIFT = DistributionShift()
CONSISTENCY = DenoisingConsistency(sampler=DDIM(steps=8), samples=10)
HIGH, LOW = (999, 900, 800, 700, 600), (500, 400, 300, 200, 100)
MODELS = {
    "baddiffusion": Fading(Ancestral()),
    "villandiffusion": Fading(Deterministic()),
}


def loss(**changes) -> Inversion:
    changed = dataclasses.replace(LOSS, **changes)
    return dataclasses.replace(BASE, loss=changed)


def descent(**changes) -> Inversion:
    changed = dataclasses.replace(BASE.descent, **changes)
    return dataclasses.replace(BASE, descent=changed)


CHANGES = {
    "default": BASE,
    "loss: shift": dataclasses.replace(BASE, loss=SHIFT),
    "loss: consistency": dataclasses.replace(BASE, loss=CONSISTENCY),
    "loss: shift + consistency": dataclasses.replace(
        BASE, loss=Sum(SHIFT, CONSISTENCY)
    ),
    "timesteps: 999 alone": loss(timesteps=(999,), samples=40),
    "timesteps: 999 to 600": loss(timesteps=HIGH, samples=8),
    "timesteps: 500 to 100": loss(timesteps=LOW, samples=8),
    "samples: 2": loss(samples=2),
    "samples: 8": loss(samples=8),
    "floor: 0.005": loss(floor=0.005),
    "floor: 0.5": loss(floor=0.5),
    "variance: 0.1": loss(variance=0.1),
    "starts: each pixel by itself": descent(grain=0),
    "starts: one scale": descent(scales=(1.0,)),
    "candidates: 6": descent(candidates=6, scales=(1.0, 0.1)),
    "finalists: 1": descent(finalists=1),
    "bound: none": descent(bound=None),
    "Adam: b2 0.999": descent(b2=0.999),
    "budget: half": descent(steps=60, scout=15),
    "budget: double": descent(steps=240, scout=60),
}


def folder(change: str) -> str:
    return re.sub(r"\W+", "-", change)


def run(change: str, model: str, seed: int) -> Experiment:
    return Experiment(
        workdir=f"{folder(change)}/{model}-{seed}",
        model=SHIPPED,
        audit=Audit(
            weights=(model,), hypotheses=(MODELS[model],), inversion=CHANGES[change]
        ),
        evaluation=Evaluation(draws=128),
        seed=seed,
        chunk=40,
    )


def get_config() -> Sweep:
    return Sweep(
        workdir="runs/ablation",
        experiments=tuple(
            run(change, model, seed)
            for change in CHANGES
            for model in MODELS
            for seed in range(3)
        ),
    )
