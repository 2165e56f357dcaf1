"""Measures a backdoored model: success by 1,000 ancestral steps, and base rates.

    python -m puredif_jax.main --config=configs/measure.py
    python -m puredif_jax.main --config=configs/measure.py \
        --config.workdir=runs/mine --config.weights=PATH.safetensors

The attack named here must be the one that is in the weights.

Hardware: two CPU cores. Duration: 10 minutes. Expected: 95.3 % (docs/models.md).
"""

from puredif_jax.attacks.baddiffusion import BadDiffusion
from puredif_jax.attacks.targets import Shoe
from puredif_jax.attacks.triggers import StopSign
from puredif_jax.diffusion.ddpm import DDPM
from puredif_jax.networks.unet import SHIPPED
from puredif_jax.stages.evaluation import Evaluation
from puredif_jax.stages.experiment import Experiment


def get_config() -> Experiment:
    return Experiment(
        workdir="runs/measure",
        model=SHIPPED,
        weights="baddiffusion",
        attack=BadDiffusion(trigger=StopSign(), target=Shoe()),
        evaluation=Evaluation(ancestral=DDPM(steps=1000)),
    )
