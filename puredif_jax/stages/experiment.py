"""The configuration of a run: which models are trained, amplified, inverted, judged.

Frozen dataclasses of Python values; `puredif_jax.stages.perform` performs them.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import os
from typing import Any, TypeVar

from puredif_jax.attacks.base import Attack
from puredif_jax.attacks.training import Training
from puredif_jax.data.images import FashionMNIST, ImageSet
from puredif_jax.diffusion.prediction import Prediction
from puredif_jax.diffusion.schedules import LinearBetas, Process
from puredif_jax.files.whole import listed, safe_name
from puredif_jax.networks.base import ImageNetwork
from puredif_jax.stages.amplify import Amplification
from puredif_jax.stages.audit import Audit
from puredif_jax.stages.base import Stage
from puredif_jax.stages.evaluation import Evaluation, at_least
from puredif_jax.stages.measure import Measure
from puredif_jax.stages.repair import Repair
from puredif_jax.stages.rounds import Rounds
from puredif_jax.stages.screen import Screen
from puredif_jax.stages.train import Train
from puredif_jax.stages.weights import WEIGHTS, ZOO


def _seeded(node: Any) -> None:
    """Raises ValueError for a `seed` that JAX would take for another one."""
    if not 0 <= node.seed < 2**32:
        raise ValueError(f"seed must lie in 0..{2**32 - 1}, found {node.seed}")


def _at_home(node: Any) -> None:
    """Puts the user's folder for "~" in `workdir`; ValueError if it is no folder."""
    if not node.workdir.strip():
        raise ValueError("workdir is empty: give a folder")
    if "://" in node.workdir:
        raise ValueError(
            f"workdir {node.workdir} is a URL: give a folder, which all hosts share if "
            "there are several (a bucket can be mounted as one)"
        )
    object.__setattr__(node, "workdir", os.path.expanduser(node.workdir))


_T = TypeVar("_T")


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
      screen: tests starting noise by the trigger that the audit finds.
      repair: trains the backdoor out of the model that was audited, and audits the
        result.
      then: further stages, after these.
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
    screen: Screen | None = None
    repair: Repair | None = None
    then: tuple[Stage, ...] = ()
    evaluation: Evaluation = Evaluation()
    data: ImageSet = FashionMNIST()
    schedule: Process = LinearBetas()
    prediction: Prediction = "epsilon"
    devices: int = 0
    seed: int = 0
    chunk: int = 20
    save_every: float = 60.0

    def __post_init__(self) -> None:
        _at_home(self)
        _seeded(self)
        at_least(self, devices=0, chunk=1, save_every=0)
        if self.amplification and not (self.training and self.attack):
            raise ValueError("amplification needs both a training and an attack")
        if self.amplification and self.training:
            last = self.amplification.steps[-1]
            if last > self.training.steps:
                raise ValueError(
                    f"the steps of amplification go to {last}, past the last of "
                    f"training.steps={self.training.steps}"
                )
        if (self.screen or self.repair) and (
            self.audit is None or len(self.audit.weights) != 1
        ):
            found = "none" if self.audit is None else self.audit.weights
            raise ValueError(
                "a screen and a repair need an audit of one model, which finds the "
                f"trigger; found {found}"
            )
        for stage in self.then:
            if isinstance(stage, Amplification | Train | Screen | Repair | Rounds):
                raise ValueError(
                    f"`then` has a stage {type(stage).__name__}, which a run does "
                    "once, by a field of its own"
                )
        for audit in self.audits:
            if not audit.tried(self.schedule.tables()):
                names = ", ".join(each.name for each in audit.hypotheses)
                raise ValueError(
                    f"no hypothesis of the audit ({names}) applies to the process of "
                    f"{type(self.schedule).__name__}"
                )
            if "repaired" in audit.weights and not self.repair:
                raise ValueError(
                    "audit.weights names 'repaired', but the run has no repair"
                )
            if "trained" in audit.weights and not self.training:
                raise ValueError(
                    "audit.weights names 'trained', but the run has no training: give "
                    "a shipped model or a path"
                )

    def aimed(self, models: tuple[str, ...]) -> Experiment:
        """This run on models that a command names.

        They are the weights of the audit where nothing is trained or measured before
        it. Otherwise there is one, at which the run starts.

        Raises:
          ValueError: several, where one is taken.
        """
        if self.audit and not self.training and not self.weights:
            audit = dataclasses.replace(self.audit, weights=models)
            return dataclasses.replace(self, audit=audit)
        if len(models) > 1:
            raise ValueError(
                f"this configuration starts from one model, found {', '.join(models)}"
            )
        return dataclasses.replace(self, weights=models[0])

    @property
    def audits(self) -> tuple[Audit, ...]:
        """All stages that audit models."""
        return tuple(stage for stage in self.stages if isinstance(stage, Audit))

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What the run does, in order.

        An audit that does not wait for the trained model comes before the training.
        """
        made: list[Stage] = []
        if self.amplification:
            made.append(self.amplification)
        if self.training:
            made.append(Train())
        if self.training or self.weights:
            made.append(Measure())
        judged: list[Stage] = []
        if self.audit:
            judged.append(self.audit)
        if self.screen:
            judged.append(self.screen)
        if self.repair and self.audit:
            again = dataclasses.replace(self.audit, weights=("repaired",))
            judged.append(Rounds(self.repair, again))
        return (*self._ordered(made, judged), *self.then)

    def _ordered(self, made: list[_T], judged: list[_T]) -> list[_T]:
        """What is judged comes first where it does not wait for what is made."""
        if self.audit and "trained" not in self.audit.weights:
            return judged + made
        return made + judged

    @property
    def plan(self) -> str:
        """What will be done, in words."""
        made, judged = [], []
        if self.training:
            made.append(f"{self.training.steps:,} steps of training")
        if self.amplification:
            steps = ", ".join(map(str, self.amplification.snapshots))
            made.append(f"reinforcement of the trigger at step {steps}")
        if self.training or self.weights:
            made.append("measuring of the model")
        if self.audit:
            count = len(self.audit.weights)
            models = f"{count} models" if count > 1 else self.audit.weights[0]
            how = self.audit.plan(self.schedule.tables())
            judged.append(f"audit of {models} {how}")
        if self.screen:
            judged.append(f"screening of {self.screen.noise or 'no noise'}")
        if self.repair:
            most = self.repair.rounds
            often = f", at most {most} times" if most > 1 else ""
            judged.append(f"repair of it and audit of the result{often}")
        parts = self._ordered(made, judged)
        parts += [type(stage).__name__ for stage in self.then]
        return f"{self.workdir}: {', '.join(parts) or 'nothing but a report'}"

    @property
    def images(self) -> int:
        """Most images that are sampled or inverted at once."""
        most = [self.evaluation.batch]
        if self.amplification and self.attack:
            reinforcement = self.amplification.reinforcement
            most.append(reinforcement.loss(self.attack.solver).samples)
        for audit in self.audits:
            searches = audit.searches(self.schedule.tables())
            most += [inversion.images for _, inversion in searches]
        return max(most)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Many runs by one command, each in a folder of its own below the sweep's.

    Started again, or several times at once, each call goes on with what nobody has
    done or is doing, also with the runs of a call that died; the table of all is
    written when the last is done.

    Attributes:
      workdir: folder of the sweep.
      experiments: the runs; their `workdir` is a name within that folder. As `weights`
        such a name stands for the model that the other run has trained; that one comes
        before.
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
        for number, each in enumerate(self.experiments):
            if each.weights is None or self._file(each.weights) == each.weights:
                continue
            before = {x.workdir: x for x in self.experiments[:number]}
            if each.weights not in before or before[each.weights].training is None:
                raise ValueError(
                    f"{each.workdir} starts from {each.weights}, which must be a run "
                    "before it that trains a model"
                )
        if not self.chosen():
            raise ValueError(f"no run fits only={self.only!r}: there are {names}")

    @property
    def plan(self) -> str:
        """What will be done, in words."""
        return f"{self.workdir}: {len(self.chosen())} of {len(self.experiments)} runs"

    def aimed(self, models: tuple[str, ...]) -> Sweep:
        """Raises ValueError: the runs of a sweep name their models."""
        raise ValueError(
            f"a sweep takes no model, since its runs name theirs, found "
            f"{', '.join(models)}"
        )

    def chosen(self) -> tuple[Experiment, ...]:
        """The runs to do now, with their folders."""
        pairs = zip(self.experiments, self.placed(), strict=True)
        return tuple(
            placed
            for given, placed in pairs
            if fnmatch.fnmatchcase(given.workdir, self.only)
        )

    def _file(self, weights: str) -> str:
        """The file of weights that a run names, which may be another run."""
        names = {each.workdir for each in self.experiments}
        if weights not in names or (ZOO / weights).is_dir():
            return weights
        return f"{self.workdir}/{weights}/{WEIGHTS}"

    def placed(self) -> tuple[Experiment, ...]:
        """All runs, with their folders, and with the files of weights among them."""
        return tuple(
            dataclasses.replace(
                each,
                workdir=f"{self.workdir}/{each.workdir}",
                weights=None if each.weights is None else self._file(each.weights),
            )
            for each in self.experiments
        )


@dataclasses.dataclass(frozen=True)
class Scan:
    """Models in any format that is known, each audited in a folder of its own.

    Started again, or several times at once, each call goes on with what nobody has
    done or is doing; the table of all is written again after each model.

    Attributes:
      workdir: folder of the scan; "" for runs/scan-MODEL, see `located`.
      model: folders or files of models, runs that trained one, folders of such, text
        files that name one a line, or names of the Hub ("owner/name",
        "owner/name@revision", an address).
      audit: how each is inverted and judged; names no weights.
      screen: tests starting noise by the trigger that the audit finds.
      repair: trains the backdoor out of a model that the audit calls backdoored. The
        verdict of the scan is then the one on the result.
      steps: of sampling, strided.
      draws: images sampled from each trigger.
      offline: take from the Hub only what has been downloaded before.
      variant: of the weights, such as "fp16", as in diffusers; None for no variant.
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
    screen: Screen | None = None
    repair: Repair | None = None
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
        at_least(self, steps=1, draws=2, devices=0, chunk=1, save_every=0)
        if not self.model:
            raise ValueError("a scan needs a model: give --config.model=FOLDER")
        if self.audit.weights:
            raise ValueError(
                f"a scan takes its weights from its models: leave audit.weights empty, "
                f"found {self.audit.weights}"
            )
        if self.audit.scheduler:
            raise ValueError(
                "a scan takes the scheduler from --config.scheduler, found "
                f"audit.scheduler={self.audit.scheduler}"
            )

    @property
    def plan(self) -> str:
        """What will be done, in words."""
        kinds = listed(each.name for each in self.audit.hypotheses)
        models, end = ", ".join(self.model), ", repair of it" if self.repair else ""
        return f"{self.workdir}: scan of {models}, each model under {kinds}{end}"

    def aimed(self, models: tuple[str, ...]) -> Scan:
        """This scan, of models that a command names."""
        return dataclasses.replace(self, model=models)

    def located(self) -> Scan:
        """This scan with a workdir, which by default is named after what is scanned.

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
