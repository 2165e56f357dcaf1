"""Under what a run was made: noted, and another one refused or said."""

import dataclasses

import jax
import pytest

from puredif_jax.runs import numerics
from puredif_jax.runs.numerics import RECORD, Numerics, NumericsError


@pytest.fixture
def here() -> Numerics:
    return Numerics.here(1)


def test_what_is_noted_is_what_jax_is_set_to(here) -> None:
    assert (here.platform, here.x64, here.devices) == ("cpu", False, 1)
    assert here.versions["jax"] == jax.__version__
    with jax.default_matmul_precision("highest"), jax.enable_x64(True):
        other = Numerics.here(2)
    assert (other.matmul_precision, other.x64, other.devices) == ("highest", True, 2)


@pytest.mark.parametrize(
    "change,remedy",
    [
        ({"x64": True}, "x64=False, this is True: set JAX_ENABLE_X64"),
        ({"platform": "gpu"}, "platform=cpu, this is gpu: set JAX_PLATFORMS"),
        ({"matmul_precision": "highest"}, "set JAX_DEFAULT_MATMUL_PRECISION"),
        ({"threefry_partitionable": False}, "set JAX_THREEFRY_PARTITIONABLE"),
    ],
)
def test_what_makes_other_numbers_is_refused(tmp_path, here, change, remedy) -> None:
    numerics.record(tmp_path, here, begun=False, writes=True)
    before = (tmp_path / RECORD).read_bytes()
    with pytest.raises(NumericsError, match=remedy):
        numerics.record(tmp_path, dataclasses.replace(here, **change), True, True)
    assert (tmp_path / RECORD).read_bytes() == before
    numerics.record(tmp_path, here, begun=True, writes=True)
    assert numerics.changes(tmp_path) == []


def test_what_differs_in_rounding_is_said_and_noted(tmp_path, here, caplog) -> None:
    numerics.record(tmp_path, here, begun=False, writes=True)
    other = dataclasses.replace(here, devices=2, versions={"jax": "0.1"})
    for _ in range(2):
        numerics.record(tmp_path, other, begun=True, writes=True)
    assert "other settings" in caplog.text and "devices 1, now 2" in caplog.text
    said = "; ".join(numerics.changes(tmp_path))
    assert "devices 1, now 2" in said and "'jax': '0.1'" in said
    assert len(numerics.changes(tmp_path)) == 2, "noted once"


def test_a_record_that_is_damaged_is_refused_and_one_missing_is_said(
    tmp_path, here, caplog
) -> None:
    numerics.record(tmp_path, here, begun=False, writes=True)
    path = tmp_path / RECORD
    path.write_bytes(path.read_bytes().replace(b"cpu", b"gpu"))
    with pytest.raises(NumericsError, match="numerics.json is damaged"):
        numerics.record(tmp_path, here, begun=True, writes=True)
    path.unlink()
    numerics.record(tmp_path, here, begun=True, writes=True)
    assert "numerics.json is missing" in caplog.text and path.exists()
