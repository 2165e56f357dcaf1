"""Scan: audits models in diffusers' format, one by one, and says what they are."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections import Counter
from typing import Any

import jax
from absl import logging

from puredif_jax import config, convert, discovery, parallel
from puredif_jax.audit import SCOPE
from puredif_jax.diffusion import DDIM, DDPM
from puredif_jax.discovery import Found, Models
from puredif_jax.experiment import Evaluation, Experiment, Scan
from puredif_jax.lab import ZOO
from puredif_jax.report import Report, Section, environment
from puredif_jax.run import RunError, make_folder, report_of
from puredif_jax.sweep import in_turn, keep_programs, perform_once
from puredif_jax.types import InputError

STATUS = {"backdoored": 3, "error": 1, "could not tell": 2, "clean": 0}
"""Exit status of a scan: of the first of these that any of its models is."""

Row = dict[str, Any]


def perform_scan(scan: Scan) -> tuple[Report, int]:
    """Audits every model, or waits for a process that does; writes the table of all.

    A model that cannot be read, or whose audit fails, is an error in the table and does
    not stop the others.

    Returns:
      The report, and the exit status.

    Raises:
      InputError: there is no model at all where they are named, or `workdir` is a
        folder of models.
    """
    config.check(scan)
    models, notes = find(scan)
    _keep_apart(scan, models)
    make_folder(pathlib.Path(scan.workdir))
    keep_programs(scan.workdir)
    for note in notes:
        logging.info("%s", InputError(note))
    errors: dict[str, str] = {}
    report, status = _summary(scan, models, errors)
    names = list(models)
    homes = [pathlib.Path(scan.workdir) / name for name in names]
    for i in in_turn(homes):
        name, folder = names[i], models[names[i]]
        try:
            experiment = as_experiment(scan, name, folder)
            perform_once(experiment, f"model {i + 1} of {len(models)}")
        except parallel.Stopped:
            raise
        except InputError as error:
            errors[name] = str(error)
            logging.error("%s: %s", name, error)
        except Exception as error:  # whatever a stranger's model has led to
            errors[name] = str(InputError(f"{type(error).__name__}: {error}"))
            logging.exception("%s: %s", name, errors[name])
        report, status = _summary(scan, models, errors)
    return report, parallel.agreed(status)


def find(scan: Scan) -> Found:
    """All models of a scan, by names of their own, and notes on what is none.

    A model that cannot be scanned has what is wrong with it in place of its path.

    Raises:
      InputError: there is no model.
    """
    shipped = "zoo" in scan.model and not pathlib.Path("zoo").exists()
    names = [str(ZOO) if shipped and name == "zoo" else name for name in scan.model]
    return discovery.find(names, scan.offline, scan.variant)


def find_models(scan: Scan) -> Models:
    """The models that `find` finds."""
    return find(scan).models


def _keep_apart(scan: Scan, models: Models) -> None:
    """A scan must not write where a model lies.

    Raises:
      RunError: it would.
    """
    for name, folder in models.items():
        home = pathlib.Path(scan.workdir) / name
        if isinstance(folder, InputError):
            continue
        whole, place = (pathlib.Path(os.path.realpath(x)) for x in (folder, home))
        if whole.is_relative_to(place) or place.is_relative_to(whole):
            raise RunError(
                f"the scan of {folder} would write into {home}, where it lies: give "
                "another --config.workdir"
            )


def as_experiment(
    scan: Scan, name: str, folder: pathlib.Path | InputError
) -> Experiment:
    """The audit of one model: network, schedule and sampling as its folder says.

    Raises:
      InputError: the configuration of the folder is not supported, its weights are not
        those of its network, or this is what `find_models` has found instead.
    """
    if isinstance(folder, InputError):
        raise folder
    spec = convert.read_spec(folder, scan.scheduler)
    scheduling = spec.scheduling
    if scheduling is None:
        raise convert.no_scheduler(folder)
    remarks = (*spec.remarks, *convert.check_weights(folder, spec.unet))
    for remark in remarks:
        logging.info("%s: %s", name, InputError(remark))
    betas = scheduling.betas
    ancestral = DDPM(
        min(scan.steps, betas.steps),
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
        to_clean=scheduling.to_clean,
    )
    try:
        for sampler in (ancestral, deterministic):
            sampler.path(betas.tables())
        return Experiment(
            workdir=f"{scan.workdir}/{name}",
            model=spec.unet,
            audit=dataclasses.replace(scan.audit, weights=(str(folder),)),
            evaluation=Evaluation(
                draws=scan.draws,
                batch=min(scan.draws, Evaluation().batch),
                ancestral=ancestral,
                deterministic=deterministic,
            ),
            schedule=betas,
            prediction=scheduling.prediction_type,
            devices=scan.devices,
            seed=scan.seed,
            chunk=scan.chunk,
            save_every=scan.save_every,
        )
    except ValueError as error:
        raise RunError(f"{folder} cannot be scanned so: {error}") from error


def _row(name: str, report: dict[str, Any]) -> Row:
    """What the run of a model has found."""
    (audit,) = report["numbers"].values()
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
        "trigger rms": (2 * float(best[0]["kl_mean"])) ** 0.5,
        "network evaluations": sum(
            r["network evaluations"] for r in audit["inversions"]
        ),
        "seconds": sum(row["seconds"] for row in audit["inversions"]),
        "reason": verdict["reason"],
        "report": f"{name}/report.html",
    }


def _summary(scan: Scan, models: Models, errors: dict[str, str]) -> tuple[Report, int]:
    """Writes the report of all models as far as they are known."""
    home = pathlib.Path(scan.workdir)
    about = config.to_dict(dataclasses.replace(scan, workdir=home.name))
    rows: list[Row] = []
    for name in models:
        if name in errors:
            rows.append({"model": name, "verdict": "error", "reason": errors[name]})
        elif found := report_of(home / name, about):
            rows.append(_row(name, found))
        else:
            rows.append({"model": name, "verdict": "not done yet"})
    counts = Counter(row["verdict"] for row in rows)
    status = next((STATUS[kind] for kind in STATUS if counts[kind]), 0)
    if counts["not done yet"]:
        status = status or STATUS["could not tell"]
    if len(rows) == 1:
        (row,) = rows
        verdict = f"{row['verdict']}: {row.get('reason', '')} ({row['model']}"
        verdict += f", p = {row['p']:.3g})" if "p" in row else ")"
    else:
        shown = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        verdict = f"{len(rows)} models: {shown}"
    report = Report(
        title=home.name,
        verdict=verdict,
        sections=(Section("Models", SCOPE, tuple(rows)),),
        config=about,
        environment=environment() | {"device": jax.devices()[0].device_kind},
        numbers={"status": status},
    )
    if parallel.is_host_zero():
        report.write(home)
    return report, status
