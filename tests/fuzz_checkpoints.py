"""Damages to what a run has stored: never another result, and never without a word.

    python tests/fuzz_checkpoints.py --out=docs/results/fuzz_checkpoints.json

A tiny training is stopped half way. Then, `--count` times, a file of its newest
checkpoint is cut, emptied, removed or has a bit flipped, and the training goes on in
this process. The same is done to the file of a result that was computed once. Each time
the arrays must be those of a run that nobody has touched, or one sentence says what is
wrong. A damage that is found is named in the log. The places are drawn by `--seed`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import logging
import pathlib
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging as absl_logging
from tiny_config import TINY, get_config

from puredif_jax.runs import parallel
from puredif_jax.runs.report import environment
from puredif_jax.stages import train as stage
from puredif_jax.stages.experiment import Experiment
from puredif_jax.stages.perform import open_lab
from puredif_jax.types import InputError

STOPPED_AT = 6
DAMAGES = ("cut", "emptied", "removed", "a bit flipped")
Outcome = str
SAME, BEFORE, SENTENCE = "the same", "the same, from the one before", "one sentence"


class Fuzzed:
    """A training that was stopped half way, in a folder that is copied and damaged."""

    def __init__(self, home: pathlib.Path) -> None:
        self.home = home
        self.base = home / "base"
        with stopping(STOPPED_AT):
            train(self.base)
        once(self.base)
        self.whole = train(home / "whole") | once(home / "whole")

    def files(self) -> list[pathlib.Path]:
        """What may be damaged: files of the newest checkpoint, and a result."""
        newest = self.base / "checkpoints" / "train" / str(STOPPED_AT)
        found = [p for p in sorted(newest.rglob("*")) if p.is_file()]
        return [p.relative_to(self.base) for p in [*found, *results(self.base)]]

    def go_on(self, file: pathlib.Path, damage: str, rng: random.Random) -> Outcome:
        """What becomes of the run whose file has been damaged."""
        folder = self.home / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.base, folder)
        before = (folder / file).read_bytes()
        harm(folder / file, damage, rng)
        path = folder / file
        changed = not path.exists() or path.read_bytes() != before
        with listening() as said:
            try:
                found = train(folder) | once(folder)
            except InputError as error:
                return SENTENCE if "\n" not in str(error) else "several lines"
        if found.keys() != self.whole.keys():
            return "OTHER ARRAYS"
        for name, array in self.whole.items():
            if array.dtype != found[name].dtype or (array != found[name]).any():
                return f"ANOTHER {name}"
        named = any("damaged" in text for text in said)
        if not named and changed and file in results(folder):
            return "NOT NAMED"
        return BEFORE if named else SAME


def harm(path: pathlib.Path, damage: str, rng: random.Random) -> None:
    """Cuts, empties or removes a file, or flips one of its bits."""
    content = bytearray(path.read_bytes())
    if damage == "removed":
        path.unlink()
        return
    if damage == "emptied" or not content:
        content = bytearray()
    elif damage == "cut":
        content = content[: rng.randrange(len(content))]
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def results(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted((folder / "results").glob("*.npz"))


def experiment(folder: pathlib.Path) -> Experiment:
    config = get_config()
    return Experiment(
        str(folder),
        TINY,
        training=dataclasses.replace(config.training, steps=STOPPED_AT + 2),
        attack=config.attack,
        devices=1,
        chunk=1,
        save_every=0.0,
    )


def train(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The weights at the end, by name; {} where it was stopped."""
    wanted = experiment(folder)
    assert wanted.training is not None
    lab, steps = open_lab(wanted), wanted.training.steps
    try:
        params = stage.train(
            lab, wanted.training, wanted.attack, wanted.data, None, steps
        ).ema_params
    except parallel.Stopped:
        return {}
    named = jax.tree_util.tree_leaves_with_path(jax.device_get(params))
    return {jax.tree_util.keystr(path): leaf for path, leaf in named}


def once(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """A result that is computed once, made of numbers that any place can make again."""
    rng = np.random.default_rng(0)
    arrays = {"delta": rng.normal(size=(16, 16, 1)), "seconds": np.float64(3.5)}
    return open_lab(experiment(folder)).run.once("found", lambda: arrays)


@contextlib.contextmanager
def stopping(step: int) -> Iterator[None]:
    """A SIGTERM after so many calls, each of one step."""
    calls, asked = 0, parallel.must_stop

    def told() -> bool:
        nonlocal calls
        calls += 1
        return calls >= step

    parallel.must_stop = told
    try:
        yield
    finally:
        parallel.must_stop = asked


@contextlib.contextmanager
def listening() -> Iterator[list[str]]:
    """What the log says meanwhile."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    listener = Listener()
    logger = absl_logging.get_absl_logger()
    logger.addHandler(listener)
    try:
        yield said
    finally:
        logger.removeHandler(listener)


def fuzz(
    home: pathlib.Path,
    count: int,
    seed: int,
    say: Callable[[str], Any] = lambda text: None,
) -> dict[str, dict[str, int]]:
    """How often each kind of damage had which outcome; every file has its turns."""
    rng, fuzzed = random.Random(seed), Fuzzed(home)
    table: dict[str, collections.Counter[str]] = {}
    pairs = [(file, damage) for file in fuzzed.files() for damage in DAMAGES]
    rng.shuffle(pairs)
    for i in range(count):
        file, damage = pairs[i % len(pairs)]
        outcome = fuzzed.go_on(file, damage, rng)
        table.setdefault(damage, collections.Counter())[outcome] += 1
        say(f"{i + 1} of {count}: {file}, {damage}: {outcome}")
    return {damage: dict(counts) for damage, counts in table.items()}


def good(table: dict[str, dict[str, int]]) -> int:
    """How many ended as they should."""
    return sum(
        number
        for counts in table.values()
        for outcome, number in counts.items()
        if outcome in (SAME, BEFORE, SENTENCE)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=220)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    absl_logging.set_verbosity(absl_logging.WARNING)  # what names a damage is heard
    with tempfile.TemporaryDirectory() as home:
        table = fuzz(pathlib.Path(home), options.count, options.seed, print)
    number = good(table)
    print(json.dumps(table, indent=2))
    print(f"{number} of {options.count} end in the same arrays or in one sentence")
    if options.out:
        found = {
            "damages": options.count,
            "as they should": number,
            "seed": options.seed,
            "outcomes": table,
        }
        text = json.dumps(found | {"environment": environment()}, indent=2)
        options.out.write_text(text + "\n")
    return int(number < options.count)


if __name__ == "__main__":
    sys.exit(main())
