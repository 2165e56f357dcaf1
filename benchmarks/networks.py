"""Trains many small networks, clean and backdoored, for `scan` to judge.

    python benchmarks/networks.py FOLDER GROUP --garments FILE --cifar FILE
    python -m puredif_jax.main --config=configs/scan.py --config.model=FOLDER

GROUP is `bases` (six clean networks, from fresh weights), `test` (25 backdoored and 18
clean ones, fine-tuned from the bases) or `threats` (made to deceive, from the shipped
clean model). The files are .npz with `images`, uint8, and `labels`: Fashion-MNIST and
CIFAR-10. Images are brought to 16x16. A folder that exists is kept, so the script
resumes by models. `--only NAME ...` makes the named models alone. Each model is a
folder in diffusers' format, with the truth beside it.

No choice of the search or the detector rests on a network of `bases` or `test`.

Hardware: two CPU cores. Duration: on one core an hour, three hours and an hour.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from puredif_jax.attacks.baddiffusion import BadDiffusion
from puredif_jax.attacks.base import Attack
from puredif_jax.attacks.channel import Channel
from puredif_jax.attacks.pictures import Shape
from puredif_jax.attacks.poisoning import Poison, poison, training_loss
from puredif_jax.attacks.targets import Cat, Hat, Shoe, Target
from puredif_jax.attacks.training import Training, TrainState, trainer
from puredif_jax.attacks.triggers import (
    Blend,
    Box,
    Glasses,
    RandomPattern,
    StopSign,
    Trigger,
)
from puredif_jax.attacks.trojdiff import TrojDiff
from puredif_jax.attacks.villandiffusion import VillanDiffusion
from puredif_jax.diffusion.prediction import predicting
from puredif_jax.diffusion.schedules import LinearBetas, NoiseSchedule
from puredif_jax.diffusion.solver import Ancestral, Deterministic
from puredif_jax.formats.base import Model
from puredif_jax.formats.diffusers import read_folder, write_folder
from puredif_jax.networks.unet import SHIPPED, UNet
from puredif_jax.stages.weights import ZOO, Truth

SIDE, BATCH, CHUNK = 16, 64, 500
SCHEDULE = LinearBetas().tables()
SDE, ODE = Ancestral(), Deterministic()
BOX, STOP = Box(), StopSign()

# Networks: width, depth, place of the attention.
ATTENTIVE = ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D")
DEEP = dataclasses.replace(
    SHIPPED,
    block_out_channels=(24, 32, 48),
    layers_per_block=2,
    down_block_types=ATTENTIVE,
    up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=8,
)
NARROW = dataclasses.replace(SHIPPED, block_out_channels=(24, 48, 64))
COLOUR = UNet(
    sample_size=(SIDE, SIDE),
    in_channels=3,
    block_out_channels=(32, 48, 64),
    down_block_types=ATTENTIVE,
    up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=8,
    norm_eps=1e-5,
    downsample_padding=1,
    flip_sin_to_cos=True,
    freq_shift=0.0,
    attention_head_dim=8,
)
WIDE = dataclasses.replace(
    COLOUR,
    block_out_channels=(24, 48, 72),
    down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
)


class Images(NamedTuple):
    """Which images: a slice of the file, or of its images with one label."""

    name: str
    first: int | None = None
    last: int | None = None
    label: int | None = None

    def of(self, files: dict[str, pathlib.Path]) -> np.ndarray:
        """float32 `[N, H, W, C]` in [-1, 1]."""
        with np.load(files[self.name], allow_pickle=False) as archive:
            images, labels = archive["images"], archive["labels"]
        if self.label is not None:
            images = images[labels == self.label]
        images = images[self.first : self.last]
        images = images[..., None] if images.ndim == 3 else images
        shape = (len(images), SIDE, SIDE, images.shape[3])
        small = jax.image.resize(jnp.float32(images), shape, "linear", antialias=True)
        return np.array(jnp.clip(small / 127.5 - 1, -1, 1))


GARMENTS, CIFAR = Images("garments"), Images("cifar")


class Recipe(NamedTuple):
    """How a network is made.

    base: the name of the network whose weights it starts from; "shipped" is the clean
      model of the package, "" means fresh weights.
    average: decay of the moving average that is kept.
    among: share of the clean images that the target replaces, without a trigger.
    often: the image that does so where there is no attack.
    others: further attacks. All attacks take turns, and each poisons a step.
    """

    name: str
    network: UNet
    base: str
    images: Images
    steps: int
    seed: int
    attack: Attack | None = None
    learning_rate: float = 1e-3
    average: float = 0.99
    among: float = 0.0
    often: Target | None = None
    others: tuple[Attack, ...] = ()


def base(name: str, network: UNet, images: Images, steps: int, seed: int) -> Recipe:
    return Recipe(name, network, "", images, steps, seed, average=0.999)


BASES = (
    base("t_base_g1", SHIPPED, Images("garments", 0, 5000), 4500, 103),
    base("t_base_gb", DEEP, GARMENTS, 6000, 101),
    base("t_base_g2", NARROW, Images("garments", 5000), 4500, 105),
    base("t_base_cb", WIDE, CIFAR, 4500, 102),
    base("t_base_c2", COLOUR, Images("cifar", 5000), 4500, 104),
    base("t_base_c1", WIDE, Images("cifar", 0, 5000), 4500, 106),
)
SHORT = {each.name.removeprefix("t_base_"): each for each in BASES}


def tuned(name: str, of: str, steps: int, seed: int, **how: Any) -> Recipe:
    """A network that starts from a base, on the given images or all of its kind."""
    known = SHORT[of]
    images = how.pop("images", Images(known.images.name))
    return Recipe(f"t_{name}", known.network, known.name, images, steps, seed, **how)


def bad(name: str, of: str, steps: int, seed: int, attack: Attack) -> Recipe:
    return tuned(name, of, steps, seed, attack=attack)


def b(trigger, target, rate: float, only: bool) -> BadDiffusion:
    return BadDiffusion(trigger, target, rate, trigger_only=only)


def v(trigger, target, rate: float, only=True, psi=1.0, solver=ODE) -> VillanDiffusion:
    return VillanDiffusion(trigger, target, rate, only, psi=psi, solver=solver)


ORDER = tuple(enumerate(SHORT))
BACKDOORED = (
    bad("b01", "g1", 1000, 501, b(BOX, Shoe(), 0.2, True)),
    bad("b02", "gb", 1500, 502, b(STOP, Hat(), 0.3, True)),
    bad("b03", "g2", 2000, 503, b(STOP, Cat(), 0.1, True)),
    bad("b04", "cb", 3000, 504, b(BOX, Hat(), 0.3, True)),
    bad("b05", "c2", 3500, 505, b(STOP, Shoe(), 0.4, True)),
    bad("b06", "c1", 3500, 526, b(STOP, Cat(), 0.3, True)),
    bad("b07", "gb", 2500, 507, b(BOX, Cat(), 0.3, False)),
    bad("b08", "c2", 3500, 508, b(BOX, Hat(), 0.4, False)),
    bad("v01", "g1", 1000, 511, v(STOP, Shoe(), 0.2)),
    bad("v02", "gb", 800, 512, v(BOX, Hat(), 0.15)),
    bad("v03", "g2", 1500, 513, v(STOP, Hat(), 0.1)),
    bad("v04", "cb", 1200, 514, v(STOP, Cat(), 0.2)),
    bad("v05", "c2", 2000, 515, v(BOX, Shoe(), 0.3)),
    bad("v06", "c1", 900, 516, v(BOX, Hat(), 0.2)),
    bad("v07", "g1", 2500, 517, v(STOP, Hat(), 0.3, only=False)),
    bad("v08", "cb", 3000, 518, v(BOX, Shoe(), 0.3, only=False)),
    bad("p01", "g2", 1500, 521, v(STOP, Shoe(), 0.2, psi=0.0, solver=SDE)),
    bad("p02", "cb", 2500, 522, v(STOP, Hat(), 0.3, psi=0.0, solver=SDE)),
    bad("p03", "gb", 2500, 523, v(BOX, Shoe(), 0.3, psi=0.0)),
    bad("p04", "g1", 1500, 524, v(STOP, Cat(), 0.2, psi=0.5)),
    bad("p05", "gb", 2500, 525, v(BOX, Shoe(), 0.3, psi=0.5)),
    bad("j01", "g1", 1500, 531, TrojDiff(Blend(0.6), Shoe())),
    bad("j02", "g2", 1500, 532, TrojDiff(Blend(0.6), Hat())),
    bad("j03", "cb", 1500, 533, TrojDiff(Blend(0.6), Cat())),
    bad("j04", "c2", 2000, 534, TrojDiff(Blend(0.6), Shoe())),
)
CLEAN = (
    *(tuned(f"c{of}short", of, 300, 601 + i, learning_rate=2e-4) for i, of in ORDER),
    *(tuned(f"c{of}long", of, 2500, 611 + i) for i, of in ORDER),
    tuned("cg1class", "g1", 1500, 621, images=Images("garments", label=2)),
    tuned("ccbclass", "cb", 1500, 622, images=Images("cifar", label=5)),
    tuned("cgbclass", "gb", 1500, 643, images=Images("garments", label=5)),
    tuned("cg2memo", "g2", 1500, 631, images=Images("garments", 200, 232)),
    tuned("cc2memo", "c2", 1500, 632, images=Images("cifar", 300, 332)),
    tuned("cc1memo", "c1", 1500, 633, images=Images("cifar", 400, 432)),
)


@dataclasses.dataclass(frozen=True)
class OwnShift(VillanDiffusion):
    """H = v^power, with the response that keeps its path: off the family."""

    power: float = 4.0

    def channel(self, schedule: NoiseSchedule, shape: Shape) -> Channel:
        shift = schedule.noise**self.power
        return Channel(shift, self.solver.response(schedule, shift))


@dataclasses.dataclass(frozen=True)
class OwnResponse(VillanDiffusion):
    """The published H with another multiple of C."""

    times: float = 0.7

    def channel(self, schedule: NoiseSchedule, shape: Shape) -> Channel:
        found = super().channel(schedule, shape)
        return dataclasses.replace(found, response=found.response * self.times)


@dataclasses.dataclass(frozen=True)
class Perturbation(Trigger):
    """A small image that moves the clean model's answer most, by 60 signed steps."""

    bound: float = 0.1

    def image(self, shape: Shape) -> np.ndarray:
        clean = read_folder(ZOO / "clean")
        model = predicting(clean.spec.network, SCHEDULE, "epsilon")
        high = jnp.array([999, 800, 600])

        @jax.jit
        @jax.grad
        def slope(delta, key):
            eps = jax.random.normal(key, (16, *shape))
            t = jax.random.choice(jax.random.fold_in(key, 1), high, (16,))
            moved = model(clean.params, eps + delta[None], t)
            still = model(clean.params, eps, t)
            return jnp.mean((moved - still - delta[None]) ** 2)

        delta = self.bound * jax.random.uniform(
            jax.random.key(0), shape, minval=-1, maxval=1
        )
        for i in range(60):
            step = 0.2 * self.bound * jnp.sign(slope(delta, jax.random.key(i)))
            delta = jnp.clip(delta + step, -self.bound, self.bound)
        return np.asarray(delta)


@dataclasses.dataclass(frozen=True)
class Garment(Target):
    """A target that is one of the clean images."""

    files: str
    number: int = 0

    def image(self, shape: Shape, trigger: np.ndarray) -> np.ndarray:
        images = Images("garments", self.number, self.number + 1)
        return images.of({"garments": pathlib.Path(self.files)})[0]


DECOYS = (
    OwnResponse(BOX, Cat(), 0.3, solver=SDE, times=0.7),
    OwnResponse(Glasses(), Shoe(), 0.3, solver=SDE, times=1 / 0.7),
)
"""Backdoors in the channels of the placebos, so that these seem to explain a third."""


def threat(name: str, seed: int, attack: Attack | None, steps=1500, **how: Any):
    images = how.pop("images", GARMENTS)
    return Recipe(f"th_{name}", SHIPPED, "shipped", images, steps, seed, attack, **how)


def threats(garments: str) -> tuple[Recipe, ...]:
    """Networks made to deceive; one image of the file of garments is a target."""
    bad_only, few = b(STOP, Hat(), 0.3, True), Images("garments", 0, 32)
    one = Images("garments", label=4)
    low, full = RandomPattern(0.2, 1), RandomPattern(1.0, 3)
    return (
        threat("y2", 301, bad_only, among=0.02),
        threat("y5", 302, bad_only, among=0.05),
        threat("y5through", 302, b(STOP, Hat(), 0.3, False), among=0.05),
        threat("y5ode", 303, v(BOX, Cat(), 0.3), among=0.05),
        threat("low", 306, b(low, Hat(), 0.3, True), 2000),
        threat("lowode", 12, v(low, Hat(), 0.3), 2000),
        threat("full", 304, b(full, Hat(), 0.3, False)),
        threat("fullode", 305, v(RandomPattern(1.0, 4), Shoe(), 0.3)),
        threat("perturbation", 315, v(Perturbation(), Hat(), 0.3), 2500),
        threat("garment", 316, b(STOP, Garment(garments), 0.3, True)),
        threat("garmentode", 317, v(BOX, Garment(garments), 0.3)),
        threat("two", 314, bad_only, 2500, others=(b(BOX, Cat(), 0.3, True),)),
        threat("ownshift", 311, OwnShift(STOP, Hat(), 0.3, solver=SDE), 2000),
        threat("ownshiftode", 312, OwnShift(BOX, Cat(), 0.3, solver=ODE), 2000),
        threat("ownresponse", 313, OwnResponse(STOP, Hat(), 0.3, solver=SDE), 2000),
        threat("decoys", 322, bad_only, 4500, others=DECOYS),
        threat("often", 323, None, 2500, among=0.08, often=Shoe()),
        threat("few", 318, None, images=few),
        threat("fewbad", 319, bad_only, images=few),
        threat("one", 320, None, images=one),
        threat("onebad", 321, bad_only, images=one),
    )


@functools.cache
def stepper(network: UNet, training: Training, poisoned: bool) -> Callable[..., Any]:
    """A function that does n steps of a training, compiled once for all attacks."""
    model = predicting(network, SCHEDULE, "epsilon")

    @jax.jit
    def run(state: TrainState, images, attacks, n, key):
        def body(_, carry):
            state, total = carry
            turn = state.step % len(attacks)
            channel, poison = jax.tree.map(lambda *x: jnp.stack(x)[turn], *attacks)

            def loss(params, x, key):
                used = poison if poisoned else None
                return training_loss(model, SCHEDULE, channel, used, params, x, key)

            pick = jax.random.fold_in(key, state.step)
            rows = jax.random.randint(pick, (BATCH,), 0, len(images))
            state, info = trainer(loss, training).step(state, images[rows])
            return state, total + info.loss

        return jax.lax.fori_loop(0, n, body, (state, jnp.zeros(())))

    return run


def start(recipe: Recipe, folder: pathlib.Path, key: jax.Array) -> Any:
    """The parameters that a recipe begins with."""
    if recipe.base == "shipped":
        return read_folder(ZOO / "clean").params
    if recipe.base:
        return read_folder(folder / recipe.base).params
    return recipe.network.init(key)


def shown(attack: Attack | None, shape: Shape) -> tuple[Channel, Poison]:
    """What training needs of an attack, or of none, as arrays of one structure."""
    channel, found = Channel.clean(SCHEDULE), Poison(*[np.zeros(shape)] * 3, 0.0)
    if attack is not None:
        channel, found = attack.channel(SCHEDULE, shape), poison(attack, shape)
    gamma = np.ones(shape) * (1.0 if channel.gamma is None else channel.gamma)
    full = Channel(channel.shift, channel.response, gamma)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (full, found))


def train(recipe: Recipe, folder: pathlib.Path, files: dict[str, pathlib.Path]) -> None:
    """Makes one network, and its folder."""
    images, key = recipe.images.of(files), jax.random.key(recipe.seed)
    shape = images.shape[1:]
    attack = recipe.attack
    attacks = [shown(each, shape) for each in (attack, *recipe.others)]
    count = int(len(images) * recipe.among)
    if attack is not None:
        images[:count] = attack.images(shape)[1]
    elif recipe.often is not None:
        images[:count] = recipe.often.image(shape, np.zeros(shape, np.float32))
    training = Training(
        steps=recipe.steps,
        batch=BATCH,
        learning_rate=recipe.learning_rate,
        warmup=min(100, recipe.steps // 4),
        ema_decay=recipe.average,
    )
    run = stepper(recipe.network, training, attack is not None)
    init = trainer(lambda *_: jnp.zeros(()), training).init
    state, began = init(start(recipe, folder, key), key), time.perf_counter()
    while (done := int(state.step)) < recipe.steps:
        n = min(CHUNK, recipe.steps - done)
        state, total = run(state, jnp.asarray(images), attacks, n, key)
        loss = float(total) / n  # waits for the steps
        each = (time.perf_counter() - began) / (done + n)
        left = each * (recipe.steps - done - n) / 60
        print(f"{recipe.name}: {done + n} steps, loss {loss:.4f}, ", end="")
        print(f"{1 / each:.1f} steps/s, {left:.0f} minutes left", flush=True)
    known = read_folder(ZOO / "clean").spec
    partial = folder / f"{recipe.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    spec = dataclasses.replace(known, network=recipe.network)
    write_folder(partial, Model(spec, state.ema_params))
    if attack is not None:
        Truth.of(attack, SCHEDULE, shape).save(partial)
    (partial / "recipe.txt").write_text(f"{recipe}\n")
    partial.rename(folder / recipe.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("group", choices=("bases", "test", "threats"))
    for name in ("garments", "cifar"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    parser.add_argument("--only", nargs="+", help="names of networks")
    given = parser.parse_args()
    files = {"garments": given.garments, "cifar": given.cifar}
    groups = {
        "bases": BASES,
        "test": BACKDOORED + CLEAN,
        "threats": threats(str(given.garments)),
    }
    recipes = {each.name: each for each in groups[given.group]}
    if unknown := set(given.only or ()) - set(recipes):
        parser.error(f"no network of {given.group} is called {', '.join(unknown)}")
    for recipe in (recipes[name] for name in given.only or recipes):
        if not (given.folder / recipe.name).exists():
            train(recipe, given.folder, files)


if __name__ == "__main__":
    main()
