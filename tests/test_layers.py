"""Who may import whom: folders are layers, the core is pure; an `ast` walk."""

from __future__ import annotations

import ast
import pathlib

import pytest

from puredif_jax.diffusion.solver import Ancestral, Deterministic, Solver

SOLVERS = (Ancestral(), Deterministic())
PACKAGE = "puredif_jax"
ROOT = pathlib.Path(__file__).resolve().parents[1] / PACKAGE

LAYERS: dict[str, set[str]] = {
    "types": set(),
    "files": {"types"},
    "diffusion": {"types"},
    "networks": {"types"},
    "metrics": {"types"},
    "attacks": {"types", "diffusion"},
    "defenses": {"types", "diffusion", "attacks"},
    "runs": {"types", "files"},
    "formats": {"types", "files", "diffusion", "networks"},
    "data": {"types", "files", "runs"},
}
LAYERS["stages"] = {*LAYERS}
LAYERS["main"] = {"types", "runs", "stages"}
LAYERS["command"] = {"runs", "main"}
LAYERS["__init__"] = {*LAYERS} - {"runs", "stages", "main", "command"}
"""What a folder, or a module at the top, may import beside itself."""

CORE = {"types", "diffusion", "networks", "metrics", "attacks", "defenses"}
ARRAYS = {"jax", "flax", "optax", "numpy", "chex"}
STANDARD = set(
    "__future__ abc dataclasses typing functools collections math base64 zlib "
    "itertools re unicodedata enum".split()
)
DEVICES = set(
    "jax.devices jax.local_devices jax.device_count jax.local_device_count "
    "jax.process_index jax.process_count".split()
)
FILES = {"open", "__import__"}
LINEN = "networks"  # the folder that alone knows Flax's modules
ORBAX = ("runs.checkpoint", "runs.parallel")
LONGEST = 400  # lines of a module


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


def modules(names: set[str], known: set[str]) -> set[str]:
    """Modules of the package among imported names; the package itself is __init__."""
    found = set()
    for name in names:
        if root(name) != PACKAGE:
            continue
        parts = name.split(".")[1:]
        while parts and ".".join(parts) not in known and len(parts) > 1:
            parts.pop()
        found.add(".".join(parts) or "__init__")
    return found


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


def layer(module: str) -> str:
    return module.partition(".")[0]


def violations(sources: dict[str, str]) -> list[str]:
    """Every broken rule, as 'module: what'. sources: module name -> its text."""
    found, graph = [], {}
    for module, text in sources.items():
        tree = ast.parse(text)
        names = imports(tree)
        used = names | attributes(tree)
        graph[module] = modules(names, {*sources})
        problems = set()
        here = layer(module)
        if here not in LAYERS:
            problems.add("lies in no layer; name it for what it does")
        others = {layer(target) for target in graph[module]} - {here}
        problems |= {f"{here} imports {t}" for t in others - LAYERS.get(here, set())}
        if here in CORE:
            allowed = ARRAYS | STANDARD | {PACKAGE}
            problems |= {f"core imports {n}" for n in names if root(n) not in allowed}
            problems |= {f"core reads {n}" for n in used & DEVICES}
            problems |= {f"core calls {n}" for n in calls(tree) & FILES}
        if module not in ORBAX and "orbax" in {root(n) for n in names}:
            problems.add("imports orbax")
        if here != LINEN and any(f"{n}.".startswith("flax.linen.") for n in used):
            problems.add("imports flax.linen")
        if (lines := text.count("\n")) > LONGEST:
            problems.add(f"has {lines} lines, more than {LONGEST}")
        found += [f"{module}: {problem}" for problem in sorted(problems)]
    if cycle := find_cycle(graph):
        found.append("cycle: " + " -> ".join(cycle))
    return found


def read_sources() -> dict[str, str]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        *folders, name = path.relative_to(ROOT).with_suffix("").parts
        parts = folders if folders and name == "__init__" else [*folders, name]
        found[".".join(parts)] = path.read_text("utf-8")
    return found


def test_the_package_keeps_its_layers():
    sources = read_sources()
    assert {layer(module) for module in sources} == {*LAYERS}
    assert violations(sources) == []


def literals(text: str) -> set[str]:
    """Strings of a module, but for docstrings; those of an f-string, too."""
    tree, told = ast.parse(text), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            told.add(node.value)
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node not in told
    }


def homes(name: str, sources: dict[str, str]) -> list[str]:
    """The modules in which a string stands by itself."""
    return [module for module, text in sources.items() if name in literals(text)]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda x: x.name)
def test_the_name_of_a_kind_stands_in_its_own_module_alone(solver: Solver):
    """A kind is a class: nothing else compares, lists or makes that string."""
    home = type(solver).__module__.removeprefix(f"{PACKAGE}.")
    sources = read_sources()
    assert homes(solver.name, sources) == homes(solver.title, sources) == [home]


def test_every_name_of_a_kind_is_looked_for():
    assert {type(solver) for solver in SOLVERS} == {*Solver.__subclasses__()}


@pytest.mark.parametrize(
    "text, found",
    [
        ("if solver == 'sde': pass", True),
        ("KINDS = ('ode', 'sde')", True),
        ("NAMES = {'sde': 1}", True),
        ("x = f'{y}sde'", True),
        ("def f(x: Literal['sde']): ...", True),
        ("'sde'", False),
        ("def f():\n    'sde'", False),
        ("x = 'sde is ancestral'", False),
        ("sde = ode", False),
    ],
)
def test_a_name_in_another_module_is_found(text: str, found: bool):
    sources = {"diffusion.solver": "name = 'sde'", "stages.a": text}
    wanted = ["diffusion.solver", *(["stages.a"] if found else [])]
    assert homes("sde", sources) == wanted


def of(module: str) -> str:
    return f"from puredif_jax.{module} import x"


@pytest.mark.parametrize(
    "sources, expected",
    [
        ({"attacks.exact": "import os"}, "attacks.exact: core imports os"),
        ({"attacks.a": "def f():\n    import time"}, "attacks.a: core imports time"),
        ({"attacks.a": "from logging import info"}, "core imports logging.info"),
        ({"attacks.a": "from absl import flags"}, "core imports absl.flags"),
        ({"attacks.a": "import torch.nn as nn"}, "core imports torch.nn"),
        ({"metrics.a": "import jax\nn = jax.devices()"}, "core reads jax.devices"),
        ({"metrics.a": "from jax import devices"}, "core reads jax.devices"),
        ({"networks.a": "open('x')"}, "networks.a: core calls open"),
        ({"attacks.a": of("defenses.b")}, "attacks.a: attacks imports defenses"),
        ({"attacks.a": of("networks.b")}, "attacks.a: attacks imports networks"),
        ({"diffusion.a": of("networks.b")}, "diffusion imports networks"),
        ({"networks.a": of("diffusion.b")}, "networks imports diffusion"),
        ({"formats.a": of("runs.run")}, "formats.a: formats imports runs"),
        ({"formats.a": of("attacks")}, "formats.a: formats imports attacks"),
        ({"runs.a": of("formats.b")}, "runs.a: runs imports formats"),
        ({"files.a": of("runs.b")}, "files.a: files imports runs"),
        ({"runs.a": of("stages.b")}, "runs.a: runs imports stages"),
        ({"runs.a": "import puredif_jax.stages.b"}, "runs.a: runs imports stages"),
        ({"runs.a": "from puredif_jax import stages"}, "runs imports stages"),
        ({"stages.a": "from puredif_jax import main"}, "stages imports main"),
        ({"__init__": of("stages.experiment")}, "__init__ imports stages"),
        ({"runs.a": "import puredif_jax"}, "runs.a: runs imports __init__"),
        ({"runs.config": "import orbax.checkpoint as ocp"}, "runs.config: imports orb"),
        ({"main": "from orbax import checkpoint"}, "main: imports orbax"),
        ({"data.a": "import flax.linen as nn"}, "data.a: imports flax.linen"),
        ({"attacks.a": "from flax import linen"}, "attacks.a: imports flax.linen"),
        ({"attacks.a": "from flax.linen import Conv"}, "imports flax.linen"),
        ({"attacks.a": "import flax\nx = flax.linen"}, "imports flax.linen"),
        ({"utils": ""}, "utils: lies in no layer"),
        ({"helpers.utils": ""}, "helpers.utils: lies in no layer"),
        ({"runs.a": "x = 1\n" * 401}, "runs.a: has 401 lines"),
        (
            {"types": of("types"), "runs.a": of("runs.b"), "runs.b": of("runs.a")},
            "cycle: ",
        ),
        (
            {
                "runs.a": "from puredif_jax.runs import b",
                "runs.b": "import puredif_jax.runs.c",
                "runs.c": of("runs.a"),
            },
            "cycle: runs.a -> runs.b -> runs.c -> runs.a",
        ),
    ],
)
def test_a_broken_rule_is_found(sources, expected):
    assert any(expected in found for found in violations(sources))


def test_what_is_allowed_is_not_found():
    sources = {
        "types": "from __future__ import annotations\nimport collections.abc",
        "networks.unet": f"import flax.linen as nn\n{of('types')}",
        "attacks.training": "from flax import struct\nimport optax\nimport flax",
        "data.images": f"import os\n{of('runs.report')}",
        "files.npz": of("files.whole"),
        "runs.checkpoint": "import orbax.checkpoint as ocp",
        "stages.lab": "from puredif_jax.runs import run\nimport time",
        "main": f"from absl import app\n{of('stages.perform')}",
        "__init__": of("attacks.exact"),
    }
    assert violations(sources) == []
