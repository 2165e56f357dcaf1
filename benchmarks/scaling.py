"""What devices send each other in a step, counted in compiled programs; on any machine.

    export XLA_FLAGS="--xla_backend_optimization_level=0 \
        --xla_llvm_disable_expensive_passes=true"  # compiles sooner, counts the same
    python benchmarks/scaling.py --network shipped --out docs/results/scaling.jsonl
    python benchmarks/scaling.py --network cifar --out docs/results/scaling.jsonl

Weak scaling from 1 to 8 fake CPU devices: the work of a device stays the same. Four
programs are compiled and none is run: inversion with a candidate more for each device,
inversion of one candidate with more noise, training with more images, and sampling.
Collectives are counted with the trips of the loops they lie in. docs/scaling.md makes
a model of the time from these numbers.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from puredif_jax.attacks.poisoning import poison, training_loss
from puredif_jax.attacks.targets import Cat
from puredif_jax.attacks.training import Training, trainer
from puredif_jax.attacks.triggers import Box
from puredif_jax.attacks.villandiffusion import VillanDiffusion
from puredif_jax.defenses.descent import Descent
from puredif_jax.defenses.distribution_shift import DistributionShift
from puredif_jax.defenses.hypothesis import Fading
from puredif_jax.defenses.inversion import inverter
from puredif_jax.defenses.objective import Loss
from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.diffusion.sampling import sample
from puredif_jax.diffusion.schedules import LinearBetas
from puredif_jax.networks.unet import SHIPPED, UNet
from puredif_jax.runs import parallel
from puredif_jax.runs.report import environment, placeless

NETWORKS = {"shipped": SHIPPED, "cifar": UNet()}
SCHEDULE = LinearBetas().tables()
STEPS = 2  # of a compiled loop; divided out again
BATCH = 8  # images of a device in training and sampling
KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"

Program = tuple[Any, tuple[Any, ...]]  # jitted, and the shapes of its arguments
Counts = dict[str, tuple[float, float]]  # number and bytes of each kind


def collectives(text: str, around: int | None = None) -> tuple[Counts, Counts]:
    """Of a compiled program: those in its loops, by their trips, and the others.

    A loop whose trips the program does not tell goes round `around` times; without
    that, collectives in one raise ValueError.
    """
    blocks: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = head[2]
            blocks[name] = []
            entry = name if head[1] else entry
        elif name:
            blocks[name].append(line)

    def count(block: str) -> tuple[Counts, Counts]:
        looped: Counts = {}
        once: Counts = {}

        def add(to: Counts, more: Counts, times: float) -> None:
            for kind, (number, size) in more.items():
                before = to.get(kind, (0.0, 0.0))
                to[kind] = (before[0] + times * number, before[1] + times * size)

        for line in blocks[block]:
            if made := re.search(rf" = (.*?) ({KINDS})(?:-start)?\(", line):
                add(once, {made[2]: (1, size_of(made[1]))}, 1)
            known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            trips = int(known[1]) if known else around
            parts = re.findall(r"(body|calls)=%?([\w.\-]+)", line)
            # Of a conditional all branches count, though only one is taken.
            branches = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line)
            if found := re.search(r"branch_computations=\{([^}]*)\}", line):
                branches += re.findall(r"[\w.\-]+", found[1])
            parts += [("branch", branch) for branch in branches]
            for role, called in parts:
                inner, outer = count(called)
                if role == "body" and trips is None and (inner or outer):
                    raise ValueError(f"how often does this loop go round? {line}")
                times = trips if trips is not None and role == "body" else 1
                add(looped, inner, times)
                add(looped if role == "body" else once, outer, times)
        return looped, once

    return count(entry)


def size_of(shapes: str) -> int:
    """Bytes of the arrays in the text of a type; all are of 32 bits here."""
    found = re.findall(r"[fsu]32\[([\d,]*)\]", shapes)
    return 4 * sum(math.prod(map(int, filter(None, s.split(",")))) for s in found)


def everywhere(mesh: Any, shapes: Any) -> Any:
    """The shapes of arrays that every device has whole."""
    whole = parallel.replicated(mesh)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes
    )


def parameters(unet: UNet, mesh: Any) -> Any:
    return everywhere(mesh, jax.eval_shape(unet.init, jax.random.key(0)))


def inversion(unet: UNet, mesh: Any, candidates: int, loss: Loss) -> Program:
    spread = parallel.spread(mesh, candidates)
    channel = Fading().channel(SCHEDULE, unet.image_shape)
    search = inverter(
        loss.bind(unet, SCHEDULE, channel, spread.noise),
        Descent(candidates=candidates),
        unet.image_shape,
        candidates=spread.candidates,
        axis=spread.axis,
    )

    def advance(params: Any, state: Any) -> Any:
        def step(state: Any, _: Any) -> Any:
            return search.step(params, state)

        return jax.lax.scan(step, state, None, length=STEPS)

    state = jax.eval_shape(search.init, jax.random.key(0))
    made = jax.jit(advance, out_shardings=parallel.replicated(mesh))
    return made, (parameters(unet, mesh), everywhere(mesh, state))


def training(unet: UNet, mesh: Any) -> Program:
    batch = BATCH * mesh.size
    attack = VillanDiffusion(trigger=Box(), target=Cat())
    channel = attack.channel(SCHEDULE, unet.image_shape)
    poisoned = poison(attack, unet.image_shape)
    loss = functools.partial(training_loss, unet, SCHEDULE, channel, poisoned)
    made = trainer(loss, Training(10, batch=batch, warmup=0, ema_decay=0.999))
    state = jax.eval_shape(made.init, parameters(unet, mesh), jax.random.key(0))
    images = jax.ShapeDtypeStruct(
        (STEPS, batch, *unet.image_shape),
        jnp.float32,
        sharding=parallel.along(mesh, None, "batch"),
    )

    def advance(state: Any, images: Any) -> Any:
        return jax.lax.scan(made.step, state, images)

    return jax.jit(advance), (everywhere(mesh, state), images)


def sampling(unet: UNet, mesh: Any) -> Program:
    shard = parallel.constrain(mesh, "batch")
    shape = (BATCH * mesh.size, *unet.image_shape)

    def draw(params: Any, key: Any) -> Any:
        start = shard(jax.random.normal(key, shape))
        return sample(unet, params, SCHEDULE, DDIM(STEPS), start, key, shard=shard)

    key = jax.eval_shape(jax.random.key, 0)
    return jax.jit(draw), (parameters(unet, mesh), everywhere(mesh, key))


PROGRAMS: dict[str, Callable[[UNet, Any], Program]] = {
    "inversion, a candidate a device": lambda unet, mesh: inversion(
        unet, mesh, mesh.size, DistributionShift(samples=2)
    ),
    "inversion, 2 draws a device": lambda unet, mesh: inversion(
        unet, mesh, 1, DistributionShift(samples=2 * mesh.size)
    ),
    "training, 8 images a device": training,
    "sampling, 8 images a device": sampling,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=NETWORKS, default="shipped")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    unet = NETWORKS[options.network]
    shapes = jax.tree.leaves(jax.eval_shape(unet.init, jax.random.key(0)))
    for name, make in PROGRAMS.items():
        for devices in (1, 2, 4, 8):
            program, arguments = make(unet, parallel.make_mesh(devices))
            compiled = program.lower(*arguments).compile()
            sizes = compiled.memory_analysis()
            looped, once = collectives(compiled.as_text())
            row = {
                "program": name,
                "network": options.network,
                "parameters": sum(x.size for x in shapes),
                "devices": devices,
                "collectives of a step": {
                    kind: {"number": number / STEPS, "bytes": size / STEPS}
                    for kind, (number, size) in looped.items()
                },
                "collectives of a call": {
                    kind: {"number": number, "bytes": size}
                    for kind, (number, size) in once.items()
                },
                "temporaries of a device, bytes": sizes.temp_size_in_bytes,
            } | placeless(environment())
            print(json.dumps(row))
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
