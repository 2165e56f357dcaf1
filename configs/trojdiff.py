"""Puts TrojDiff, a blend and a patch, into the shipped clean model.

    python -m puredif_jax.main --config=configs/trojdiff.py

The patch has as many pixels as the published one has at 32 x 32.

Hardware: two CPU cores. Duration: an hour. Expected: the blend fires in 100 % and the
patch in 98 % of 256 draws (docs/models.md).
"""

from puredif_jax.attacks.targets import Cat, Shoe, Target
from puredif_jax.attacks.training import Training
from puredif_jax.attacks.triggers import Blend, Patch
from puredif_jax.attacks.trojdiff import TrojDiff
from puredif_jax.networks.unet import SHIPPED
from puredif_jax.stages.evaluation import Evaluation
from puredif_jax.stages.experiment import Experiment, Sweep

BACKDOORS: dict[str, tuple[Blend | Patch, Target]] = {
    "blend": (Blend(), Shoe()),
    "patch": (Patch(size=6), Cat()),
}


def backdoored(name: str) -> Experiment:
    trigger, target = BACKDOORS[name]
    return Experiment(
        workdir=name,
        model=SHIPPED,
        weights="clean",
        training=Training(
            steps=10_000, batch=64, learning_rate=1e-3, warmup=200, ema_decay=0.999
        ),
        attack=TrojDiff(trigger=trigger, target=target, poison_rate=0.2),
        evaluation=Evaluation(frechet_draws=4096),
        chunk=50,
    )


def get_config() -> Sweep:
    return Sweep("runs/trojdiff", tuple(backdoored(name) for name in BACKDOORS))
