"""How much training a reinforced trigger saves: success along trainings of two recipes.

    python -m puredif_jax.main --config=configs/speedup.py

Two attacks, three pairs of trigger and target, three seeds. The published recipe has
Adam at 2e-4, a tenth of poisoned samples, no moving average, and the clean image shows
through. The fast one has 1e-3, half of the samples, a moving average and the bare
trigger. The trigger is reinforced along the training, and both triggers are measured.

Beside each recipe a shorter run, `-chosen`, trains with the reinforced trigger in place
of the true one. It is chosen on the clean weights, at the norm that it begins with, and
reinforced again on the way. Started twice, the two calls share the runs.
`benchmarks/speedup_page.py` makes the factors.

Hardware: two CPU cores. Duration: 9 hours.
"""

from collections.abc import Iterator
from typing import NamedTuple

from puredif_jax.attacks.baddiffusion import BadDiffusion
from puredif_jax.attacks.targets import Cat, Shoe
from puredif_jax.attacks.training import Training
from puredif_jax.attacks.triggers import Box, StopSign
from puredif_jax.attacks.villandiffusion import VillanDiffusion
from puredif_jax.defenses.descent import NormKeeping
from puredif_jax.defenses.reinforcement import Reinforcement
from puredif_jax.networks.unet import SHIPPED
from puredif_jax.stages.amplify import Amplification
from puredif_jax.stages.evaluation import Evaluation
from puredif_jax.stages.experiment import Experiment, Sweep


class Recipe(NamedTuple):
    """How backdoors are trained, and where their triggers are reinforced.

    snapshots, beyond: of `Amplification`; the training ends at the last.
    last: step at which the run with a chosen trigger ends.
    """

    name: str
    poison_rate: float
    trigger_only: bool
    learning_rate: float
    ema_decay: float
    snapshots: tuple[int, ...]
    beyond: tuple[int, ...]
    last: int


SEEDS = range(3)
ATTACKS = {"villandiffusion": VillanDiffusion, "baddiffusion": BadDiffusion}
PAIRS = {
    "stopsign-shoe": (StopSign(), Shoe()),
    "box-cat": (Box(), Cat()),
    "stopsign-cat": (StopSign(), Cat()),
}
RECIPES = (
    Recipe(
        name="published",
        poison_rate=0.1,
        trigger_only=False,
        learning_rate=2e-4,
        ema_decay=0.0,
        snapshots=(0, 125, 250, 500, 1000, 2000, 4000),
        beyond=(8000, 12_000),
        last=2000,
    ),
    Recipe(
        name="fast",
        poison_rate=0.5,
        trigger_only=True,
        learning_rate=1e-3,
        ema_decay=0.99,
        snapshots=(0, 45, 90, 180, 360, 720),
        beyond=(1500, 2500, 4000),
        last=720,
    ),
)
KEPT = Reinforcement(descent=NormKeeping(steps=80, learning_rate=0.05, b2=0.999))


def run(recipe: Recipe, attack: str, pair: str, seed: int, chosen: bool) -> Experiment:
    trigger, target = PAIRS[pair]
    steps = (*recipe.snapshots, *recipe.beyond)
    if chosen:
        steps = tuple(step for step in steps if step <= recipe.last)
        amplification = Amplification(steps, KEPT, alternate=True)
    else:
        amplification = Amplification(recipe.snapshots, beyond=recipe.beyond)
    return Experiment(
        workdir=f"{recipe.name}{'-chosen' * chosen}/{attack}-{pair}/{seed}",
        model=SHIPPED,
        weights="clean",
        training=Training(
            steps=steps[-1],
            batch=64,
            learning_rate=recipe.learning_rate,
            warmup=50,
            ema_decay=recipe.ema_decay,
            cosine=False,
        ),
        attack=ATTACKS[attack](
            trigger=trigger,
            target=target,
            poison_rate=recipe.poison_rate,
            trigger_only=recipe.trigger_only,
        ),
        amplification=amplification,
        evaluation=Evaluation(draws=256, frechet_draws=2048),
        seed=seed,
        chunk=50,
    )


def runs() -> Iterator[Experiment]:
    for seed in SEEDS:
        for recipe in RECIPES:
            for pair in PAIRS:
                for attack in ATTACKS:
                    for chosen in (False, True):
                        yield run(recipe, attack, pair, seed, chosen)


def get_config() -> Sweep:
    return Sweep(workdir="runs/speedup", experiments=tuple(runs()))
