"""SIGTERM and Ctrl-C: the program ends at a safe point, or soon without one.

A signal that comes while XLA compiles or a long program runs is not seen by Python's
main thread, so another thread waits for it. What is stored is whole at any moment, so
the process may end anywhere, as after kill -9. No import here is slow.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

STOPPED, INTERRUPTED = 143, 130  # exit status after SIGTERM and SIGINT, as of a shell
GOES_ON = "the same command goes on from what is stored"
REACH = 10.0  # seconds from a SIGTERM to a safe point, or the process ends without
STORE = 60.0  # seconds from there to the end, in which the state is stored
UNWIND = 3.0  # seconds from a Ctrl-C to the end


class _State:
    """What has come, and what the main thread has answered."""

    watched = False
    working = False
    terminated = False
    interrupts = 0
    reached = threading.Event()


def watch() -> None:
    """Ends the process at a signal, from now on; `work` says that a run has begun.

    For the main thread of a program, before its long imports: no library that they
    enter can swallow a Ctrl-C.
    """
    _State.watched = True
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    signal.signal(signal.SIGINT, _note)
    signal.signal(signal.SIGTERM, _note)
    signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    threading.Thread(target=_wait, args=(receiver,), daemon=True).start()


def work(sigterm: bool = True) -> None:
    """From now on a SIGTERM lets the run reach its next safe point first.

    Ctrl-C raises KeyboardInterrupt. A second one, or one that nobody answers, ends the
    process.

    Args:
      sigterm: False where somebody else listens to it.
    """
    _State.working = True
    if _State.watched:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if sigterm:
        signal.signal(signal.SIGTERM, _note)


def must_stop() -> bool:
    """Whether a SIGTERM has come; whoever asks has reached a safe point."""
    if _State.terminated:
        _State.reached.set()
    return _State.terminated


def _note(number: int, frame: Any) -> None:
    del frame
    if number == signal.SIGTERM:
        _State.terminated = True


def _wait(receiver: int) -> None:
    """The other thread: signals as they come, whatever the main thread is at."""
    while True:
        for number in os.read(receiver, 64):
            if number == signal.SIGINT:
                _State.interrupts += 1
                if not _State.working or _State.interrupts > 1:
                    _end(INTERRUPTED, f"interrupted: {GOES_ON}")
                _after(UNWIND, INTERRUPTED, f"interrupted: {GOES_ON}")
            elif number == signal.SIGTERM:
                if not _State.working:
                    _end(STOPPED, f"stopped by SIGTERM: {GOES_ON}")
                threading.Thread(target=_terminate, daemon=True).start()


def _terminate() -> None:
    text = f"stopped by SIGTERM in the midst of a long operation: {GOES_ON}"
    if _State.reached.wait(REACH):
        _after(STORE, STOPPED, text)
    else:
        _end(STOPPED, text)


def _after(seconds: float, status: int, text: str) -> None:
    timer = threading.Timer(seconds, _end, (status, text))
    timer.daemon = True
    timer.start()


def _end(status: int, text: str) -> None:
    os.write(2, f"{text}\n".encode())
    os._exit(status)
