"""The configuration of a run: which models are trained, amplified, inverted, judged.

Frozen dataclasses of Python values; `puredif_jax.stages.perform` performs them.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import os
from typing import Any, Literal

from puredif_jax.attacks.base import Attack
from puredif_jax.attacks.training import Training
from puredif_jax.data.images import FashionMNIST, ImageFolder, NpzImages
from puredif_jax.defenses.detector import Detector
from puredif_jax.defenses.distribution_shift import DistributionShift
from puredif_jax.defenses.elijah import ElijahLoss
from puredif_jax.defenses.hypothesis import Exploding, Fading, Hypothesis
from puredif_jax.defenses.inversion import Descent
from puredif_jax.defenses.objective import Loss
from puredif_jax.defenses.reinforcement import Reinforcement
from puredif_jax.defenses.survey import Survey
from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.diffusion.ddpm import DDPM
from puredif_jax.diffusion.prediction import Prediction
from puredif_jax.diffusion.sampling import Sampler
from puredif_jax.diffusion.schedules import LinearBetas, NoiseSchedule, Process
from puredif_jax.diffusion.solver import Ancestral, Deterministic, Solver
from puredif_jax.files.whole import safe_name
from puredif_jax.networks.base import ImageNetwork


def _at_least(node: Any, **bounds: int) -> None:
    """Raises ValueError where a field is below its bound."""
    for name, least in bounds.items():
        if getattr(node, name) < least:
            raise ValueError(
                f"{name} must be {least} or more, found {getattr(node, name)}"
            )


def _seeded(node: Any) -> None:
    """Raises ValueError for a `seed` that JAX would take for another one."""
    if not 0 <= node.seed < 2**32:
        raise ValueError(f"seed must lie in 0..{2**32 - 1}, found {node.seed}")


def _at_home(node: Any) -> None:
    """A folder as `workdir`, with the user's own for "~"; ValueError for a URL."""
    if not node.workdir.strip():
        raise ValueError("workdir is empty: give a folder")
    if "://" in node.workdir:
        raise ValueError(
            f"workdir {node.workdir} is a URL: give a folder, which all hosts share if "
            "there are several (a bucket can be mounted as one)"
        )
    object.__setattr__(node, "workdir", os.path.expanduser(node.workdir))


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How a model is measured.

    Attributes:
      draws: images for each success rate.
      batch: images sampled together.
      ancestral: sampler for backdoors of ancestral sampling.
      deterministic: sampler for those of deterministic sampling, and for quality.
      frechet_draws: images for the Frechet distance, two of each noise; 0 for none.

    Raises:
      ValueError: `frechet_draws` is odd or negative, or 2, too few for a covariance;
        another is below 1.
    """

    draws: int = 256
    batch: int = 64
    ancestral: Sampler = DDPM(steps=100)
    deterministic: Sampler = DDIM(steps=50)
    frechet_draws: int = 0

    def __post_init__(self) -> None:
        _at_least(self, draws=1, batch=1)
        if self.frechet_draws % 2 or self.frechet_draws < 0 or self.frechet_draws == 2:
            raise ValueError(
                "frechet_draws must be 0 or an even number of at least 4, found "
                f"{self.frechet_draws}"
            )

    def sampler(self, solver: Solver) -> Sampler:
        """The sampler under which a backdoor of that kind fires."""
        return solver.pick(self.ancestral, self.deterministic)


@dataclasses.dataclass(frozen=True)
class Inversion:
    """How a trigger is sought, under one hypothesis.

    Attributes:
      loss: what is minimised.
      descent: optimiser, candidates and bounds.
      survey: finds where the first `survey.starts` candidates start; the others, and
        without a survey all, start at random.
      heldout: noise draws at each timestep on which the kept candidate is chosen.
    """

    loss: Loss = DistributionShift(samples=4)
    descent: Descent = Descent(candidates=8, scout=40, finalists=4)
    survey: Survey | None = Survey()
    heldout: int = 64

    def __post_init__(self) -> None:
        _at_least(self, heldout=1)

    @property
    def evaluations(self) -> int:
        """Network evaluations of one image; one with its gradient counts for three.

        Those of survey and descent. Left out are the judging of candidates on held-out
        noise, and the choice of their sign.
        """
        survey = 0 if self.survey is None else self.survey.evaluations
        values = self.descent.candidate_steps * self.loss.evaluations
        return 3 * values + survey

    @property
    def images(self) -> int:
        """Most images that the network may see at once."""
        judged = DistributionShift(samples=self.heldout).evaluations
        most = [self.descent.candidates * self.loss.evaluations, judged]
        if self.survey is not None:
            signed = DistributionShift(samples=self.survey.draws).evaluations
            most += [min(self.survey.starts, self.descent.candidates) * signed]
            most += [self.survey.together * self.survey.draws]
        return max(most)


Baseline = Literal["elijah", "elijah, equal evaluations"]


def elijah(solver: Solver, evaluations: int | None = None) -> Inversion:
    """Elijah's inversion with its published settings, by the kind of backdoor.

    Args:
      solver: the kind.
      evaluations: raises the steps from the published 100 or 10 until the network is
        evaluated as often as in `Inversion.evaluations`.
    """
    published = Inversion(
        loss=ElijahLoss(scale=solver.pick(0.5, 1.0)),
        survey=None,
        descent=Descent(
            steps=solver.pick(100, 10),
            learning_rate=0.1,
            b2=0.999,
            low=-1.0,
            high=solver.pick(0.0, 1.0),
            bound=None,
            cosine=False,
        ),
    )
    if evaluations is None:
        return published
    steps = max(1, round(evaluations / (3 * published.loss.evaluations)))
    descent = dataclasses.replace(published.descent, steps=steps)
    return dataclasses.replace(published, descent=descent)


@dataclasses.dataclass(frozen=True)
class Audit:
    """Which models are inverted and judged, and how.

    Attributes:
      weights: names of shipped models, paths of weights, or "trained" for the result
        of this run.
      hypotheses: kinds of backdoor tried on each, as far as they apply to its process.
      inversion: how triggers are sought.
      detector: how they are judged.
      baselines: inversions to compare with: Elijah with its published steps, or with
        as many as make its network evaluations equal to those of `inversion`.
      scheduler: the folder or file from which `schedule` and `prediction` of the run
        were read, where weights have no scheduler of their own; the report names it.
    """

    weights: tuple[str, ...] = ("trained",)
    hypotheses: tuple[Hypothesis, ...] = (
        Fading(Ancestral()),
        Fading(Deterministic()),
        Exploding(Ancestral()),
        Exploding(Deterministic()),
    )
    inversion: Inversion = Inversion()
    detector: Detector = Detector()
    baselines: tuple[Baseline, ...] = ()
    scheduler: str | None = None

    def __post_init__(self) -> None:
        names = [hypothesis.name for hypothesis in self.hypotheses]
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"hypotheses must be one or more of different names, found {names}"
            )

    def tried(self, schedule: NoiseSchedule) -> tuple[Hypothesis, ...]:
        """The hypotheses that apply to a process."""
        return tuple(each for each in self.hypotheses if each.applies(schedule))

    def methods(self, hypothesis: Hypothesis) -> dict[str, Inversion]:
        """The inversions to run under one hypothesis, by name, ours first."""
        found = {"puredif": self.inversion}
        for name in self.baselines:
            equal = None if name == "elijah" else self.inversion.evaluations
            found[name] = elijah(hypothesis.solver, equal)
        return found

    def plan(self, schedule: NoiseSchedule) -> str:
        """How each model of a process is inverted, in words."""
        tried = self.tried(schedule)
        count = sum(
            inversion.evaluations
            for hypothesis in tried
            for inversion in self.methods(hypothesis).values()
        )
        names = " and ".join(hypothesis.name for hypothesis in tried)
        return f"(under {names}, {count:,} evaluations of its network on an image)"


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
class Experiment:
    """A run: stages that are None are left out.

    Attributes:
      workdir: folder of the run; the same command there resumes it.
      model: the network.
      weights: where training starts, or, without a training, what is measured: a
        shipped model or a path; None for fresh ones.
      training: trains the model, clean or with the attack.
      attack: the backdoor put in, or the one that success is measured for.
      amplification: reinforces the trigger along the training.
      audit: inverts and judges models.
      evaluation: how models are measured.
      data: images to train on: the shipped ones, a file or a folder of a user.
      schedule: forward process of the model.
      prediction: what the network predicts, by the name that diffusers has for it.
      devices: how many to use; 0 for all.
      seed: root of all randomness.
      chunk: most steps of a loop in one dispatch, which lasts some seconds at most;
        and the steps of a row of its scalars.
      save_every: seconds, at least, between two checkpoints of a loop. The last step
        and a SIGTERM make one anyhow.
    """

    workdir: str
    model: ImageNetwork
    weights: str | None = None
    training: Training | None = None
    attack: Attack | None = None
    amplification: Amplification | None = None
    audit: Audit | None = None
    evaluation: Evaluation = Evaluation()
    data: FashionMNIST | NpzImages | ImageFolder = FashionMNIST()
    schedule: Process = LinearBetas()
    prediction: Prediction = "epsilon"
    devices: int = 0
    seed: int = 0
    chunk: int = 20
    save_every: float = 60.0

    def __post_init__(self) -> None:
        _at_home(self)
        _seeded(self)
        _at_least(self, devices=0, chunk=1, save_every=0)
        if self.amplification and not (self.training and self.attack):
            raise ValueError("amplification needs both a training and an attack")
        if self.amplification and self.training:
            last = self.amplification.snapshots[-1]
            if last > self.training.steps:
                raise ValueError(
                    f"amplification.snapshots go to {last}, past the last of "
                    f"training.steps={self.training.steps}"
                )
        if self.audit and not self.audit.tried(self.schedule.tables()):
            names = ", ".join(each.name for each in self.audit.hypotheses)
            raise ValueError(
                f"no hypothesis of the audit ({names}) applies to the process of "
                f"{type(self.schedule).__name__}"
            )
        if self.audit and "trained" in self.audit.weights and not self.training:
            raise ValueError(
                "audit.weights names 'trained', but the run has no training: give a "
                "shipped model or a path"
            )

    @property
    def plan(self) -> str:
        """What will be done, in words."""
        parts = []
        if self.training:
            parts.append(f"{self.training.steps:,} steps of training")
        if self.amplification:
            steps = ", ".join(map(str, self.amplification.snapshots))
            parts.append(f"reinforcement of the trigger at step {steps}")
        if self.training or self.weights:
            parts.append("measuring of the model")
        if self.audit:
            count = len(self.audit.weights)
            models = f"{count} models" if count > 1 else self.audit.weights[0]
            how = self.audit.plan(self.schedule.tables())
            parts.append(f"audit of {models} {how}")
        return f"{self.workdir}: {', '.join(parts) or 'nothing but a report'}"

    @property
    def images(self) -> int:
        """Most images that are sampled or inverted at once."""
        most = [self.evaluation.batch]
        if self.amplification and self.attack:
            reinforcement = self.amplification.reinforcement
            most.append(reinforcement.loss(self.attack.solver).samples)
        if self.audit:
            for hypothesis in self.audit.tried(self.schedule.tables()):
                methods = self.audit.methods(hypothesis).values()
                most += [inversion.images for inversion in methods]
        return max(most)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Many runs by one command, each in a folder of its own below that of the sweep.

    Started again, or several times at once, each call goes on with what nobody has
    done or is doing, also with the runs of a call that died; the table of all is
    written when the last is done.

    Attributes:
      workdir: folder of the sweep.
      experiments: the runs; their `workdir` is a name within that folder.
      only: a pattern such as "clean/*": the runs to do now.
    """

    workdir: str
    experiments: tuple[Experiment, ...]
    only: str = "*"

    def __post_init__(self) -> None:
        _at_home(self)
        names = [experiment.workdir for experiment in self.experiments]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"a sweep needs runs of different names, found {names}")
        if not self.chosen():
            raise ValueError(f"no run fits only={self.only!r}: there are {names}")

    @property
    def plan(self) -> str:
        """What will be done, in words."""
        return f"{self.workdir}: {len(self.chosen())} of {len(self.experiments)} runs"

    def chosen(self) -> tuple[Experiment, ...]:
        """The runs to do now, with their folders."""
        return tuple(
            dataclasses.replace(e, workdir=f"{self.workdir}/{e.workdir}")
            for e in self.experiments
            if fnmatch.fnmatchcase(e.workdir, self.only)
        )


@dataclasses.dataclass(frozen=True)
class Scan:
    """Models in any format that is known, each audited in a folder of its own.

    Started again, or several times at once, each call goes on with what nobody has
    done or is doing; the table of all is written again after each model.

    Attributes:
      workdir: folder of the scan; "" for runs/scan-MODEL, see `located`.
      model: folders or files of models, or of runs that trained one, folders of such,
        text files that name one a line, or names of the Hub ("owner/name",
        "owner/name@revision", an address).
      audit: how each is inverted and judged; names no weights.
      steps: of sampling, strided.
      draws: images sampled from each trigger.
      offline: take from the Hub only what has been downloaded before.
      variant: of the weights, such as "fp16", as in diffusers; None for those without.
      scheduler: a folder or file for networks that have no scheduler of their own.
      devices: how many to use; 0 for all.
      seed: root of all randomness.
      chunk: most steps of a loop in one dispatch, which lasts some seconds at most;
        and the steps of a row of its scalars.
      save_every: seconds, at least, between two checkpoints of a loop.
    """

    workdir: str = ""
    model: tuple[str, ...] = ()
    audit: Audit = Audit(weights=())
    steps: int = 50
    draws: int = 64
    offline: bool = False
    variant: str | None = None
    scheduler: str | None = None
    devices: int = 0
    seed: int = 0
    chunk: int = 20
    save_every: float = 60.0

    def __post_init__(self) -> None:
        if self.workdir:
            _at_home(self)
        _seeded(self)
        _at_least(self, steps=1, draws=2, devices=0, chunk=1, save_every=0)
        if not self.model:
            raise ValueError("a scan needs a model: give --config.model=FOLDER")
        if self.audit.weights:
            raise ValueError(
                f"the weights of a scan are those of its models, found "
                f"audit.weights={self.audit.weights}"
            )
        if self.audit.scheduler:
            raise ValueError(
                "a scan takes the scheduler from --config.scheduler, found "
                f"audit.scheduler={self.audit.scheduler}"
            )

    @property
    def plan(self) -> str:
        """What will be done, in words."""
        how = self.audit.plan(LinearBetas().tables())
        models = ", ".join(self.model)
        return f"{self.workdir}: scan of {models}, each model there {how}"

    def located(self) -> Scan:
        """The same with a workdir, named after what is scanned where none is given.

        The name is made by `safe_name`; of several models a part of the SHA-256 of
        their names follows the first.
        """
        if self.workdir:
            return self
        name, more = safe_name(self.model[0]), len(self.model) - 1
        if more or name == "model":  # or nothing of the name can stay
            whole = "\n".join(self.model).encode(errors="surrogateescape")
            count = f"-and-{more}-more" if more else ""
            name = f"{name}{count}-{hashlib.sha256(whole).hexdigest()[:8]}"
        return dataclasses.replace(self, workdir=f"runs/scan-{name}")
