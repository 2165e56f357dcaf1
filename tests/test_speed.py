"""The comparison with PyTorch runs, in every precision; nothing is judged by time."""

import argparse
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
from tiny_config import TINY

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def speed():
    import speed

    speed.WORK["tiny"] = (TINY, speed.Size(1, 2, 2, 4, 8, many=8, matmul=8))
    return speed


def options(out: pathlib.Path, precision: str) -> argparse.Namespace:
    return argparse.Namespace(
        work="tiny",
        threads=1,
        steps=2,
        repeats=1,
        tasks=None,
        precision=precision,
        sides=2,
        out=out,
    )


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_every_task_is_done_by_both_sides(tmp_path, capsys, speed, precision) -> None:
    speed.compare(options(tmp_path / "found.jsonl", precision))
    rows = [json.loads(x) for x in (tmp_path / "found.jsonl").read_text().splitlines()]
    tasks = {row["task"] for row in rows}
    assert {"inversion, shift, 8 candidates", "training", "sampling"} < tasks
    assert {(row["task"], row["side"]) for row in rows} == {
        (task, side) for task in tasks for side in ("puredif_jax", "torch")
    }
    differences = rows[0]["difference of losses"]
    assert max(differences.values()) < speed.AGREE[precision]
    printed = capsys.readouterr().out
    assert "8 candidates over 1: " in printed and "of the matrix product's" in printed


def test_a_side_that_runs_out_of_memory_does_not_stop_the_others(
    tmp_path, capsys, speed, monkeypatch
) -> None:
    def full(self) -> None:
        raise RuntimeError("CUDA out of memory\nand more")

    def training(self, images):
        return lambda steps: full(self)

    monkeypatch.setattr(speed.Torch, "training", training)
    wanted = options(tmp_path / "found.jsonl", "float32")
    wanted.tasks = ["training", "sampling"]
    speed.compare(wanted)
    rows = [json.loads(x) for x in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert [(row["task"], row["side"]) for row in rows] == [
        ("training", "puredif_jax"),
        ("sampling", "puredif_jax"),
        ("sampling", "torch"),
    ]
    assert (
        "training: torch does not run it: CUDA out of memory" in capsys.readouterr().out
    )
    calls = itertools.count()

    def later(steps: int) -> float:
        if next(calls) > 1:  # after one turn
            full(None)
        return 0.0

    seconds = speed.by_turns("a", {"x": later, "y": abs}, 1, 3)
    assert seconds.keys() == {"y"} and len(seconds["y"]) == 3


def test_operations_are_those_of_convolutions_and_matrix_products(speed) -> None:
    def network(x, kernel, w):
        y = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        y = jax.lax.platform_dependent(y, w, cpu=lambda y, w: y, default=jnp.matmul)
        return jax.jit(jnp.matmul)(y, w)

    shapes = (1, 8, 8, 3), (3, 3, 3, 5), (5, 5)
    jaxpr = jax.make_jaxpr(network)(*(jnp.zeros(shape) for shape in shapes)).jaxpr
    assert speed.multiply_adds(jaxpr) == 4 * 4 * 5 * (3 * 3 * 3) + 2 * 4 * 4 * 5 * 5
