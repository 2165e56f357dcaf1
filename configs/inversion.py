"""How exact an inverted trigger is, by what it costs: PureDiffusion, Elijah and TERD.

    python -m puredif_jax.main --config=configs/inversion.py

BadDiffusion with a box and with a stop sign is trained into the shipped clean model,
with three seeds. Each defense inverts under ancestral sampling: first with its own
learning rate, steps and batch, then within budgets of 1,000 to 100,000 gradients of the
network on an image. By its own settings Elijah takes 100 steps of 100 draws. TERD takes
3,000 steps of 16 draws, and then 1,000 through a rollout of ten steps.
`benchmarks/inversion_page.py` makes the table and the plot.

Hardware: two CPU cores. Duration: not measured; by its evaluations some 40 minutes
for each of six models on one of them.
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

SEEDS = range(3)
BUDGETS = (1000, 3000, 10_000, 30_000, 100_000)
BACKDOORS: dict[str, tuple[Trigger, Target]] = {
    "box": (Box(), Hat()),
    "stopsign": (StopSign(), Shoe()),
}


def audit(budget: int = 0) -> Audit:
    return Audit(
        hypotheses=(Fading(Ancestral()),), baselines=(Elijah(), Terd()), budget=budget
    )


def run(name: str, seed: int) -> Experiment:
    trigger, target = BACKDOORS[name]
    return Experiment(
        workdir=f"{name}/{seed}",
        model=SHIPPED,
        weights="clean",
        training=Training(
            steps=2000, batch=64, learning_rate=1e-3, warmup=100, ema_decay=0.99
        ),
        attack=BadDiffusion(trigger, target, 0.3, trigger_only=True),
        audit=audit(),
        then=tuple(map(audit, BUDGETS)),
        seed=seed,
        chunk=40,
    )


def get_config() -> Sweep:
    runs = (run(name, seed) for seed in SEEDS for name in BACKDOORS)
    return Sweep("runs/inversion", tuple(runs))
