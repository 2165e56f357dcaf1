"""The whole program on one device, on eight, and on two processes that lose one."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence

import numpy as np
import pytest
from test_multiprocess import free_port

from puredif_jax.formats import weight_sets

HERE = pathlib.Path(__file__).parent


TINY_RUN = (f"--config={HERE / 'tiny_config.py'}", "--config.audit.baselines=()")


def start(
    folder: pathlib.Path,
    devices: int,
    flags: Sequence[str] = TINY_RUN,
    **environ: str,
) -> subprocess.Popen:
    """The tiny run, or another, begun or resumed in a folder on so many devices."""
    command = [sys.executable, "-m", "puredif_jax.main"]
    return subprocess.Popen(
        [*command, *flags, f"--config.workdir={folder}"],
        env=os.environ
        | environ
        | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
        stderr=subprocess.PIPE,
        text=True,
    )


def start_two(
    folder: pathlib.Path, flags: Sequence[str] = TINY_RUN
) -> list[subprocess.Popen]:
    """The same on two processes with two devices each."""
    together = {
        "PUREDIF_COORDINATOR": f"127.0.0.1:{free_port()}",
        "PUREDIF_NUM_PROCESSES": "2",
    }
    return [
        start(folder, 2, flags, **together, PUREDIF_PROCESS_ID=str(number))
        for number in range(2)
    ]


def end(process: subprocess.Popen, seconds: float = 600) -> str:
    """What the process has said when it is over; killed if it is not."""
    try:
        return process.communicate(timeout=seconds)[1]
    finally:
        process.kill()


@pytest.fixture(scope="module")
def bereft(tmp_path_factory) -> pathlib.Path:
    """A run on two processes, one of which was killed in training."""
    folder = tmp_path_factory.mktemp("bereft") / "run"
    metrics = folder / "metrics.jsonl"
    processes = start_two(folder)
    deadline = time.monotonic() + 300
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert time.monotonic() < deadline and processes[0].poll() is None
        time.sleep(0.05)
    processes[1].kill()
    said = end(processes[0], 60)
    end(processes[1])
    assert processes[0].returncode not in (None, 0)
    assert "another task died" in said, said
    return folder


def test_a_lost_process_ends_all(bereft) -> None:
    """By itself, so that it is done while another worker has the run alone in hand."""
    assert not (bereft / "report.json").exists()


def scalars(folder: pathlib.Path) -> dict[tuple[str, int, str], np.ndarray]:
    """Losses and norms of gradients, by loop, step and name."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {
        (row["stage"], row["step"], name): np.asarray(row[name])
        for row in map(json.loads, lines)
        for name in {"loss", "grad_norm"} & set(row)
    }


def compare(folder: pathlib.Path, alone: pathlib.Path) -> None:
    """Losses and gradients to 1e-5, every result to 1e-4, and the same outcomes.

    The run alone has a baseline besides. Adam divides the gradient of a pixel by its
    own size, so in a result the rounding of a small one grows.
    """
    found, wanted = scalars(folder), scalars(alone)
    wanted = {k: v for k, v in wanted.items() if "elijah" not in k[0]}
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5, err_msg=str(key))
    names = sorted(path.name for path in (folder / "results").glob("*.npz"))
    whole = {path.name for path in (alone / "results").glob("*.npz")}
    assert set(names) == whole - {
        "elijah_trained_ode.npz",
        "errors_elijah_trained_ode.npz",
    }
    for name in names:
        with (
            np.load(alone / "results" / name) as a,
            np.load(folder / "results" / name) as b,
        ):
            for key in set(a) - {"seconds"}:
                close = 1e-4 * max(1.0, float(np.abs(a[key]).max()))
                np.testing.assert_allclose(b[key], a[key], atol=close, err_msg=name)

    def outcomes(folder: pathlib.Path):
        numbers = json.loads((folder / "report.json").read_text())["numbers"]
        rows = numbers["amplification"]
        return (
            numbers["trained"]["verdict"]["outcome"],
            [(row["trigger"], row["mse<0.01"]) for row in rows],
        )

    assert outcomes(folder) == outcomes(alone)


def test_the_same_command_resumes(bereft, finished, tmp_path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(bereft, folder)
    processes = start_two(folder)
    said = [end(process) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    compare(folder, finished)


def test_a_scan_by_two_processes_ends_both_with_its_status(finished, tmp_path):
    """Of a model that cannot be read; the audit of one is that of the other tests."""
    model = tmp_path / "model"
    shutil.copytree(finished / "diffusers", model)
    (model / "unet" / weight_sets.WEIGHTS).write_bytes(b"nothing")
    config = HERE.parent / "configs" / "scan.py"
    flags = (f"--config={config}", f"--config.model={model}")
    processes = start_two(tmp_path / "scan", flags)
    said = [end(process) for process in processes]
    report = json.loads((tmp_path / "scan" / "report.json").read_text())
    assert report["numbers"]["status"] == 1 and "error" in report["verdict"]
    assert [process.returncode for process in processes] == [1, 1], said


def test_eight_devices_resume_what_four_began(bereft, finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(bereft, folder)
    process = start(folder, 8)
    said = end(process)
    assert process.returncode == 0, said
    compare(folder, finished)
