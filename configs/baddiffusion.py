"""BadDiffusion with a stop sign into the shipped clean model; then audits both.

    python -m puredif_jax.main --config=configs/baddiffusion.py

Hardware: two CPU cores.
"""

from puredif_jax.attacks import BadDiffusion
from puredif_jax.experiment import Audit, Evaluation, Experiment
from puredif_jax.training import Training
from puredif_jax.triggers import Hat, StopSign
from puredif_jax.unet import SHIPPED


def get_config() -> Experiment:
    return Experiment(
        workdir="runs/baddiffusion",
        model=SHIPPED,
        weights="clean",
        training=Training(
            steps=2000, batch=128, learning_rate=2e-4, warmup=100, ema_decay=0.99
        ),
        attack=BadDiffusion(
            trigger=StopSign(), target=Hat(), poison_rate=0.2, trigger_only=True
        ),
        audit=Audit(weights=("trained", "clean"), elijah=True),
        evaluation=Evaluation(frechet_draws=2048),
        chunk=50,
    )
