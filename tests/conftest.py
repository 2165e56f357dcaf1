"""Tripwires for the whole suite: strict shapes and dtypes, eight CPU devices.

And a run that several of its files look at.
"""

import fcntl
import gc
import importlib.metadata
import os
import pathlib
import subprocess
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little: code that is made fast, not fast code.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"  # later ones abort at it
os.environ.setdefault("XLA_FLAGS", FLAGS)

import jax  # noqa: E402
import pytest  # noqa: E402

from puredif_jax.runs import parallel  # noqa: E402

gc.set_threshold(100_000, 20, 100)  # a trace is many small objects that stay
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


# Begun first, so that no worker is left with one at the end.
LONG = ("test_devices", "test_main", "test_zoo", "test_pages", "test_scan")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """Compiled programs stay; of a worker that has too many, they go after a file."""
    yield
    process, _ = parallel.peak_memory()
    if process > 3 * 2**30:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> pathlib.Path:
    """A folder that all workers have."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session", autouse=True)
def cache_of_user(shared) -> None:
    """Nothing is written into the home of whoever tests."""
    os.environ["XDG_CACHE_HOME"] = str(shared / "cache")


@pytest.fixture(scope="session")
def one_device(shared) -> dict[str, str]:
    """An environment whose processes share their compiled programs."""
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(shared / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
    }


@pytest.fixture(scope="session")
def finished(shared, one_device) -> pathlib.Path:
    """An uninterrupted run of the tiny config; by the worker that needs it first."""
    folder = shared / "finished"
    config = pathlib.Path(__file__).with_name("tiny_config.py")
    command = [sys.executable, "-m", "puredif_jax.main", f"--config={config}"]
    with (shared / "finished.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not (folder / "report.html").exists():
            command.append(f"--config.workdir={folder}")
            subprocess.run(command, env=one_device, check=True, timeout=600)
    return folder


@pytest.fixture
def standard_promotion():
    """Ordinary dtype promotion: optax itself raises floats to an int32 count."""
    with jax.numpy_dtype_promotion("standard"):
        yield
