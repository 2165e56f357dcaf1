"""The launchers: each parses, and starts the README's command."""

import pathlib
import re
import subprocess

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


def test_jobset_parses() -> None:
    yaml = pytest.importorskip("yaml")
    (path,) = (path for path in LAUNCH if path.suffix == ".yaml")
    found = yaml.safe_load(path.read_text())
    assert found["kind"] == "JobSet"
    (job,) = found["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["command"][:3] == ["python", "-m", "puredif_jax.main"]
    mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
