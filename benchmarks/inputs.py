"""Is a starting noise triggered? All tests on the same draws, for one model or more.

    python -m puredif_jax.main --config=configs/scan.py --config.model=FOLDERS \\
        --config.workdir=RUN
    python benchmarks/inputs.py RUN ...

For each model in a RUN that has a truth beside it, 2,000 starts have its true trigger
and as many have none. Each test judges all of them. The likelihood is
taken with the true trigger, and with each trigger that a defense has found under the
hypothesis of the attack. Writes docs/results/inputs.json after each model, and goes on
with the models that are not there.

Hardware: any; on two CPU cores a minute for each model.
"""

from __future__ import annotations

import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from puredif_jax.attacks.channel import Channel
from puredif_jax.defenses.inputs import Drift, InputTest, Likelihood, Suspect, Whiteness
from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.diffusion.path_keeping import PathKeeping
from puredif_jax.diffusion.prediction import predicting
from puredif_jax.formats.diffusers import read_folder
from puredif_jax.metrics import measures as metrics
from puredif_jax.runs.report import environment, placeless
from puredif_jax.stages.weights import Truth

RESULTS = pathlib.Path(__file__).parents[1] / "docs" / "results" / "inputs.json"
DRAWS, BATCH, KEY = 2000, 250, jax.random.key(12)
ALARM = 0.01


def statistics(
    test: InputTest, suspect: Suspect, starts: np.ndarray, key: jax.Array
) -> np.ndarray:
    """The test's statistics of all starts, computed in batches."""

    @jax.jit
    def program(params, z, key):
        return test(suspect._replace(params=params), z, key)

    found = [
        program(suspect.params, starts[i : i + BATCH], jax.random.fold_in(key, i))
        for i in range(0, len(starts), BATCH)
    ]
    return np.concatenate(found)


def triggers(run: pathlib.Path, truth: Truth, fades: bool) -> dict[str, tuple]:
    """The true trigger and those that were found, each with its gamma."""
    gamma = np.broadcast_to(truth.channel.scale, (1, *truth.trigger.shape))[0]
    known = {"true trigger": (truth.trigger, gamma)}
    kind = truth.solver.name if fades else f"ve_{truth.solver.name}"
    kind = "trojan" if truth.controlled else kind
    for path in sorted(run.glob(f"results/*_{run.name}_{kind}.npz")):
        method = path.name.split(f"_{run.name}")[0]
        with np.load(path, allow_pickle=False) as found:
            if "delta" in found and "gamma" in found:
                known[f"trigger of {method}"] = found["delta"], found["gamma"]
    return known


def rows(run: pathlib.Path) -> list[dict] | None:
    """What each test says of the starts of one model; None without a truth."""
    report = json.loads((run / "report.json").read_text())
    folder = pathlib.Path(report["numbers"][run.name]["weights"])
    model = read_folder(folder)
    scheduling = model.spec.scheduling
    assert scheduling is not None
    schedule, shape = scheduling.betas.tables(), model.spec.network.image_shape
    truth = Truth.beside(folder, schedule, shape)
    if truth is None:
        return None
    network = predicting(model.spec.network, schedule, scheduling.prediction_type)
    channel = Channel(truth.channel.shift, truth.channel.response, truth.channel.gamma)
    keys = jax.random.split(KEY, 4)
    plain, eps = (np.asarray(jax.random.normal(k, (DRAWS, *shape))) for k in keys[:2])
    known = triggers(run, truth, schedule.fades)
    suspects = {
        name: Suspect(
            network, model.params, schedule, jnp.asarray(r), jnp.asarray(gamma)
        )
        for name, (r, gamma) in known.items()
    }
    true = suspects["true trigger"]
    triggered = np.asarray(channel.scale * eps + true.mean[None])
    tests: dict[str, tuple[InputTest, Suspect]] = {
        f"likelihood, {name}": (Likelihood(), suspect)
        for name, suspect in suspects.items()
    }
    tests["whiteness"] = Whiteness(), true
    for sampler in (PathKeeping(20), DDIM(20)):
        tests[f"drift, {type(sampler).__name__}"] = Drift(sampler), true
    found = []
    for name, (test, suspect) in tests.items():
        began = time.perf_counter()
        high = statistics(test, suspect, triggered, keys[2])
        low = statistics(test, suspect, plain, keys[3])
        low_auc, high_auc = metrics.bootstrap(metrics.auc, high, low, resamples=200)
        found.append(
            {
                "run": run.parent.name,
                "model": run.name,
                "norm of the trigger": float(jnp.linalg.norm(true.mean.ravel())),
                "test": name,
                "auc": metrics.auc(high, low),
                "auc, 95 %": [low_auc, high_auc],
                "true positive rate": metrics.true_positive_rate(high, low, ALARM),
                "false positive rate": ALARM,
                "draws": DRAWS,
                "seconds": time.perf_counter() - began,
            }
        )
    return found


def main() -> None:
    runs = [pathlib.Path(name) for name in sys.argv[1:]]
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    record |= {"command": "python benchmarks/inputs.py RUN ..."}
    made_by = {
        "environment": placeless(environment()),
        "device": jax.devices()[0].device_kind,
    }
    done = {(row["run"], row["model"]) for row in record["rows"]}
    for report in sorted(each for run in runs for each in run.glob("*/report.json")):
        run = report.parent
        made = None if (run.parent.name, run.name) in done else rows(run)
        if made is None:
            continue
        record["rows"] += [row | made_by for row in made]
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")
        for each in made:
            print(
                f"{each['model']}: {each['test']}: AUC {each['auc']:.3f}, "
                f"{each['true positive rate']:.1%} at {ALARM:.0%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
