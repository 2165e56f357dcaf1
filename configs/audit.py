"""Inverts and judges models: the shipped ones, or any weights of the same network.

PATH is weights.safetensors of a run, or a folder in diffusers' format; for models of
other networks see configs/scan.py.

    python -m puredif_jax.main --config=configs/audit.py
    python -m puredif_jax.main --config=configs/audit.py \
        --config.workdir=runs/mine --config.audit.weights=PATH

Hardware: two CPU cores. Duration: 17 minutes. Expected figures: docs/models.md.
"""

from puredif_jax.defenses.elijah import Elijah
from puredif_jax.networks.unet import SHIPPED
from puredif_jax.stages.audit import Audit
from puredif_jax.stages.experiment import Experiment


def get_config() -> Experiment:
    return Experiment(
        workdir="runs/audit",
        model=SHIPPED,
        audit=Audit(
            weights=("baddiffusion", "villandiffusion", "clean"), baselines=(Elijah(),)
        ),
    )
