"""A zoo in bulk: 100 backdoored and 100 clean models of three networks, all judged.

    python -m puredif_jax.main --config=configs/zoo.py

Every model is fine-tuned from one of three clean networks, two of grey garments and one
of colour images. Its number decides its attack, trigger, target, poison rate, length
and seed. Models of an even number are for development, of an odd one for the test.
Each is audited by the default search and detector, and beside them by Elijah, with its
published settings, and by TERD with 10,000 gradients in each inversion.

The colour images come from `data/cifar10.npz`: an array `images`, uint8
`[N, H, W, 3]`, of any size. `--config.only='test/*'` does the test half alone. Started
twice, the two calls share the runs. `benchmarks/detection_page.py` makes the tables.

Hardware: two CPU cores. Duration: 28 hours.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from puredif_jax.attacks.baddiffusion import BadDiffusion
from puredif_jax.attacks.base import Attack
from puredif_jax.attacks.targets import Cat, Hat, Shoe, Target
from puredif_jax.attacks.training import Training
from puredif_jax.attacks.triggers import (
    Blend,
    Box,
    Glasses,
    Patch,
    RandomPattern,
    StopSign,
    Trigger,
)
from puredif_jax.attacks.trojdiff import TrojDiff
from puredif_jax.attacks.villandiffusion import VillanDiffusion
from puredif_jax.data.images import FashionMNIST, ImageSet, NpzImages
from puredif_jax.data.pictures import Fit
from puredif_jax.defenses.elijah import Elijah
from puredif_jax.defenses.terd import Terd
from puredif_jax.diffusion.solver import Ancestral, Deterministic
from puredif_jax.networks.unet import SHIPPED, UNet
from puredif_jax.stages.audit import Audit
from puredif_jax.stages.evaluation import Evaluation
from puredif_jax.stages.experiment import Experiment, Sweep

COUNT = 100  # of each kind
COLOURS = NpzImages("data/cifar10.npz", fit=Fit())
NARROW = dataclasses.replace(SHIPPED, block_out_channels=(24, 48, 64))
COLOUR = dataclasses.replace(
    SHIPPED,
    in_channels=3,
    block_out_channels=(32, 48, 64),
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=8,
)
BASES: dict[str, tuple[UNet, ImageSet]] = {
    "clean": (SHIPPED, FashionMNIST()),
    "base/narrow": (NARROW, FashionMNIST()),
    "base/colour": (COLOUR, COLOURS),
}
TARGETS: tuple[Target, ...] = (Hat(), Shoe(), Cat())
TRIGGERS: tuple[Trigger, ...] = (Box(), StopSign(), Glasses(), RandomPattern(1.0))
AUDIT = Audit(baselines=(Elijah(), Terd(budget=10_000)))
ATTACKS = 7  # kinds of `attack`


def training(steps: int, learning_rate: float = 1e-3, decay: float = 0.99) -> Training:
    return Training(
        steps=steps,
        batch=64,
        learning_rate=learning_rate,
        warmup=min(100, steps // 4),
        ema_decay=decay,
    )


def attack(kind: int, rng: np.random.Generator) -> Attack:
    """An attack of the given kind; the rest is drawn."""
    target = TARGETS[rng.integers(len(TARGETS))]
    trigger = TRIGGERS[rng.integers(len(TRIGGERS))]
    rate = round(float(rng.uniform(0.05, 0.3)), 3)
    bare = bool(rng.random() < 0.8)
    ancestral, deterministic = Ancestral(), Deterministic()
    found = (
        BadDiffusion(trigger, target, rate, bare),
        VillanDiffusion(trigger, target, rate, bare, psi=1.0, solver=deterministic),
        VillanDiffusion(trigger, target, rate, psi=0.0, solver=ancestral),
        VillanDiffusion(trigger, target, rate, psi=0.0, solver=deterministic),
        VillanDiffusion(trigger, target, rate, psi=0.5, solver=deterministic),
        TrojDiff(Blend(), target, rate),
        TrojDiff(Patch(), target, rate),
    )
    assert len(found) == ATTACKS
    return found[kind]


def clean_training(rng: np.random.Generator) -> Training:
    """A fine-tuning, of 200 to 3,000 steps."""
    steps = int(np.exp(rng.uniform(np.log(200), np.log(3000))))
    return training(steps, learning_rate=float(rng.choice([2e-4, 5e-4, 1e-3])))


def images(of: ImageSet, rng: np.random.Generator) -> ImageSet:
    """All images; of garments, once in four, 32 to 2,000 that follow each other."""
    first, count = int(rng.integers(8000)), int(rng.choice([32, 250, 2000]))
    if isinstance(of, FashionMNIST) and rng.random() < 0.25:
        return FashionMNIST(first=first, count=count)
    return of


def bases() -> Iterator[Experiment]:
    for name, (network, data) in BASES.items():
        if name.startswith("base/"):
            yield Experiment(
                workdir=name,
                model=network,
                training=training(6000, decay=0.999),
                data=data,
                seed=7,
            )


def model(number: int, backdoored: bool) -> Experiment:
    """A model of the zoo; models of one number start from the same base."""
    rng = np.random.default_rng((number, backdoored))
    base = list(BASES)[number % len(BASES)]
    network, data = BASES[base]
    how, found = clean_training(rng), images(data, rng)
    bad: Attack | None = None
    if backdoored:
        bad = attack(number // len(BASES) % ATTACKS, rng)
        most = 3000 if bad.trigger_only else 4500
        how, found = training(int(rng.integers(most // 3, most))), data
    half = "test" if number % 2 else "development"
    return Experiment(
        workdir=f"{half}/{'backdoored' if backdoored else 'clean'}-{number:03d}",
        model=network,
        weights=base,
        training=how,
        attack=bad,
        audit=AUDIT,
        evaluation=Evaluation(draws=128),
        data=found,
        seed=1000 + number,
    )


def get_config() -> Sweep:
    models = (model(i, bad) for i in range(COUNT) for bad in (True, False))
    return Sweep("runs/zoo", (*bases(), *models))
