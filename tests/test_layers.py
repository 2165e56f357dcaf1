"""Who may import whom: a pure core, thin edges, and no cycle. An `ast` walk."""

from __future__ import annotations

import ast
import pathlib

import pytest

PACKAGE = "puredif_jax"
ROOT = pathlib.Path(__file__).resolve().parents[1] / PACKAGE

CORE = set(
    "types schedules diffusion unet diffusers_config diffusers_scheduler state_dict "
    "convolution triggers metrics attacks training exact objectives survey memory "
    "inversion detection amplification garment_net".split()
)
FORMATS = set("weight_sets convert hub search discovery".split())  # models of others
EDGES = set("config parallel checkpoint data report".split())
BELOW = {"files", "npz", "pictures", "sealed", "signals"}  # of the edges
SHOWN = {"figures", "page", "terminal"}  # what people see
BAR = "puredif_jax.report.progress"  # any edge may show how far it is
COMPOSITION = {
    "numerics",
    "run",
    "lab",
    "loops",
    "experiment",
    "weights",
    "finding",
    "audit",
    "stages",
    "sweep",
    "scan",
    "scan_report",
    "settings",
    "cost",
    "main",
    "__init__",
    "__main__",
}

TOP = {"audit", "stages", "sweep", "scan", "scan_report"}
ARRAYS = {"jax", "flax", "optax", "numpy", "chex"}
STANDARD = set(
    "__future__ abc dataclasses typing functools collections math base64 zlib "
    "itertools re unicodedata".split()
)
DEVICES = set(
    "jax.devices jax.local_devices jax.device_count jax.local_device_count "
    "jax.process_index jax.process_count".split()
)
FILES = {"open", "__import__"}


def imports(tree: ast.Module) -> set[str]:
    """Dotted names of all that is imported, at any depth; `from a import b` is a.b."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = [PACKAGE] if node.level else []
            parts += [node.module] if node.module else []
            found |= {".".join([*parts, alias.name]) for alias in node.names}
    return found


def attributes(tree: ast.Module) -> set[str]:
    """Dotted names of attributes of plain names, such as jax.devices."""
    return {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }


def calls(tree: ast.Module) -> set[str]:
    """Plain names that are called, such as open."""
    return {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }


def root(name: str) -> str:
    return name.partition(".")[0]


def internal(names: set[str]) -> set[str]:
    """Modules of the package among imported names; the package itself is __init__."""
    parts = [name.split(".") for name in names if root(name) == PACKAGE]
    return {part[1] if len(part) > 1 else "__init__" for part in parts}


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules of one import cycle, or []."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(graph.get(module, ())):
            if cycle := visit(target, [*path, module]):
                return cycle
        done.add(module)
        return []

    return next((cycle for module in graph if (cycle := visit(module, []))), [])


def violations(sources: dict[str, str]) -> list[str]:
    """Every broken rule, as 'module: what'. sources: module name -> its text."""
    found, graph = [], {}
    for module, text in sources.items():
        tree = ast.parse(text)
        names = imports(tree)
        used = names | attributes(tree)
        graph[module] = targets = internal(names)
        problems = set()
        if module not in CORE | FORMATS | EDGES | BELOW | SHOWN | COMPOSITION:
            problems.add("belongs to no layer; name it for what it does")
        if module in CORE:
            allowed = ARRAYS | STANDARD | {PACKAGE}
            problems |= {f"core imports {n}" for n in names if root(n) not in allowed}
            problems |= {f"core imports {t}" for t in targets - CORE}
            problems |= {f"core reads {n}" for n in used & DEVICES}
            problems |= {f"core calls {n}" for n in calls(tree) & FILES}
        if module in BELOW:
            problems |= {f"imports {t}" for t in targets - BELOW - {"types"}}
        if module in SHOWN:
            problems |= {f"imports {t}" for t in targets - SHOWN - {"types"}}
        if module in FORMATS:
            others = EDGES | COMPOSITION
            problems |= {f"format imports {t}" for t in targets & others}
        if module in EDGES:
            others = (EDGES | FORMATS | COMPOSITION) - {module}
            problems |= {f"edge imports {t}" for t in internal(names - {BAR}) & others}
        if module not in TOP | {"main", "cost"}:
            top = TOP | {"experiment"}
            problems |= {f"imports {t}" for t in targets & top}
        if module != "checkpoint" and "orbax" in {root(n) for n in names}:
            problems.add("imports orbax")
        if module != "unet" and any(f"{n}.".startswith("flax.linen.") for n in used):
            problems.add("imports flax.linen")
        found += [f"{module}: {problem}" for problem in sorted(problems)]
    if cycle := find_cycle(graph):
        found.append("cycle: " + " -> ".join(cycle))
    return found


def read_sources() -> dict[str, str]:
    paths = sorted(ROOT.rglob("*.py"))
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text("utf-8")
        for path in paths
    }


def test_the_package_keeps_its_layers():
    sources = read_sources()
    assert {"types", "diffusion", "attacks"} <= set(sources)
    assert violations(sources) == []


@pytest.mark.parametrize(
    "sources, expected",
    [
        ({"exact": "import os"}, "exact: core imports os"),
        ({"exact": "def f():\n    import time"}, "exact: core imports time"),
        ({"exact": "from logging import info"}, "exact: core imports logging.info"),
        ({"exact": "from absl import flags"}, "exact: core imports absl.flags"),
        ({"exact": "import torch.nn as nn"}, "exact: core imports torch.nn"),
        ({"exact": "from puredif_jax import data"}, "exact: core imports data"),
        ({"exact": "from . import config"}, "exact: core imports config"),
        ({"exact": "from .report import x"}, "exact: core imports report"),
        ({"exact": "import puredif_jax"}, "exact: core imports __init__"),
        ({"exact": "import jax\nn = jax.devices()"}, "exact: core reads jax.devices"),
        ({"exact": "from jax import devices"}, "exact: core reads jax.devices"),
        ({"exact": "open('x')"}, "exact: core calls open"),
        ({"config": "import orbax.checkpoint as ocp"}, "config: imports orbax"),
        ({"main": "from orbax import checkpoint"}, "main: imports orbax"),
        ({"data": "import flax.linen as nn"}, "data: imports flax.linen"),
        ({"exact": "from flax import linen"}, "exact: imports flax.linen"),
        ({"exact": "from flax.linen import Conv"}, "exact: imports flax.linen"),
        ({"exact": "import flax\nx = flax.linen"}, "exact: imports flax.linen"),
        ({"exact": "from puredif_jax import files"}, "exact: core imports files"),
        ({"files": "from puredif_jax.unet import x"}, "files: imports unet"),
        (
            {"data": "from puredif_jax.config import x"},
            "data: edge imports config",
        ),
        ({"hub": "from puredif_jax import run"}, "hub: format imports run"),
        ({"data": "from puredif_jax import hub"}, "data: edge imports hub"),
        (
            {"data": "from puredif_jax.report import progress, Report"},
            "data: edge imports report",
        ),
        ({"npz": "from puredif_jax.data import x"}, "npz: imports data"),
        ({"page": "from puredif_jax.report import x"}, "page: imports report"),
        ({"__init__": "from .experiment import Experiment"}, "imports experiment"),
        ({"utils": ""}, "utils: belongs to no layer"),
        ({"helpers.utils": ""}, "helpers.utils: belongs to no layer"),
        (
            {"types": "from .exact import a", "exact": "from .types import b"},
            "cycle: types -> exact -> types",
        ),
        (
            {
                "types": "from puredif_jax import unet",
                "unet": "import puredif_jax.exact",
                "exact": "from .types import b",
            },
            "cycle: types -> unet -> exact -> types",
        ),
    ],
)
def test_a_broken_rule_is_found(sources, expected):
    assert any(expected in found for found in violations(sources))


def test_what_is_allowed_is_not_found():
    sources = {
        "types": "from __future__ import annotations\nimport collections.abc",
        "unet": "import flax.linen as nn\nfrom puredif_jax.types import Array",
        "training": "from flax import struct\nimport optax\nimport flax",
        "data": "import os\nfrom puredif_jax.report import progress",
        "npz": "from puredif_jax.files import shortened",
        "checkpoint": "import orbax.checkpoint as ocp",
        "experiment": "from puredif_jax import checkpoint, config, data, training",
        "stages": "from puredif_jax import experiment, lab, run",
        "main": "from absl import app\nfrom puredif_jax import config, stages",
        "__init__": "from puredif_jax.types import Array as Array",
    }
    assert violations(sources) == []
