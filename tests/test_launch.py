"""The launchers: each parses, and starts the README's command."""

import os
import pathlib
import re
import subprocess
import time

import pytest

LAUNCH = sorted((pathlib.Path(__file__).resolve().parents[1] / "launch").iterdir())
SHELL = [path for path in LAUNCH if path.suffix in (".sh", ".sbatch")]


@pytest.mark.parametrize("path", LAUNCH, ids=lambda p: p.name)
def test_starts_the_command_and_tells_what_is_needed(path: pathlib.Path) -> None:
    text = path.read_text()
    command = re.sub(r"\s+-\s+|\s+", " ", text)
    assert "python -m puredif_jax.main" in command
    assert "Usage:" in text and ("Before:" in text or "this machine" in text)


@pytest.mark.parametrize("path", SHELL, ids=lambda p: p.name)
def test_shell_parses(path: pathlib.Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)


FAKE = """#!/usr/bin/env bash
trap 'sleep 0.5; touch "$FOUND/stored-$PUREDIF_PROCESS_ID"; exit 143' TERM
echo "$PUREDIF_PROCESS_ID $PUREDIF_NUM_PROCESSES $*" > "$FOUND/$PUREDIF_PROCESS_ID"
for ((i = 0; i < $WAIT; i++)); do sleep 0.1; done
exit $PUREDIF_PROCESS_ID
"""


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """Starts local_processes.sh with a fake Python."""
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text(FAKE)
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("FOUND", str(tmp_path))

    def start(wait: int) -> subprocess.Popen:
        monkeypatch.setenv("WAIT", str(wait))
        script = next(path for path in LAUNCH if path.name == "local_processes.sh")
        return subprocess.Popen(["bash", script, "3", "--config=a b.py"])

    return start


def test_local_processes_know_their_numbers_and_the_largest_status_is_told(
    tmp_path, launched
) -> None:
    assert launched(wait=1).wait(30) == 2
    told = [(tmp_path / str(i)).read_text().strip() for i in range(3)]
    assert told == [f"{i} 3 -m puredif_jax.main --config=a b.py" for i in range(3)]


@pytest.mark.parametrize("count", [[], ["0"], ["--config=x.py"]])
def test_local_processes_need_a_number(count) -> None:
    script = next(path for path in LAUNCH if path.name == "local_processes.sh")
    done = subprocess.run(["bash", script, *count], capture_output=True, text=True)
    assert done.returncode == 1 and "the number of processes" in done.stderr


def test_local_processes_are_told_to_stop_once_and_waited_for(
    tmp_path, launched
) -> None:
    started = launched(wait=600)
    while not all((tmp_path / str(i)).exists() for i in range(3)):
        time.sleep(0.05)
    time.sleep(0.3)
    started.terminate()
    assert started.wait(30) == 143
    assert all((tmp_path / f"stored-{i}").exists() for i in range(3))


def test_jobset_parses() -> None:
    yaml = pytest.importorskip("yaml")
    (path,) = (path for path in LAUNCH if path.suffix == ".yaml")
    found = yaml.safe_load(path.read_text())
    assert found["kind"] == "JobSet"
    (job,) = found["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["command"][:3] == ["python", "-m", "puredif_jax.main"]
    assert "rename-dir-limit" in str(pod["volumes"])  # or no checkpoint is finished
    mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
