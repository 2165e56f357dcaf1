"""Elijah and TERD by their published budgets, on two backdoored models, beside ours.

    python -m puredif_jax.main --config=configs/published.py

BadDiffusion with a box and with a stop sign is trained into the shipped clean model.
Each defense inverts under ancestral sampling, with its own learning rate, steps and
batch. Elijah takes 100 steps of 100 draws. TERD takes 3,000 steps of 16 draws, and then
1,000 through a rollout of ten steps. The tables are report.html, report.json and
inversions.csv in the workdir.

Hardware: two CPU cores. Duration: 40 minutes on one of them.
"""

from puredif_jax.attacks.baddiffusion import BadDiffusion
from puredif_jax.attacks.targets import Hat, Shoe, Target
from puredif_jax.attacks.training import Training
from puredif_jax.attacks.triggers import Box, StopSign, Trigger
from puredif_jax.defenses.elijah import Elijah
from puredif_jax.defenses.hypothesis import Fading
from puredif_jax.defenses.terd import Terd
from puredif_jax.diffusion.solver import Ancestral
from puredif_jax.networks.unet import SHIPPED
from puredif_jax.stages.audit import Audit
from puredif_jax.stages.experiment import Experiment, Sweep


def run(name: str, trigger: Trigger, target: Target) -> Experiment:
    return Experiment(
        workdir=name,
        model=SHIPPED,
        weights="clean",
        training=Training(
            steps=2000, batch=64, learning_rate=1e-3, warmup=100, ema_decay=0.99
        ),
        attack=BadDiffusion(trigger, target, 0.3, trigger_only=True),
        audit=Audit(hypotheses=(Fading(Ancestral()),), baselines=(Elijah(), Terd())),
        chunk=40,
    )


def get_config() -> Sweep:
    return Sweep(
        "runs/published",
        (run("box", Box(), Hat()), run("stopsign", StopSign(), Shoe())),
    )
