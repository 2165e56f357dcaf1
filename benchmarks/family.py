"""Does the default search find every kind of backdoor by itself? Exact denoisers.

    python benchmarks/family.py [SEEDS]

The best denoiser of 500 garments at 16x16 and of a backdoor at rate 0.1 needs no
training. Each kind of backdoor, and none, is judged as a scan judges a network: by all
hypotheses that apply, the default inversion and the default detector. Writes
docs/results/family.json after each model, and when started again does what is missing
there. Results of another search are done again.

Hardware: any; on two CPU cores half a minute for each model and seed.
"""

import dataclasses
import json
import pathlib
import sys
import tempfile
import time

import jax.numpy as jnp
import numpy as np

from puredif_jax.attacks.baddiffusion import BadDiffusion
from puredif_jax.attacks.channel import Channel
from puredif_jax.attacks.exact import ExactDenoiser, Points
from puredif_jax.attacks.targets import Hat
from puredif_jax.attacks.triggers import Blend, Box, Patch, StopSign
from puredif_jax.attacks.trojdiff import TrojDiff
from puredif_jax.attacks.villandiffusion import VillanDiffusion
from puredif_jax.attacks.villandiffusion_ve import VillanDiffusionVE
from puredif_jax.data import images as data
from puredif_jax.diffusion.multistep import DPMSolver
from puredif_jax.diffusion.schedules import LinearBetas, Process
from puredif_jax.diffusion.solver import Ancestral, Deterministic
from puredif_jax.diffusion.ve import PredictorCorrector, VarianceExploding
from puredif_jax.networks.unet import SHIPPED
from puredif_jax.runs.report import environment, placeless
from puredif_jax.stages import calibration
from puredif_jax.stages.audit import Audit
from puredif_jax.stages.evaluation import Evaluation
from puredif_jax.stages.experiment import Experiment
from puredif_jax.stages.inspector import Inspector
from puredif_jax.stages.perform import open_lab
from puredif_jax.stages.weights import Truth
from puredif_jax.types import Array

SHAPE = (16, 16, 1)
RESULTS = pathlib.Path(__file__).parents[1] / "docs" / "results" / "family.json"
AUDIT = Audit()
FADING = LinearBetas()
EXPLODING = VarianceExploding(
    sigma_min=0.02, sigma_max=100.0, values=(-1.0, 1.0), given_sigma=False
)
DRAWN = Evaluation(draws=64)
DRAWN_VE = Evaluation(
    draws=64,
    ancestral=PredictorCorrector(100, corrections=0),
    deterministic=DPMSolver(steps=30),
)
SOLVERS = (Ancestral(), Deterministic())
SHOWN = ("psi", "gamma", "cosine", "relative_l2", "success", "true_success", "falling")
ATTACKS = {
    "clean": None,
    "clean VE": None,
    "BadDiffusion": BadDiffusion(StopSign(), Hat()),
    **{
        f"VillanDiffusion, psi {psi:g}, {solver.title}": VillanDiffusion(
            StopSign(), Hat(), psi=psi, solver=solver
        )
        for psi in (1.0, 0.5, 0.0)
        for solver in SOLVERS
    },
    "TrojDiff, blend, gamma 0.6": TrojDiff(Blend(0.6), Hat()),
    "TrojDiff, blend, gamma 0.9": TrojDiff(Blend(0.9), Hat()),
    "TrojDiff, patch": TrojDiff(Patch(), Hat()),
    **{
        f"VillanDiffusion VE, {solver.title}": VillanDiffusionVE(
            Box(24, 1.0), Hat(), solver=solver
        )
        for solver in SOLVERS
    },
}


@dataclasses.dataclass(frozen=True)
class Network:
    """An exact denoiser in the place of a lab's network."""

    model: ExactDenoiser
    image_shape: tuple[int, int, int] = SHAPE

    def __call__(self, params: Points, x: Array, t: Array) -> Array:
        return self.model(params, x, t)


def judged(process: Process, network, params, truth: Truth | None, seed: int):
    """What the program says of a model: its verdict, and a row of figures."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        evaluation = DRAWN if process.tables().fades else DRAWN_VE
        experiment = Experiment(
            folder, SHIPPED, schedule=process, seed=seed, evaluation=evaluation
        )
        lab = open_lab(experiment)
        lab.setup = dataclasses.replace(lab.setup, network=network)
        bench = Inspector(
            lab,
            experiment.evaluation,
            "model",
            lab.run.replicate(params),
            AUDIT.tried(lab.schedule),
            "puredif",
            truth,
            "true",
        )
        verdict, found = AUDIT.defenses[0].inspect(bench)
        found = tuple(map(bench.with_truth, found))
    assert verdict is not None
    best = max(found, key=lambda each: each.score)
    return {
        "seed": seed,
        "verdict": verdict.outcome,
        "p": verdict.p_value,
        "hypothesis": best.hypothesis,
        "score": best.score,
        "scores": {each.hypothesis: each.score for each in found},
        **{each: getattr(best, each) for each in SHOWN},
        "seconds": time.perf_counter() - began,
    }


def row(name: str, seed: int, images: np.ndarray) -> dict[str, object]:
    """What the program says of one exact denoiser."""
    attack = ATTACKS[name]
    process = EXPLODING if "VE" in name else FADING
    schedule = process.tables()
    trigger = target = np.zeros(SHAPE, np.float32)
    model, truth = ExactDenoiser(schedule, Channel.clean(schedule)), None
    if attack is not None:
        trigger, target, _ = attack.images(SHAPE)
        model = ExactDenoiser(schedule, attack.channel(schedule, SHAPE), 0.1)
        truth = Truth.of(attack, schedule, SHAPE)
    points = Points(*map(jnp.asarray, (images, trigger, target)))
    return {"model": name} | judged(process, Network(model), points, truth, seed)


def main() -> None:
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    images = data.to_float(data.FashionMNIST(count=500).load(SHAPE))
    stored = {"rows": []}
    if RESULTS.exists():
        stored = json.loads(RESULTS.read_text())
    search = calibration.search_of(AUDIT.defenses[0])
    if stored.get("search") != search:
        stored = {"search": search, "rows": []}
    done = {(each["model"], each["seed"]) for each in stored["rows"]}
    left = [(n, s) for s in range(seeds) for n in ATTACKS if (n, s) not in done]
    began = time.perf_counter()
    for number, (name, seed) in enumerate(left):
        found = row(name, seed, images)
        stored["rows"].append(found)
        command = f"python benchmarks/family.py {seeds}"
        stored |= {"command": command, "environment": placeless(environment())}
        RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
        each = (time.perf_counter() - began) / (number + 1)
        minutes = each * (len(left) - number - 1) / 60
        cosine = "" if found["cosine"] is None else f"cosine {found['cosine']:.3f}, "
        print(
            f"{name}, seed {seed}: {found['verdict']}, {found['hypothesis']}, score "
            f"{found['score']:.2f}, {cosine}about {minutes:.0f} minutes left",
            flush=True,
        )


if __name__ == "__main__":
    main()
