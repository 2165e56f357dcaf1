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
    rules = job["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rules[0]["onExitCodes"]["values"] == [2, 3]


def on_path(folder: pathlib.Path, monkeypatch, **scripts: str) -> None:
    """Programs that stand in for others."""
    folder.mkdir(exist_ok=True)
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize("status", [0, 1, 3, 143])
def test_slurm_queues_again_what_was_stopped(tmp_path, monkeypatch, status) -> None:
    """And nothing else; the status is told."""
    on_path(
        tmp_path / "bin",
        monkeypatch,
        srun=f'echo "$JAX_PLATFORMS $PUREDIF_DISTRIBUTED $*" > ran; exit {status}',
        scontrol='echo "$*" > queued',
    )
    activate = tmp_path / "venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.touch()
    for name, value in {"VENV": tmp_path / "venv", "SLURM_NTASKS": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    (script,) = (path for path in LAUNCH if path.suffix == ".sbatch")
    done = subprocess.run(["bash", script, "--config=a b.py"], cwd=tmp_path)
    assert done.returncode == status
    ran = (tmp_path / "ran").read_text()
    assert ran.startswith("cuda 1 ") and "python -m puredif_jax.main" in ran
    assert "--config=a b.py" in ran
    queued = tmp_path / "queued"
    assert queued.exists() == (status == 143)
    assert status != 143 or queued.read_text() == "requeue 77\n"


def test_every_host_of_a_pod_runs_the_command_as_it_was_given(
    tmp_path, monkeypatch
) -> None:
    """Through gcloud, which gives it to a shell of each host."""
    shared = tmp_path / "a shared place"
    (shared / "puredif_jax").mkdir(parents=True)
    (shared / "venv" / "bin").mkdir(parents=True)
    (shared / "venv" / "bin" / "activate").touch()
    on_path(
        tmp_path / "bin",
        monkeypatch,
        gcloud='for x; do case $x in --command=*) bash -c "${x#*=}";; esac; done',
        python='printf "%s|" "$PUREDIF_DISTRIBUTED" "$@" > ran',
    )
    (script,) = (path for path in LAUNCH if path.name == "tpu_vm.sh")
    flags = ["--config=it's mine.py", "--config.workdir=$HOME"]
    subprocess.run(["bash", script, "pod", "zone", shared, *flags], check=True)
    ran = (shared / "puredif_jax" / "ran").read_text()
    assert ran == "1|-m|puredif_jax.main|" + "".join(f"{flag}|" for flag in flags)
    done = subprocess.run(["bash", script, "pod"], capture_output=True, text=True)
    assert done.returncode != 0 and "usage: launch/tpu_vm.sh" in done.stderr
