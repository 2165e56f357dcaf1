"""Tripwires for the whole suite: strict shapes and dtypes, eight CPU devices."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little: code that is made fast, not fast code.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_use_fusion_emitters=false",
)

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


# Begun first, so that no worker is left with one at the end.
LONG = ("test_devices", "test_main", "test_zoo", "test_tutorial", "test_scan")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture
def standard_promotion():
    """Ordinary dtype promotion: optax itself raises floats to an int32 count."""
    with jax.numpy_dtype_promotion("standard"):
        yield
