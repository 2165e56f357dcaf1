"""Every command and snippet of README and docs: read, and run with small budgets.

A page's commands run in the order in which they stand, in one folder. It holds what the
pages name: a model, images and starting noise. A snippet with a title is the file of
that name. The notebook runs, too.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import pathlib
import re
import shlex
from typing import Any

import matplotlib.pyplot
import numpy as np
import pytest
from absl import flags
from tiny_config import ANY, INVERSION, TINY, draw_params
from tiny_config import get_config as tiny

from puredif_jax import main
from puredif_jax.attacks.training import Training
from puredif_jax.defenses.hypothesis import Fading
from puredif_jax.formats import diffusers as convert
from puredif_jax.formats.base import Model, Spec
from puredif_jax.formats.scheduling import Scheduling
from puredif_jax.stages import experiment
from puredif_jax.stages.experiment import Experiment, Scan, Sweep

pytestmark = pytest.mark.usefixtures("standard_promotion")
ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
PAGES = sorted(path for path in PAGES if path.parent.name != "notebook")
SHORT = Training(steps=2, batch=8, learning_rate=1e-3, warmup=1)
FENCED = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", re.M | re.S)
INDENTED = re.compile(r"(?:^ {4}.*\n)+", re.M)
COMMANDS = ("puredif", "python -m puredif_jax.main")


def commands(path: pathlib.Path) -> list[list[str]]:
    """Each command of the package on a page, as the shell splits it."""
    text = path.read_text("utf-8")
    shown = [body for kind, _, body in FENCED.findall(text) if kind == "bash"]
    shown += INDENTED.findall(FENCED.sub("", text))
    shown += [f"{x}\n" for x in re.findall(r"`(puredif [^`]+)`", text)]
    lines = "".join(shown).replace("\\\n", " ").split("\n")
    found = [part.strip() for line in lines for part in line.split("&&")]
    return [shlex.split(each) for each in found if each.startswith(COMMANDS)]


def snippets(path: pathlib.Path) -> list[tuple[str, str]]:
    """Title, or "", and text of each piece of Python on a page."""
    found = []
    for kind, rest, body in FENCED.findall(path.read_text("utf-8")):
        if kind == "python":
            title = re.search(r'title="([^"]+)"', rest)
            found.append((title[1] if title else "", body))
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """A folder with all that the pages name, and the configs of the repository."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "configs").symlink_to(ROOT / "configs")
    rng = np.random.default_rng(0)
    for name in ("mine", "late"):
        model = Model(Spec(TINY, Scheduling()), draw_params(TINY))
        home = folder / {"mine": "models/mine", "late": "runs/late"}[name]
        convert.write_folder(home, model)
    np.savez(folder / "noise.npz", noise=rng.normal(size=(3, 16, 16, 1)))
    pixels = rng.integers(0, 256, (9, 16, 16, 1), np.uint8)
    np.savez(folder / "images.npz", images=pixels)
    for page in PAGES:
        for title, body in snippets(page):
            if title:
                (folder / title).write_text(body)
    return folder


@pytest.fixture(autouse=True)
def there(place: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(place / "compiled"))


def read(command: list[str]) -> Any:
    """The configuration of a command; help and the list of configurations end it."""
    if command[0] == "puredif":
        return main.parse_words(command)[0]
    return main.parse(command[2:])[0]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_command_is_one(path: pathlib.Path, capsys) -> None:
    for command in commands(path):
        command = [{"FILE": "scan"}.get(word, word) for word in command]
        try:
            assert isinstance(read(command), Experiment | Sweep | Scan), command
        except SystemExit as ended:
            assert ended.code == 0, (command, ended.code)
        flags.FLAGS.unparse_flags()


def small(wanted: Any) -> Any:
    """The same work on a tiny network, with small budgets."""
    if isinstance(wanted, Scan):
        audit = dataclasses.replace(
            wanted.audit, hypotheses=(Fading(),), inversion=INVERSION, detector=ANY
        )
        changed: dict[str, Any] = {"audit": audit, "steps": 2, "draws": 8, "devices": 1}
        if wanted.screen is not None:
            changed["screen"] = dataclasses.replace(wanted.screen, plain=300)
        if wanted.repair is not None:
            changed["repair"] = dataclasses.replace(
                wanted.repair, training=SHORT, draws=4, always=True
            )
        return dataclasses.replace(wanted, **changed)
    assert isinstance(wanted, Experiment)
    changed = {"model": TINY, "weights": None, "training": SHORT, "devices": 1}
    if wanted.amplification is not None:
        assert tiny().amplification is not None
        changed["amplification"] = dataclasses.replace(
            tiny().amplification, snapshots=(2,)
        )
    changed["evaluation"] = tiny().evaluation
    return dataclasses.replace(wanted, **changed)


RUN = [
    *(("docs/scan.md", i) for i in (2, 3)),
    ("docs/screen.md", 0),
    ("docs/tutorials/repair.md", 1),
    ("docs/tutorials/amplify.md", 1),
    *(("docs/tutorials/attack.md", i) for i in (0, 1)),
]
"""Commands that run, by their place on a page. The others there differ in a value."""


@pytest.mark.parametrize(("page", "number"), RUN)
def test_a_command_runs(page: str, number: int, place: pathlib.Path, capsys) -> None:
    command = commands(ROOT / page)[number]
    wanted = small(read(command))
    status: Any = 0
    try:
        main.main((wanted, []))
    except SystemExit as stop:
        status = stop.code
    flags.FLAGS.unparse_flags()
    assert status in (0, 2, 3)
    assert f"report: {wanted.workdir}/report.html" in capsys.readouterr().out
    assert (place / wanted.workdir / "report.html").exists()


def names(*modules: str) -> dict[str, Any]:
    """What a snippet takes for granted: the public names of modules."""
    found: dict[str, Any] = {}
    for each in modules:
        found |= vars(importlib.import_module(f"puredif_jax.{each}"))
    return found


KNOWN = {
    "extending": {"dataclasses": dataclasses}
    | names("attacks.base", "attacks.channel", "diffusion.solver", "types"),
}
SNIPPETS = [
    (path, number, body)
    for path in PAGES
    for number, (title, body) in enumerate(snippets(path))
    if not title
]


@pytest.mark.parametrize(
    ("path", "body"),
    [(path, body) for path, _, body in SNIPPETS],
    ids=[f"{path.stem}-{number}" for path, number, _ in SNIPPETS],
)
def test_a_snippet_runs(path, body, place, monkeypatch, capsys) -> None:
    if "import torch" in body:
        torch = pytest.importorskip("torch")
        weights = {"Conv.weight": torch.zeros(2), "Mixed.num_b": torch.zeros(1)}
        torch.save(weights, "pt_inception-2015-12-05-6726825d.pth")
    batches = place / "cifar-10-batches-bin"
    batches.mkdir(exist_ok=True)
    (batches / "data_batch_1.bin").write_bytes(bytes(range(7)) * 439 * 2)
    monkeypatch.setattr(experiment, "Scan", lambda *a, **k: small(Scan(*a, **k)))
    found = dict(KNOWN.get(path.stem, {}))
    exec(body, found)
    if "report" in found:
        said = capsys.readouterr().out.split(":")[0]
        assert said in ("clean", "could not tell", "backdoored")
    if "images" in found:
        assert found["images"].shape == (2, 32, 32, 3)


def test_the_notebook_runs() -> None:
    notebook = json.loads((ROOT / "docs/tutorials/invert.ipynb").read_text())
    cells = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)  # the site makes them
    matplotlib.pyplot.switch_backend("agg")
    found: dict[str, Any] = {}
    for text in ("".join(cell["source"]) for cell in cells):
        exec(text.replace("STEPS = 120", "STEPS = 2"), found)
    matplotlib.pyplot.close("all")
    assert found["losses"].shape == (2, 8)
    assert np.isfinite(found["cosine"])
    plain, triggered = found["rows"]
    assert plain.shape == triggered.shape == (8, 16, 16, 1)
