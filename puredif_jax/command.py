"""The command `puredif`: as `python -m puredif_jax.main`, in fewer words."""

from __future__ import annotations

from puredif_jax.runs import signals


def run() -> None:
    """Does what the words of the command line say: `puredif scan FOLDER`."""
    signals.watch()  # before the imports that take seconds
    from absl import app

    from puredif_jax import main

    app.run(main.main, flags_parser=main.parse_words)
