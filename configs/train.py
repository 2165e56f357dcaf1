"""Trains a model with a backdoor of your choice, or a clean one, and measures it.

    python -m puredif_jax.main --config=configs/train.py \
        --config.attack="TrojDiff(Blend(0.8), Cat())" --config.workdir=runs/mine
    python -m puredif_jax.main --config=configs/train.py --config.attack=none \
        --config.data="NpzImages('images.npz')" --config.workdir=runs/clean

Training starts from the shipped clean model, or from --config.weights. A network of
other images is --config.model="UNet(sample_size=(32, 32), in_channels=3)", with
--config.weights=none. `--config.training.steps` decides the duration. The model is
written as a folder that diffusers loads, with the truth beside it.

Hardware: any. Duration: the shipped network takes 6 to 7 steps a second on one CPU
core, and is measured then; --cost tells the hours of others.
"""

from puredif_jax.attacks.baddiffusion import BadDiffusion
from puredif_jax.attacks.targets import Shoe
from puredif_jax.attacks.training import Training
from puredif_jax.attacks.triggers import StopSign
from puredif_jax.networks.unet import SHIPPED
from puredif_jax.stages.experiment import Experiment


def get_config() -> Experiment:
    return Experiment(
        workdir="runs/train",
        model=SHIPPED,
        weights="clean",
        training=Training(
            steps=2000, batch=64, learning_rate=1e-3, warmup=100, ema_decay=0.99
        ),
        attack=BadDiffusion(StopSign(), Shoe(), poison_rate=0.2, trigger_only=True),
    )
