"""A model on its devices: loading, sampling and measuring, each program compiled once.

What is drawn or measured is kept in the run folder; puredif_jax.stages.loops has the
long loops on the same model.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from puredif_jax.attacks.base import Solver
from puredif_jax.data import images as data
from puredif_jax.defenses.detection import (
    Evidence,
    Features,
    denoising,
    evidence,
    features,
)
from puredif_jax.defenses.objectives import Hypothesis
from puredif_jax.diffusion.sampling import Prediction, Sampler, predicting, sample
from puredif_jax.diffusion.schedules import Betas
from puredif_jax.formats import diffusers as convert
from puredif_jax.metrics import garment_net
from puredif_jax.metrics import measures as metrics
from puredif_jax.networks.memory import activations, sliced
from puredif_jax.networks.unet import UNet
from puredif_jax.runs import parallel, weight_file
from puredif_jax.runs.binding import RunError
from puredif_jax.runs.report import progress
from puredif_jax.runs.run import Run, compiling
from puredif_jax.stages.weights import ASSETS, find_weights
from puredif_jax.types import Array, Candidate, Key, NoiseModel, Params

SHOWN = 16  # images of a set in a report
PLAIN = 64  # draws from plain noise, with which triggered ones are compared


def garment_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Frechet distance over the shipped garment-net of two sets `[N, 16, 16, 1]`.

    Images are clipped to [-1, 1]. NaN where an image has it: maxima in the network may
    drop it. Raises ValueError for a set of fewer than two.
    """
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return math.nan
    shapes = jax.eval_shape(garment_net.init, jax.random.key(0))
    path = ASSETS / f"{garment_net.NAME}.safetensors"
    embed = functools.partial(
        jax.jit(garment_net.embed), weight_file.load_weights(path, shapes)
    )
    sets = (np.asarray(embed(x)) for x in (first, second))
    return metrics.frechet_distance(*sets)


class Success(NamedTuple):
    """How often draws meet a target.

    rates: `metrics.success` of the draws, in shares of them.
    images: the first draws, to show.
    """

    rates: dict[str, float]
    images: np.ndarray

    @property
    def rate(self) -> float:
        """Share at MSE < 1e-2, the rate that claims are made in."""
        return self.rates["mse<0.01"]


@functools.lru_cache
def _activations(unet: UNet) -> int:
    params = jax.eval_shape(unet.init, jax.random.key(0))
    return activations(unet, params, unet.image_shape)


def _fitted(unet: UNet, images: int, devices: int) -> tuple[UNet, int]:
    """How many of `images` fit into half the free memory; says so if not all do.

    Returns the network, its blocks rematerialised where not even one image fits on each
    device, and the number, a multiple of the devices.

    Raises:
      RunError: one image does not fit.
    """
    free = parallel.free_memory() // 2
    size = _activations(unet)
    if size > free:
        unet = dataclasses.replace(unet, remat=True)
        size = _activations(unet)
    if size > free:
        raise RunError(
            f"one image of {unet.image_shape} takes {size / 2**30:.3g} GiB in this "
            f"network, and half of what is free is {free / 2**30:.3g} GiB"
        )
    fit = devices * (free // size)
    if fit < images:
        logging.info(
            "memory: %d of %d images at a time, %.3g MiB each%s, into half of the "
            "%.3g GiB free on each of %d devices",
            fit,
            images,
            size / 2**20,
            " with rematerialised blocks" if unet.remat else "",
            2 * free / 2**30,
            devices,
        )
    return unet, fit


class Programs:
    """Traced and compiled programs: those that were used last.

    What is dropped gives its memory back, so a sweep of many trainings stays bounded.

    Args:
      most: how many are kept.
    """

    def __init__(self, most: int = 32) -> None:
        self._most = most
        self._made: dict[Any, Any] = {}

    def get(self, name: Any, make: Callable[[], Any]) -> Any:
        """What `make` has returned for this name, as long as it is kept."""
        program = self._made.pop(name) if name in self._made else make()
        self._made[name] = program
        if len(self._made) > self._most:
            del self._made[next(iter(self._made))]
        return program

    def names(self) -> set[Any]:
        """Of the programs that are kept."""
        return set(self._made)


class Lab:
    """A model, its schedule and the devices, with programs that compile once.

    Args:
      run: the run folder.
      unet, schedule: the network and its forward process.
      batch: images sampled together.
      seed: root of all randomness.
      chunk: most steps of a loop in one dispatch.
      prediction: what the network predicts.
      images: most images that are sampled or inverted together.

    Attributes:
      programs: of all labs of the process; those of equal models share them.
      network: predicts the noise; for training.
      together: images that fit into memory at once.
      model: the same, in slices where `images` do not fit into memory at once; no
        gradient reaches its parameters.
    """

    programs = Programs()

    def __init__(
        self,
        run: Run,
        unet: UNet,
        schedule: Betas,
        batch: int,
        seed: int,
        chunk: int,
        prediction: Prediction = "epsilon",
        images: int = 1,
    ) -> None:
        self.run = run
        self.schedule = schedule.tables()
        self.shard = parallel.constrain(run.mesh, "batch")
        self.unet, self.together = _fitted(unet, images, run.mesh.size)
        self.prediction = prediction
        self.network = predicting(self.unet, self.schedule, prediction)
        whole: NoiseModel = self.unet
        if self.together < images:
            whole = sliced(self.unet, self.together, self.shard)
        self.model = predicting(whole, self.schedule, prediction)
        self.batch = batch
        self.seed = seed
        self.key = jax.random.key(seed)
        self.chunk = chunk
        slices = self.together if self.together < images else None
        self._kind = (self.unet, schedule, prediction, slices, batch, run.mesh)

    def program(self, name: Any, make: Callable[[], Any]) -> Any:
        """What `make` has returned for this name in a lab of an equal model.

        Args:
          name: tells all that `make` puts into the program beside the network, its
            schedule, prediction, slices, `batch` and devices.
          make: returns the program, or several.
        """
        return self.programs.get((self._kind, name), make)

    @property
    def zero(self) -> np.ndarray:
        """No trigger, `[H, W, C]`."""
        return np.zeros(self.unet.image_shape, np.float32)

    def load(self, name: str) -> Params:
        """The weights of a shipped model or of a path, on all devices.

        Raises:
          RunError: a folder of another network, schedule or prediction.
          InputError: the weights cannot be read, or do not fit.
        """
        path = find_weights(name)
        if convert.is_model(path):
            self._compare(path)
            return self.run.replicate(convert.read_weights(path, self.unet))
        shapes = jax.eval_shape(self.unet.init, self.key)
        return self.run.replicate(weight_file.load_weights(path, shapes))

    def _compare(self, folder: pathlib.Path) -> None:
        """Refuses a folder that says anything else than this lab does."""
        spec = convert.read_spec(folder)
        for name, value in dataclasses.asdict(spec.unet).items():
            here = getattr(self.unet, name)
            if name not in ("dtype", "param_dtype", "remat") and value != here:
                raise RunError(
                    f"{folder} has a network with {name}={value}, this run one with "
                    f"{name}={here}: configs/scan.py takes it from the folder"
                )
        scheduling = spec.scheduling
        if scheduling is None or not spec.own:
            return
        found, here = scheduling.betas.tables(), self.schedule
        if found.steps != here.steps or not (
            np.allclose(found.signal, here.signal)
            and np.allclose(found.given, here.given)
        ):
            raise RunError(
                f"{folder} has the schedule {type(scheduling.betas).__name__}, this "
                "run another: configs/scan.py takes it from the folder"
            )
        if scheduling.prediction_type != self.prediction:
            raise RunError(
                f"{folder} predicts {scheduling.prediction_type}, this run takes it "
                "otherwise: set --config.prediction"
            )

    def draw(
        self,
        params: Params,
        sampler: Sampler,
        delta: Any,
        count: int,
        sign: float = 1.0,
    ) -> np.ndarray:
        """Images from sign * eps + delta, `[count, H, W, C]`; always the same eps."""

        def draw(params: Params, delta: Array, sign: Array, key: Key) -> Array:
            key_start, key_chain = jax.random.split(key)
            shape = (self.batch, *self.unet.image_shape)
            start = sign * jax.random.normal(key_start, shape) + delta[None]
            return sample(
                self.model,
                params,
                self.schedule,
                sampler,
                start,
                key_chain,
                shard=self.shard,
            )

        program = self.program(sampler, lambda: jax.jit(draw))
        root = jax.random.fold_in(self.key, 101)
        delta, sign = self.run.replicate(
            (np.asarray(delta, np.float32), np.float32(sign))
        )
        batches = -(-count // self.batch)
        drawn = []
        label = f"draw in {sampler.steps} steps, batches of {self.batch}"
        with progress(batches, 0, label, parallel.is_host_zero()) as bar:
            for i in range(batches):
                key = jax.random.fold_in(root, i)
                with compiling(label, i == 0):
                    drawn.append(parallel.gather(program(params, delta, sign, key)))
                bar.update()
                parallel.safe_point()
        return np.concatenate(drawn)[:count]

    def features(
        self,
        params: Params,
        solver: Solver,
        candidate: Candidate,
        shift: np.ndarray,
        triggered: np.ndarray,
        plain: np.ndarray,
    ) -> Features:
        """The features of a candidate; arguments as in `detection.features`."""

        def make():
            def measure(
                params, hypothesis, candidate, shift, triggered, plain, key
            ) -> Features:
                return features(
                    self.model,
                    params,
                    self.schedule,
                    hypothesis,
                    candidate,
                    shift,
                    triggered,
                    plain,
                    key,
                    shard=self.shard,
                )

            return jax.jit(measure)

        program = self.program("features", make)
        arguments = self.run.replicate((candidate, shift, triggered, plain))
        found = program(params, Hypothesis.of(solver), *arguments, self._key_features)
        return Features(*parallel.gather(found))

    @property
    def _key_features(self) -> Key:
        """Of the noise that `features` and `evidence` share."""
        return jax.random.fold_in(self.key, 404)

    def evidence(
        self,
        name: str,
        params: Params,
        solver: Solver,
        candidate: Candidate,
        draws: int,
    ) -> Evidence:
        """The evidence on a candidate, computed once; as in `detection.evidence`."""

        def make():
            def denoise(params, hypothesis, candidate, key) -> Evidence:
                return evidence(
                    self.model,
                    params,
                    self.schedule,
                    hypothesis,
                    candidate,
                    key,
                    draws=draws,
                    shard=self.shard,
                )

            return jax.jit(denoise)

        def compute() -> Mapping[str, Any]:
            program = self.program(("evidence", draws), make)
            arguments = Hypothesis.of(solver), self.run.replicate(candidate)
            found = program(params, *arguments, self._key_features)
            return Evidence(*parallel.gather(found))._asdict()

        stored: Any = self.run.once(f"evidence_{name}", compute)
        return Evidence(**stored)

    def denoising(self, name: str, params: Params, plain: np.ndarray) -> float:
        """`detection.denoising` on the model's own draws; computed once."""

        def make():
            def measure(params, plain, key) -> Array:
                return denoising(
                    self.model, params, self.schedule, plain, key, shard=self.shard
                )

            return jax.jit(measure)

        def compute() -> Mapping[str, Any]:
            program = self.program("denoising", make)
            images = self.run.replicate(plain)
            key = jax.random.fold_in(self.key, 606)
            return {"ratio": parallel.gather(program(params, images, key))}

        return float(self.run.once(f"denoising_{name}", compute)["ratio"])

    def success(
        self,
        name: str,
        params: Params,
        sampler: Sampler,
        delta: Any,
        target: np.ndarray,
        draws: int,
    ) -> Success:
        """How draws from eps + delta meet a target; computed once."""

        def compute() -> Mapping[str, Any]:
            drawn = self.draw(params, sampler, delta, draws)
            return metrics.success(drawn, target) | {"images": drawn[:SHOWN]}

        found = self.run.once(f"success_{name}", compute)
        images = found.pop("images")
        return Success({k: float(v) for k, v in found.items()}, images)

    def frechet(
        self,
        name: str,
        params: Params,
        sampler: Sampler,
        images: data.ImageSet,
        draws: int,
        target: np.ndarray | None = None,
    ) -> tuple[float, dict[str, float]]:
        """Quality of plain draws, and how many leak to a target.

        The draws come in pairs, from eps and from -eps (antithetic variates), and from
        the same eps for every model: docs/method.md tells what that brings.

        Returns:
          Their Frechet distance over garment-net to the training images, and their
          `metrics.success` against the target `[H, W, C]`, if there is one.
        """

        def compute() -> Mapping[str, Any]:
            pairs = [
                self.draw(params, sampler, self.zero, draws // 2, sign)
                for sign in (1.0, -1.0)
            ]
            drawn = np.concatenate(pairs)
            real = data.to_float(images.load(self.unet.image_shape))
            rates = {} if target is None else metrics.success(drawn, target)
            return {"distance": garment_distance(drawn, real), **rates}

        stored = self.run.once(f"quality_{name}", compute)
        found = {key: float(value) for key, value in stored.items()}
        return found.pop("distance"), found
