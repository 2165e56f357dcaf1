"""Command line: python -m puredif_jax.main --config=configs/quickstart.py"""

from __future__ import annotations

import os
import pathlib
import sys

from absl import app, flags, logging

from puredif_jax import config, parallel
from puredif_jax.experiment import Scan, Sweep
from puredif_jax.types import InputError

STOPPED = 143  # exit status after a SIGTERM, as a shell has it
_COST = flags.DEFINE_bool(
    "cost", False, "tell what the run would cost, from a few steps, and do not run it"
)


def parse(argv: list[str]):
    """The configuration, and what absl keeps of the command line."""
    try:
        return config.from_flags(flags.FLAGS(argv, known_only=True))
    except config.ConfigError as error:
        sys.exit(f"error: {error}")


def main(parsed) -> None:
    """Does what is configured; bad input ends it with one sentence and status 1.

    A scan ends with its own status: 0 clean, 1 error, 2 could not tell, 3 backdoored.
    `--cost` tells what the run would cost instead.
    """
    wanted, _ = parsed
    status = 0
    try:
        parallel.initialize(os.environ)
        parallel.use_cores()
        # Imported after the devices are initialised.
        if _COST.value:
            from puredif_jax import cost

            found = cost.estimate(wanted)
            if parallel.is_host_zero():
                print(found)
            return
        parallel.stop_on_sigterm()
        if isinstance(wanted, Sweep):
            from puredif_jax.sweep import perform_sweep

            report = perform_sweep(wanted)
        elif isinstance(wanted, Scan):
            from puredif_jax.scan import perform_scan

            report, status = perform_scan(wanted)
        else:
            from puredif_jax.stages import perform
            from puredif_jax.sweep import in_turn, keep_programs

            keep_programs(wanted.workdir)
            report = None
            for _ in in_turn([pathlib.Path(wanted.workdir)]):
                report = perform(wanted)
    except InputError as error:
        sys.exit(f"error: {error}")
    except parallel.Stopped as stopped:
        logging.warning("%s", stopped)
        sys.exit(STOPPED)
    if report is None:
        logging.info("a call without only writes the table of all runs")
    elif parallel.is_host_zero():
        logging.info("%s", report.verdict or "done")
        print(report.verdict)
        print(f"report: {wanted.workdir}/report.html")
    if status:
        sys.exit(status)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
