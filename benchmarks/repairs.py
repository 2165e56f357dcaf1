"""Repairs of backdoored models, and of clean ones by mistake, beside controls.

    python benchmarks/networks.py FOLDER GROUP --garments FILE --cifar FILE
    python -m puredif_jax.main --config=configs/scan.py --config.model=MODELS \\
        --config.workdir=RUN
    python benchmarks/repairs.py RUN GARMENTS.npz MODEL ... [--ways WAY ...]

A MODEL is a folder of a grey model, as the scan had it. Each is repaired by every way
below, or by those named, and each result is audited, in the folder of the scan. The
Frechet distance is over garment-net, of 4,096 draws to the images of GARMENTS.npz.
Writes docs/results/repairs.json after each repair, and goes on with what is not there.

Hardware: two CPU cores. Duration: ten minutes for each model and way on one core.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib

import jax
import numpy as np

from puredif_jax.data import images as data
from puredif_jax.data.images import NpzImages
from puredif_jax.data.pictures import Fit
from puredif_jax.defenses.removal import FineTuning, Pruning, ThreeTerms
from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.diffusion.prediction import predicting
from puredif_jax.diffusion.sampling import sample
from puredif_jax.formats.diffusers import read_folder
from puredif_jax.runs.report import environment, placeless
from puredif_jax.stages.embedding import GarmentNet
from puredif_jax.stages.experiment import Scan
from puredif_jax.stages.finding import Finding
from puredif_jax.stages.repair import Repair
from puredif_jax.stages.repaired import Repaired
from puredif_jax.stages.scan import perform_scan

RESULTS = pathlib.Path(__file__).parents[1] / "docs" / "results" / "repairs.json"
DRAWS, BATCH, SAMPLER = 4096, 256, DDIM(steps=50)
BASE = Repair(always=True)  # also of a model that is clean


def ways(images: NpzImages) -> dict[str, Repair]:
    """By name."""
    own = {
        "unlearning": BASE,
        "three terms": dataclasses.replace(BASE, removal=ThreeTerms()),
        "fine-tuning": dataclasses.replace(BASE, removal=FineTuning()),
        "pruning": dataclasses.replace(BASE, removal=Pruning()),
    }
    given = {
        name: dataclasses.replace(way, images=images)
        for name, way in own.items()
        if name != "pruning"
    }
    return {
        **{f"{name}, own draws": way for name, way in own.items()},
        **{f"{name}, data": way for name, way in given.items()},
        **{
            f"unlearning, own draws, seed {seed}": dataclasses.replace(BASE, seed=seed)
            for seed in (1, 2)
        },
    }


def distance(folder: pathlib.Path, real: np.ndarray) -> float:
    """The Frechet distance of plain draws to images, over garment-net."""
    model = read_folder(folder)
    scheduling = model.spec.scheduling
    assert scheduling is not None
    schedule = scheduling.betas.tables()
    network = predicting(model.spec.network, schedule, scheduling.prediction_type)
    shape = model.spec.network.image_shape

    @jax.jit
    def drawn(params, key):
        start = schedule.start(jax.random.normal(key, (BATCH, *shape)))
        return sample(network, params, schedule, SAMPLER, start, key)

    keys = jax.random.split(jax.random.key(5), DRAWS // BATCH)
    images = np.concatenate([drawn(model.params, key) for key in keys])
    return GarmentNet().distance(images, real)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=pathlib.Path)
    parser.add_argument("garments")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--ways", nargs="+")
    given = parser.parse_args()
    run, models, images = given.run, given.models, NpzImages(given.garments, fit=Fit())
    known = ways(images)
    if unknown := set(given.ways or ()) - set(known):
        parser.error(f"no way is called {', '.join(unknown)}: {', '.join(known)}")
    shape = (16, 16, 1)
    real = data.to_float(images.load(shape))
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    done = {(row["model"], row["way"], row.get("settings")) for row in record["rows"]}
    before: dict[str, float] = {}
    for name, way in ((name, known[name]) for name in given.ways or known):
        scan = Scan(str(run), tuple(models), repair=way)
        for model in models:
            folder = run / pathlib.Path(model).name
            if (folder.name, name, way.name) in done:
                continue
            perform_scan(dataclasses.replace(scan, model=(model,), devices=1))
            numbers = json.loads((folder / "report.json").read_text())["numbers"]
            first, *after = Finding.read(numbers, str(folder))
            repairs = Repaired.read(numbers, str(folder))
            if folder.name not in before:
                before[folder.name] = distance(pathlib.Path(model), real)
            row = {
                "model": folder.name,
                "way": name,
                "settings": way.name,
                "before": first.verdict._asdict(),
                "after": [each.verdict._asdict() for each in after],
                "success": {
                    k: v
                    for each, when in ((repairs[0], "before"), (repairs[-1], "after"))
                    for k, v in each.success.items()
                    if k.endswith(when)
                },
                "Frechet before": before[folder.name],
                "Frechet after": distance(folder / after[-1].weights, real),
                "images": repairs[-1].images,
                "minutes": sum(each.seconds for each in repairs) / 60,
            }
            record["rows"].append(row)
            record |= {"environment": placeless(environment())}
            RESULTS.write_text(json.dumps(record, indent=1, default=float) + "\n")
            ratio = row["Frechet after"] / row["Frechet before"]
            print(
                f"{folder.name}, {name}: {first.verdict.outcome} to "
                f"{after[-1].verdict.outcome}, Frechet times {ratio:.2f}, "
                f"{row['success']}",
                flush=True,
            )


if __name__ == "__main__":
    main()
