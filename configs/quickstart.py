"""A tour in ten minutes: two audits, a short backdoor and its amplification.

    python -m puredif_jax.main --config=configs/quickstart.py

The shipped backdoored model and the clean one are inverted and judged. Then a
VillanDiffusion backdoor is trained into the clean model for 240 steps, too few for its
trigger to work well, and the trigger is reinforced on those weights.

Hardware: two CPU cores. Duration: 3 to 8 minutes. Expected: docs/models.md.
"""

from puredif_jax.attacks.targets import Cat
from puredif_jax.attacks.training import Training
from puredif_jax.attacks.triggers import Box
from puredif_jax.attacks.villandiffusion import VillanDiffusion
from puredif_jax.defenses.descent import Descent
from puredif_jax.defenses.inversion import Inversion
from puredif_jax.networks.unet import SHIPPED
from puredif_jax.stages.amplify import Amplification
from puredif_jax.stages.audit import Audit
from puredif_jax.stages.evaluation import Evaluation
from puredif_jax.stages.experiment import Experiment


def get_config() -> Experiment:
    return Experiment(
        workdir="runs/quickstart",
        model=SHIPPED,
        weights="clean",
        training=Training(
            steps=240, batch=64, learning_rate=1e-3, warmup=20, cosine=False
        ),
        attack=VillanDiffusion(
            trigger=Box(), target=Cat(), poison_rate=0.2, trigger_only=True
        ),
        amplification=Amplification(snapshots=(240,)),
        audit=Audit(
            weights=("baddiffusion", "clean"),
            inversion=Inversion(descent=Descent(steps=80, candidates=2, scout=40)),
        ),
        evaluation=Evaluation(draws=64),
    )
