"""Compiled programs are found again, and by whom."""

import os
import pathlib
import subprocess
import sys
import time

import jax
import pytest

from puredif_jax.runs import compilation

ROOT = pathlib.Path(__file__).parents[1]
PROGRAM = """
import sys
import jax, jax.numpy as jnp
from puredif_jax.runs.compilation import keep_programs
keep_programs(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: jnp.sort(x) * 3)(jnp.arange(5.0)).block_until_ready()
"""


@pytest.fixture(autouse=True)
def settings(monkeypatch, tmp_path):
    """Those of JAX come back; no folder is named."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_enable_xla_caches",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def chosen(workdir: str = "work") -> str:
    compilation.keep_programs(workdir)
    return jax.config.jax_compilation_cache_dir


def test_a_folder_of_the_user_or_the_one_that_is_named(tmp_path, monkeypatch) -> None:
    folder = pathlib.Path(chosen())
    assert folder.parent == tmp_path / "cache" / "puredif_jax" and folder.is_dir()
    assert folder.stat().st_mode & 0o077 == 0, "of the user alone"
    monkeypatch.setattr(compilation.platform, "machine", lambda: "another")
    assert chosen() != str(folder)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert chosen("runs/x") == "runs/x/compiled"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "named"))
    assert chosen() == str(tmp_path / "named")


def test_the_workdir_has_them_where_the_user_has_no_folder(
    tmp_path, monkeypatch
) -> None:
    (tmp_path / "cache").write_text("a file")
    assert chosen("runs/x") == "runs/x/compiled"
    (tmp_path / "cache").unlink()
    monkeypatch.setattr(os, "getuid", lambda: -1)  # the folder is another user's
    assert chosen("runs/x") == "runs/x/compiled"


def test_old_programs_are_removed(tmp_path) -> None:
    folder = pathlib.Path(chosen())
    for name, days in (("old", compilation.DAYS + 1), ("young", compilation.DAYS - 1)):
        (folder / name).write_text("")
        then = time.time() - days * 24 * 3600
        os.utime(folder / name, (then, then))
    chosen()
    assert {path.name for path in folder.iterdir()} == {"young"}


def test_a_run_in_another_workdir_compiles_nothing_again(tmp_path) -> None:
    found = []
    for name in ("first", "second"):
        subprocess.run(
            [sys.executable, "-W", "error", "-c", PROGRAM, str(tmp_path / name)],
            env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"},
            check=True,
        )
        kept = (tmp_path / "cache" / "puredif_jax").rglob("jit_*")
        found.append(sorted((path.name, path.stat().st_mtime_ns) for path in kept))
    assert found[0] and found[0] == found[1]
    assert not list(tmp_path.glob("first/*")) and not list(tmp_path.glob("second/*"))
