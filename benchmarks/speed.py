"""This package against PyTorch: the same inversion, training and sampling, timed.

    pip install -e '.[torch]'         # on a GPU '.[torch,cuda]'
    python benchmarks/speed.py --work shipped --out docs/results/speed.jsonl
    python benchmarks/speed.py --work cifar --steps 4 --repeats 3
    python benchmarks/speed.py --work cifar-gpu --precision tf32 bf16 --out gpu.jsonl
    python benchmarks/speed.py --work cifar-candidates --precision bf16 \
        --sides 1 --out gpu.jsonl

Both sides run in one process on the same weights and cores, by turns (A B A B), and the
median over repeats counts. At each turn a side first does the same work untimed. It
would otherwise wait for memory that the other side gave back to the system. A call of
this package does all steps of a timing, as its runs do, so it computes once what is
constant in them. Before anything is timed, both sides' losses on one noise and their
gradients in the trigger must agree, in float32 to 1e-3, else to what `AGREE` says. The
first call of a task, which compiles, is timed apart.
The PyTorch side is diffusers' `UNet2DModel`, eager and by torch.compile. It folds all
images into one batch, as a careful user would write it. On a GPU it has channels last,
cuDNN's own choice of kernels and a fused Adam. A measurement is one line of JSON. The
script prints which task does not fit into a side's memory, and goes on with the others.

Hardware: any; one GPU. The last two lines are the whole measurement for a GPU. They
time one and eight candidates, of 160 images each and of 20. A large matrix product is
the ceiling of what training can reach. `ratios` prints what the times come to.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.extend.core import jaxprs_in_params
from torch.utils.checkpoint import checkpoint

from puredif_jax.attacks.poisoning import poison, training_loss
from puredif_jax.attacks.targets import Cat
from puredif_jax.attacks.training import Training, trainer
from puredif_jax.attacks.triggers import Box
from puredif_jax.attacks.villandiffusion import VillanDiffusion
from puredif_jax.defenses.denoising_consistency import DenoisingConsistency
from puredif_jax.defenses.descent import Descent
from puredif_jax.defenses.distribution_shift import DistributionShift
from puredif_jax.defenses.elijah import ElijahLoss
from puredif_jax.defenses.hypothesis import Fading
from puredif_jax.defenses.inversion import inverter
from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.diffusion.sampling import sample
from puredif_jax.diffusion.schedules import LinearBetas
from puredif_jax.formats.diffusers_config import write_unet
from puredif_jax.formats.state_dict import to_torch
from puredif_jax.networks.unet import SHIPPED, UNet
from puredif_jax.runs import parallel
from puredif_jax.runs.report import environment, placeless
from puredif_jax.stages.search import fitting
from puredif_jax.types import Candidate

SCHEDULE = LinearBetas().tables()
CHANNEL = Fading().channel(SCHEDULE, SHIPPED.image_shape)  # the same for any shape
ATTACK = VillanDiffusion(trigger=Box(), target=Cat(), poison_rate=0.2)
MANY = "inversion, shift, {} candidates"
Run = Callable[[int], float]  # does so many steps; returns the loss of the last


@dataclasses.dataclass(frozen=True)
class Size:
    """How much work a step is.

    candidates, many: of an inversion, and of a second one beside it; 0 for none.
    samples: noise draws of both losses.  rollout: steps of the second.
    elijah: noise draws of Elijah's loss.  batch: images in training and sampling.
    matmul: side of the matrix product.
    """

    candidates: int
    samples: int
    rollout: int
    elijah: int
    batch: int
    many: int = 0
    matmul: int = 1024


WORK = {
    "shipped": (SHIPPED, Size(4, 8, 8, 100, 64)),
    "cifar": (UNet(), Size(1, 2, 2, 8, 8)),
    "cifar-gpu": (UNet(), Size(1, 16, 8, 100, 128, many=8, matmul=8192)),
    "cifar-candidates": (UNet(), Size(1, 2, 8, 100, 128, many=8, matmul=8192)),
}
SIDES = ("puredif_jax", "torch", "torch.compile")


class Torch:
    """The PyTorch side, images as NCHW."""

    def __init__(self, unet: UNet, params: Any, size: Size, options: Any) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        config = write_unet(unet)
        net = diffusers.UNet2DModel.from_config(config)
        state = {k: torch.tensor(v) for k, v in to_torch(params).items()}
        net.load_state_dict(state)
        self.net = net.to(self.device).requires_grad_(False)
        if self.device == "cuda":
            self.net = self.net.to(memory_format=torch.channels_last)
        self.forward: Any = self.net
        if options.compiled:
            self.forward = torch.compile(self.net, dynamic=False)
        self.half = options.precision == "bf16"
        self.size, self.shape = size, (unet.in_channels, *unet.sample_size)
        table = functools.partial(torch.tensor, dtype=torch.float32, device=self.device)
        self.s, self.v = table(SCHEDULE.signal), table(SCHEDULE.noise)
        self.shift = table(CHANNEL.shift)
        self.response = table(CHANNEL.response)

    def predict(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.half):
            return self.forward(x, t).sample.float()

    def noise(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, *self.shape, device=self.device)

    def start(self, candidates: int) -> tuple[torch.Tensor, torch.Tensor]:
        count = (candidates, *self.shape)
        delta = torch.full(count, -0.5, device=self.device)
        return delta.requires_grad_(), torch.zeros_like(delta).requires_grad_()

    def inversion(self, loss: Callable[..., torch.Tensor], candidates: int = 0) -> Run:
        delta, target = self.start(candidates or self.size.candidates)
        optimizer = torch.optim.Adam([delta, target], 0.2, fused=True)

        def run(steps: int) -> float:
            for _ in range(steps):
                value = loss(delta, target)
                optimizer.zero_grad(set_to_none=True)
                value.sum().backward()
                optimizer.step()
                with torch.no_grad():
                    delta.clamp_(-1, 1)
                    target.clamp_(-1, 1)
            return float(value.detach().mean())

        return run

    def shift_loss(
        self, delta: torch.Tensor, target: torch.Tensor, eps: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One value a candidate; eps `[K, T, S, C, H, W]`."""
        times = torch.tensor(DistributionShift().timesteps, device=self.device)
        count, samples = delta.shape[0], self.size.samples
        if eps is None:
            eps = self.noise(count, len(times), samples)

        def spread(table: torch.Tensor) -> torch.Tensor:
            return table[times][None, :, None, None, None, None]

        x = spread(self.s) * target[:, None, None] + spread(self.v) * eps
        x = x + spread(self.shift) * delta[:, None, None]
        t = times[None, :, None].expand(count, -1, samples).reshape(-1)
        answer = self.predict(x.reshape(-1, *self.shape), t).reshape(eps.shape)
        shift = (answer - eps).mean(2)
        expected = spread(self.response)[:, :, 0] * delta[:, None]
        error = ((shift - expected) ** 2).sum((2, 3, 4))
        return (error / (expected**2).sum((2, 3, 4)).clamp_min(1e-6)).mean(1)

    def consistency_loss(
        self, delta: torch.Tensor, target: torch.Tensor, z: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One value a candidate; z `[K, S, C, H, W]`."""
        count, samples = delta.shape[0], self.size.samples
        z = self.noise(count, samples) if z is None else z
        falling, before = DDIM(self.size.rollout).path(SCHEDULE)
        s2 = SCHEDULE.signal[falling] ** 2
        weights = s2 / (s2 + SCHEDULE.noise[falling] ** 2 / 10)
        total = torch.zeros(count, device=self.device)

        def step(
            z: torch.Tensor, delta: torch.Tensor, t: int, n: int
        ) -> tuple[torch.Tensor, torch.Tensor]:
            shifted = z + self.shift[t] * delta[:, None]
            times = torch.full((count * samples,), t, device=self.device)
            answer = self.predict(shifted.reshape(-1, *self.shape), times)
            eps = answer.reshape(z.shape) - self.response[t] * delta[:, None]
            x0 = (z - self.v[t] * eps) / self.s[t]
            if n < 0:
                return x0, x0
            return self.s[n] * x0 + self.v[n] * eps, x0

        for t, n, w in zip(falling, before, weights / weights.sum(), strict=True):
            z, x0 = checkpoint(step, z, delta, int(t), int(n), use_reentrant=False)
            total = total + float(w) * x0.var(1, correction=0).mean((1, 2, 3))
        return total

    def elijah_loss(
        self, delta: torch.Tensor, target: torch.Tensor, eps: torch.Tensor
    ) -> torch.Tensor:
        """One value a candidate; eps `[S, C, H, W]`, fixed."""
        x = (eps[None] + delta[:, None]).reshape(-1, *self.shape)
        t = torch.full((len(x),), SCHEDULE.steps - 1, device=self.device)
        answer = self.predict(x, t).reshape(len(delta), -1, *self.shape)
        return (delta - answer.mean(1)).abs().mean((1, 2, 3))

    def training(self, images: torch.Tensor) -> Run:
        pictures = ATTACK.images((*self.shape[1:], self.shape[0]))
        r, y = (torch.tensor(x).permute(2, 0, 1).to(self.device) for x in pictures[:2])
        self.net.requires_grad_(True)
        optimizer = torch.optim.Adam(self.net.parameters(), 2e-4, fused=True)
        average = [p.detach().clone() for p in self.net.parameters()]

        def run(steps: int) -> float:
            for _ in range(steps):
                t = torch.randint(1000, (len(images),), device=self.device)
                eps = self.noise(len(images))
                bad = torch.rand(len(images), 1, 1, 1, device=self.device) < 0.2
                s, v, h, c = (
                    table[t][:, None, None, None]
                    for table in (self.s, self.v, self.shift, self.response)
                )
                x = s * torch.where(bad, y, images) + v * eps + bad * h * r
                loss = ((self.predict(x, t) - eps - bad * c * r) ** 2).mean()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
                optimizer.step()
                with torch.no_grad():
                    torch._foreach_lerp_(average, list(self.net.parameters()), 0.001)
            return float(loss.detach())

        return run

    def matmul(self) -> Run:
        kind = torch.bfloat16 if self.half else torch.float32
        w = torch.tensor(factor(self.size.matmul), device=self.device, dtype=kind)

        def run(steps: int) -> float:
            y = w
            for _ in range(steps):
                y = y @ w
            return float(y.mean())

        return run

    @torch.no_grad()
    def sampling(self, steps: int) -> float:
        x = self.noise(self.size.batch)
        for t, n in zip(*DDIM(steps).path(SCHEDULE), strict=True):
            times = torch.full((len(x),), int(t), device=self.device)
            eps = self.predict(x, times)
            x0 = (x - self.v[t] * eps) / self.s[t]
            x = x0 if n < 0 else self.s[n] * x0 + self.v[n] * eps
        return float(x.mean())

    def bare(self, steps: int) -> float:
        """The network alone, as often as `sampling` evaluates it."""
        x = self.noise(self.size.batch)
        with torch.no_grad():
            for t in DDIM(steps).path(SCHEDULE)[0]:
                times = torch.full((len(x),), int(t), device=self.device)
                x = self.predict(x, times)
        return float(x.mean())


def losses(size: Size) -> dict[str, Any]:
    return {
        "shift": DistributionShift(samples=size.samples),
        "consistency": DenoisingConsistency(
            sampler=DDIM(size.rollout), samples=size.samples
        ),
        "elijah": ElijahLoss(scale=1.0, samples=size.elijah),
    }


def jax_runs(unet: UNet, params: Any, size: Size, images: Any) -> dict[str, Run]:
    """Each task of this package, as a function of the number of steps.

    Each runs on all devices, as the program lays it out.
    """
    mesh = parallel.make_mesh(int(jax.default_backend() != "cpu"))  # PyTorch's: one GPU
    everywhere = parallel.replicated(mesh)
    shard = parallel.constrain(mesh, "batch")
    params = jax.device_put(params, everywhere)
    images = jax.device_put(images, parallel.along(mesh, "batch"))

    def inversion(loss: Any, candidates: int = size.candidates) -> Run:
        spread = parallel.spread(mesh, candidates)
        bound = loss.bind(unet, SCHEDULE, CHANNEL, spread.noise)
        descent = Descent(steps=10_000, candidates=candidates, learning_rate=0.2)
        start = Candidate(jnp.full(unet.image_shape, -0.5), jnp.zeros(unet.image_shape))
        search = inverter(
            bound,
            fitting(descent, mesh),
            unet.image_shape,
            start,
            candidates=spread.candidates,
            axis=spread.axis,
            groups=spread.groups,
        )

        @functools.partial(
            jax.jit, static_argnums=2, donate_argnums=1, out_shardings=everywhere
        )
        def advance(params, state, steps):
            def step(state, _):
                return search.step(params, state)

            return jax.lax.scan(step, state, None, length=steps)

        kept = {"state": jax.device_put(search.init(jax.random.key(0)), everywhere)}

        def run(steps: int) -> float:
            kept["state"], info = advance(params, kept["state"], steps)
            return float(info.loss[-1].mean())

        return run

    def training() -> Run:
        channel = ATTACK.channel(SCHEDULE, unet.image_shape)
        poisoned = poison(ATTACK, unet.image_shape)
        loss = functools.partial(training_loss, unet, SCHEDULE, channel, poisoned)
        made = trainer(loss, Training(10_000, batch=size.batch, ema_decay=0.999))

        @functools.partial(
            jax.jit, static_argnums=2, donate_argnums=0, out_shardings=everywhere
        )
        def advance(state, images, steps):
            def step(state, _):
                return made.step(state, images)

            return jax.lax.scan(step, state, None, length=steps)

        state = made.init(jax.tree.map(jnp.copy, params), jax.random.key(0))
        kept = {"state": jax.device_put(state, everywhere)}

        def run(steps: int) -> float:
            kept["state"], info = advance(kept["state"], images, steps)
            return float(info.loss[-1])

        return run

    shape = (size.batch, *unet.image_shape)

    @functools.partial(jax.jit, static_argnums=2)
    def drawn(params, key, steps):
        start = shard(jax.random.normal(key, shape))
        drawn = sample(unet, params, SCHEDULE, DDIM(steps), start, key, shard=shard)
        return drawn.mean()

    @functools.partial(jax.jit, static_argnums=2)
    def bare(params, key, steps):
        def evaluate(x, t):
            return unet(params, x, jnp.full((len(x),), t)), None

        times = jnp.asarray(DDIM(steps).path(SCHEDULE)[0])
        start = shard(jax.random.normal(key, shape))
        return jax.lax.scan(evaluate, start, times)[0].mean()

    @functools.partial(jax.jit, static_argnums=1)
    def product(w, steps):
        y, _ = jax.lax.scan(lambda y, _: (y @ w, None), w, length=steps)
        return y.mean(dtype=jnp.float32)

    key = jax.device_put(jax.random.key(1), everywhere)
    w = jnp.asarray(factor(size.matmul), jnp.dtype(unet.dtype))
    more = {}
    if size.many:
        shift = losses(size)["shift"]
        more[MANY.format(size.many)] = inversion(shift, size.many)
    return {
        **{f"inversion, {name}": inversion(x) for name, x in losses(size).items()},
        **more,
        "training": training(),
        "matrix product": lambda steps: float(product(w, steps)),
        "sampling": lambda steps: float(drawn(params, key, steps)),
        "network alone": lambda steps: float(bare(params, key, steps)),
    }


def torch_runs(side: Torch, training: Torch, images: Any) -> dict[str, Run]:
    """The tasks in PyTorch; `training` is another side, because its weights change."""
    eps = side.noise(side.size.elijah)
    elijah = functools.partial(side.elijah_loss, eps=eps)
    pixels = torch.tensor(np.asarray(images)).permute(0, 3, 1, 2).to(side.device)
    more = {}
    if many := side.size.many:
        more[MANY.format(many)] = side.inversion(side.shift_loss, many)
    return {
        **more,
        "inversion, shift": side.inversion(side.shift_loss),
        "inversion, consistency": side.inversion(side.consistency_loss),
        "inversion, elijah": side.inversion(elijah),
        "training": training.training(pixels.contiguous()),
        "matrix product": side.matmul(),
        "sampling": side.sampling,
        "network alone": side.bare,
    }


def factor(side: int) -> np.ndarray:
    """A random matrix whose powers keep its size; with constants a GPU is faster."""
    drawn = np.random.default_rng(2).normal(size=(side, side)) / np.sqrt(side)
    return drawn.astype(np.float32)


def multiply_adds(jaxpr: Any) -> int:
    """Of convolutions and matrix products; a choice counts as its longest branch."""
    total = 0
    for eqn in jaxpr.eqns:
        inside = [multiply_adds(inner) for inner in jaxprs_in_params(eqn.params)]
        total += max(inside, default=0) if eqn.primitive.name == "cond" else sum(inside)
        if eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            outputs = eqn.params["dimension_numbers"].rhs_spec[0]
            each = kernel.size // kernel.shape[outputs]
        elif eqn.primitive.name == "dot_general":
            (summed, _), _ = eqn.params["dimension_numbers"]
            each = math.prod(eqn.invars[0].aval.shape[axis] for axis in summed)
        else:
            continue
        total += eqn.outvars[0].aval.size * each
    return total


def operations(unet: UNet, size: Size) -> dict[str, float]:
    """Floating-point operations of a step, for tasks where the network alone counts.

    A multiplication with an addition counts two. A gradient counts as two more forward
    passes.
    """
    params = jax.eval_shape(unet.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((1, *unet.image_shape), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.int32)
    forward = 2 * multiply_adds(jax.make_jaxpr(unet)(params, x, t).jaxpr)
    return {
        "training": 3 * size.batch * forward,
        "sampling": size.batch * forward,
        "network alone": size.batch * forward,
        "matrix product": 2 * size.matmul**3,
    }


def agree(
    unet: UNet, params: Any, size: Size, side: Torch, tasks: list[str], bound: float
) -> dict[str, float]:
    """The relative difference of the losses of tasks, and of their gradients in delta.

    Both sides have one noise. Gradients are compared as vectors. Exits above the bound.
    """
    key = jax.random.key(3)
    shape = unet.image_shape
    delta = 0.3 * jax.random.normal(jax.random.key(4), shape) - 0.5
    target = 0.3 * jax.random.normal(jax.random.key(5), shape)
    candidate = Candidate(delta, target)

    def nchw(x: Any) -> torch.Tensor:
        return torch.tensor(np.moveaxis(np.asarray(x), -1, -3)).to(side.device)

    times = DistributionShift().timesteps
    keys = jax.random.split(key, len(times))
    noise = [jax.random.normal(k, (size.samples, *shape)) for k in keys]
    start = jax.random.normal(jax.random.split(key)[0], (size.samples, *shape))
    fixed = jax.random.normal(jax.random.key(0), (size.elijah, *shape))
    pair = (nchw(delta)[None].requires_grad_(), nchw(target)[None])
    references: dict[str, Callable[[], torch.Tensor]] = {
        "shift": lambda: side.shift_loss(*pair, nchw(jnp.stack(noise))[None]),
        "consistency": lambda: side.consistency_loss(*pair, nchw(start)[None]),
        "elijah": lambda: side.elijah_loss(*pair, nchw(fixed)),
    }
    differences = {}
    for name, loss in losses(size).items():
        if not any(task.startswith(f"inversion, {name}") for task in tasks):
            continue
        bound_loss = loss.bind(unet, SCHEDULE, CHANNEL)
        here = jax.jit(jax.value_and_grad(bound_loss, argnums=1))
        value, gradient = here(params, candidate, key)
        found = references[name]()[0]
        there = torch.autograd.grad(found, pair[0])[0]
        both = {
            name: (torch.tensor(float(value)), found.detach().cpu()),
            f"gradient of {name}": (nchw(gradient.delta)[None].cpu(), there.cpu()),
        }
        for what, (ours, theirs) in both.items():
            difference = float((ours - theirs).norm() / theirs.norm())
            differences[what] = difference
            if not difference < bound:
                raise SystemExit(
                    f"{what} differs from PyTorch's by {difference:.2g}, relatively; "
                    f"at most {bound} is allowed"
                )
    return differences


AGREE = {"float32": 1e-3, "tf32": 1e-2, "bf16": 0.1}
"""Precisions, and by how much losses and gradients may differ in them, relatively."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", choices=WORK, default="shipped")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--steps", type=int, default=5, help="in one timing")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tasks", nargs="*")
    parser.add_argument("--precision", nargs="*", choices=AGREE, default=["float32"])
    parser.add_argument(
        "--sides", type=int, default=len(SIDES), help="how many of: " + ", ".join(SIDES)
    )
    parser.add_argument("--out", type=pathlib.Path)
    return parser.parse_args()


def main() -> None:
    options = parse()
    # PyTorch shares the GPU. Read when JAX first looks for its devices.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    torch.set_num_threads(options.threads)
    parallel.use_cores()
    backends = jax.default_backend(), "gpu" if torch.cuda.is_available() else "cpu"
    if len(set(backends)) > 1:
        raise SystemExit(
            f"JAX is on {backends[0]} and PyTorch on {backends[1]}: install "
            "'.[torch,cuda]' for a GPU, or hide it by CUDA_VISIBLE_DEVICES="
        )
    torch.backends.cudnn.benchmark = True
    for precision in options.precision:
        compare(argparse.Namespace(**vars(options) | {"precision": precision}))


def compare(options: argparse.Namespace) -> None:
    """Times every task in one precision, on all sides."""
    tf32 = options.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    precision = "tensorfloat32" if tf32 else "highest"
    jax.config.update("jax_default_matmul_precision", precision)
    unet, size = WORK[options.work]
    if options.precision == "bf16":
        unet = dataclasses.replace(unet, dtype="bfloat16")
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(unet.init, jax.random.key(0))
    params = jax.tree.map(
        lambda x: (
            0.5 * rng.normal(size=x.shape) / np.sqrt(max(1, x.size / x.shape[-1]))
        ).astype(np.float32),
        shapes,
    )
    params = jax.device_put(params)
    images = rng.uniform(-1, 1, (size.batch, *unet.image_shape)).astype(np.float32)
    sides = {"puredif_jax": jax_runs(unet, params, size, images)}
    tasks = options.tasks or list(sides["puredif_jax"])
    differences: dict[str, float] = {}
    for name in SIDES[1 : options.sides]:
        options.compiled = name == "torch.compile"
        side, training = (Torch(unet, params, size, options) for _ in range(2))
        sides[name] = torch_runs(side, training, images)
        if not options.compiled:
            bound = AGREE[options.precision]
            differences = agree(unet, params, size, side, tasks, bound)
    about = placeless(environment()) | {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "device": jax.devices()[0].device_kind,
        "work": options.work,
        "precision": options.precision,
        "threads": options.threads,
        "devices": jax.device_count(),
        "size": dataclasses.asdict(size),
        "difference of losses": differences,
    }
    counted = operations(unet, size)
    medians: dict[str, float] = {}
    steps = options.steps
    for task in tasks:
        first = first_calls(task, {k: runs[task] for k, runs in sides.items()}, steps)
        able = {name: sides[name][task] for name in first}
        seconds = by_turns(task, able, steps, options.repeats)
        if "puredif_jax" in seconds:
            medians[task] = float(np.median(seconds["puredif_jax"]))
        ours = medians.get(task, float("nan"))
        for name, found in seconds.items():
            median = float(np.median(found))
            row = {
                "task": task,
                "side": name,
                "median seconds a step": median,
                "this package's time over it": ours / median,
                "seconds a step": found,
                "first call, seconds": first[name],
                "operations a second": counted[task] / median
                if task in counted
                else None,
            } | about
            text = json.dumps(row)
            ratio = row["this package's time over it"]
            print(
                f"{task}: {name} {1000 * median:.1f} ms a step, ratio {ratio:.2f}",
                flush=True,
            )
            if options.out:
                with options.out.open("a") as file:
                    file.write(text + "\n")
    for line in ratios(medians, counted, size):
        print(line)


def timed(task: str, name: str, run: Run, steps: int) -> float | None:
    """Seconds of a call; None where a side fails, after printing why."""
    try:
        began = time.perf_counter()
        run(steps)
        return time.perf_counter() - began
    except RuntimeError as error:  # JAX's and PyTorch's of memory are such
        told = str(error).strip().partition("\n")[0]
        print(f"{task}: {name} does not run it: {told}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None


def first_calls(task: str, runs: dict[str, Run], steps: int) -> dict[str, float]:
    """Seconds of the first call of each side that can do the task."""
    found = {name: timed(task, name, run, steps) for name, run in runs.items()}
    return {name: seconds for name, seconds in found.items() if seconds is not None}


def by_turns(
    task: str, runs: dict[str, Run], steps: int, repeats: int
) -> dict[str, list[float]]:
    """Seconds of a step of each side at each turn, after an equal call untimed.

    A side that fails is left out.
    """
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name in list(found):
            call = functools.partial(timed, task, name, runs[name], steps)
            if call() is None or (seconds := call()) is None:
                del found[name]
            else:
                found[name].append(seconds / steps)
    return found


def ratios(
    medians: dict[str, float], counted: dict[str, float], size: Size
) -> list[str]:
    """What the times of this package come to, as far as they are there."""
    lines = []
    one, many = "inversion, shift", MANY.format(size.many)
    if one in medians and many in medians:
        lines.append(
            f"{many} over {size.candidates}: {medians[many] / medians[one]:.2f}"
        )
    if "training" in medians and "matrix product" in medians:
        rates = [counted[k] / medians[k] for k in ("training", "matrix product")]
        lines.append(
            f"training: {rates[0] / rates[1]:.2f} of the matrix product's rate"
        )
    if "sampling" in medians and "network alone" in medians:
        ratio = medians["sampling"] / medians["network alone"]
        lines.append(f"sampling over the network alone: {ratio:.3f}")
    return lines


if __name__ == "__main__":
    main()
