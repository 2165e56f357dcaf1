"""Trains the clean model that ships with the package, from scratch.

    python -m puredif_jax.main --config=configs/pretrain.py

Hardware: two CPU cores. Duration: 45 minutes on two busy cores. Expected: final
loss 0.037 (docs/models.md); the model card is puredif_jax/assets/zoo/clean/README.md.
"""

from puredif_jax.attacks.training import Training
from puredif_jax.networks.unet import SHIPPED
from puredif_jax.stages.evaluation import Evaluation
from puredif_jax.stages.experiment import Experiment


def get_config() -> Experiment:
    return Experiment(
        workdir="runs/pretrain",
        model=SHIPPED,
        training=Training(
            steps=8000, batch=64, learning_rate=1e-3, warmup=200, ema_decay=0.999
        ),
        evaluation=Evaluation(frechet_draws=4096),
        chunk=50,
    )
