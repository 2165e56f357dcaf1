"""Does the default search find every kind of backdoor, told nothing? Exact denoisers.

    python benchmarks/family.py [SEEDS]

The best denoiser of 500 garments at 16x16 and of a backdoor at rate 0.1 needs no
training. For each kind of backdoor and for no backdoor, all hypotheses of an audit are
searched by the default inversion. Kept is the hypothesis of the largest score. Writes
docs/results/family.json after each model, and goes on with what is not there.

Hardware: any; on two CPU cores half a minute for each model and seed, once
compiled.
"""

import dataclasses
import functools
import json
import pathlib
import sys
import time

import jax
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
from puredif_jax.defenses.denoising_consistency import estimated_target
from puredif_jax.defenses.features import BEST, errors
from puredif_jax.defenses.inversion import Inversion, inverter, keep, starting
from puredif_jax.diffusion.schedules import LinearBetas
from puredif_jax.diffusion.solver import Ancestral, Deterministic
from puredif_jax.diffusion.ve import VarianceExploding
from puredif_jax.metrics import measures as metrics
from puredif_jax.runs.report import environment
from puredif_jax.stages.audit import Audit
from puredif_jax.stages.lab import PLAIN

SHAPE = (16, 16, 1)
RESULTS = pathlib.Path(__file__).parents[1] / "docs" / "results" / "family.json"
INVERSION = Inversion()
SOLVERS = (Ancestral(), Deterministic())
FADING, EXPLODING = LinearBetas().tables(), VarianceExploding(sigma_max=50.0).tables()
ATTACKS = {
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
    "clean": None,
    "clean VE": None,
}


def scored(model, schedule, kind, points, seed: int):
    """The kept candidate under one hypothesis, and its score."""
    placebos = [
        search(model, schedule, each, points, seed)[2] for each in kind.placebos
    ]
    family, candidate, loss = search(model, schedule, kind, points, seed)
    key = jax.random.split(jax.random.key(seed), 3)[2]
    known = points.images[:: len(points.images) // PLAIN][:PLAIN]  # as it draws them
    found = programs(model, schedule)[3](
        family, points, candidate, known, kind.lone, key
    )
    score = -float(np.log10(np.sort(np.asarray(found.ratios))[:BEST]).mean())
    if placebos:
        score = min(score, float(np.mean(placebos) - loss) / np.log(10))
    return candidate, score


def search(model, schedule, kind, points, seed: int):
    """A family, its kept candidate, and its held-out loss."""
    family = kind.family(schedule, SHAPE)
    family = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), family)
    key_run, key_held, _ = jax.random.split(jax.random.key(seed), 3)
    scouts, finals, judge, _, answer, show = programs(model, schedule)
    descent = INVERSION.descent
    init, _ = inverter(lambda *_: 0.0, descent, SHAPE, family=family)
    state = init(key_run)
    if (blocks := INVERSION.starts(kind)) is not None:
        squares = jnp.asarray(blocks.squares(SHAPE))
        ratios = np.asarray(answer(family, points, squares, key_run))
        psi = jnp.asarray(family.psi)[1]
        best = squares[blocks.best(ratios, blocks.starts)]
        starts = jax.vmap(lambda each: blocks.candidate(each, SHAPE, psi))(best)
        starts = dataclasses.replace(
            starts, target=show(family, points, starts, key_run)
        )
        state = starting(state, starts, blocks.rate)
    state = scouts(family, points, state)
    order = np.argsort(judge(family, points, state.candidate, key_held))
    state = finals(family, points, keep(state, order[: descent.last]))
    losses = np.asarray(judge(family, points, state.candidate, key_held))
    best = int(np.argmin(losses))
    found = jax.tree.map(lambda x: x[best], state.candidate)
    return family, found, float(losses[best])


@functools.lru_cache(1)
def programs(model, schedule):
    """The compiled parts of a search of one model, for any hypothesis and seed."""
    descent = INVERSION.descent

    def steps(count: int, number: int):
        def run(family, points, state):
            loss = INVERSION.loss.bind(model, schedule, family)
            _, step = inverter(
                loss,
                dataclasses.replace(descent, candidates=number),
                SHAPE,
                family=family,
            )
            body = lambda state, _: (step(points, state)[0], None)  # noqa: E731
            return jax.lax.scan(body, state, length=count)[0]

        return jax.jit(run)

    def judge(family, points, candidates, key):
        loss = INVERSION.judge.bind(model, schedule, family)
        return jax.lax.map(lambda each: loss(points, each, key), candidates)

    def measure(family, points, found, plain, lone, key):
        here = family.at(found)
        return errors(
            model, points, schedule, here, found, plain, lone, key, draws=PLAIN
        )

    def answer(family, points, squares, key):
        blocks = INVERSION.blocks
        return blocks.ratios(model, points, schedule, family, squares, SHAPE, key)

    def show(family, points, candidates, key):
        image = estimated_target(model, schedule, family)
        return jax.lax.map(lambda each: image(points, each, key), candidates)

    return (
        steps(descent.scout, descent.candidates),
        steps(descent.steps - descent.scout, descent.last),
        jax.jit(judge),
        jax.jit(measure),
        jax.jit(answer),
        jax.jit(show),
    )


def row(name: str, seed: int, images: np.ndarray) -> dict[str, object]:
    """What the search finds in one model."""
    attack = ATTACKS[name]
    schedule = EXPLODING if "VE" in name else FADING
    if attack is None:
        trigger = target = np.zeros(SHAPE, np.float32)
        model = ExactDenoiser(schedule, Channel.clean(schedule))
    else:
        trigger, target, _ = attack.images(SHAPE)
        model = ExactDenoiser(schedule, attack.channel(schedule, SHAPE), 0.1)
    points = Points(*map(jnp.asarray, (images, trigger, target)))
    began = time.perf_counter()
    found = {
        kind: scored(model, schedule, kind, points, seed)
        for kind in Audit().tried(schedule)
    }
    best = max(found, key=lambda kind: found[kind][1])
    candidate, score = found[best]
    result: dict[str, object] = {
        "model": name,
        "seed": seed,
        "hypothesis": best.name,
        "score": score,
        "scores": {kind.name: each[1] for kind, each in found.items()},
        "psi": float(candidate.member.psi),
        "gamma": float(candidate.member.gamma.mean()),
        "seconds": time.perf_counter() - began,
    }
    if attack is not None:
        distance = metrics.trigger_distance(candidate.delta, trigger)
        result |= {k: float(v) for k, v in distance._asdict().items()}
        result["target mse"] = float(np.mean((candidate.target - target) ** 2) / 4)
    return result


def main() -> None:
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    images = data.to_float(data.FashionMNIST(count=500).load(SHAPE))
    stored = {"rows": []}
    if RESULTS.exists():
        stored = json.loads(RESULTS.read_text())
    done = {(each["model"], each["seed"]) for each in stored["rows"]}
    left = [(n, s) for n in ATTACKS for s in range(seeds) if (n, s) not in done]
    began = time.perf_counter()
    for number, (name, seed) in enumerate(left):
        found = row(name, seed, images)
        stored["rows"].append(found)
        command = f"python benchmarks/family.py {seeds}"
        stored |= {"command": command, "environment": environment()}
        RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
        each = (time.perf_counter() - began) / (number + 1)
        print(
            f"{name}, seed {seed}: {found['hypothesis']}, score {found['score']:.2f}, "
            f"cosine {found.get('cosine', np.nan):.3f}, psi {found['psi']:.2f}, gamma "
            f"{found['gamma']:.2f}; about {each * (len(left) - number - 1) / 60:.0f} "
            "minutes left",
            flush=True,
        )


if __name__ == "__main__":
    main()
