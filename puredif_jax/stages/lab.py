"""A model on its devices: loading, sampling and measuring, each program compiled once.

What is drawn or measured is kept in the run folder; puredif_jax.stages.train
and puredif_jax.stages.search have the long loops on the same model.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar, cast

import jax
import numpy as np

from puredif_jax.attacks.channel import Channel
from puredif_jax.data.images import ImageSet
from puredif_jax.defenses.family import Family
from puredif_jax.defenses.features import Evidence, Features
from puredif_jax.defenses.hypothesis import Hypothesis
from puredif_jax.defenses.path_errors import Errors
from puredif_jax.diffusion.prediction import Prediction
from puredif_jax.diffusion.sampling import Sampler
from puredif_jax.diffusion.schedules import NoiseSchedule, Process
from puredif_jax.formats.base import Spec
from puredif_jax.metrics import measures as metrics
from puredif_jax.networks.base import ImageNetwork
from puredif_jax.runs import parallel, weight_file
from puredif_jax.runs.binding import RunError
from puredif_jax.runs.report import progress
from puredif_jax.runs.run import Run, compiling
from puredif_jax.stages import programs
from puredif_jax.stages.models import Models
from puredif_jax.stages.setup import Setup, Stream, fitted
from puredif_jax.types import Candidate, Key, NoiseModel, Params

_Tree = TypeVar("_Tree", Channel, Family)

SHOWN = 16  # images of a set in a report
PLAIN = 64  # draws from plain noise, with which triggered ones are compared


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


class Lab:
    """A model and its devices in a run folder.

    Args:
      run: the run folder.
      unet, process: the network and its forward process.
      batch: images sampled together.
      seed: root of all randomness.
      chunk: most steps of a loop in one dispatch.
      prediction: what the network predicts.
      images: most images that are sampled or inverted together.
      models: where weights are read; it can be shared, so that they are read once.

    Attributes:
      setup: the model without its weights.
      together: images that fit into memory at once.
    """

    def __init__(
        self,
        run: Run,
        unet: ImageNetwork,
        process: Process,
        batch: int,
        seed: int,
        chunk: int,
        prediction: Prediction = "epsilon",
        images: int = 1,
        models: Models | None = None,
    ) -> None:
        self.run = run
        self.models = Models() if models is None else models
        unet, self.together = fitted(unet, images, run.mesh.size)
        slices = self.together if self.together < images else None
        self.setup = Setup(unet, process, prediction, slices, batch, run.mesh)
        self.seed = seed
        self.key = jax.random.key(seed)
        self.chunk = chunk
        self._pixels: dict[ImageSet, np.ndarray] = {}

    @property
    def unet(self) -> ImageNetwork:
        """The network."""
        return self.setup.network

    @property
    def schedule(self) -> NoiseSchedule:
        """The tables of its process."""
        return self.setup.schedule

    @property
    def model(self) -> NoiseModel:
        """Predicts the noise; no gradient reaches its parameters."""
        return self.setup.model

    def stream(self, which: Stream) -> Key:
        """The key of a stream."""
        return jax.random.fold_in(self.key, which)

    @property
    def zero(self) -> np.ndarray:
        """No trigger, `[H, W, C]`."""
        return np.zeros(self.unet.image_shape, np.float32)

    def pixels(self, images: ImageSet) -> np.ndarray:
        """All images of a set, uint8 `[N, H, W, C]`, read once and not to be changed.

        Raises:
          DataError: as `ImageSet.load`.
        """
        if images not in self._pixels:
            found = images.load(self.unet.image_shape).view()
            found.flags.writeable = False
            self._pixels[images] = found
        return self._pixels[images]

    def load(self, name: str, start: bool = False) -> Params:
        """The weights of a shipped model or of a path, on all devices.

        Args:
          name: of the model, or its path.
          start: they are where a training starts, which may lead from one process to
            another.

        Raises:
          RunError: a folder of another network, or of another schedule or prediction.
          InputError: the weights cannot be read, or do not fit.
        """
        source = self.models[name]
        if source.spec is not None:
            self._compare(source.path, source.spec, start)
            return self.run.replicate(source.params)
        shapes = jax.eval_shape(self.unet.init, self.key)
        return self.run.replicate(weight_file.load_weights(source.path, shapes))

    def _compare(self, folder: pathlib.Path, spec: Spec, start: bool) -> None:
        """Refuses a model that is another one than this lab's."""
        there, here = spec.network, self.unet
        if type(there) is not type(here):
            raise RunError(
                f"{folder} has a network of {type(there).__name__}, this run one of "
                f"{type(here).__name__}: configs/scan.py takes it from the folder"
            )
        for field in dataclasses.fields(cast(Any, there)):
            name = field.name
            value, ours = (getattr(each, name) for each in (there, here))
            if name not in ("dtype", "param_dtype", "remat") and value != ours:
                raise RunError(
                    f"{folder} has a network with {name}={value}, this run one with "
                    f"{name}={ours}: configs/scan.py takes it from the folder"
                )
        scheduling = spec.scheduling
        if scheduling is None or not spec.own or start:
            return
        found, tables = scheduling.betas.tables(), self.schedule
        if found.steps != tables.steps or not (
            found.values == tables.values
            and np.allclose(found.signal, tables.signal)
            and np.allclose(found.noise, tables.noise)
            and np.allclose(found.given, tables.given)
        ):
            raise RunError(
                f"{folder} has the schedule {type(scheduling.betas).__name__}, this "
                "run another: configs/scan.py takes it from the folder"
            )
        if scheduling.prediction_type != self.setup.prediction:
            raise RunError(
                f"{folder} predicts {scheduling.prediction_type}, this run takes it "
                "otherwise: set --config.prediction"
            )

    def channel(self, hypothesis: Hypothesis) -> Channel:
        """The channel of a hypothesis for this model, in float32 on all devices."""
        return self.place(hypothesis.channel(self.schedule, self.unet.image_shape))

    def family(self, hypothesis: Hypothesis, moving: bool = True) -> Family:
        """All that a hypothesis allows for this model, in float32 on all devices.

        `moving=False`: its `channel` alone.
        """
        shape = self.unet.image_shape
        if moving:
            return self.place(hypothesis.family(self.schedule, shape))
        still = Family.only(hypothesis.channel(self.schedule, shape))
        return self.place(dataclasses.replace(still, power=hypothesis.power))

    def place(self, channels: _Tree) -> _Tree:
        """A channel, or a family of them, in float32 on all devices."""
        placed: _Tree = self.run.replicate(
            jax.tree.map(lambda x: np.asarray(x, np.float32), channels)
        )
        return placed

    def draw(
        self,
        params: Params,
        sampler: Sampler,
        delta: Any,
        count: int,
        sign: float = 1.0,
        inside: Channel | None = None,
        stream: Stream = Stream.DRAWS,
    ) -> np.ndarray:
        """Images from sign * eps + delta, `[count, H, W, C]`.

        A stream always has the same eps.

        Args:
          params: weights.
          sampler: of the draws.
          delta: the trigger.
          count: of images.
          sign: of the noise.
          inside: draw in the variable of this channel, as an attacker who controls the
            sampler can.
          stream: of eps.
        """

        program = programs.drawing(self.setup, sampler)
        inside = None if inside is None else self.place(inside)
        root = self.stream(stream)
        delta, sign = self.run.replicate(
            (np.asarray(delta, np.float32), np.float32(sign))
        )
        batch = self.setup.batch
        batches = -(-count // batch)
        drawn = []
        label = f"draw in {sampler.steps} steps, batches of {batch}"
        with progress(batches, 0, label, parallel.is_host_zero()) as bar:
            for i in range(batches):
                key = jax.random.fold_in(root, i)
                with compiling(label, i == 0):
                    found = program(params, delta, sign, key, inside)
                    drawn.append(parallel.gather(found))
                bar.update()
                parallel.safe_point()
        return np.concatenate(drawn)[:count]

    def errors(
        self,
        name: str,
        params: Params,
        hypothesis: Hypothesis,
        candidate: Candidate,
        plain: np.ndarray,
    ) -> Errors:
        """The errors of a candidate, computed once; as in `path_errors.errors`."""

        def compute() -> Mapping[str, Any]:
            program = programs.erring(self.setup, PLAIN)
            told = candidate, plain, np.bool_(hypothesis.lone)
            whole, drawn, lone = self.run.replicate(told)
            channel = self.family(hypothesis).at(whole)
            key = self.stream(Stream.ERRORS)
            found = program(params, channel, whole, drawn, lone, key)
            return Errors(*parallel.gather(found))._asdict()

        stored: Any = self.run.once(f"errors_{name}", compute, Errors._fields)
        return Errors(**stored)

    def features(
        self,
        params: Params,
        hypothesis: Hypothesis,
        candidate: Candidate,
        errors: Errors,
        heldout: np.ndarray,
        falling: np.ndarray,
        placebos: np.ndarray,
        triggered: np.ndarray,
        plain: np.ndarray,
    ) -> Features:
        """The features of a candidate; arguments as in `features.features`."""

        program = programs.measuring(self.setup)
        arguments = self.run.replicate(
            (candidate, errors, heldout, falling, placebos, triggered, plain)
        )
        channel = self.family(hypothesis).at(arguments[0])
        key = self.stream(Stream.FEATURES)
        found = program(params, channel, *arguments, key)
        return Features(*parallel.gather(found))

    def evidence(
        self,
        name: str,
        params: Params,
        hypothesis: Hypothesis,
        candidate: Candidate,
    ) -> Evidence:
        """The evidence on a candidate, computed once; as in `features.evidence`."""

        def compute() -> Mapping[str, Any]:
            program = programs.showing(self.setup)
            whole = self.run.replicate(candidate)
            channel = self.family(hypothesis).at(whole)
            found = program(params, channel, whole, self.stream(Stream.EVIDENCE))
            return Evidence(*parallel.gather(found))._asdict()

        stored: Any = self.run.once(f"evidence_{name}", compute, Evidence._fields)
        return Evidence(**stored)

    def denoising(self, name: str, params: Params, plain: np.ndarray) -> float:
        """`features.denoising` on the model's own draws; computed once."""

        def compute() -> Mapping[str, Any]:
            program = programs.judging_denoiser(self.setup)
            images = self.run.replicate(plain)
            key = self.stream(Stream.DENOISING)
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
        inside: Channel | None = None,
    ) -> Success:
        """How draws with a trigger, by `draw`, meet a target; computed once."""

        def compute() -> Mapping[str, Any]:
            drawn = self.draw(params, sampler, delta, draws, inside=inside)
            return metrics.success(drawn, target) | {"images": drawn[:SHOWN]}

        found = self.run.once(f"success_{name}", compute)
        images = found.pop("images")
        return Success({k: float(v) for k, v in found.items()}, images)
