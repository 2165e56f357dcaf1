"""What bounds amplification: draws that no trigger found for them alone brings home.

    python -m puredif_jax.main --config=configs/speedup.py
    python benchmarks/bound.py runs/speedup/published/baddiffusion-stopsign-shoe/0 ...

For each run, 128 draws of the final weights by 20 steps of the backdoor's own kind of
sampling: with the true trigger, with the last reinforced one, and with an oracle. The
oracle descends on one trigger for each draw, its start and the sampler's noise known,
from the better of the two for this draw. It is a descent from these starts, and no
proof that there is no other trigger. Writes docs/results/bound.json after each run,
and goes on with the runs that are not there.

Hardware: any; on one CPU core four minutes a run.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.diffusion.path_keeping import PathKeeping
from puredif_jax.diffusion.prediction import predicting
from puredif_jax.diffusion.sampling import Sampler, trajectory
from puredif_jax.formats.diffusers import read_folder
from puredif_jax.metrics import measures as metrics
from puredif_jax.runs.report import environment, placeless
from puredif_jax.stages.weights import Truth
from puredif_jax.types import Array

RESULTS = pathlib.Path(__file__).parents[1] / "docs" / "results" / "bound.json"
DRAWS, BATCH, STEPS, RATE, THRESHOLD = 128, 32, 60, 0.05, 0.01


def reinforced(run: pathlib.Path) -> np.ndarray:
    """The last trigger that the run has reinforced."""
    files = run.glob("results/reinforced_*.npz")
    last = max(files, key=lambda path: int(path.stem.rsplit("_", 1)[1]))
    with np.load(last, allow_pickle=False) as found:
        return np.asarray(found["delta"])


def measured(run: pathlib.Path) -> dict[str, Any]:
    """Success with both triggers and with the oracle's."""
    model = read_folder(run / "diffusers")
    scheduling = model.spec.scheduling
    assert scheduling is not None
    schedule, shape = scheduling.betas.tables(), model.spec.network.image_shape
    network = predicting(model.spec.network, schedule, scheduling.prediction_type)
    truth = Truth.beside(run / "diffusers", schedule, shape)
    assert truth is not None and not truth.controlled
    kept: Sampler = PathKeeping(20).keeping(truth.psi(schedule))
    sampler = truth.solver.pick(kept, DDIM(20))
    target = jnp.asarray(truth.target)

    def distances(delta: Array, key: jax.Array) -> Array:
        """MSE of each draw with its own trigger, `[B, H, W, C]`, in [-1, 1]."""
        start, chain = jax.random.split(key)
        x = schedule.start(jax.random.normal(start, delta.shape), delta)
        images, _ = trajectory(
            network, model.params, schedule, sampler, x, chain, remat=True
        )
        return jnp.mean((images - target[None]) ** 2, axis=(1, 2, 3))

    def total(delta: Array, key: jax.Array) -> tuple[Array, Array]:
        found = distances(delta, key)
        return found.sum(), found

    rule = optax.adam(optax.cosine_decay_schedule(RATE, STEPS, 0.1))

    @jax.jit
    def oracle(delta: Array, key: jax.Array) -> tuple[Array, Array]:
        """The least MSE of each draw along its descent, and the norm of its trigger."""

        def body(carry: Any, _: None) -> tuple[Any, None]:
            delta, state, least, norm = carry
            slope = jax.value_and_grad(total, has_aux=True)
            (_, found), grad = slope(delta, key)
            own = jnp.linalg.norm(delta.reshape(len(delta), -1), axis=1)
            norm = jnp.where(found < least, own, norm)
            updates, state = rule.update(grad, state)
            return (delta + updates, state, jnp.minimum(least, found), norm), None

        far = jnp.full(len(delta), jnp.inf)
        first = (delta, rule.init(delta), far, jnp.zeros(len(delta)))
        (_, _, least, norm), _ = jax.lax.scan(body, first, None, STEPS)
        return least, norm

    plain = jax.jit(distances)
    keys = jax.random.split(jax.random.key(11), DRAWS // BATCH)
    triggers = {"true trigger": truth.trigger, "reinforced": reinforced(run)}
    many = {k: jnp.broadcast_to(v, (BATCH, *shape)) for k, v in triggers.items()}
    errors = {
        name: np.concatenate([plain(delta, key) for key in keys]) / 4
        for name, delta in many.items()
    }
    rates = {name: float((x < THRESHOLD).mean()) for name, x in errors.items()}
    closer = errors["reinforced"] < errors["true trigger"]
    begin = np.where(
        closer[:, None, None, None],
        triggers["reinforced"][None],
        triggers["true trigger"][None],
    )
    parts = zip(np.split(begin, len(keys)), keys, strict=True)
    found = [oracle(jnp.asarray(delta), key) for delta, key in parts]
    least, norms = (np.concatenate(x) for x in zip(*found, strict=True))
    home = least / 4 < THRESHOLD
    low, high = metrics.share_interval(int(home.sum()), DRAWS)
    return {
        "run": "/".join(run.parts[-3:]),
        "draws": DRAWS,
        "sampler": f"{type(sampler).__name__}({sampler.steps})",
        **{f"success, {name}": rate for name, rate in rates.items()},
        "success, a trigger for each draw": float(home.mean()),
        "its 95 % interval": [low, high],
        "norm of those triggers over the true one's, median": float(
            np.median(norms) / np.linalg.norm(truth.trigger)
        ),
        "descent": {"steps": STEPS, "learning rate": RATE},
        "environment": placeless(environment()),
    }


def main() -> None:
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    record |= {"command": "python benchmarks/bound.py RUN ..."}
    done = {row["run"] for row in record["rows"]}
    for run in map(pathlib.Path, sys.argv[1:]):
        if "/".join(run.parts[-3:]) in done:
            continue
        record["rows"].append(measured(run))
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")
        print(json.dumps(record["rows"][-1]), flush=True)


if __name__ == "__main__":
    main()
