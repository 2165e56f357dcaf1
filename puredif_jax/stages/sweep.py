"""Many runs by one command: each in its own folder, shared between processes."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import logging

from puredif_jax.files.whole import safe_name, shortened, write_whole
from puredif_jax.runs import config, parallel
from puredif_jax.runs.binding import (
    RunError,
    bind_sweep,
    is_run,
    make_folder,
    numbers_of,
    pin,
)
from puredif_jax.runs.compilation import keep_programs
from puredif_jax.runs.page import Section
from puredif_jax.runs.report import Report, as_csv, environment
from puredif_jax.stages.base import results
from puredif_jax.stages.experiment import Experiment, Sweep
from puredif_jax.stages.finding import Finding
from puredif_jax.stages.gallery import Shown, gallery
from puredif_jax.stages.models import Models
from puredif_jax.stages.perform import digests, opened, perform
from puredif_jax.types import InputError


def perform_sweep(sweep: Sweep) -> Report | None:
    """Does the runs that nobody has done or is doing; then writes the table of all.

    Waits for the runs of other processes, and does the runs of a process that died. A
    run whose input is wrong is named at the end and does not stop the others.

    Returns:
      The report of the whole sweep; None where `only` left some out.

    Raises:
      InputError: some runs had wrong input; names each of them.
    """
    bind_sweep(pathlib.Path(sweep.workdir))
    keep_programs(sweep.workdir)
    failed: dict[str, str] = {}
    chosen = sweep.chosen()
    for i in in_turn([pathlib.Path(experiment.workdir) for experiment in chosen]):
        experiment = chosen[i]
        _wait_for_base(sweep, experiment)
        try:
            perform_once(experiment, f"run {i + 1} of {len(chosen)}")
        except InputError as error:
            if not parallel.all_fail(experiment.workdir):
                raise  # it is this process's own, and the others wait for it
            failed[experiment.workdir] = str(error)
    if failed:
        first = next(iter(failed))
        raise InputError(
            f"{len(failed)} of {len(chosen)} runs were not done "
            f"({shortened([*failed])}): {first}: {failed[first]}"
        )
    return _summary(sweep)


def _wait_for_base(sweep: Sweep, experiment: Experiment) -> None:
    """Waits while another process trains the model that a run starts from."""
    weights = pathlib.Path(experiment.weights or "")
    homes = {pathlib.Path(each.workdir) for each in sweep.placed()}
    while weights.parent in homes and not weights.exists():
        with _claim(weights.parent) as claimed:
            if claimed:  # nobody is at it
                return
        logging.log_every_n_seconds(
            logging.INFO, "waiting for another process at %s", 300, weights.parent
        )
        parallel.safe_point()
        time.sleep(1)


def perform_once(
    experiment: Experiment, label: str, models: Models | None = None
) -> bool:
    """Does a run that has no report yet, or one by another detector or of other noise.

    Args:
      experiment: the run.
      label: goes into the log where there is anything to do.
      models: where weights are read; what is read there already is not read again.

    Returns:
      Whether there was anything to do.

    Raises:
      InputError: its input is wrong, or its folder holds another run, or one of other
        weights.
    """
    models = opened(experiment) if models is None else models
    folder = pathlib.Path(experiment.workdir)
    numbers, screen = reported(experiment), experiment.screen
    done = numbers is not None and (screen is None or screen.done(numbers))
    if parallel.agreed(done):
        pin(folder, digests(experiment, models))
        return False
    logging.info("%s: %s", label, folder)
    perform(experiment, models)
    return True


def reported(experiment: Experiment) -> dict[str, Any] | None:
    """What the report of a run says, if it is of this configuration; else None.

    Raises:
      RunError: its folder holds another run.
    """
    folder, wanted = pathlib.Path(experiment.workdir), config.to_dict(experiment)
    return numbers_of(folder, wanted) if is_run(folder, wanted) else None


def in_turn(folders: Sequence[pathlib.Path]) -> Iterator[int]:
    """The index of each folder, once, while no other process is at it.

    Free folders come first. The others follow when their processes are done with them,
    or dead.
    """
    waiting = list(range(len(folders)))
    took: list[float] = []  # seconds of those that were not done already
    while waiting:
        for i in tuple(waiting):
            with _claim(folders[i]) as claimed:
                if claimed:
                    waiting.remove(i)
                    began = time.monotonic()
                    yield i
                    if (seconds := time.monotonic() - began) > 1:
                        took.append(seconds)
                        _say_how_long(took, len(waiting))
        if waiting:
            names = ", ".join(str(folders[i]) for i in waiting)
            logging.log_every_n_seconds(
                logging.INFO, "waiting for other processes at %s", 300, names
            )
            parallel.safe_point()
            time.sleep(1)


def _say_how_long(took: Sequence[float], left: int) -> None:
    minutes = sum(took) / 60
    logging.info(
        "%d done in %.1f minutes by this process, %d to do: about %.0f minutes",
        len(took),
        minutes,
        left,
        minutes / len(took) * left,
    )


@contextlib.contextmanager
def _claim(folder: pathlib.Path) -> Iterator[bool]:
    """Whether the run in a folder is ours; a dead process claims nothing.

    The processes of one program on several hosts share every run.
    """
    if jax.process_count() > 1:
        yield True
        return
    import fcntl

    make_folder(folder)
    try:
        opened = (folder / "lock").open("a")
    except OSError as error:
        raise RunError(
            f"{folder}/lock cannot be opened ({error.strerror}), so it may be the run "
            "of another user: give another --config.workdir"
        ) from error
    with opened as file:
        free = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError as error:
            logging.warning(
                "%s cannot be locked (%s): start no second call", folder, error
            )
        yield free


def _summary(sweep: Sweep) -> Report | None:
    """Tables of all runs, by kind, also as CSV, and pictures; None if some are left."""
    tables: dict[str, list[dict[str, Any]]] = {}
    shown: list[Shown] = []
    for experiment, placed in zip(sweep.experiments, sweep.placed(), strict=True):
        folder = pathlib.Path(placed.workdir)
        try:
            numbers = reported(placed)
        except RunError as error:  # of one that was not asked for
            logging.warning("no table of all runs: %s", error)
            return None
        if numbers is None:
            return None
        found = results(numbers, str(folder / "report.json"))
        audits = [each for each in found if isinstance(each, Finding)]
        shown.append(Shown(experiment.workdir, folder, experiment.attack, audits))
        for result in found:
            for kind, rows in result.tables().items():
                named = [{"run": experiment.workdir} | dict(row) for row in rows]
                tables.setdefault(kind, []).extend(named)
    title = pathlib.Path(sweep.workdir).name
    sections = [Section(kind, table=tuple(rows)) for kind, rows in tables.items()]
    if (triggers := gallery(shown)) is not None:
        sections.append(triggers)
    report = Report(
        title=title,
        sections=tuple(sections),
        config=config.to_dict(dataclasses.replace(sweep, workdir=title)),
        environment=environment() | {"device": jax.devices()[0].device_kind},
    )
    if parallel.is_host_zero():
        for kind, table in tables.items():
            name = f"{safe_name(kind)}.csv"
            write_whole(pathlib.Path(sweep.workdir) / name, as_csv(table))
        report.write(sweep.workdir)
    return report
