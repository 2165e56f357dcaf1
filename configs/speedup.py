"""How much training a reinforced trigger saves: success along trainings of two recipes.

    python -m puredif_jax.main --config=configs/speedup.py

Two attacks, three pairs of trigger and target, three seeds. The published recipe has
Adam at 2e-4, a tenth of poisoned samples, no moving average, and the clean image shows
through. The fast one has 1e-3, half of the samples, a moving average and the bare
trigger. Each training is one run: the trigger is reinforced at early steps, first on
the clean weights, and both triggers are measured from there to the end. Started twice,
the two calls share the runs. `benchmarks/speedup_page.py` makes the factors.

Hardware: two CPU cores. Duration: 8 hours.
"""

import dataclasses
from collections.abc import Iterator

from puredif_jax.attacks.baddiffusion import BadDiffusion
from puredif_jax.attacks.targets import Cat, Shoe
from puredif_jax.attacks.training import Training
from puredif_jax.attacks.triggers import Box, StopSign
from puredif_jax.attacks.villandiffusion import VillanDiffusion
from puredif_jax.networks.unet import SHIPPED
from puredif_jax.stages.amplify import Amplification
from puredif_jax.stages.evaluation import Evaluation
from puredif_jax.stages.experiment import Experiment, Sweep

SEEDS = range(3)
ATTACKS = {"villandiffusion": VillanDiffusion, "baddiffusion": BadDiffusion}
PAIRS = {
    "stopsign-shoe": (StopSign(), Shoe()),
    "box-cat": (Box(), Cat()),
    "stopsign-cat": (StopSign(), Cat()),
}
PUBLISHED = Experiment(
    "published",
    SHIPPED,
    weights="clean",
    training=Training(
        steps=12_000, batch=64, learning_rate=2e-4, warmup=100, cosine=False
    ),
    amplification=Amplification((0, 250, 500, 1000), beyond=(2000, 4000, 8000, 12_000)),
    evaluation=Evaluation(draws=256, frechet_draws=2048),
    chunk=50,
)
FAST = dataclasses.replace(
    PUBLISHED,
    workdir="fast",
    training=Training(
        steps=4000,
        batch=64,
        learning_rate=1e-3,
        warmup=50,
        ema_decay=0.99,
        cosine=False,
    ),
    amplification=Amplification((0, 90, 180, 360), beyond=(720, 1500, 2500, 4000)),
)


def run(recipe: Experiment, attack: str, pair: str, seed: int) -> Experiment:
    published = recipe is PUBLISHED
    trigger, target = PAIRS[pair]
    return dataclasses.replace(
        recipe,
        workdir=f"{recipe.workdir}/{attack}-{pair}/{seed}",
        attack=ATTACKS[attack](
            trigger=trigger,
            target=target,
            poison_rate=0.1 if published else 0.5,
            trigger_only=not published,
        ),
        seed=seed,
    )


def runs() -> Iterator[Experiment]:
    for seed in SEEDS:
        for recipe in (PUBLISHED, FAST):
            for pair in PAIRS:
                for attack in ATTACKS:
                    yield run(recipe, attack, pair, seed)


def get_config() -> Sweep:
    return Sweep(workdir="runs/speedup", experiments=tuple(runs()))
