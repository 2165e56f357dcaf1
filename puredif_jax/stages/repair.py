"""The repair of a model that an audit has called backdoored."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from puredif_jax.attacks.channel import Channel
from puredif_jax.attacks.training import (
    TrainInfo,
    Training,
    TrainState,
)
from puredif_jax.data import images as data
from puredif_jax.data.images import ImageSet
from puredif_jax.defenses.principal import Principal, principal, unknown
from puredif_jax.defenses.removal import Backdoor, Removal, Unlearning
from puredif_jax.diffusion.sampling import Sampler
from puredif_jax.formats import diffusers as convert
from puredif_jax.formats.base import Model, Spec
from puredif_jax.formats.diffusers_config import ConvertError
from puredif_jax.formats.scheduling import Scheduling
from puredif_jax.formats.weight_sets import TRUTH
from puredif_jax.runs import config, parallel
from puredif_jax.runs.binding import RunError
from puredif_jax.runs.page import Section
from puredif_jax.runs.run import wait_for
from puredif_jax.stages.base import (
    Accused,
    Context,
    Outcome,
    Stage,
    State,
)
from puredif_jax.stages.embedding import embedding_for
from puredif_jax.stages.lab import SHOWN, Lab
from puredif_jax.stages.removing import removal_trainer, removing
from puredif_jax.stages.repaired import REPAIRED, Repaired
from puredif_jax.stages.setup import Stream
from puredif_jax.stages.train import batches
from puredif_jax.stages.work import Step, Work, drawing
from puredif_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Repair(Stage):
    """Trains the backdoor out of the model that was audited.

    The trigger is the one that the audit has found. The result is written into the
    run's folder as a folder of diffusers; the model itself stays as it is. A model that
    the audit has not called backdoored is left alone. The audit of the result follows
    (`Experiment.repair`). A run that is done may be given a repair later, or another
    one: the audit is not done again, and what an earlier repair made stays.

    Attributes:
      removal: the loss by which the backdoor is trained out.
      training: how that is trained.
      images: clean images; None for draws of the model itself, whose clean behaviour
        is then kept as it was.
      draws: of the model itself, where no images are given, and to compare; an even
        number.
      always: repair also a model with the verdict "clean" or "could not tell".
      seed: of the noise in the training; the same audit can be repaired with several.
      rounds: most repairs, each of what the last one made, while the verdict on that is
        "backdoored".
    """

    removal: Removal = Unlearning()
    training: Training = Training(steps=1000, batch=64, learning_rate=2e-4, warmup=50)
    images: ImageSet | None = None
    draws: int = 1024
    always: bool = False
    seed: int = 0
    rounds: int = 2

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds must be 1 or more, found {self.rounds}")
        if self.draws < 4 or self.draws % 2:
            raise ValueError(f"draws must be even, 4 or more, found {self.draws}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in 0..{2**32 - 1}, found {self.seed}")

    @property
    def name(self) -> str:
        """A name by what decides the result, such as for the folder that it writes."""
        settings = config.to_dict(self)
        for which in ("always", "rounds"):  # say whether, and how often
            del settings[which]
        text = json.dumps(settings, sort_keys=True)
        return f"{REPAIRED}{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def _named(self, context: Context) -> str:
        """The same for a round of the run; a later one has a name of its own."""
        return f"{self.name}-{context.place + 1}" if context.place else self.name

    @property
    def _distilled(self) -> bool:
        """Whether theta0's answer stands for the noise in the clean term."""
        return self.images is None or self.removal.distils

    def inputs(self, context: Context) -> dict[str, str]:
        if self.images is None:
            return {}
        pixels = context.lab.pixels(self.images)
        return {f"the images of {self.name}": data.fingerprint(pixels)}

    def check(self, context: Context) -> None:
        lab, batch = context.lab, self.training.batch
        if batch % lab.run.mesh.size:
            raise RunError(
                f"repair.training.batch must be a multiple of the {lab.run.mesh.size} "
                f"devices, found {batch}"
            )
        (audited,) = context.audited
        try:
            convert.configurations(_spec(lab, audited))
        except ConvertError as error:
            raise RunError(
                f"a repaired model could not be written as a folder of diffusers: "
                f"{error}"
            ) from error
        if self.images is not None and len(lab.pixels(self.images)) < 2:
            raise RunError("a repair needs two clean images or more, found fewer")

    def work(self, context: Context) -> Iterator[Work]:
        batch, evaluation = context.evaluation.batch, context.evaluation
        steps = evaluation.deterministic.steps
        sets = 2 + (self.images is None)  # of plain draws
        yield drawing(batch, sets * self.draws * steps)
        most = max(steps, evaluation.ancestral.steps)
        yield drawing(batch, 4 * evaluation.draws * most)  # with two triggers
        distilled = self._distilled

        def program(lab: Lab, params: Params) -> tuple[Step, Any]:
            made = removal_trainer(lab.setup, self.removal, self.training, distilled)
            images = np.zeros((self.training.batch, *lab.unet.image_shape), np.float32)
            split = parallel.put(images, parallel.along(lab.run.mesh, "batch"))
            zero = lab.run.replicate(lab.zero)
            channel = lab.place(Channel.clean(lab.schedule))
            clean = unknown(lab.unet.image_shape)

            def step(params: Params, state: Any) -> Any:
                state, reference, images = state
                known = Backdoor(channel, zero, reference, clean)
                return made(known).step(state, images)[0], reference, images

            known = Backdoor(channel, zero, params, clean)
            first = made(known).init(params, lab.key)
            return step, (first, params, split)

        name = f"repair step of {self.training.batch} images"
        each = self.removal.evaluations(distilled) * self.training.batch
        yield Work(name, self.training.steps, each, self.removal, program)

    def run(self, context: Context, state: State) -> tuple[State, Outcome]:
        accused = state.accused
        if accused is None or accused.candidate is None or accused.hypothesis is None:
            text = "The audit has found no trigger, so there is nothing to remove."
            return state, Outcome(sections=(Section("Repair", text),))
        if accused.verdict.outcome != "backdoored" and not self.always:
            text = (
                f"The audit says {accused.verdict.outcome}: the model is left as it "
                "is. `always` repairs it all the same."
            )
            return state, Outcome(sections=(Section("Repair", text),))
        return self.of(context, state, accused)

    def of(
        self, context: Context, state: State, accused: Accused
    ) -> tuple[State, Outcome]:
        """Repairs a model by the trigger that is known of it, whatever the verdict."""
        pixels = self._images(context, accused)
        params = self._trained(context, accused, pixels)
        self._save(context, accused, params)
        result, section = self._measured(context, accused, params, pixels)
        state = dataclasses.replace(state, repaired=(self._named(context), params))
        return state, Outcome((result,), (section,))

    def _images(self, context: Context, accused: Accused) -> np.ndarray:
        """The clean images `[N, H, W, C]`: uint8 as given, or float32 as drawn.

        The model that was given draws them; later rounds have the same.
        """
        lab = context.lab
        if self.images is not None:
            return lab.pixels(self.images)

        def compute() -> Mapping[str, Any]:
            sampler = context.evaluation.deterministic
            pairs = [
                lab.draw(
                    accused.params,
                    sampler,
                    lab.zero,
                    self.draws // 2,
                    sign,
                    stream=Stream.OWN_IMAGES,
                )
                for sign in (1.0, -1.0)
            ]
            return {"images": np.clip(np.concatenate(pairs), -1, 1)}

        return lab.run.once(f"{self.name}_images", compute)["images"]

    def _trained(
        self, context: Context, accused: Accused, pixels: np.ndarray
    ) -> Params:
        lab, training, run = context.lab, self.training, context.lab.run
        distilled = self._distilled
        made = removal_trainer(lab.setup, self.removal, training, distilled)
        assert accused.candidate is not None and accused.hypothesis is not None
        candidate = run.replicate(accused.candidate)
        channel = lab.family(accused.hypothesis).at(candidate)
        known = run.replicate(self._known(context, pixels))
        backdoor = Backdoor(channel, candidate.delta, accused.params, known)
        program = removing(lab.setup, self.removal, training, distilled, lab.chunk)

        def begin() -> TrainState:
            start = self.removal.prepared(accused.params)
            key = jax.random.fold_in(lab.stream(Stream.REPAIR), self.seed)
            return made(backdoor).init(start, key)

        def several(
            state: TrainState, first: int, last: int
        ) -> tuple[TrainState, TrainInfo]:
            taken = batches(lab, pixels, training.batch, first, last)
            return program(state, taken, backdoor, np.int32(last - first))

        shapes = jax.eval_shape(begin)
        steps = training.steps
        name = self._named(context)
        found: TrainState = run.loop(
            name,
            several,
            begin,
            shapes,
            steps,
            lab.chunk,
            remedy="set a smaller repair.training.learning_rate",
        )
        return found.ema_params

    def _known(self, context: Context, pixels: np.ndarray) -> Principal:
        """The covariance of the clean images, where the removal asks; computed once.

        Raises:
          RunError: the images have none: the model has drawn one that is not finite.
        """
        lab, name = context.lab, f"{self._named(context)}_components"
        if not self.removal.asks:
            return unknown(lab.unet.image_shape)

        def compute() -> Mapping[str, Any]:
            return principal(pixels)._asdict()

        try:
            found = lab.run.once(name, compute, Principal._fields)
        except ValueError as error:
            raise RunError(f"no repair by {self.removal.name}: {error}") from error
        return Principal(*(found[name] for name in Principal._fields))

    def _save(self, context: Context, accused: Accused, params: Params) -> None:
        """Writes the folder, with the truth beside it where that is known."""
        lab, host = context.lab, parallel.gather(params)
        (audited,) = context.audited
        if parallel.is_host_zero():
            folder = lab.run.folder / self._named(context)
            convert.write_folder(folder, Model(_spec(lab, audited), host))
            if accused.truth is not None:
                accused.truth.save(folder)
        parallel.agreed(True)  # it is there before any process reads it
        last = "model_index.json" if accused.truth is None else TRUTH
        wait_for(lab.run.folder / self._named(context) / last)

    def _measured(
        self,
        context: Context,
        accused: Accused,
        params: Params,
        pixels: np.ndarray,
    ) -> tuple[Repaired, Section]:
        """Before and after: success of both triggers, and the Frechet distance."""
        lab, evaluation, own_name = (
            context.lab,
            context.evaluation,
            self._named(context),
        )
        assert accused.candidate is not None and accused.hypothesis is not None
        hypothesis, candidate = accused.hypothesis, accused.candidate
        channel = lab.family(hypothesis).at(lab.run.replicate(candidate))
        inside = channel if hypothesis.controlled else None
        solver = evaluation.sampler_for(hypothesis, candidate)
        found_image = np.asarray(candidate.target)
        backdoors: dict[str, tuple[Sampler, Any, np.ndarray, Channel | None]] = {
            "inverted trigger": (solver, candidate.delta, found_image, inside)
        }
        if (truth := accused.truth) is not None:
            by = evaluation.sampler(truth.solver, truth.psi(lab.schedule))
            backdoors["true trigger"] = (by, truth.trigger, truth.target, truth.inside)
        embedding, own = embedding_for(lab.unet.image_shape), self.images is None
        clean = pixels if own else data.to_float(pixels)
        rates: dict[str, float] = {}
        distances: dict[str, float] = {}
        pictures: list[tuple[str, np.ndarray]] = []
        labels = {"before": accused.label, "after": own_name}
        for when, weights in (("before", accused.params), ("after", params)):
            for name, (by, r, target, inner) in backdoors.items():
                file = f"{own_name}_{when}_{name.replace(' ', '_')}"
                found = lab.success(
                    file, weights, by, r, target, evaluation.draws, inner
                )
                rates[f"{name}, {when}"] = found.rate
                pictures.append((f"draws, {name}, {when}", found.images))
            plain = self._plain(context, labels[when], weights)
            distances[when] = embedding.distance(plain, clean)
            pictures.append((f"draws from plain noise, {when}", plain[:SHOWN]))
        seconds = lab.run.metrics.seconds(own_name)
        result = Repaired(
            self.removal.name,
            embedding.name,
            len(pixels),
            own,
            self.training.steps,
            seconds,
            rates,
            distances,
            context.place,
        )
        whose = "drawn by the model itself" if own else "given"
        text = (
            f"By {self.removal.name}: {self.training.steps:,} steps of "
            f"{self.training.batch} images, of {len(pixels):,} {whose}, in "
            f"{seconds / 60:.1f} minutes. The repaired model is in {own_name}."
        )
        table = tuple({"draws": k, "at MSE < 0.01": v} for k, v in rates.items())
        return result, Section("Repair", text, table, tuple(pictures))

    def _plain(self, context: Context, label: str, params: Params) -> np.ndarray:
        """Draws from plain noise; what is one round's result begins the next."""
        lab, sampler = context.lab, context.evaluation.deterministic
        name = f"{self.name}_plain_{label}"

        def compute() -> Mapping[str, Any]:
            return {"images": lab.draw(params, sampler, lab.zero, self.draws)}

        return lab.run.once(name, compute)["images"]


def _spec(lab: Lab, audited: str) -> Spec:
    """What the model is, as its folder says; for weights alone, as the run says."""
    found = None if audited == "trained" else lab.models[audited].spec
    if found is not None:
        return found
    process, prediction = lab.setup.process, lab.setup.prediction
    return Spec(lab.setup.network, Scheduling(process, prediction, clip=None))
