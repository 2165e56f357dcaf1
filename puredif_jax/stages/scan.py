"""Scan: audits models in any format, one by one, and says what they are."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import time
import traceback

from absl import logging

from puredif_jax.files.whole import shortened, write_whole
from puredif_jax.formats import diffusers as convert
from puredif_jax.formats import discovery
from puredif_jax.formats.diffusers_layout import parts_of
from puredif_jax.formats.discovery import Found
from puredif_jax.formats.discovery import Models as Rows
from puredif_jax.formats.opening import read_json
from puredif_jax.formats.state_dict import named_leaves
from puredif_jax.runs import config, parallel
from puredif_jax.runs.binding import RunError, bind_scan
from puredif_jax.runs.compilation import keep_programs
from puredif_jax.runs.report import Report
from puredif_jax.runs.sources import from_json
from puredif_jax.stages.evaluation import Evaluation
from puredif_jax.stages.experiment import Experiment, Scan
from puredif_jax.stages.models import Models
from puredif_jax.stages.scan_report import summarise
from puredif_jax.stages.sweep import in_turn, perform_once, reported
from puredif_jax.stages.weights import ZOO
from puredif_jax.types import InputError

SECONDS = 5.0  # between two tables, at most, while rows are errors


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
    models, notes = find(scan)
    _keep_apart(scan, models)
    asked = {*map(_place, models.values())}
    given = bind_scan(pathlib.Path(scan.workdir), config.to_dict(scan))
    if given != scan.model:  # the table has models of earlier calls
        scan = dataclasses.replace(scan, model=given)
        models, notes = find(scan)
        _keep_apart(scan, models)
    keep_programs(scan.workdir)
    for note in notes:
        logging.info("%s", InputError(note))
    errors = {k: str(v) for k, v in models.items() if isinstance(v, InputError)}
    plans = dict.fromkeys(models, scan)
    for name, folder in models.items():
        try:
            if _place(folder) not in asked:
                plans[name] = _as_before(scan, name)
        except InputError as error:
            errors[name] = str(error)
    for name, text in errors.items():
        logging.error("%s: %s", name, text)
    report, status = summarise(scan, models, plans, errors, notes)
    written = time.monotonic()
    names = [name for name in models if name not in errors]
    sources = Models(scan.scheduler)
    homes = [pathlib.Path(scan.workdir) / name for name in names]
    for i in in_turn(homes):
        name, folder = names[i], models[names[i]]
        audited = False
        try:
            experiment = as_experiment(plans[name], name, folder, sources)
            if _place(folder) not in asked:
                if parallel.agreed(reported(experiment) is not None):
                    continue  # an earlier call's, whose noise may be gone
            label = f"model {i + 1} of {len(names)}"
            audited = perform_once(experiment, label, sources)
        except parallel.Stopped:
            raise
        except Exception as error:  # whatever a stranger's model has led to
            if not parallel.all_fail(name):
                raise  # it is this process's own, and the others wait for it
            said = error
            if not isinstance(error, InputError):
                said = InputError(f"{type(error).__name__}: {error}")
            errors[name] = str(said)
            logging.error("%s: %s", name, said)
            if said is not error and homes[i].is_dir() and parallel.is_host_zero():
                write_whole(homes[i] / "traceback.txt", _traceback(error))
        if audited or time.monotonic() - written > SECONDS:
            report, status = summarise(scan, models, plans, errors, notes)
            written = time.monotonic()
    report, status = summarise(scan, models, plans, errors, notes)
    return report, parallel.agreed(status)


def _place(folder: pathlib.Path | InputError) -> object:
    """Where a model lies; what is wrong, if it cannot be scanned."""
    if isinstance(folder, InputError):
        return str(folder)
    return discovery.located(folder)


def _as_before(scan: Scan, name: str) -> Scan:
    """The scan for a model that only an earlier call has named.

    Its starting noise and its repair stay what they were in that call.
    """
    path = pathlib.Path(scan.workdir) / name / "config.json"
    run = from_json(path) if path.exists() else None
    return dataclasses.replace(
        scan,
        screen=run.screen if isinstance(run, Experiment) else None,
        repair=run.repair if isinstance(run, Experiment) else None,
    )


def _pipeline(folder: pathlib.Path) -> str:
    """What the index of a pipeline says that it is, where there is one."""
    index = folder / "model_index.json"
    if not os.path.isfile(index):
        return ""
    found = read_json(index)
    parts = shortened(sorted(parts_of(found))) or "no parts"
    return f" ({found.get('_class_name', 'a pipeline')} with {parts})"


def _traceback(error: Exception) -> bytes:
    """For whoever mends the program; it is not for the log."""
    lines = traceback.format_exception(error)
    return "".join(lines).encode("utf-8", "backslashreplace")


def find(scan: Scan) -> Found:
    """All models of a scan, by names of their own, and notes on what is no model.

    A model that cannot be scanned has what is wrong with it in place of its path.

    Raises:
      InputError: there is no model.
    """
    names = [*map(_of_zoo, scan.model)]
    return discovery.find(names, scan.offline, scan.variant)


def _of_zoo(name: str) -> str:
    """A path for "zoo", the models of the package, and for "zoo/NAME", one of them."""
    first, *rest = pathlib.PurePath(name).parts or ("",)
    shipped = ZOO.joinpath(*rest[:1])
    if first != "zoo" or len(rest) > 1 or pathlib.Path("zoo").exists():
        return name
    return str(shipped) if shipped.is_dir() else name


def find_models(scan: Scan) -> Rows:
    """The models that `find` finds."""
    return find(scan).models


def _keep_apart(scan: Scan, models: Rows) -> None:
    """Refuses a scan that would write where a model lies.

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
    scan: Scan,
    name: str,
    folder: pathlib.Path | InputError,
    sources: Models | None = None,
) -> Experiment:
    """The audit of one model: network, schedule and sampling as its files say.

    Args:
      scan: what is scanned.
      name: of the model.
      folder: where it lies, or what is wrong.
      sources: where models are read.

    Raises:
      InputError: the configuration of the folder is not supported, its weights do not
        fit its network, or `find_models` has found an error instead.
    """
    if isinstance(folder, InputError):
        raise folder
    path = os.path.abspath(folder)  # never the name of a shipped one
    source = (Models(scan.scheduler) if sources is None else sources)[path]
    spec = source.spec
    if spec is None:
        raise RunError(
            f"{folder} is in none of the formats that are read{_pipeline(folder)}: a "
            "folder of diffusers has unet/config.json"
        )
    scheduling = spec.scheduling
    if scheduling is None:
        raise convert.no_scheduler(folder)
    for remark in source.remarks:
        logging.info("%s: %s", name, InputError(remark))
    size = 4 * sum(leaf.size for leaf in named_leaves(spec.network).values())
    free = parallel.free_memory()
    if 2 * size > free:
        raise RunError(
            f"the parameters of {folder} take {size / 2**30:.3g} GiB, and half of what "
            f"is free is {free / 2**31:.3g} GiB"
        )
    betas = scheduling.betas
    if scan.steps > betas.steps:
        logging.info("%s: its schedule allows %d steps of sampling", name, betas.steps)
    try:
        ancestral, deterministic = scheduling.samplers(scan.steps)
    except ValueError as error:
        raise RunError(
            f"{folder} cannot be scanned so: {error}; --config.steps sets the steps"
        ) from error
    try:
        return Experiment(
            workdir=f"{scan.workdir}/{name}",
            model=spec.network,
            audit=dataclasses.replace(
                scan.audit,
                weights=(path,),
                scheduler=scan.scheduler,
            ),
            screen=scan.screen,
            repair=scan.repair,
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
