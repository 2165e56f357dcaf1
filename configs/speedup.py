"""How much training a reinforced trigger saves: success along trainings of two recipes.

    python -m puredif_jax.main --config=configs/speedup.py

Two attacks, three pairs of trigger and target, three seeds. The published recipe has
Adam at 2e-4, a tenth of poisoned samples, no moving average, and the clean image shows
through. The fast one has 1e-3, half of the samples, a moving average and the bare
trigger. The trigger is reinforced along the training, and both triggers are measured.

Beside each recipe a shorter run trains with the reinforced trigger in place of the
true one: it is chosen on the clean weights, at the norm of the true one, and reinforced
again on the way. Started twice, the two calls share the runs.
`benchmarks/speedup_page.py` makes the factors.

Hardware: two CPU cores. Duration: 9 hours.
"""

import dataclasses
from collections.abc import Iterator

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

SEEDS = range(3)
ATTACKS = {"villandiffusion": VillanDiffusion, "baddiffusion": BadDiffusion}
PAIRS = {
    "stopsign-shoe": (StopSign(), Shoe()),
    "box-cat": (Box(), Cat()),
    "stopsign-cat": (StopSign(), Cat()),
}
CHOSEN = "-chosen"
KEPT = NormKeeping(steps=80, learning_rate=0.05, b2=0.999, bound=None)
PUBLISHED = Experiment(
    "published",
    SHIPPED,
    weights="clean",
    training=Training(
        steps=12_000, batch=64, learning_rate=2e-4, warmup=100, cosine=False
    ),
    amplification=Amplification((0, 250, 500, 1000, 2000, 4000), beyond=(8000, 12_000)),
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
    amplification=Amplification((0, 90, 180, 360, 720), beyond=(1500, 2500, 4000)),
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


def chosen(whole: Experiment, last: int) -> Experiment:
    """The same to step `last`, with a trigger that is chosen on the clean weights."""
    recipe, rest = whole.workdir.split("/", 1)
    assert whole.training is not None and whole.amplification is not None
    return dataclasses.replace(
        whole,
        workdir=f"{recipe}{CHOSEN}/{rest}",
        training=dataclasses.replace(whole.training, steps=last),
        amplification=Amplification(
            tuple(step for step in whole.amplification.steps if step <= last),
            Reinforcement(descent=KEPT),
            alternate=True,
        ),
    )


def runs() -> Iterator[Experiment]:
    for seed in SEEDS:
        for recipe, last in ((PUBLISHED, 2000), (FAST, 720)):
            for pair in PAIRS:
                for attack in ATTACKS:
                    whole = run(recipe, attack, pair, seed)
                    yield whole
                    yield chosen(whole, last)


def get_config() -> Sweep:
    return Sweep(workdir="runs/speedup", experiments=tuple(runs()))
