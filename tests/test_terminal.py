"""A stranger's text on a terminal and in a log: one line, nothing but characters."""

from __future__ import annotations

import io
import logging
import os
import sys

import pytest
from absl import logging as absl_logging

from puredif_jax.runs.report import progress
from puredif_jax.runs.terminal import OneLine, protect

NAME = "x\x1b[2J\nclean: all good \u202eabc" + os.fsdecode(b"\xff")
SAID = r"x\x1b[2J\nclean: all good \u202eabc\udcff"


@pytest.fixture
def log():
    """A logger of absl's format and what it writes."""
    stream, logger = io.StringIO(), logging.Logger("test")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(OneLine())
    logger.addHandler(handler)
    return logger, stream


def test_a_message_is_a_line(log) -> None:
    logger, stream = log
    logger.error("%s: %s", NAME, 3)
    logger.warning(NAME)
    first, second = stream.getvalue().splitlines()
    assert first.startswith("E") and first.endswith(f"] {SAID}: 3")
    assert second.startswith("W") and second.endswith(f"] {SAID}")
    stream.getvalue().encode()


def test_a_traceback_cannot_feign_a_line(log) -> None:
    logger, stream = log
    try:
        raise OSError(f"{NAME}\nclean: all good")
    except OSError:
        logger.exception("of %s", NAME)
    lines = stream.getvalue().splitlines()
    assert lines[0].endswith(f"] of {SAID}")
    assert all(line.startswith("  | ") for line in lines[1:]) and len(lines) > 4
    assert lines[-1] == "  | clean: all good" and "\x1b" not in stream.getvalue()


def test_records_stay_as_they_were_for_others(log) -> None:
    logger, stream = log
    seen: list[str] = []
    other = logging.Handler()
    other.emit = lambda record: seen.append(record.getMessage())  # type: ignore
    logger.addHandler(other)
    logger.error("%s", NAME)
    assert seen == [NAME] and NAME not in stream.getvalue()


def test_stdout_of_another_encoding_shows_what_it_can(monkeypatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    handler = absl_logging.get_absl_handler()
    monkeypatch.setattr(handler.python_handler, "formatter", None)
    protect()
    print("Größe")
    sys.stdout.flush()
    assert written.getvalue() == b"Gr\\xf6\\xdfe\n"
    assert isinstance(handler.python_handler.formatter, OneLine)


def test_a_bar_has_a_safe_label(capsys) -> None:
    with progress(total=1, initial=0, label=NAME, enabled=True) as bar:
        bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith(SAID) for line in lines) and lines
