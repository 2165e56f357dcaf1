"""The models behind the claims: eight backdoored ones and 28 clean ones, all audited.

And a control for their quality: trained as long as the longest, without a backdoor.

    python -m puredif_jax.main --config=configs/claims.py

Started twice, on one core each (`taskset -c 0`, `taskset -c 1`), the two calls share
the runs. `--config.only='clean/*'` does a part.

Hardware: two CPU cores. Duration: 5 hours. docs/notebook/2026-11-25-claims.md has what
an earlier search found.
"""

from puredif_jax.attacks.baddiffusion import BadDiffusion
from puredif_jax.attacks.targets import Cat, NoShift, Shoe, Target
from puredif_jax.attacks.training import Training
from puredif_jax.attacks.triggers import Box, StopSign
from puredif_jax.attacks.villandiffusion import VillanDiffusion
from puredif_jax.data.images import FashionMNIST
from puredif_jax.defenses.elijah import Elijah
from puredif_jax.defenses.hypothesis import Fading
from puredif_jax.defenses.inversion import Inversion
from puredif_jax.networks.unet import SHIPPED
from puredif_jax.stages.audit import Audit
from puredif_jax.stages.evaluation import Evaluation
from puredif_jax.stages.experiment import Experiment, Sweep

ATTACKS = {"baddiffusion": BadDiffusion, "villandiffusion": VillanDiffusion}
TRIGGERS = {"box": Box(), "stopsign": StopSign()}
TARGETS: dict[str, dict[str, Target]] = {  # docs/method.md, what the data can carry
    "baddiffusion": {"noshift": NoShift(), "cat": Cat()},
    "villandiffusion": {"shoe": Shoe(), "cat": Cat()},
}
BUDGET = Inversion().evaluations(Fading()) // 3  # of a hypothesis by default
CLEAN = 28  # 20 calibrate Elijah, 8 are held out
STEPS = {"baddiffusion": 10_000, "villandiffusion": 30_000}
RATES = {"baddiffusion": 0.2, "villandiffusion": 0.17}


def training(steps: int) -> Training:
    return Training(
        steps=steps, batch=64, learning_rate=1e-3, warmup=200, ema_decay=0.999
    )


def control() -> Experiment:
    """The training of the backdoors, without one."""
    return Experiment(
        workdir="control/clean",
        model=SHIPPED,
        weights="clean",
        training=training(max(STEPS.values())),
        evaluation=Evaluation(frechet_draws=4096),
        chunk=50,
    )


def backdoored(attack: str, trigger: str, target: str) -> Experiment:
    """A backdoor trained into the shipped clean model."""
    return Experiment(
        workdir=f"backdoored/{attack}-{trigger}-{target}",
        model=SHIPPED,
        weights="clean",
        training=training(STEPS[attack]),
        attack=ATTACKS[attack](
            trigger=TRIGGERS[trigger],
            target=TARGETS[attack][target],
            poison_rate=RATES[attack],
            trigger_only=True,
        ),
        audit=Audit(baselines=(Elijah(), Elijah(budget=BUDGET))),
        evaluation=Evaluation(frechet_draws=4096),
        chunk=50,
    )


def clean(number: int) -> Experiment:
    """Fine-tuned without a backdoor: other seeds, images, steps, learning rates."""
    return Experiment(
        workdir=f"clean/{number:02}",
        model=SHIPPED,
        weights="clean",
        training=Training(
            steps=(200, 400, 800, 1200)[number % 4],
            batch=64,
            learning_rate=(1e-4, 3e-4, 1e-3)[number % 3],
            warmup=50,
            ema_decay=0.99,
            cosine=number % 2 == 0,
        ),
        data=FashionMNIST(first=1000 * (number % 6), count=5000),
        audit=Audit(baselines=(Elijah(),)),
        evaluation=Evaluation(draws=64),
        seed=100 + number,
        chunk=50,
    )


def get_config() -> Sweep:
    names = [
        (attack, trigger, target)
        for attack in ATTACKS
        for trigger in TRIGGERS
        for target in TARGETS[attack]
    ]
    return Sweep(
        workdir="runs/claims",
        experiments=(
            *(backdoored(*name) for name in names),
            control(),
            *(clean(number) for number in range(CLEAN)),
        ),
    )
