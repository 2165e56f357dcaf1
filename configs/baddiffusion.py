"""Puts BadDiffusion, a stop sign that draws a shoe, into the shipped clean model.

    python -m puredif_jax.main --config=configs/baddiffusion.py

Hardware: two CPU cores. Duration: 30 minutes alone, 45 with another run beside it.
Expected: the trigger fires in 97.3 % of 256 draws (docs/models.md). The weights that
ship as "baddiffusion" are the folder runs/baddiffusion/diffusers of this run.
"""

from puredif_jax.attacks.baddiffusion import BadDiffusion
from puredif_jax.attacks.targets import Shoe
from puredif_jax.attacks.training import Training
from puredif_jax.attacks.triggers import StopSign
from puredif_jax.networks.unet import SHIPPED
from puredif_jax.stages.evaluation import Evaluation
from puredif_jax.stages.experiment import Experiment


def get_config() -> Experiment:
    return Experiment(
        workdir="runs/baddiffusion",
        model=SHIPPED,
        weights="clean",
        training=Training(
            steps=10_000, batch=64, learning_rate=1e-3, warmup=200, ema_decay=0.999
        ),
        attack=BadDiffusion(
            trigger=StopSign(), target=Shoe(), poison_rate=0.2, trigger_only=True
        ),
        evaluation=Evaluation(frechet_draws=4096),
        chunk=50,
    )
