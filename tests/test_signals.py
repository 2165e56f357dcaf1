"""SIGTERM and Ctrl-C while the main thread is in C, as in a compilation."""

import signal
import subprocess
import sys
import time

import pytest

# Key stretching stands for XLA: minutes in C, in which Python hears nothing.
PROGRAM = """
import hashlib, sys
from puredif_jax.runs import signals
signals.REACH, signals.STORE, signals.UNWIND = 0.2, 60.0, float(sys.argv[2])
signals.watch()
if sys.argv[1] != "starting":
    signals.work()
print("!", flush=True)
while True:
    try:
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
    except KeyboardInterrupt:
        pass  # swallowed, as in a callback of a library
"""


def ended(phase: str, unwind: float, *numbers: int) -> tuple[int, str]:
    """How the program ends after signals, and what it says."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, phase, str(unwind)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.read(1) == "!"
    for number in numbers:
        time.sleep(0.1)
        process.send_signal(number)
    try:
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, said


@pytest.mark.parametrize(
    "phase,unwind,numbers,status,words",
    [
        ("starting", 60, [signal.SIGINT], 130, "interrupted"),
        ("starting", 60, [signal.SIGTERM], 143, "stopped by SIGTERM"),
        ("working", 60, [signal.SIGTERM], 143, "in the midst of a long operation"),
        ("working", 0.2, [signal.SIGINT], 130, "interrupted"),
        ("working", 60, [signal.SIGINT, signal.SIGINT], 130, "interrupted"),
    ],
)
def test_a_signal_ends_the_program_with_one_sentence(
    phase, unwind, numbers, status, words
) -> None:
    found, said = ended(phase, unwind, *numbers)
    assert found == status and words in said and said.count("\n") == 1
    assert "the same command goes on from what is stored" in said


SAFE = """
import os, signal, time
from puredif_jax.runs import signals
signals.REACH = 0.5
signals.watch()
signals.work()
assert not signals.must_stop()
os.kill(os.getpid(), signal.SIGTERM)
while not signals.must_stop():
    time.sleep(0.01)
time.sleep(1.0)  # the state is stored, for longer than a safe point may take
print("stored")
"""


def test_what_reaches_a_safe_point_has_time_to_store() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SAFE], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("stored\n", "")
