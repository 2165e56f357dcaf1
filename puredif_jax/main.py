"""Command line: python -m puredif_jax.main --config=configs/quickstart.py

    --config=FILE          what to do: a Python file whose get_config() returns an
                           Experiment, a Sweep or a Scan; the name of a file in
                           configs/, such as scan; or the config.json of a run
    --config.NAME=VALUE    changes a field of it, such as --config.training.steps=100
    --cost                 tell what the run would cost, and do not run it
    --help                 this; with --config=FILE what that does, and its fields
    --version              the version of the package

The same in fewer words, where a MODEL is a folder, a file or a name of the Hub:

    puredif FILE [MODEL ...] --NAME=VALUE ...
    puredif cost FILE ...
    puredif FILE --help

The same command goes on with a run that was interrupted.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from puredif_jax.runs import signals

if __name__ == "__main__":
    signals.watch()  # before the imports that take seconds

from absl import app, flags, logging

from puredif_jax.runs import (
    command_line,
    config,
    parallel,
    settings,
    sources,
    terminal,
)
from puredif_jax.runs.compilation import keep_programs
from puredif_jax.runs.report import environment
from puredif_jax.stages.experiment import Experiment, Scan, Sweep
from puredif_jax.types import InputError, shown

_COST = flags.DEFINE_bool(
    "cost", False, "tell what the run would cost, from a few steps, and do not run it"
)


def parse(argv: list[str]) -> tuple[Any, list[str]]:
    """The configuration that flags give, and what absl keeps of the command line."""
    parts = [part for arg in argv[1:] for part in arg.split("=", 1)]
    given = [b for a, b in itertools.pairwise(parts) if a.strip("-") == "config"]
    return _parsed(argv, given, command_line.from_flags)


def parse_words(argv: list[str]) -> tuple[Any, list[str]]:
    """The configuration that words give, and what absl keeps of the command line."""
    if argv[1:2] == ["cost"]:
        argv = [argv[0], *argv[2:], "--cost"]
    elif argv[1:] in ([], ["help"]):
        argv = [argv[0], "--help"]
    given = [arg for arg in argv[1:] if not arg.startswith("-")]
    return _parsed(argv, given, command_line.from_words)


def _parsed(
    argv: list[str],
    given: Sequence[str],
    read: Callable[[Sequence[str]], tuple[Any, list[str]]],
) -> tuple[Any, list[str]]:
    """What `read` makes of a command line; help is printed, an error ends it.

    Args:
      argv: the command line, program name first.
      given: what it names; the first is a configuration.
      read: takes what absl does not know.
    """
    terminal.protect()
    if "--version" in argv:
        terminal.say(f"puredif_jax {environment()['puredif_jax']}")
        sys.exit(0)
    asked = {"-h", "-help", "--help"}.intersection(argv)
    try:
        if asked and not given:
            terminal.say(__doc__)
            terminal.say(f"In configs/ are {', '.join(sources.shipped())}")
            sys.exit(0)
        if asked:
            argv = [arg for arg in argv if arg not in asked]
        wanted, remaining = read(flags.FLAGS(argv, known_only=True))
    except (config.ConfigError, flags.Error) as error:
        sys.exit(f"error: {shown(str(error))}")
    if not isinstance(wanted, Experiment | Sweep | Scan):
        sys.exit(
            f"error: get_config() returns a {type(wanted).__name__}: expected an "
            "Experiment, a Sweep or a Scan"
        )
    if asked:
        terminal.say(f"{sources.about(given[0])}\nIts fields are:\n")
        terminal.say("\n".join(settings.describe(wanted)))
        sys.exit(0)
    return wanted.located() if isinstance(wanted, Scan) else wanted, remaining


def main(parsed: tuple[Any, list[str]]) -> None:
    """Does what is configured; bad input ends it with one sentence and status 1.

    A scan ends with its own status: 0 clean, 1 error, 2 could not tell, 3 backdoored.
    `--cost` tells what the run would cost instead.
    """
    wanted, _ = parsed
    status = 0
    try:
        parallel.initialize(os.environ)
        parallel.use_cores()
        devices = parallel.describe_devices()
        # Imported after the devices are initialised.
        if _COST.value:
            from puredif_jax.stages import cost

            found = cost.estimate(wanted)
            if parallel.is_host_zero():
                print(found)
            return
        parallel.stop_on_sigterm()
        if parallel.is_host_zero():
            logging.info(
                "%s; on %s; --cost tells how long it takes", wanted.plan, devices
            )
        if isinstance(wanted, Sweep):
            from puredif_jax.stages.sweep import perform_sweep

            report = perform_sweep(wanted)
        elif isinstance(wanted, Scan):
            from puredif_jax.stages.scan import perform_scan

            report, status = perform_scan(wanted)
        else:
            from puredif_jax.stages.perform import perform
            from puredif_jax.stages.sweep import in_turn

            keep_programs(wanted.workdir)
            report = None
            for _ in in_turn([pathlib.Path(wanted.workdir)]):
                report = perform(wanted)
    except InputError as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # of a library: the disk, or a permission
        sys.exit(f"error: {InputError(error)}")
    except parallel.Stopped as stopped:
        logging.warning("%s", stopped)
        sys.exit(signals.STOPPED)
    except KeyboardInterrupt:
        logging.warning("interrupted: %s", signals.GOES_ON)
        sys.exit(signals.INTERRUPTED)
    if report is None:
        logging.info("the table of all runs is written when all are done")
    elif parallel.is_host_zero():
        print(report.verdict or "done")
        print(f"report: {shown(wanted.workdir)}/report.html")
    if status:
        sys.exit(status)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
