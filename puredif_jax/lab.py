"""The programs of an experiment on its devices, each compiled once.

Everything that touches both the pure core and a run folder: loading, training,
sampling, inverting and measuring one model.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from puredif_jax import attacks, checkpoint, data, metrics, parallel
from puredif_jax import features as garment_net
from puredif_jax.amplification import Reinforcement
from puredif_jax.attacks import Attack, Solver
from puredif_jax.detection import Features, features
from puredif_jax.diffusion import DDIM, LinearBetas, Sampler, sample
from puredif_jax.inversion import Descent, InversionState, Inverter, inverter, keep_one
from puredif_jax.objectives import Bindable, DistributionShift, Hypothesis, denoised
from puredif_jax.report import progress
from puredif_jax.run import Run, RunError
from puredif_jax.survey import Survey
from puredif_jax.training import Training, TrainState, trainer
from puredif_jax.types import Array, Candidate, Key, Params
from puredif_jax.unet import UNet

ASSETS = pathlib.Path(str(importlib.resources.files("puredif_jax") / "assets"))


def find_weights(name: str) -> pathlib.Path:
    """The file of a shipped model's name, or of a path.

    Raises:
      RunError: there is neither.
    """
    shipped = sorted(p.stem for p in ASSETS.glob("*.safetensors") if "." not in p.stem)
    if name in shipped:
        return ASSETS / f"{name}.safetensors"
    if not pathlib.Path(name).exists():
        raise RunError(
            f"no weights {name!r}: give a path, or a shipped model "
            f"({', '.join(shipped)})"
        )
    return pathlib.Path(name)


class Truth(NamedTuple):
    """The backdoor that a model is known to have, to compare with; never an input."""

    solver: Solver
    trigger: np.ndarray
    target: np.ndarray

    @classmethod
    def of(cls, attack: Attack, image_shape: tuple[int, int, int]) -> Truth:
        """The images of an attack."""
        poison = attacks.poison(attack, image_shape)
        return cls(attack.solver, np.asarray(poison.trigger), np.asarray(poison.target))

    @classmethod
    def beside(
        cls, weights: pathlib.Path, image_shape: tuple[int, int, int]
    ) -> Truth | None:
        """What the truth file beside weights tells; None without one."""
        path = weights.with_suffix(".truth.safetensors")
        if not path.is_file():
            return None
        image = jax.ShapeDtypeStruct(image_shape, jnp.float32)
        found = checkpoint.load_weights(path, {"trigger": image, "target": image})
        solver: Solver = (
            "ode" if checkpoint.read_metadata(path)["solver"] == "ode" else "sde"
        )
        return cls(solver, found["trigger"], found["target"])

    def save(self, weights: pathlib.Path) -> None:
        """Writes the truth file beside weights."""
        images = {"trigger": self.trigger, "target": self.target}
        path = weights.with_suffix(".truth.safetensors")
        checkpoint.save_weights(path, images, {"solver": self.solver})


class Lab:
    """A model, its schedule and the devices, with programs that compile once.

    Args:
      run: the run folder.
      model, schedule: the network and its forward process.
      batch: images sampled together.
      seed: root of all randomness.
      chunk: steps of a loop between two checkpoints.
    """

    def __init__(
        self,
        run: Run,
        model: UNet,
        schedule: LinearBetas,
        batch: int,
        seed: int,
        chunk: int,
    ) -> None:
        self.run = run
        self.model = model
        self.schedule = schedule.tables()
        self.shard = parallel.constrain(run.mesh, "batch")
        self._batch = batch
        self._seed = seed
        self._key = jax.random.key(seed)
        self._chunk = chunk
        self._programs: dict[Any, Any] = {}

    def _program(self, name: Any, make: Callable[[], Any]) -> Any:
        if name not in self._programs:
            self._programs[name] = make()
        return self._programs[name]

    @property
    def zero(self) -> np.ndarray:
        """No trigger, `[H, W, C]`."""
        return np.zeros(self.model.image_shape, np.float32)

    def load(self, name: str) -> Params:
        """The weights of a shipped model or of a path, on all devices."""
        shapes = jax.eval_shape(self.model.init, self._key)
        return self.run.replicate(checkpoint.load_weights(find_weights(name), shapes))

    def draw(
        self, params: Params, sampler: Sampler, delta: Any, count: int
    ) -> np.ndarray:
        """Images from eps + delta, `[count, H, W, C]`; the same eps for every delta."""

        def draw(params: Params, delta: Array, key: Key) -> Array:
            key_start, key_chain = jax.random.split(key)
            shape = (self._batch, *self.model.image_shape)
            start = jax.random.normal(key_start, shape) + delta[None]
            return sample(
                self.model,
                params,
                self.schedule,
                sampler,
                start,
                key_chain,
                shard=self.shard,
            )

        program = self._program(sampler, lambda: jax.jit(draw))
        root = jax.random.fold_in(self._key, 101)
        delta = self.run.replicate(np.asarray(delta, np.float32))
        batches = -(-count // self._batch)
        drawn = []
        label = f"draw in {sampler.steps} steps, batches of {self._batch}"
        with progress(batches, 0, label, parallel.is_host_zero()) as bar:
            for i in range(batches):
                key = jax.random.fold_in(root, i)
                drawn.append(parallel.gather(program(params, delta, key)))
                bar.update()
        return np.concatenate(drawn)[:count]

    def train(
        self,
        training: Training,
        attack: Attack | None,
        images: data.ImageSet,
        start: str | None,
        until: int,
        trigger: np.ndarray | None = None,
    ) -> Params:
        """The moving average of the weights at step `until`, trained on to it.

        Each `until` is kept as a snapshot, so that an earlier one is read back.

        Args:
          training: hyperparameters.
          attack: the backdoor, or None.
          images: the clean set.
          start: weights at step 0; None for fresh ones.
          until: step to reach.
          trigger: replaces that of the attack from the last snapshot on.
        """
        run, shape = self.run, self.model.image_shape
        rows = (
            attack.rows(self.schedule) if attack else attacks.clean_rows(self.schedule)
        )
        poison = attacks.poison(attack, shape) if attack else None

        def made(trigger: Array | None):
            chosen = None
            if poison is not None and trigger is not None:
                chosen = poison._replace(trigger=trigger)
            loss = functools.partial(attacks.training_loss, self.model, rows, chosen)
            return trainer(loss, training)

        def advance(state: TrainState, batches: Array, trigger: Array | None):
            return jax.lax.scan(made(trigger).step, state, batches)

        key_init, key_train = jax.random.split(self._key)

        def fresh(params: Params) -> TrainState:
            return made(None if poison is None else poison.trigger).init(
                params, key_train
            )

        def begin() -> TrainState:
            params = self.model.init(key_init) if start is None else self.load(start)
            return fresh(params)

        program = self._program("train", lambda: jax.jit(advance, donate_argnums=0))
        if poison is not None:
            chosen = poison.trigger if trigger is None else trigger
            trigger = run.replicate(np.asarray(chosen))
        shapes = jax.eval_shape(fresh, jax.eval_shape(self.model.init, key_init))
        snapshots = run.folder / "checkpoints" / "snapshots"
        with checkpoint.Checkpoints(snapshots, keep=None) as kept:
            if until in kept.steps():
                return kept.restore(until, run.place(shapes)).ema_params
        pixels = images.load(shape)
        sharding = parallel.along(run.mesh, None, "batch")

        def chunk(state: TrainState, first: int, last: int):
            batch = data.batches(pixels, self._seed, first, last, training.batch)
            return program(state, parallel.put(batch, sharding), trigger)

        state = run.loop("train", chunk, begin, shapes, until, self._chunk)
        with checkpoint.Checkpoints(snapshots, keep=None) as kept:
            kept.save(until, state)
        return state.ema_params

    def _descend(
        self,
        stage: str,
        params: Params,
        name: Any,
        make: Callable[[], Inverter],
        begin: Callable[[Inverter], InversionState],
        steps: int,
    ) -> InversionState:
        """Runs the inverter of `make` from its state `begin` as a resumable loop."""

        def programs() -> tuple[Inverter, Any]:
            made = make()

            def advance(params: Params, state: InversionState, count: int):
                return jax.lax.scan(
                    lambda s, _: made.step(params, s), state, None, length=count
                )

            return made, jax.jit(advance, static_argnums=2, donate_argnums=1)

        made, program = self._program(name, programs)
        return self.run.loop(
            stage,
            lambda state, start, stop: program(params, state, stop - start),
            lambda: begin(made),
            jax.eval_shape(lambda: begin(made)),
            steps,
            self._chunk,
        )

    def _start(self, made: Inverter) -> InversionState:
        """The first state of an inversion."""
        return made.init(jax.random.fold_in(self._key, 202))

    def _survey(
        self,
        stage: str,
        params: Params,
        hypothesis: Hypothesis,
        survey: Survey,
        count: int,
    ) -> Candidate:
        """The candidates that a survey of the model proposes; computed once."""

        def make():
            def propose(params: Params, key: Key) -> Candidate:
                return survey.propose(
                    self.model,
                    params,
                    self.schedule,
                    hypothesis,
                    self.model.image_shape,
                    count,
                    key,
                    shard=self.shard,
                )

            return jax.jit(propose)

        def compute() -> Mapping[str, Any]:
            program = self._program(("survey", hypothesis, survey, count), make)
            found = parallel.gather(program(params, jax.random.fold_in(self._key, 505)))
            return {"delta": found.delta, "target": found.target}

        found = self.run.once(f"{stage}_survey", compute)
        return Candidate(jnp.asarray(found["delta"]), jnp.asarray(found["target"]))

    def reinforce(
        self, stage: str, params: Params, reinforcement: Reinforcement, truth: Truth
    ) -> np.ndarray:
        """The known trigger, reinforced on these weights; `[H, W, C]`."""

        def make() -> Inverter:
            start = Candidate(jnp.asarray(truth.trigger), jnp.asarray(truth.target))
            return reinforcement.inverter(
                self.model, self.schedule, Hypothesis(truth.solver), start, self.shard
            )

        name, steps = ("reinforce", reinforcement), reinforcement.descent.steps
        state = self._descend(stage, params, name, make, self._start, steps)
        return parallel.gather(state.candidate.delta)[0]

    def invert(
        self,
        stage: str,
        params: Params,
        solver: Solver,
        loss: Bindable,
        descent: Descent,
        survey: Survey | None,
        heldout: int,
    ) -> tuple[Candidate, np.ndarray]:
        """Seeks a trigger under one hypothesis.

        Descent starts where the triggers of the survey meet; at random without one.

        Returns the candidate with the least shift error on held-out noise, as numpy,
        and those errors, `[K]`.
        """
        hypothesis = Hypothesis(solver)

        def refresh(params: Params, candidate: Candidate, key: Key) -> Array:
            chain = denoised(
                self.model,
                params,
                self.schedule,
                hypothesis,
                DDIM(steps=10),
                candidate.delta,
                16,
                key,
                shard=self.shard,
            )
            return jnp.clip(jnp.mean(chain[-1], axis=0), -1, 1)

        def make() -> Inverter:
            bound = loss.bind(self.model, self.schedule, hypothesis, self.shard)
            return inverter(bound, descent, self.model.image_shape, refresh=refresh)

        def judge():
            error = DistributionShift(samples=heldout)
            bound = error.bind(self.model, self.schedule, hypothesis, self.shard)
            return jax.jit(jax.vmap(bound, in_axes=(None, 0, None)))

        program = self._program(("heldout", solver, heldout), judge)
        key = jax.random.fold_in(self._key, 303)

        def heldout_errors(state: InversionState) -> np.ndarray:
            return parallel.gather(program(params, state.candidate, key))

        begin: Callable[[Inverter], InversionState] = self._start
        if survey is not None:
            start = self._survey(stage, params, hypothesis, survey, descent.candidates)

            def begin(made: Inverter) -> InversionState:
                return dataclasses.replace(self._start(made), candidate=start)

        name, steps = (solver, loss, descent), descent.steps
        if descent.scout:
            scouts = self._descend(
                f"{stage}_scouts", params, name, make, begin, descent.scout
            )
            ahead = int(np.argmin(heldout_errors(scouts)))
            steps -= descent.scout

            def begin(made: Inverter) -> InversionState:
                del made
                return keep_one(scouts, ahead)

        state = self._descend(stage, params, name, make, begin, steps)
        errors = heldout_errors(state)
        best = int(np.argmin(errors))
        return jax.tree.map(lambda x: x[best], parallel.gather(state.candidate)), errors

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
            def measure(params, candidate, shift, triggered, plain, key):
                return features(
                    self.model,
                    params,
                    self.schedule,
                    Hypothesis(solver),
                    candidate,
                    shift,
                    triggered,
                    plain,
                    key,
                    shard=self.shard,
                )

            return jax.jit(measure)

        program = self._program(("features", solver), make)
        arguments = self.run.replicate((candidate, shift, triggered, plain))
        found = program(params, *arguments, jax.random.fold_in(self._key, 404))
        return Features(*parallel.gather(found))

    def success(
        self,
        name: str,
        params: Params,
        sampler: Sampler,
        delta: Any,
        target: np.ndarray,
        draws: int,
    ) -> float:
        """Share of draws from eps + delta at MSE < 1e-2 of a target; computed once."""

        def compute() -> Mapping[str, Any]:
            return metrics.success(self.draw(params, sampler, delta, draws), target)

        return float(self.run.once(f"success_{name}", compute)["mse<0.01"])

    def frechet(
        self,
        name: str,
        params: Params,
        sampler: Sampler,
        images: data.ImageSet,
        draws: int,
    ) -> float:
        """Frechet distance over garment-net of plain draws to the training images."""

        def compute() -> Mapping[str, Any]:
            shapes = jax.eval_shape(garment_net.init, self._key)
            weights = checkpoint.load_weights(find_weights(garment_net.NAME), shapes)
            embed = jax.jit(functools.partial(garment_net.embed, weights))
            drawn = np.clip(self.draw(params, sampler, self.zero, draws), -1, 1)
            real = data.to_float(images.load(self.model.image_shape))
            sets = (np.asarray(embed(x)) for x in (drawn, real))
            return {"distance": metrics.frechet_distance(*sets)}

        return float(self.run.once(f"frechet_{name}", compute)["distance"])
