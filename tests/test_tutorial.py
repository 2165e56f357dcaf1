"""docs/scan.md is run as it stands, on a tiny model and with small budgets."""

import pathlib
import re

import numpy as np
import pytest
from tiny_config import TINY, draw_params

from puredif_jax import main
from puredif_jax.formats import diffusers as convert
from puredif_jax.formats.base import Model, Spec
from puredif_jax.formats.scheduling import Scheduling
from puredif_jax.runs import config
from puredif_jax.stages import experiment

pytestmark = pytest.mark.usefixtures("standard_promotion")
ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "scan.md").read_text()
BUDGET = {
    "audit.hypotheses": "Fading",
    "devices": "1",
    "audit.inversion.descent.scout": "2",
    "audit.inversion.descent.steps": "4",
    "audit.inversion.loss.samples": "2",
    "audit.inversion.heldout": "2",
    "steps": "2",
    "draws": "4",
}
FLAGS = [f"--config.{name}={value}" for name, value in BUDGET.items()]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """A folder with a model at models/mine and the configs of the repository."""
    folder = tmp_path_factory.mktemp("tutorial")
    (folder / "configs").symlink_to(ROOT / "configs")
    model = Model(Spec(TINY, Scheduling()), draw_params(TINY))
    convert.write_folder(folder / "models" / "mine", model)
    return folder


@pytest.fixture(autouse=True)
def compilation_cache(place, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(place / "compiled"))


@pytest.mark.parametrize("block", blocks("bash"), ids=lambda x: x.split("=")[-1][:9])
def test_commands(block: str, place: pathlib.Path, monkeypatch, capsys) -> None:
    command = block.replace("\\\n", " ").split()
    assert command[:3] == ["python", "-m", "puredif_jax.main"]
    if "--config.model" not in block:  # all that ship: tests/test_zoo.py has some
        command.append("--config.model=models/mine")
    monkeypatch.chdir(place)
    status = 0
    try:
        main.main(main.parse([*command[2:], *FLAGS]))
    except SystemExit as stop:
        status = stop.code
    assert status in (0, 2, 3)
    workdir = next(
        (c.split("=")[1] for c in command if "workdir" in c), "runs/scan-models-mine"
    )
    assert f"report: {workdir}/report.html" in capsys.readouterr().out
    assert (place / workdir / "report.html").exists()


def test_python(place: pathlib.Path, monkeypatch, capsys) -> None:
    (block,) = blocks("python")
    assert len(block.strip().splitlines()) <= 5
    whole = experiment.Scan

    def small(*args, **kwargs):
        wanted = whole(*args, **kwargs)
        for name, value in BUDGET.items():
            wanted = config.override(wanted, name, value)
        return wanted

    monkeypatch.setattr(experiment, "Scan", small)
    monkeypatch.chdir(place)
    exec(block, {})
    assert capsys.readouterr().out.split(":")[0] in (
        "clean",
        "could not tell",
        "backdoored",
    )


def test_the_example_of_the_readme(monkeypatch) -> None:
    readme = (ROOT / "README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    for whole, small in {
        "120": "2",
        "DenoisingError()": "DenoisingError(samples=1)",
    }.items():
        assert whole in block
        block = block.replace(whole, small)
    monkeypatch.chdir(ROOT)
    names: dict = {}
    exec(block, names)
    assert int(names["state"].step) == 2
    assert names["state"].candidate.delta.shape == (4, 16, 16, 1)
    assert np.isfinite(names["info"].loss).all()
