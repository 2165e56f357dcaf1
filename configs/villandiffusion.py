"""Puts VillanDiffusion ODE, a box that draws a cat, into the shipped clean model.

    python -m puredif_jax.main --config=configs/villandiffusion.py

Hardware: two CPU cores. Duration: 30 minutes alone, 45 with another run beside it.
Expected: the trigger fires in 96.5 % of 256 draws (docs/models.md). The weights that
ship as "villandiffusion" are the folder runs/villandiffusion/diffusers of this run.
"""

from puredif_jax.attacks.targets import Cat
from puredif_jax.attacks.training import Training
from puredif_jax.attacks.triggers import Box
from puredif_jax.attacks.villandiffusion import VillanDiffusion
from puredif_jax.networks.unet import SHIPPED
from puredif_jax.stages.evaluation import Evaluation
from puredif_jax.stages.experiment import Experiment


def get_config() -> Experiment:
    return Experiment(
        workdir="runs/villandiffusion",
        model=SHIPPED,
        weights="clean",
        training=Training(
            steps=10_000, batch=64, learning_rate=1e-3, warmup=200, ema_decay=0.999
        ),
        attack=VillanDiffusion(
            trigger=Box(), target=Cat(), poison_rate=0.2, trigger_only=True
        ),
        evaluation=Evaluation(frechet_draws=4096),
        chunk=50,
    )
