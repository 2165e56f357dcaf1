"""How many training steps a reinforced trigger saves: success over short trainings.

    python -m puredif_jax.main --config=configs/speedup.py

Each number of steps is a training of its own, whose rate decays to zero at its end:
what an attacker with that budget would run. After the short ones the trigger is
reinforced, after the long ones only the true one is measured. Started twice, the two
calls share the runs.

Hardware: two CPU cores. Duration: 2.5 hours. Expected: docs/claims.md.
"""

from puredif_jax.attacks import BadDiffusion, VillanDiffusion
from puredif_jax.experiment import Amplification, Experiment, Sweep
from puredif_jax.training import Training
from puredif_jax.triggers import Box, Cat, Shoe, StopSign, Target, Trigger
from puredif_jax.unet import SHIPPED

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
SHORT, LONG = (180, 360, 720), (1200, 3600)


def run(setting: str, seed: int, steps: int) -> Experiment:
    return Experiment(
        workdir=f"{setting}/{seed}-{steps:05}",
        model=SHIPPED,
        weights="clean",
        training=Training(
            steps=steps, batch=64, learning_rate=1e-3, warmup=50, ema_decay=0.99
        ),
        attack=SETTINGS[setting],
        amplification=Amplification(snapshots=(steps,)) if steps in SHORT else None,
        seed=seed,
        chunk=60,
    )


def get_config() -> Sweep:
    return Sweep(
        workdir="runs/speedup",
        experiments=tuple(
            run(setting, seed, steps)
            for seed in range(3)
            for setting in SETTINGS
            for steps in (*SHORT, *LONG)
        ),
    )
