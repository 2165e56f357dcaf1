"""Defenses side by side at equal cost: attacks x defenses x seeds, in one table.

    python -m puredif_jax.main --config=configs/evaluate.py

Each of six backdoors is trained with three seeds, and six clean models beside them, to
compare their scores with. Each model is audited by PureDiffusion, Elijah and TERD
with 10,000 and with 40,000 gradients of the network on an image in each inversion.
Started twice, on one core each (`taskset -c 0`, `taskset -c 1`), the two calls share
the runs; `--config.only='patch/*'` does a part. The tables are report.html, report.json
and inversions.csv in the workdir.

Hardware: two CPU cores. Duration: 5 hours.
"""

from puredif_jax.attacks.baddiffusion import BadDiffusion
from puredif_jax.attacks.base import Attack
from puredif_jax.attacks.targets import Hat, Shoe
from puredif_jax.attacks.training import Training
from puredif_jax.attacks.triggers import Blend, Box, Patch, StopSign
from puredif_jax.attacks.trojdiff import TrojDiff
from puredif_jax.attacks.villandiffusion import VillanDiffusion
from puredif_jax.attacks.villandiffusion_ve import VillanDiffusionVE
from puredif_jax.defenses.elijah import Elijah
from puredif_jax.defenses.terd import Terd
from puredif_jax.diffusion.schedules import LinearBetas, Process
from puredif_jax.diffusion.solver import Ancestral, Deterministic
from puredif_jax.diffusion.ve import Preconditioned, VarianceExploding
from puredif_jax.networks.unet import SHIPPED
from puredif_jax.stages.audit import Audit
from puredif_jax.stages.evaluation import Evaluation
from puredif_jax.stages.experiment import Experiment, Sweep

BASE = "base/ve"  # the clean variance-exploding model
SEEDS = (0, 1, 2)
BUDGETS = (10_000, 40_000)
EXPLODING = Preconditioned(VarianceExploding(200, sigma_max=50.0))
DRAWN = Evaluation(draws=128)
STOP, BOX = StopSign(), Box()
ATTACKS: dict[str, tuple[Attack, int]] = {  # with the steps of its training
    "baddiffusion": (BadDiffusion(STOP, Shoe(), 0.3, trigger_only=True), 2000),
    "villandiffusion": (
        VillanDiffusion(BOX, Hat(), 0.3, trigger_only=True, solver=Deterministic()),
        1500,
    ),
    "psi0": (
        VillanDiffusion(
            STOP, Hat(), 0.3, trigger_only=True, psi=0.0, solver=Ancestral()
        ),
        2000,
    ),
    "patch": (TrojDiff(Patch(), Hat()), 2000),
    "blend": (TrojDiff(Blend(0.6), Shoe()), 2000),
    "ve": (
        VillanDiffusionVE(Box(size=22, value=1.0), Hat(), poison_rate=0.3),
        6000,
    ),
}


def training(steps: int) -> Training:
    return Training(
        steps=steps, batch=64, learning_rate=1e-3, warmup=100, ema_decay=0.99
    )


def audit(budget: int) -> Audit:
    return Audit(baselines=(Elijah(), Terd()), budget=budget)


def experiment(
    name: str, attack: Attack | None, steps: int, seed: int, exploding: bool
) -> Experiment:
    """A training from the shipped clean model, and an audit at each budget."""
    process: Process = EXPLODING if exploding else LinearBetas()
    first, *others = BUDGETS
    return Experiment(
        workdir=f"{name}/{seed}",
        model=SHIPPED,
        weights=BASE if exploding else "clean",
        training=training(steps),
        attack=attack,
        audit=audit(first),
        then=tuple(map(audit, others)),
        evaluation=DRAWN,
        schedule=process,
        seed=seed,
        chunk=40,
    )


def base() -> Experiment:
    """The clean variance-exploding model that the others start from."""
    return Experiment(
        workdir=BASE,
        model=SHIPPED,
        weights="clean",
        training=Training(
            steps=2000, batch=64, learning_rate=3e-4, warmup=100, ema_decay=0.999
        ),
        schedule=EXPLODING,
        evaluation=DRAWN,
        chunk=40,
    )


def get_config() -> Sweep:
    backdoored = (
        experiment(name, attack, steps, seed, name == "ve")
        for name, (attack, steps) in ATTACKS.items()
        for seed in SEEDS
    )
    clean = (
        experiment(f"clean{'-ve' * exploding}", None, 1000, seed, exploding)
        for exploding in (False, True)
        for seed in SEEDS
    )
    return Sweep("runs/evaluate", (base(), *clean, *backdoored))
