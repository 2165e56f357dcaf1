"""How many training steps a reinforced trigger saves: success over short trainings.

    python -m puredif_jax.main --config=configs/speedup.py

Each number of steps is a training of its own, whose rate decays to zero at its end:
what an attacker with that budget would run. After the short ones the trigger is
reinforced, after the long ones, of one seed, only the true one is measured. One setting
also alternates: it goes on training with the trigger reinforced half way. Started
twice, the two calls share the runs.

Hardware: two CPU cores. Duration: 3 hours. Expected: docs/claims.md.
"""

from collections.abc import Iterator

from puredif_jax.attacks.baddiffusion import BadDiffusion
from puredif_jax.attacks.targets import Cat, Shoe, Target
from puredif_jax.attacks.training import Training
from puredif_jax.attacks.triggers import Box, StopSign, Trigger
from puredif_jax.attacks.villandiffusion import VillanDiffusion
from puredif_jax.networks.unet import SHIPPED
from puredif_jax.stages.amplify import Amplification
from puredif_jax.stages.experiment import Experiment, Sweep

TRIGGERS: dict[str, Trigger] = {"box": Box(), "stopsign": StopSign()}
TARGETS: dict[str, Target] = {"shoe": Shoe(), "cat": Cat()}
SETTINGS: dict[str, BadDiffusion | VillanDiffusion] = {
    f"{name}-{trigger}-{target}": attack(
        trigger=TRIGGERS[trigger],
        target=TARGETS[target],
        poison_rate=0.5,
        trigger_only=True,
    )
    for name, attack, trigger, target in (
        ("villandiffusion", VillanDiffusion, "box", "cat"),
        ("villandiffusion", VillanDiffusion, "stopsign", "shoe"),
        ("villandiffusion", VillanDiffusion, "stopsign", "cat"),
        ("baddiffusion", BadDiffusion, "stopsign", "shoe"),
    )
}


def run(setting: str, seed: int, steps: int, snapshots: tuple[int, ...]) -> Experiment:
    """A training; the trigger is reinforced at its snapshots, and two alternate."""
    alternate = len(snapshots) > 1
    kind = "alternating" if alternate else "plain"
    return Experiment(
        workdir=f"{setting}/{kind}-{seed}-{steps:05}",
        model=SHIPPED,
        weights="clean",
        training=Training(
            steps=steps, batch=64, learning_rate=1e-3, warmup=50, ema_decay=0.99
        ),
        attack=SETTINGS[setting],
        amplification=(
            Amplification(snapshots, alternate=alternate) if snapshots else None
        ),
        seed=seed,
        chunk=60,
    )


def runs() -> Iterator[Experiment]:
    for seed in range(3):
        for setting in SETTINGS:
            ancestral = setting.startswith("baddiffusion")
            for steps in (360,) if ancestral else (180, 360, 720):
                yield run(setting, seed, steps, (steps,))
        yield run("villandiffusion-stopsign-shoe", seed, 360, (180, 360))
    for setting in SETTINGS:
        for steps in (1200, 3600):
            yield run(setting, 0, steps, ())


def get_config() -> Sweep:
    return Sweep(workdir="runs/speedup", experiments=tuple(runs()))
