"""Command line: python -m puredif_jax.main --config=configs/quickstart.py"""

from __future__ import annotations

import os
import sys

from absl import app, flags, logging

from puredif_jax import config, parallel
from puredif_jax.types import InputError


def parse(argv: list[str]):
    """The configuration, and what absl keeps of the command line."""
    try:
        return config.from_flags(flags.FLAGS(argv, known_only=True))
    except config.ConfigError as error:
        sys.exit(f"error: {error}")


def main(parsed) -> None:
    """Runs the configured experiment; bad input ends it with one sentence."""
    experiment, _ = parsed
    from puredif_jax.stages import perform  # after the devices are initialised

    try:
        parallel.initialize(os.environ)
        report = perform(experiment)
    except InputError as error:
        sys.exit(f"error: {error}")
    if parallel.is_host_zero():
        logging.info("%s", report.verdict or "done")
        print(report.verdict)
        print(f"report: {experiment.workdir}/report.html")


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
