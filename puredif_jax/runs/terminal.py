"""What a stranger's text may do on a terminal and in a log: nothing but be read."""

from __future__ import annotations

import copy
import io
import logging
import os
import sys

from absl import logging as absl_logging

from puredif_jax.types import shown


class OneLine(absl_logging.PythonFormatter):
    """absl's lines, each message on one of them; a traceback is set off by a bar."""

    def format(self, record: logging.LogRecord) -> str:
        safe = copy.copy(record)  # other handlers get it as it was
        safe.msg, safe.args = shown(record.getMessage(), 4000), ()
        if record.exc_info and not record.exc_text:
            safe.exc_text = self.formatException(record.exc_info)
        if safe.exc_text:
            lines = safe.exc_text.split("\n")
            safe.exc_text = "\n".join(f"  | {shown(line)}" for line in lines)
        return super().format(safe)


def protect() -> None:
    """Escapes what is logged, and what the encoding of stdout does not have.

    Such an encoding would end the program at a name that it cannot write.
    """
    absl_logging.get_absl_handler().setFormatter(OneLine())
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Prints; a reader that wants no more, such as `head`, ends the program quietly."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
