"""One factor of the inversion at a time, on the shipped backdoors.

    python -m puredif_jax.main --config=configs/ablation.py

Each change on two models with three seeds, each under the model's own hypothesis. What
is changed is the base: the shift loss with the four starts of the survey alone, and
eight draws of noise. Started twice, the two calls share the runs. The third rule for
the scale is not among them: the factor that `measured_factor` reads off
either model is 0.998 or more, which makes `Calibrated` the default's `Analytic`.

Hardware: two CPU cores. Duration: 4.5 hours. Expected: docs/claims.md.
"""

import dataclasses
import re

from puredif_jax.defenses.denoising_consistency import DenoisingConsistency
from puredif_jax.defenses.distribution_shift import DistributionShift, LeastSquares
from puredif_jax.defenses.hypothesis import Fading
from puredif_jax.defenses.inversion import Descent, Inversion
from puredif_jax.defenses.objective import Sum
from puredif_jax.defenses.survey import Survey
from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.diffusion.solver import Ancestral, Deterministic
from puredif_jax.networks.unet import SHIPPED
from puredif_jax.stages.audit import Audit
from puredif_jax.stages.evaluation import Evaluation
from puredif_jax.stages.experiment import Experiment, Sweep

SHIFT = DistributionShift(samples=8)
BASE = Inversion(loss=SHIFT, descent=Descent(candidates=4, scout=40), survey=Survey())
CONSISTENCY = DenoisingConsistency(sampler=DDIM(steps=8), samples=10)
HIGH, LOW = (999, 900, 800, 700, 600), (500, 400, 300, 200, 100)
MODELS = {
    "baddiffusion": Fading(Ancestral()),
    "villandiffusion": Fading(Deterministic()),
}


def loss(**changes) -> Inversion:
    changed = dataclasses.replace(SHIFT, **changes)
    return dataclasses.replace(BASE, loss=changed)


def descent(**changes) -> Inversion:
    changed = dataclasses.replace(BASE.descent, **changes)
    return dataclasses.replace(BASE, descent=changed)


CHANGES = {
    "default": Inversion(),
    "default: one finalist": Inversion(
        descent=dataclasses.replace(Inversion().descent, finalists=1)
    ),
    "base": BASE,
    "loss: consistency alone": dataclasses.replace(BASE, loss=CONSISTENCY),
    "loss: shift + consistency": dataclasses.replace(
        BASE, loss=Sum(SHIFT, CONSISTENCY)
    ),
    "loss: each sample's residual": loss(per_sample=True),
    "target: that of the survey": loss(learn_target=False),
    "scale: least squares": loss(scale=LeastSquares()),
    "timesteps: 999 alone": loss(timesteps=(999,), samples=80),
    "timesteps: 999 to 600": loss(timesteps=HIGH, samples=16),
    "timesteps: 500 to 100": loss(timesteps=LOW, samples=16),
    "weights: more at low t": loss(weights=(1, 2, 3, 4, 5, 6, 7, 8, 9, 10)),
    "starts: random": dataclasses.replace(BASE, survey=None),
    "survey: one radius": dataclasses.replace(BASE, survey=Survey(radii=(1e-3,))),
    "candidates: 1": descent(candidates=1),
    "candidates: 8": dataclasses.replace(
        descent(candidates=8), survey=Survey(starts=8)
    ),
    "candidates: 8, half of them random": descent(candidates=8),
    "bound: none": descent(bound=None),
    "Adam: b2 0.999": descent(b2=0.999),
    "samples: 2": loss(samples=2),
    "samples: 32": loss(samples=32),
    "budget: half": descent(steps=60, scout=20),
    "budget: double": descent(steps=240, scout=80),
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
