"""Reinforces the trigger along a short backdoor training, and measures both triggers.

    python -m puredif_jax.main --config=configs/amplify.py

VillanDiffusion ODE, a stop sign that draws a shoe, from the shipped clean model.

Hardware: two CPU cores. Duration: 8 minutes on one of them. Expected: docs/models.md.
"""

from puredif_jax.attacks.targets import Shoe
from puredif_jax.attacks.training import Training
from puredif_jax.attacks.triggers import StopSign
from puredif_jax.attacks.villandiffusion import VillanDiffusion
from puredif_jax.networks.unet import SHIPPED
from puredif_jax.stages.amplify import Amplification
from puredif_jax.stages.evaluation import Evaluation
from puredif_jax.stages.experiment import Experiment


def get_config() -> Experiment:
    return Experiment(
        workdir="runs/amplify",
        model=SHIPPED,
        weights="clean",
        training=Training(
            steps=360,
            batch=64,
            learning_rate=1e-3,
            warmup=50,
            ema_decay=0.99,
        ),
        attack=VillanDiffusion(
            trigger=StopSign(), target=Shoe(), poison_rate=0.5, trigger_only=True
        ),
        amplification=Amplification(snapshots=(360,)),
        evaluation=Evaluation(draws=256),
    )
