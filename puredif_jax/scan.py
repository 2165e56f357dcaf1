"""Scan: audits models in diffusers' format, one by one, and says what they are."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections import Counter
from typing import Any

import jax
from absl import logging

from puredif_jax import config, convert, parallel
from puredif_jax.diffusion import DDIM, DDPM, LinearBetas
from puredif_jax.experiment import Evaluation, Experiment, Scan
from puredif_jax.lab import ZOO
from puredif_jax.report import Report, Section, environment
from puredif_jax.run import RunError, write_atomically
from puredif_jax.stages import FOLDER
from puredif_jax.sweep import in_turn, keep_programs, perform_once
from puredif_jax.types import InputError

STATUS = {"backdoored": 3, "error": 1, "could not tell": 2, "clean": 0}
"""Exit status of a scan: of the first of these that any of its models is."""

Row = dict[str, Any]


def perform_scan(scan: Scan) -> tuple[Report, int]:
    """Audits every model, or waits for a process that does; writes the table of all.

    A model that cannot be read is an error in the table and does not stop the others.

    Returns:
      The report, and the exit status.

    Raises:
      InputError: there is no model where one is named.
    """
    models = find_models(scan)
    keep_programs(scan.workdir)
    errors: dict[str, str] = {}
    report, status = _summary(scan, models, errors)
    names = list(models)
    homes = [pathlib.Path(scan.workdir) / name for name in names]
    for i in in_turn(homes):
        name, folder = names[i], models[names[i]]
        try:
            experiment = as_experiment(scan, name, folder)
            _mark(homes[i], folder)
            perform_once(experiment, f"model {i + 1} of {len(models)}")
        except (InputError, jax.errors.JaxRuntimeError, MemoryError) as error:
            errors[name] = str(error).strip() or type(error).__name__
            logging.error("%s: %s", name, error)
        report, status = _summary(scan, models, errors)
    return report, status


def find_models(scan: Scan) -> dict[str, pathlib.Path]:
    """The folders of all models of a scan, by names of their own.

    Raises:
      InputError: a path that holds none.
    """
    folders: list[pathlib.Path] = []
    for name in scan.model:
        path = convert.find_folder(name, scan.offline)
        if name == "zoo" and not path.exists():
            path = ZOO
        if path.is_file():
            lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
            named = [line for line in lines if line and not line.startswith("#")]
            found = [convert.find_folder(line, scan.offline) for line in named]
        elif model := _model_in(path):
            found = [model]
        elif path.is_dir():
            found = [m for p in sorted(path.iterdir()) if (m := _model_in(p))]
        else:
            found = []
        if not found:
            raise RunError(
                f"{name} is no model: give a folder in diffusers' format (with "
                "unet/config.json), a folder of such folders, a text file that names "
                "one a line, or a name of the Hub"
            )
        folders += found
    models: dict[str, pathlib.Path] = {}
    for folder in folders:
        whole, count = folder.resolve(), 1
        stem = whole.name
        if stem == FOLDER:  # of a run
            stem = whole.parent.name
        elif whole.parent.name == "snapshots":  # of the Hub's cache
            stem = whole.parents[1].name
        while (name := stem if count == 1 else f"{stem}-{count}") in models:
            count += 1
        models[name] = folder
    return models


def _model_in(path: pathlib.Path) -> pathlib.Path | None:
    """The model that is a folder, or that a run of ours has left in it."""
    for folder in (path / FOLDER, path):
        if convert.is_folder(folder):
            return folder
    return None


def as_experiment(scan: Scan, name: str, folder: pathlib.Path) -> Experiment:
    """The audit of one model: network, schedule and sampling as its folder says.

    Raises:
      InputError: the configuration of the folder is not supported.
    """
    unet, scheduling = convert.read_configs(folder)
    if scheduling.betas.steps != LinearBetas().steps:
        raise RunError(
            f"{folder} has {scheduling.betas.steps} timesteps: the losses of inversion "
            f"are made for {LinearBetas().steps}"
        )
    ancestral = DDPM(
        scan.steps,
        clip=scheduling.clip,
        spacing=scheduling.timestep_spacing,
        offset=scheduling.steps_offset,
        variance=scheduling.variance_type,
    )
    deterministic = DDIM(
        ancestral.steps,
        clip=ancestral.clip,
        spacing=ancestral.spacing,
        offset=ancestral.offset,
    )
    for sampler in (ancestral, deterministic):
        try:
            sampler.path(scheduling.betas.tables())
        except ValueError as error:
            raise RunError(f"{folder} cannot be sampled so: {error}") from error
    return Experiment(
        workdir=f"{scan.workdir}/{name}",
        model=unet,
        audit=dataclasses.replace(scan.audit, weights=(str(folder),)),
        evaluation=Evaluation(
            draws=scan.draws,
            batch=min(scan.draws, Evaluation().batch),
            ancestral=ancestral,
            deterministic=deterministic,
        ),
        schedule=scheduling.betas,
        prediction=scheduling.prediction_type,
        devices=scan.devices,
        seed=scan.seed,
        chunk=scan.chunk,
    )


def _mark(home: pathlib.Path, folder: pathlib.Path) -> None:
    """Notes which weights a run is of, and refuses a run of others.

    Raises:
      RunError: the folder of the run holds one of other weights.
    """
    digest = hashlib.sha256()
    kinds = (".json", ".safetensors", ".bin")
    files = (p for p in folder.rglob("*") if p.suffix in kinds and p.is_file())
    for path in sorted(files):
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    mark, found = home / "model.json", {"sha256": digest.hexdigest()}
    begun = any((home / part).exists() for part in ("checkpoints", "results"))
    if mark.exists() and begun:
        if json.loads(mark.read_text()) != found:
            raise RunError(
                f"{home} holds the scan of another version of {folder}: give another "
                "--config.workdir, or remove the folder to start again"
            )
    elif parallel.is_host_zero():
        write_atomically(mark, json.dumps(found).encode())


def _row(home: pathlib.Path, name: str) -> Row | None:
    """What the run of a model has found; None before its end."""
    path = home / name / "report.json"
    if not path.exists():
        return None
    (audit,) = json.loads(path.read_text())["numbers"].values()
    verdict = audit["verdict"]
    best = [
        row
        for row in audit["inversions"]
        if (row["method"], row["hypothesis"]) == ("puredif", verdict["hypothesis"])
    ]
    return {
        "model": name,
        "verdict": verdict["outcome"],
        "p": verdict["p_value"],
        "score": verdict["score"],
        "hypothesis": verdict["hypothesis"],
        "trigger rms": (2 * best[0]["kl_mean"]) ** 0.5,
        "network evaluations": sum(
            r["network evaluations"] for r in audit["inversions"]
        ),
        "seconds": sum(row["seconds"] for row in audit["inversions"]),
        "reason": verdict["reason"],
        "report": f"{name}/report.html",
    }


def _summary(
    scan: Scan, models: dict[str, pathlib.Path], errors: dict[str, str]
) -> tuple[Report, int]:
    """Writes the report of all models as far as they are known."""
    home = pathlib.Path(scan.workdir)
    rows: list[Row] = []
    for name in models:
        if name in errors:
            rows.append({"model": name, "verdict": "error", "reason": errors[name]})
        elif row := _row(home, name):
            rows.append(row)
        else:
            rows.append({"model": name, "verdict": "not done yet"})
    counts = Counter(row["verdict"] for row in rows)
    status = next((STATUS[kind] for kind in STATUS if counts[kind]), 0)
    if counts["not done yet"]:
        status = status or STATUS["could not tell"]
    if len(rows) == 1:
        verdict = f"{rows[0]['verdict']}: {rows[0].get('reason', '')}"
    else:
        shown = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        verdict = f"{len(rows)} models: {shown}"
    placeless = dataclasses.replace(scan, workdir=home.name)
    report = Report(
        title=home.name,
        verdict=verdict,
        sections=(Section("Models", table=tuple(rows)),),
        config=config.to_dict(placeless),
        environment=environment() | {"device": jax.devices()[0].device_kind},
        numbers={"status": status},
    )
    if parallel.is_host_zero():
        report.write(home)
    return report, status
