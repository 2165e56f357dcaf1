"""What a checkpoint costs, packed into one array with its digest, and as Orbax has it.

    python benchmarks/checkpoints.py

Answers: is the layout of puredif_jax/runs/checkpoint.py worth its lines? The state is
the training state of the package's network. Prints three times for each way, medians
of eight in seconds: how long a save blocks the loop, how long it takes until it is on
the disk, and how long a restore takes.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp

from puredif_jax.attacks.training import Training, trainer
from puredif_jax.networks.unet import SHIPPED
from puredif_jax.runs import checkpoint, parallel
from puredif_jax.runs.report import environment

TIMES = 8


def main() -> None:
    parallel.use_cores()
    everywhere = parallel.replicated(parallel.make_mesh())
    params = jax.jit(SHIPPED.init)(jax.random.key(0))
    made = trainer(lambda *_: None, Training(steps=1000))  # type: ignore[arg-type]
    state = parallel.put(made.init(params, jax.random.key(1)), everywhere)
    like, plain = checkpoint.abstract(state), without_keys(state)
    found: dict[str, Any] = {"arrays": len(jax.tree.leaves(state))}
    with tempfile.TemporaryDirectory() as folder:
        with checkpoint.Checkpoints(f"{folder}/packed") as kept:
            found["packed, with digest"] = timed(
                lambda step: kept.save(step, state),
                kept._manager.wait_until_finished,
                lambda step: kept.restore(step, like),
            )
        for name, tree in {
            "Orbax, NumPy arrays": lambda: jax.device_get(plain),
            "Orbax, JAX arrays": lambda: plain,
        }.items():
            with ocp.CheckpointManager(f"{folder}/{name}") as manager:
                found[name] = timed(
                    lambda step, m=manager, tree=tree: m.save(
                        step, args=ocp.args.PyTreeSave(tree())
                    ),
                    manager.wait_until_finished,
                    lambda step, m=manager: m.restore(
                        step, args=ocp.args.PyTreeRestore()
                    ),
                )
    print(json.dumps(found | environment(), indent=2))


def without_keys(state: Any) -> Any:
    """The state with keys as their data, which Orbax's handler of trees takes."""

    def leaf(x: jax.Array) -> jax.Array:
        is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(x) if is_key else x

    return jax.tree.map(leaf, state)


def timed(
    save: Callable[[int], Any], wait: Callable[[], Any], restore: Callable[[int], Any]
) -> dict[str, float]:
    columns: dict[str, list[float]] = {"blocks": [], "in all": [], "restore": []}
    for step in range(TIMES):
        began = time.perf_counter()
        save(step)
        columns["blocks"].append(time.perf_counter() - began)
        wait()
        columns["in all"].append(time.perf_counter() - began)
        began = time.perf_counter()
        jax.block_until_ready(restore(step))
        columns["restore"].append(time.perf_counter() - began)
    return {name: round(statistics.median(x), 4) for name, x in columns.items()}


if __name__ == "__main__":
    main()
