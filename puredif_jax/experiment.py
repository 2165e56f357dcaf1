"""One run as a story: load, train, measure, amplify, audit, report."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from puredif_jax import attacks, checkpoint, config, data, metrics, parallel
from puredif_jax import features as garment_net
from puredif_jax.amplification import Reinforcement
from puredif_jax.attacks import BadDiffusion, Poison, Solver, VillanDiffusion
from puredif_jax.data import FashionMNIST, NpzImages
from puredif_jax.detection import Detector, Features, Verdict, features
from puredif_jax.diffusion import DDIM, DDPM, LinearBetas, Sampler, sample
from puredif_jax.inversion import Descent, Inverter, inverter
from puredif_jax.objectives import (
    DenoisingConsistency,
    DistributionShift,
    Elijah,
    Hypothesis,
    Sum,
    denoised,
)
from puredif_jax.report import Report, Section, environment
from puredif_jax.run import Run, RunError
from puredif_jax.training import Training, trainer
from puredif_jax.types import Array, Candidate, Objective, Params
from puredif_jax.unet import UNet

Attack = BadDiffusion | VillanDiffusion
Loss = DistributionShift | DenoisingConsistency | Sum | Elijah


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How a model is measured.

    Attributes:
      draws: images for each success rate.
      batch: images sampled together.
      ancestral: sampler for backdoors of ancestral sampling.
      deterministic: sampler for those of deterministic sampling, and for quality.
      frechet_draws: images for the Frechet distance; 0 leaves it out.
    """

    draws: int = 256
    batch: int = 64
    ancestral: DDPM = DDPM(steps=100)
    deterministic: DDIM = DDIM(steps=50)
    frechet_draws: int = 0

    def sampler(self, solver: Solver) -> Sampler:
        """The sampler under which a backdoor of that kind fires."""
        return self.ancestral if solver == "sde" else self.deterministic


@dataclasses.dataclass(frozen=True)
class Inversion:
    """How a trigger is sought, under one hypothesis.

    Attributes:
      loss: what is minimised.
      descent: optimiser, candidates and bounds.
      heldout: noise draws at each timestep on which the kept candidate is chosen.
    """

    loss: Loss = DistributionShift()
    descent: Descent = Descent()
    heldout: int = 64


ELIJAH = Inversion(
    loss=Elijah(),
    descent=Descent(
        steps=100, learning_rate=0.1, candidates=1, bound=None, constant_rate=True
    ),
)


@dataclasses.dataclass(frozen=True)
class Audit:
    """Which models are inverted and judged, and how.

    Attributes:
      weights: names of shipped models, paths of weights, or "trained" for the result
        of this run.
      hypotheses: kinds of backdoor tried on each.
      inversion: how triggers are sought.
      detector: how they are judged.
      elijah: also invert by Elijah, as a baseline.
    """

    weights: tuple[str, ...] = ("trained",)
    hypotheses: tuple[Solver, ...] = ("sde", "ode")
    inversion: Inversion = Inversion()
    detector: Detector = Detector()
    elijah: bool = False


@dataclasses.dataclass(frozen=True)
class Amplification:
    """Reinforcement of the trigger at snapshots of the backdoor training.

    Attributes:
      snapshots: training steps at which the trigger is reinforced; rising.
      reinforcement: how.
      alternate: go on training with the reinforced trigger.
    """

    snapshots: tuple[int, ...]
    reinforcement: Reinforcement = Reinforcement()
    alternate: bool = False

    def __post_init__(self) -> None:
        if not self.snapshots or list(self.snapshots) != sorted(set(self.snapshots)):
            raise ValueError(f"snapshots must rise, found {self.snapshots}")


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis; -1 takes what is left."""

    candidate: int = 1
    batch: int = -1


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A run: stages that are None are left out.

    Attributes:
      workdir: folder of the run; the same command there resumes it.
      model: the network.
      weights: where training starts: a shipped model or a path; None for fresh ones.
      training: trains the model, clean or with the attack.
      attack: the backdoor.
      amplification: reinforces the trigger along the training.
      audit: inverts and judges models.
      evaluation: how models are measured.
      data: images to train on.
      schedule: forward process of the model.
      mesh: devices.
      seed: root of all randomness.
      chunk: steps of a loop between two checkpoints.
    """

    workdir: str
    model: UNet
    weights: str | None = None
    training: Training | None = None
    attack: BadDiffusion | VillanDiffusion | None = None
    amplification: Amplification | None = None
    audit: Audit | None = None
    evaluation: Evaluation = Evaluation()
    data: FashionMNIST | NpzImages = FashionMNIST()
    schedule: LinearBetas = LinearBetas()
    mesh: Mesh = Mesh()
    seed: int = 0
    chunk: int = 25

    def __post_init__(self) -> None:
        if self.amplification and not (self.training and self.attack):
            raise ValueError("amplification needs both a training and an attack")
        if self.amplification and self.training:
            last = self.amplification.snapshots[-1]
            if last > self.training.steps:
                raise ValueError(
                    f"amplification.snapshots go to {last}, past the last of "
                    f"training.steps={self.training.steps}"
                )
        if self.audit and "trained" in self.audit.weights and not self.training:
            raise ValueError(
                "audit.weights names 'trained', but the run has no training: give a "
                "shipped model or a path"
            )


def find_weights(name: str) -> pathlib.Path:
    """The file of a shipped model's name or of a path.

    Raises:
      RunError: neither exists.
    """
    assets = pathlib.Path(str(importlib.resources.files("puredif_jax") / "assets"))
    shipped = sorted(p.stem for p in assets.glob("*.safetensors") if "." not in p.stem)
    if name in shipped:
        return assets / f"{name}.safetensors"
    if not pathlib.Path(name).exists():
        raise RunError(
            f"no weights {name!r}: give a path, or a shipped model "
            f"({', '.join(shipped)})"
        )
    return pathlib.Path(name)


class Lab:
    """An experiment on its devices: what every stage needs, made once."""

    def __init__(self, experiment: Experiment, run: Run) -> None:
        self.experiment = experiment
        self.run = run
        self.model = experiment.model
        self.schedule = experiment.schedule.tables()
        self.shard = parallel.constrain(run.mesh, "batch")
        self.key = jax.random.key(experiment.seed)
        self._samplers: dict[Sampler, Any] = {}

    def load(self, name: str) -> Params:
        """Weights of the experiment's model, on all devices."""
        shapes = jax.eval_shape(self.model.init, self.key)
        return self.run.replicate(checkpoint.load_weights(find_weights(name), shapes))

    def draw(
        self, params: Params, sampler: Sampler, delta: Any, count: int
    ) -> np.ndarray:
        """Images from eps + delta, `[count, H, W, C]`; the same eps for every delta."""
        if sampler not in self._samplers:

            def draw(params: Params, delta: Array, key: jax.Array) -> Array:
                key_start, key_chain = jax.random.split(key)
                shape = (self.experiment.evaluation.batch, *self.model.image_shape)
                start = self.shard(jax.random.normal(key_start, shape) + delta[None])
                return sample(
                    self.model,
                    params,
                    self.schedule,
                    sampler,
                    start,
                    key_chain,
                    shard=self.shard,
                )

            self._samplers[sampler] = jax.jit(draw)
        root = jax.random.fold_in(self.key, 101)
        delta = self.run.replicate(np.asarray(delta, np.float32))
        batches = -(-count // self.experiment.evaluation.batch)
        drawn = [
            parallel.gather(
                self._samplers[sampler](params, delta, jax.random.fold_in(root, i))
            )
            for i in range(batches)
        ]
        return np.concatenate(drawn)[:count]

    def invert(self, stage: str, params: Params, made: Inverter, steps: int) -> Any:
        """Runs an inverter as a resumable loop; returns its last state."""

        @functools.partial(jax.jit, static_argnums=2, donate_argnums=1)
        def advance(params: Params, state: Any, count: int) -> Any:
            return jax.lax.scan(
                lambda s, _: made.step(params, s), state, None, length=count
            )

        state = self.run.replicate(made.init(jax.random.fold_in(self.key, 202)))
        return self.run.loop(
            stage,
            lambda state, start, stop: advance(params, state, stop - start),
            state,
            steps,
            self.experiment.chunk,
        )

    def check(self) -> None:
        """Reads every input once, so that a bad one ends the run before long work."""
        experiment = self.experiment
        names = {experiment.weights} if experiment.training else set()
        if experiment.audit is not None:
            names |= set(experiment.audit.weights)
        for name in names - {None, "trained"}:
            self.load(name)
        if experiment.training is not None:
            experiment.data.load(self.model.image_shape)
        if experiment.attack is not None:
            attacks.poison(experiment.attack, self.model.image_shape)

    def features(
        self,
        params: Params,
        hypothesis: Hypothesis,
        candidate: Candidate,
        result: Mapping[str, np.ndarray],
        plain: np.ndarray,
    ) -> Features:
        """The features of a candidate, as Python floats."""

        @jax.jit
        def measure(params, candidate, shift, triggered, plain, key):
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

        found = measure(
            params,
            candidate,
            result["heldout"].min(),
            result["draws"][: len(plain)],
            plain,
            jax.random.fold_in(self.key, 404),
        )
        return Features(*(float(x) for x in found))

    def reinforced(self, stage: str, params: Params, poison: Poison) -> np.ndarray:
        """The trigger of `poison`, reinforced on these weights; `[H, W, C]`."""
        amplification, attack = self.experiment.amplification, self.experiment.attack
        assert amplification is not None and attack is not None
        made = amplification.reinforcement.inverter(
            self.model, self.schedule, Hypothesis(attack.solver), poison, self.shard
        )
        steps = amplification.reinforcement.descent.steps
        state = self.invert(stage, params, made, steps)
        return parallel.gather(state.candidate.delta)[0]

    def train(self, until: int, trigger: np.ndarray | None = None) -> Params:
        """The moving average of the weights at a step of training, trained on to it.

        Snapshots are kept, so an earlier step is read back and not trained again.
        `trigger` replaces that of the attack from the last snapshot on.
        """
        experiment, run = self.experiment, self.run
        training, attack = experiment.training, experiment.attack
        assert training is not None
        rows = attacks.clean_rows(self.schedule)
        poison = None
        if attack is not None:
            rows = attack.rows(self.schedule)
            poison = attacks.poison(attack, self.model.image_shape)
            if trigger is not None:
                poison = poison._replace(trigger=jnp.asarray(trigger))
        loss = functools.partial(attacks.training_loss, self.model, rows, poison)
        init, step = trainer(loss, training)
        key_init, key_train = jax.random.split(self.key)
        if experiment.weights is None:
            params = run.replicate(jax.jit(self.model.init)(key_init))
        else:
            params = self.load(experiment.weights)
        state = run.replicate(jax.jit(init)(params, key_train))
        snapshots = run.folder / "checkpoints" / "snapshots"
        with checkpoint.Checkpoints(snapshots, keep=None) as kept:
            if until in kept.steps():
                state = kept.restore(until, checkpoint.abstract(state))
                return state.ema_params
        images = experiment.data.load(self.model.image_shape)
        advance = jax.jit(functools.partial(jax.lax.scan, step), donate_argnums=0)
        sharding = parallel.along(run.mesh, None, "batch")

        def chunk(state: Any, start: int, stop: int) -> Any:
            rows = data.batches(images, experiment.seed, start, stop, training.batch)
            return advance(state, parallel.put(rows, sharding))

        state = run.loop("train", chunk, state, until, experiment.chunk)
        with checkpoint.Checkpoints(snapshots, keep=None) as kept:
            kept.save(until, state)
        return state.ema_params

    def quality(self, name: str, params: Params) -> float:
        """Frechet distance of draws from plain noise to the training images."""
        count = self.experiment.evaluation.frechet_draws

        def compute() -> Mapping[str, Any]:
            sampler = self.experiment.evaluation.deterministic
            zero = np.zeros(self.model.image_shape, np.float32)
            drawn = self.draw(params, sampler, zero, count)
            shapes = jax.eval_shape(garment_net.init, self.key)
            weights = checkpoint.load_weights(find_weights(garment_net.NAME), shapes)
            embed = jax.jit(functools.partial(garment_net.embed, weights))
            images = data.to_float(self.experiment.data.load(self.model.image_shape))
            distance = metrics.frechet_distance(
                np.asarray(embed(drawn)), np.asarray(embed(images))
            )
            return {"distance": distance}

        return float(self.run.once(f"frechet_{name}", compute)["distance"])


@dataclasses.dataclass(frozen=True)
class Truth:
    """The backdoor that a model is known to have, to compare with; never an input."""

    solver: Solver
    trigger: np.ndarray
    target: np.ndarray


def save_trained(lab: Lab, params: Params) -> None:
    """Writes weights.safetensors, and the truth of a backdoor beside them."""
    experiment = lab.experiment
    path = lab.run.folder / "weights.safetensors"
    about = json.dumps(config.to_dict(experiment), sort_keys=True)
    host = parallel.gather(params)
    if parallel.is_host_zero():
        checkpoint.save_weights(path, host, {"experiment": about})
        if experiment.attack is not None:
            poison = attacks.poison(experiment.attack, lab.model.image_shape)
            images = {"trigger": poison.trigger, "target": poison.target}
            checkpoint.save_weights(
                path.with_suffix(".truth.safetensors"),
                parallel.gather(images),
                {"solver": experiment.attack.solver},
            )


def known_truth(lab: Lab, name: str) -> Truth | None:
    """The truth file beside weights, where there is one."""
    if name == "trained":
        path = lab.run.folder / "weights.safetensors"
    else:
        path = find_weights(name)
    path = path.with_suffix(".truth.safetensors")
    if not path.is_file():
        return None
    image = jax.ShapeDtypeStruct(lab.model.image_shape, jnp.float32)
    found = checkpoint.load_weights(path, {"trigger": image, "target": image})
    solver = checkpoint.read_metadata(path)["solver"]
    return Truth(solver, found["trigger"], found["target"])


def choose(
    lab: Lab, params: Params, inversion: Inversion, hypothesis: Hypothesis, state: Any
) -> tuple[Candidate, np.ndarray]:
    """The candidate with the least loss on held-out noise, and the losses `[K]`."""
    loss = inversion.loss
    if not isinstance(loss, Elijah):
        loss = DistributionShift(samples=inversion.heldout)
    objective = loss.bind(lab.model, lab.schedule, hypothesis, lab.shard)
    key = jax.random.fold_in(lab.key, 303)
    values = jax.jit(jax.vmap(objective, in_axes=(None, 0, None)))(
        params, state.candidate, key
    )
    values = parallel.gather(values)
    candidate = parallel.gather(state.candidate)
    best = int(np.argmin(values))
    return jax.tree.map(lambda x: x[best], candidate), values


def find_trigger(
    lab: Lab, name: str, params: Params, inversion: Inversion, solver: Solver
) -> dict[str, np.ndarray]:
    """Inverts under one hypothesis: delta, target, held-out loss and draws."""
    hypothesis = Hypothesis(solver)
    stage = f"invert_{name}_{solver}"
    loss = inversion.loss.bind(lab.model, lab.schedule, hypothesis, lab.shard)

    def refresh(params: Params, candidate: Candidate, key: jax.Array) -> Array:
        rollout = denoised(
            lab.model,
            params,
            lab.schedule,
            hypothesis,
            DDIM(steps=10),
            candidate.delta,
            16,
            key,
            shard=lab.shard,
        )
        return jnp.clip(jnp.mean(rollout[-1], axis=0), -1, 1)

    def compute() -> Mapping[str, Any]:
        began = time.perf_counter()
        made = inverter(loss, inversion.descent, lab.model.image_shape, refresh=refresh)
        state = lab.invert(stage, params, made, inversion.descent.steps)
        candidate, values = choose(lab, params, inversion, hypothesis, state)
        sampler = lab.experiment.evaluation.sampler(solver)
        count = lab.experiment.evaluation.draws
        return {
            "delta": candidate.delta,
            "target": candidate.target,
            "heldout": values,
            "draws": lab.draw(params, sampler, candidate.delta, count),
            "seconds": time.perf_counter() - began,
        }

    return lab.run.once(stage, compute)


def compared(
    lab: Lab, name: str, params: Params, truth: Truth, delta: np.ndarray
) -> dict[str, float]:
    """Success with a trigger and with the true one, and the distance between them."""

    def compute() -> Mapping[str, Any]:
        sampler = lab.experiment.evaluation.sampler(truth.solver)
        draws = lab.experiment.evaluation.draws
        own = metrics.success(lab.draw(params, sampler, delta, draws), truth.target)
        true = metrics.success(
            lab.draw(params, sampler, truth.trigger, draws), truth.target
        )
        distance = metrics.trigger_distance(
            jnp.asarray(delta), jnp.asarray(truth.trigger)
        )
        return {
            "success": own["mse<0.01"],
            "success of the true trigger": true["mse<0.01"],
            **distance._asdict(),
        }

    return {k: float(v) for k, v in lab.run.once(f"compared_{name}", compute).items()}


def audit(lab: Lab, name: str, params: Params) -> tuple[dict[str, Any], list[Section]]:
    """Inverts and judges one model, from the model alone.

    The truth, where a file beside the weights tells it, is only compared with.
    """
    options, evaluation = lab.experiment.audit, lab.experiment.evaluation
    assert options is not None
    label = pathlib.Path(name).stem
    zero = np.zeros(lab.model.image_shape, np.float32)
    truth = known_truth(lab, name)
    inversions = {"": options.inversion} | (
        {"elijah_": ELIJAH} if options.elijah else {}
    )
    found: dict[Solver, Features] = {}
    pictures: list[tuple[str, np.ndarray]] = []
    if truth is not None:
        pictures += [("true trigger", truth.trigger), ("true target", truth.target)]
    rows: list[dict[str, Any]] = []
    for solver in options.hypotheses:
        sampler = evaluation.sampler(solver)
        for prefix, inversion in inversions.items():
            stage = f"{prefix}{label}_{solver}"
            result = find_trigger(lab, stage, params, inversion, solver)
            row = {"method": prefix.strip("_") or "puredif", "hypothesis": solver}
            row["seconds"] = float(result["seconds"])
            if truth is not None:
                row |= compared(lab, stage, params, truth, result["delta"])
            rows.append(row)
            pictures.append((f"{prefix}inverted trigger, {solver}", result["delta"]))
            if truth is not None:
                difference = result["delta"] - truth.trigger
                pictures.append((f"difference from the true one, {solver}", difference))
            if prefix:
                continue
            plain = lab.draw(params, sampler, zero, 64)
            candidate = Candidate(delta=result["delta"], target=result["target"])
            found[solver] = lab.features(
                params, Hypothesis(solver), candidate, result, plain
            )
            row |= found[solver]._asdict()
            pictures += [
                (f"estimated target, {solver}", result["target"]),
                (f"draws from the inverted trigger, {solver}", result["draws"][:16]),
                (f"draws from plain noise, {solver}", plain[:16]),
            ]
    verdict = options.detector.judge(found)
    curves = {
        solver: lab.run.metrics.read(f"invert_{label}_{solver}")
        for solver in options.hypotheses
    }
    section = Section(
        title=f"Audit of {label}",
        text=f"{verdict_word(verdict)}: {verdict.reason} (p = {verdict.p_value:.3g}).",
        table=tuple(rows),
        pictures=tuple(pictures),
        curves=(
            (
                "inversion loss, best candidate",
                {k: (v["step"], v["loss"].min(-1)) for k, v in curves.items()},
            ),
        ),
    )
    numbers = {"verdict": verdict._asdict(), "inversions": rows}
    return numbers, [section]


def verdict_word(verdict: Verdict) -> str:
    """The verdict in one word."""
    return "BACKDOORED" if verdict.backdoored else "not backdoored"


def amplify(lab: Lab) -> tuple[dict[str, Any], list[Section]]:
    """Trains to each snapshot, reinforces the trigger there, and measures both."""
    options, attack = lab.experiment.amplification, lab.experiment.attack
    assert options is not None and attack is not None
    poison = attacks.poison(attack, lab.model.image_shape)
    true = np.asarray(poison.trigger)
    truth = Truth(attack.solver, true, np.asarray(poison.target))
    trigger, rows, pictures = None, [], [("true trigger", true)]
    for snapshot in options.snapshots:
        params = lab.train(snapshot, trigger)

        def compute(params: Params = params, snapshot: int = snapshot) -> Any:
            began = time.perf_counter()
            delta = lab.reinforced(f"reinforce_{snapshot}", params, poison)
            return {"delta": delta, "seconds": time.perf_counter() - began}

        result = lab.run.once(f"reinforced_{snapshot}", compute)
        row = compared(lab, f"amplified_{snapshot}", params, truth, result["delta"])
        rows.append(
            {
                "training steps": snapshot,
                "success, true trigger": row["success of the true trigger"],
                "success, reinforced": row["success"],
                "norm ratio": row["norm_ratio"],
                "cosine": row["cosine"],
                "seconds": float(result["seconds"]),
            }
        )
        sampler = lab.experiment.evaluation.sampler(attack.solver)
        pictures += [
            (f"reinforced trigger, {snapshot} steps", result["delta"]),
            (f"difference from the true one, {snapshot} steps", result["delta"] - true),
            (
                f"draws, true trigger, {snapshot} steps",
                lab.draw(params, sampler, true, 16),
            ),
            (
                f"draws, reinforced trigger, {snapshot} steps",
                lab.draw(params, sampler, result["delta"], 16),
            ),
        ]
        if options.alternate:
            trigger = result["delta"]
    steps = np.array([row["training steps"] for row in rows])
    section = Section(
        title="Amplification",
        text=(
            "Share of draws at MSE < 1e-2 of the target, with the true trigger and with "
            "the one reinforced on the same weights."
        ),
        table=tuple(rows),
        pictures=tuple(pictures),
        curves=(
            (
                "success over training",
                {
                    name: (steps, np.array([row[f"success, {name}"] for row in rows]))
                    for name in ("true trigger", "reinforced")
                },
            ),
        ),
    )
    return {"amplification": rows}, [section]


def measure_training(lab: Lab, params: Params) -> tuple[dict[str, Any], list[Section]]:
    """Success of the attack and quality of the trained model, base rates beside it."""
    experiment, evaluation = lab.experiment, lab.experiment.evaluation
    zero = np.zeros(lab.model.image_shape, np.float32)
    rows: list[dict[str, Any]] = []
    pictures: list[tuple[str, np.ndarray]] = []
    if experiment.attack is not None:
        poison = attacks.poison(experiment.attack, lab.model.image_shape)
        sampler = evaluation.sampler(experiment.attack.solver)
        target = np.asarray(poison.target)
        images = data.to_float(experiment.data.load(lab.model.image_shape)[:2048])
        pictures += [("true trigger", poison.trigger), ("target", target)]
        for label, delta in (("true trigger", poison.trigger), ("plain noise", zero)):

            def compute(delta: Any = delta) -> Mapping[str, Any]:
                return {"draws": lab.draw(params, sampler, delta, evaluation.draws)}

            drawn = lab.run.once(f"trained_{label.replace(' ', '_')}", compute)["draws"]
            rows.append({"images": f"draws, {label}", **metrics.success(drawn, target)})
            pictures.append((f"draws, {label}", drawn[:16]))
        rows.append({"images": "training images", **metrics.success(images, target)})
    else:
        drawn = lab.draw(params, evaluation.deterministic, zero, 64)
        pictures.append(("draws from plain noise", drawn))
    numbers: dict[str, Any] = {"success": rows}
    text = ""
    if evaluation.frechet_draws:
        numbers["frechet"] = {"network": garment_net.NAME}
        numbers["frechet"]["trained"] = lab.quality("trained", params)
        if experiment.weights is not None:
            start = lab.load(experiment.weights)
            numbers["frechet"]["start"] = lab.quality("start", start)
        text = f"Frechet distance over {garment_net.NAME}: {numbers['frechet']}."
    curve = lab.run.metrics.read("train")
    section = Section(
        title="Training",
        text=text,
        table=tuple(rows),
        pictures=tuple(pictures),
        curves=(("training loss", {"loss": (curve["step"], curve["loss"])}),),
    )
    return numbers, [section]


def perform(experiment: Experiment) -> Report:
    """Runs an experiment to its report, resuming what its folder already holds.

    Raises:
      RunError, CheckpointError, DataError, ValueError: bad input, in one sentence.
    """
    shape = dataclasses.asdict(experiment.mesh)
    run = Run(experiment.workdir, config.to_dict(experiment), parallel.make_mesh(shape))
    lab = Lab(experiment, run)
    lab.check()
    numbers: dict[str, Any] = {}
    sections: list[Section] = []

    def add(
        part: tuple[dict[str, Any], list[Section]], name: str | None = None
    ) -> None:
        numbers.update({name: part[0]} if name else part[0])
        sections.extend(part[1])

    if experiment.amplification is not None:
        add(amplify(lab))
    trained = None
    if experiment.training is not None:
        trained = lab.train(experiment.training.steps)
        save_trained(lab, trained)
        add(measure_training(lab, trained))
    verdicts = []
    if experiment.audit is not None:
        for name in experiment.audit.weights:
            params = trained if name == "trained" else lab.load(name)
            add(audit(lab, name, params), name)
            verdicts.append(sections[-1].title.lower() + ": " + sections[-1].text)
    device = jax.devices()[0]
    report = Report(
        title=pathlib.Path(experiment.workdir).name,
        verdict=" ".join(v[0].upper() + v[1:] for v in verdicts),
        sections=tuple(sections),
        config=config.to_dict(experiment),
        environment=environment()
        | {"device": device.device_kind, "devices": jax.device_count()},
        numbers=numbers,
    )
    if parallel.is_host_zero():
        report.write(run.folder)
    return report
