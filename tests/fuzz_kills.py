"""kill -9 at random moments of each loop: the arrays of an untouched run, every time.

    python tests/fuzz_kills.py --count=20 --out=docs/results/fuzz_kills.json

`--loops` takes some of them only; their results join those of the file that is there.
Loops: a training, one with a backdoor, the inversion of a trigger, a training whose
trigger is reinforced on the way, and a scan. Each is run once to its end. Then,
`--count` times, it is killed at a random moment, goes on, and ends; all its results and
weights must be equal bit for bit. The moments are drawn by `--seed`: a row of scalars
of the loop, and a time after it. Compiled programs are shared, and a process that has
the imports done is forked, since both take longer than the loops.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).parent
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
CONFIG = """
import dataclasses, sys
sys.path.insert(0, {here!r})
import tiny_config
from puredif_jax.stages.audit import Audit
from puredif_jax.stages.experiment import Scan

def get_config():
    config = tiny_config.get_config()
    few = dataclasses.replace(config, chunk=4, save_every=0.1)
    long = dataclasses.replace(config.training, steps=40)
    bare = dataclasses.replace(few, training=long, amplification=None, audit=None)
    inversion = dataclasses.replace(
        config.audit.inversion,
        descent=dataclasses.replace(config.audit.inversion.descent, steps=30, scout=6),
    )
    audit = dataclasses.replace(config.audit, inversion=inversion, baselines=())
    return {what}
"""
LOOPS = {
    "pretrain": ("train", "dataclasses.replace(bare, attack=None)"),
    "backdoor": ("train", "bare"),
    "invert": (
        "puredif",
        "dataclasses.replace(few, training=None, attack=None, amplification=None, "
        "audit=dataclasses.replace(audit, weights=({weights!r},)))",
    ),
    "amplify": ("", "dataclasses.replace(few, audit=None)"),
    "scan": (
        "puredif",
        "Scan('x', ({folder!r},), dataclasses.replace(audit, weights=()), steps=2, "
        "draws=8, devices=1, chunk=4, save_every=0.1)",
    ),
}


def start(config: pathlib.Path, workdir: pathlib.Path, log: pathlib.Path) -> int:
    """Forks a process that runs the program; its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        from puredif_jax import main

        argv = [f"--config={config}", f"--config.workdir={workdir}"]
        try:
            main.main(main.parse(["main", *argv]))
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
    finally:
        os._exit(status)


def lines(workdir: pathlib.Path, stage: str) -> list[dict]:
    """The scalars that a loop has written so far."""
    found = []
    for path in (*workdir.glob("metrics.jsonl"), *workdir.glob("*/metrics.jsonl")):
        for line in path.read_text(errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            found += [row] if row["stage"].startswith(stage) else []
    return found


def arrays(workdir: pathlib.Path) -> dict[str, bytes]:
    """Everything that a run has computed, but for the seconds it took."""
    import numpy as np

    from puredif_jax.files import sealed

    found: dict[str, bytes] = {}
    for path in sorted(workdir.rglob("results/*.npz")):
        for name, array in sealed.read_arrays(path).items():
            if name != "seconds":
                head = f"{path.relative_to(workdir)}/{name} {array.dtype}{array.shape}"
                found[head] = np.ascontiguousarray(array).tobytes()
    for path in sorted(workdir.rglob("*.safetensors")):
        content = path.read_bytes()  # the header names the folder of the run
        length = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:length])
        header.pop("__metadata__", None)
        head = f"{path.relative_to(workdir)} {json.dumps(header, sort_keys=True)}"
        found[head] = content[length:]
    return found


def finish(config: pathlib.Path, workdir: pathlib.Path, log: pathlib.Path) -> None:
    _, status = os.waitpid(start(config, workdir, log), 0)
    status = os.waitstatus_to_exitcode(status)
    if status not in (0, 2, 3):  # of a scan: could not tell, backdoored
        raise SystemExit(
            f"{workdir.name} ended with {status}: {log.read_text()[-800:]}"
        )


def kill_within(
    config: pathlib.Path,
    workdir: pathlib.Path,
    log: pathlib.Path,
    stage: str,
    rows: int,
    delay: float,
) -> bool:
    """Kills a run once a loop has written so many rows; False if it ended before."""
    child, end = start(config, workdir, log), time.monotonic() + 240
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        if len(lines(workdir, stage)) >= rows:
            break
        time.sleep(0.002)
    time.sleep(delay)
    alive = not os.waitpid(child, os.WNOHANG)[0]
    if alive:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return alive


def fuzz(home: pathlib.Path, loop: str, count: int, rng: random.Random) -> dict:
    """Kills one loop so often; how many ended in the same arrays."""
    stage, what = LOOPS[loop]
    trained = home / "backdoor"
    what = what.format(
        weights=str(trained / "weights.safetensors"), folder=str(trained / "diffusers")
    )
    config, log = home / f"{loop}.py", home / f"{loop}.log"
    config.write_text(CONFIG.format(here=str(HERE), what=what))
    whole = home / loop
    finish(config, whole, log)
    want, told = arrays(whole), lines(whole, stage)
    spare = sum(float(row["seconds"]) for row in told) / len(told)
    equal = 0
    for i in range(count):
        workdir = home / f"{loop}-{i}"
        rows, delay = rng.randrange(len(told)), rng.uniform(0, 2 * spare)
        while not kill_within(config, workdir, log, stage, rows, delay):
            shutil.rmtree(workdir)  # it had ended: another moment
            rows, delay = rng.randrange(len(told)), rng.uniform(0, 2 * spare)
        finish(config, workdir, log)
        got = arrays(workdir)
        names = want.keys() | got.keys()
        differs = [name for name in names if want.get(name) != got.get(name)]
        equal += not differs
        print(
            f"{loop} {i + 1}: killed after {rows} of {len(told)} rows:",
            f"DIFFERS in {differs[:3]}" if differs else f"{len(want)} equal arrays",
            flush=True,
        )
        shutil.rmtree(workdir)
    return {"killed": count, "equal": equal, "arrays": len(want)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--loops", nargs="*", default=list(LOOPS))
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    rng, found = random.Random(options.seed), {}
    with tempfile.TemporaryDirectory() as name:
        home = pathlib.Path(name)
        cache = {"JAX_COMPILATION_CACHE_DIR": str(home / "compiled")}
        os.environ |= ENVIRONMENT | cache  # before JAX is imported
        from puredif_jax import main as program  # so that forks have the imports
        from puredif_jax.runs import report
        from puredif_jax.stages import perform as stages
        from puredif_jax.stages import scan

        del program, scan, stages

        for loop in LOOPS:
            if loop in options.loops:
                found[loop] = fuzz(home, loop, options.count, rng)
            elif loop == "backdoor":  # whose model others read
                fuzz(home, loop, 0, rng)
    print(json.dumps(found, indent=2))
    if options.out:
        if options.out.exists():
            found = json.loads(options.out.read_text())["loops"] | found
        document = {"seed": options.seed, "loops": found}
        document["environment"] = report.environment()
        options.out.write_text(json.dumps(document, indent=2) + "\n")
    return int(any(row["equal"] < row["killed"] for row in found.values()))


if __name__ == "__main__":
    sys.exit(main())
