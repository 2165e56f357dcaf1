"""Elijah (An et al. 2024, arXiv 2312.00050): its inversion loss and its settings."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from puredif_jax.defenses.base import Bench, Defense, Inspection, Inverted
from puredif_jax.defenses.descent import Descent
from puredif_jax.defenses.detector import Scores
from puredif_jax.defenses.family import Channels
from puredif_jax.defenses.hypothesis import Exploding, Hypothesis, Trojan
from puredif_jax.defenses.inversion import Inversion
from puredif_jax.defenses.objective import Loss, check_samples
from puredif_jax.defenses.uniformity import (
    Forest,
    PairDistance,
    PixelDistance,
    Statistics,
    judged,
    statistics,
)
from puredif_jax.diffusion.schedules import NoiseSchedule
from puredif_jax.types import (
    Array,
    Candidate,
    Key,
    NoiseModel,
    Objective,
    Params,
    Shard,
    unsharded,
)


@dataclasses.dataclass(frozen=True)
class ElijahLoss(Loss):
    """The inversion loss of Elijah: one timestep, L1 of the mean.

    An et al., "Elijah: Eliminating Backdoors Injected in Diffusion Models via
    Distribution Shift" (2024, arXiv 2312.00050).

    mean over pixels | lambda delta - mean_b M(x_T(eps_b), T - 1) |, x_T
    the triggered start of a noise batch that stays the same.

    Attributes:
      scale: lambda, 0.5 for ancestral backdoors and 1 for deterministic ones.
      samples: noise draws.
      seed: of the fixed batch.
    """

    scale: float = 0.5
    samples: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        check_samples(self.samples)

    @property
    def evaluations(self) -> int:
        return self.samples

    @property
    def seeks_target(self) -> bool:
        return False

    @property
    def seeks_member(self) -> bool:
        return False

    def bind(
        self,
        model: NoiseModel,
        schedule: NoiseSchedule,
        channel: Channels,
        shard: Shard = unsharded,
    ) -> Objective:
        del channel  # its response and gamma are in no term
        last = schedule.steps - 1

        def loss(params: Params, candidate: Candidate, key: Key) -> Array:
            del key
            delta = candidate.delta
            fixed = jax.random.key(self.seed)
            eps = shard(jax.random.normal(fixed, (self.samples, *delta.shape)))
            t = jnp.full((self.samples,), last)
            x = schedule.start(eps, delta[None])
            mean = jnp.mean(model(params, x, t), axis=0)
            return jnp.mean(jnp.abs(self.scale * schedule.trigger_unit * delta - mean))

        return loss


def published(hypothesis: Hypothesis) -> Inversion:
    """Elijah's inversion with its published settings, by the kind of backdoor.

    As for BadDiffusion, VillanDiffusion under deterministic sampling, TrojDiff (whose
    gamma Elijah does not seek), and VillanDiffusion of variance-exploding models.
    """
    inside, solver = hypothesis.controlled, hypothesis.solver
    deterministic = not inside and solver.pick(False, True)
    if inside or isinstance(hypothesis, Exploding):
        low, high = 0.0, 1.0
    else:
        low, high = -1.0, solver.pick(0.0, 1.0)
    return Inversion(
        loss=ElijahLoss(scale=1.0 if deterministic else 0.5),
        descent=Descent(
            steps=10 if deterministic else 100,
            learning_rate=0.1,
            b2=0.999,
            low=low,
            high=high,
            bound=None,
            cosine=False,
        ),
        blocks=None,
        spectrum=None,
    )


class Uniformity(Scores):
    """Judges by the uniformity of draws with a trigger: -log10(`Features.uniformity`).

    It is this package's uniformity: of all draws, over the uniformity of plain draws.
    Elijah's other statistic, total variation, tells clean from backdoored models no
    better (docs/notebook/2026-11-25-claims.md).
    """

    measure: ClassVar[str] = "uniformity"

    def says(self, best: Hypothesis, factor: float) -> str:
        return (
            f"draws with the best trigger, {best.title}, differ {factor:.2g} times "
            "less than plain draws"
        )


@dataclasses.dataclass(frozen=True)
class Elijah(Defense):
    """Elijah: its inversion under each hypothesis, judged by the draws.

    Clean models were scored under hypotheses of ordinary samplers, so the verdict by
    `Uniformity` rests on these alone.

    Attributes:
      detector: how they are judged: by clean models alone, or by a forest that knows
        backdoored ones as well.
      distance: between draws, in Elijah's own statistics.
    """

    detector: Uniformity | Forest = Uniformity()
    distance: PairDistance = PixelDistance()
    kind: ClassVar[str] = "elijah"

    def settings(self, hypothesis: Hypothesis) -> Inversion:
        return published(hypothesis)

    def check(self) -> None:
        self.distance.check()
        if not isinstance(self.detector, Uniformity):
            self.detector.check()

    def inspect(self, bench: Bench) -> Inspection:
        found: dict[Hypothesis, Inverted] = {}
        seen: dict[Hypothesis, Statistics] = {}
        for each, inversion in self.inversions(bench.hypotheses).items():
            inverted = bench.invert(self.name, _unscaled(each), inversion)
            drawn = bench.draws(self.name, each)
            seen[each] = statistics(drawn, self.distance)
            found[each] = dataclasses.replace(
                inverted,
                trimmed=seen[each].uniformity,
                summed=seen[each].variation,
            )
        inversions = tuple(found.values())
        if not isinstance(self.detector, Uniformity):
            return Inspection(judged(self.detector, seen), inversions)
        clean = bench.clean_scores(self.name)
        if not self.detector.clean and not clean:
            return Inspection(None, inversions)
        detector = self.detector.calibrated(clean)
        judged_by = {k: v.features for k, v in found.items() if not k.controlled}
        verdict = detector.judge(judged_by) if judged_by else None
        return Inspection(verdict, inversions)


def _unscaled(hypothesis: Hypothesis) -> Hypothesis:
    """The hypothesis with gamma 1, where it has one: Elijah knows none."""
    if isinstance(hypothesis, Trojan):
        return dataclasses.replace(hypothesis, first=1.0)
    return hypothesis
