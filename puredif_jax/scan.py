"""Scan: audits models in diffusers' format, one by one, and says what they are."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging

from puredif_jax import config, convert, parallel
from puredif_jax.audit import SCOPE
from puredif_jax.diffusion import DDIM, DDPM
from puredif_jax.experiment import Evaluation, Experiment, Scan
from puredif_jax.lab import ZOO
from puredif_jax.report import Report, Section, environment
from puredif_jax.run import RunError, bind_scan, report_of
from puredif_jax.stages import FOLDER, numbered
from puredif_jax.sweep import in_turn, keep_programs, perform_once
from puredif_jax.types import InputError

STATUS = {"backdoored": 3, "error": 1, "could not tell": 2, "clean": 0}
"""Exit status of a scan: of the first of these that any of its models is."""

LONGEST_LIST = 1_000_000  # bytes
LOOSE = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")

Row = dict[str, Any]
Models = dict[str, pathlib.Path | InputError]


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
    scan = scan.located()
    config.check(scan)
    models = find_models(scan)
    _keep_apart(scan, models)
    given = bind_scan(pathlib.Path(scan.workdir), config.to_dict(scan))
    if given != scan.model:  # the table has models of earlier calls
        scan = dataclasses.replace(scan, model=given)
        models = find_models(scan)
        _keep_apart(scan, models)
    keep_programs(scan.workdir)
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


def find_models(scan: Scan) -> Models:
    """The folders of all models of a scan, by names of their own.

    Of several names, one that leads to no model has what is wrong with it instead; and
    a folder that has parts of a model only is one, for the audit to refuse.

    Raises:
      InputError: there is no model.
    """
    found: list[tuple[str, pathlib.Path | InputError]] = []
    for name in scan.model:
        try:
            found += _named(name, scan.offline)
        except InputError as error:
            found.append((name, error))
    errors = [folder for _, folder in found if isinstance(folder, InputError)]
    if len(errors) == len(found):
        raise errors[0]
    models: Models = {}
    for name, folder in found:
        if isinstance(folder, InputError):
            stem = re.sub(r"[^\w-]+", "-", name)[-60:]
        else:
            whole = pathlib.Path(os.path.realpath(folder))
            stem = whole.name
            if stem == FOLDER:  # of a run
                stem = whole.parent.name
            elif whole.parent.name == "snapshots":  # of the Hub's cache
                stem = whole.parents[1].name
        models[numbered(stem, models)] = folder
    return models


def _named(name: str, offline: bool) -> list[tuple[str, pathlib.Path | InputError]]:
    """All models that one name means: a folder, all below a folder, a list."""
    found: list[tuple[str, pathlib.Path | InputError]] = []
    path = convert.find_folder(name, offline)
    if name == "zoo" and not path.exists():
        path = ZOO
    if path.is_file():
        for line in _lines(path):
            try:
                folder = convert.find_folder(line, offline)
                found.append((line, _model_in(folder) or folder))
            except InputError as error:
                found.append((line, error))
    elif model := _model_in(path):
        found.append((name, model))
    elif path.is_dir():
        found += _below(path)
    if found:
        return found
    raise RunError(
        f"{name} is no model: give a folder in diffusers' format (with "
        "unet/config.json), a folder that has such folders, a text file that names "
        "one a line, or a name of the Hub"
    )


def _below(
    path: pathlib.Path,
) -> Iterator[tuple[str, pathlib.Path | InputError]]:
    """Every model in a folder, at any depth, and what cannot be one for its faults."""
    for entry in _entries(path):
        try:
            if model := _model_in(entry):
                yield entry.name, model
            elif entry.is_dir() and not entry.is_symlink():
                yield from _below(entry)
            elif entry.suffix in LOOSE:
                raise RunError(
                    f"{entry} is a file of weights without its configuration: a model "
                    "is a folder with unet/config.json"
                )
        except InputError as error:
            yield entry.name, error


def _entries(path: pathlib.Path) -> list[pathlib.Path]:
    """What lies in a folder; raises RunError where it cannot be read."""
    try:
        return sorted(path.iterdir())
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror})") from error


def _lines(path: pathlib.Path) -> list[str]:
    """What a text file names, a line each; "#" begins a remark.

    Raises:
      RunError: it is no text, or cannot be read.
    """
    try:
        if path.stat().st_size > LONGEST_LIST:
            raise UnicodeError
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except UnicodeError:
        raise RunError(
            f"{path} is a file, and not a text that names models: give the folder of "
            "the model, which has unet/config.json in it"
        ) from None
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror})") from error
    return [line for line in lines if line and not line.startswith("#")]


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


def _model_in(path: pathlib.Path) -> pathlib.Path | None:
    """The model that is a folder, or that a run of ours has left in it.

    A folder with parts of a model is taken for one, so that it is not passed over.
    Raises RunError where it cannot be read.
    """
    parts = ("model_index.json", "unet", "scheduler", convert.WEIGHTS, convert.PICKLE)
    try:
        for folder in (path / FOLDER, path):
            if convert.is_folder(folder):
                return folder
        return path if any(os.path.lexists(path / part) for part in parts) else None
    except OSError as error:  # is_file does not take a missing permission for a no
        raise RunError(f"{path} cannot be read ({error.strerror})") from error


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
    unet, scheduling = convert.read_configs(folder)
    convert.check_weights(folder, unet)
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
        to_clean=scheduling.to_clean,
    )
    try:
        for sampler in (ancestral, deterministic):
            sampler.path(scheduling.betas.tables())
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
