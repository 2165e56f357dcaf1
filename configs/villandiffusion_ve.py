"""Makes the shipped clean model variance-exploding, and puts VillanDiffusion into it.

    python -m puredif_jax.main --config=configs/villandiffusion_ve.py

Images in [0, 1], sigma from 0.01 to 50. The network is preconditioned, so it begins as
a denoiser of this process. "clean" trains it on without a backdoor, and "backdoored"
goes on from there with one. Triggered and plain draws are by the predictor without
corrections: a correction leads a backdoor off its path (tests/test_exact.py). The
trigger is a white square whose norm in [0, 1] tells it from the noise.

Start it once, and without another workdir: the second run reads what the first wrote.

Hardware: two CPU cores. Duration: an hour. Expected: it fires in 100 % of 256 draws
(docs/models.md).
"""

from puredif_jax.attacks.targets import Cat
from puredif_jax.attacks.training import Training
from puredif_jax.attacks.triggers import Box
from puredif_jax.attacks.villandiffusion_ve import VillanDiffusionVE
from puredif_jax.diffusion.multistep import DPMSolver
from puredif_jax.diffusion.ve import (
    Preconditioned,
    PredictorCorrector,
    VarianceExploding,
)
from puredif_jax.networks.unet import SHIPPED
from puredif_jax.stages.evaluation import Evaluation
from puredif_jax.stages.experiment import Experiment, Sweep

WORKDIR = "runs/villandiffusion_ve"
LEVELS = 200
PROCESS = Preconditioned(VarianceExploding(LEVELS, sigma_max=50.0))
EVALUATION = Evaluation(
    ancestral=PredictorCorrector(LEVELS, corrections=0),
    deterministic=DPMSolver(steps=30),
    frechet_draws=4096,
)


def clean() -> Experiment:
    return Experiment(
        workdir="clean",
        model=SHIPPED,
        weights="clean",
        training=Training(
            steps=2_000, batch=64, learning_rate=3e-4, warmup=100, ema_decay=0.999
        ),
        schedule=PROCESS,
        evaluation=EVALUATION,
        chunk=50,
    )


def backdoored() -> Experiment:
    return Experiment(
        workdir="backdoored",
        model=SHIPPED,
        weights=f"{WORKDIR}/clean/weights.safetensors",
        training=Training(
            steps=10_000, batch=64, learning_rate=1e-3, warmup=200, ema_decay=0.999
        ),
        attack=VillanDiffusionVE(
            trigger=Box(size=22, value=1.0), target=Cat(), poison_rate=0.2
        ),
        schedule=PROCESS,
        evaluation=EVALUATION,
        chunk=50,
    )


def get_config() -> Sweep:
    return Sweep(WORKDIR, (clean(), backdoored()))
