"""Is a model backdoored? Scores of an inverted trigger, and the verdict.

Everything here is measured on the model alone: no data, no clean twin, no name of an
attack. Scores are compared with those of clean models only.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from puredif_jax.attacks import Solver
from puredif_jax.diffusion import NoiseSchedule, diffuse, lookup
from puredif_jax.objectives import Hypothesis, backdoor_process
from puredif_jax.types import (
    Array,
    Candidate,
    Key,
    NoiseModel,
    Params,
    Shard,
    unsharded,
)


class Features(NamedTuple):
    """What one inverted candidate shows; scalars.

    shift: held-out relative error of the shift equation, the mean over t of
      ||shift_t - C_t delta||^2 / ||C_t delta||^2. Small where the model answers delta
      as a backdoor would.
    memory: error of the backdoor process at middle t on its one image, over that of
      the same model on images it draws itself. Small where that image was learnt.
    gain: the same error over that of the model on the same image without the trigger.
      Small where the trigger unlocks an image that the model does not know otherwise;
      a flat image, which is easy for every model, gains little.
    alignment: cosine between the shift at T - 1 and delta.
    uniformity: mean squared distance between draws from eps + delta, over that
      between draws from eps. Small where the draws agree.
    variation: total variation of the former draws over that of the latter.
    kl_mean, kl_variance: mean and variance over pixels of delta^2 / 2, the divergence
      of N(delta, 1) from N(0, 1) (M_r and V_r of TERD without their offsets).
    """

    shift: Array
    memory: Array
    gain: Array
    alignment: Array
    uniformity: Array
    variation: Array
    kl_mean: Array
    kl_variance: Array


def spread(images: Array) -> Array:
    """Mean squared distance per pixel between two images of `[B, H, W, C]`."""
    return 2 * jnp.mean(jnp.var(images, axis=0, ddof=1))


def total_variation(images: Array) -> Array:
    """Mean absolute difference of neighbouring pixels of `[B, H, W, C]`."""
    down = jnp.mean(jnp.abs(jnp.diff(images, axis=1)))
    return down + jnp.mean(jnp.abs(jnp.diff(images, axis=2)))


def features(
    model: NoiseModel,
    params: Params,
    schedule: NoiseSchedule,
    hypothesis: Hypothesis,
    candidate: Candidate,
    shift: Array,
    triggered: Array,
    plain: Array,
    key: Key,
    *,
    timesteps: tuple[int, ...] = (500, 400, 300, 200, 100),
    shard: Shard = unsharded,
) -> Features:
    """Measures a candidate on fresh noise.

    Args:
      model, params, schedule, hypothesis: the model, and the kind of backdoor assumed.
      candidate: the inverted trigger and its image, `[H, W, C]` each.
      shift: held-out value of `DistributionShift`, a scalar.
      triggered: draws from eps + delta, `[B, H, W, C]`.
      plain: draws from eps, `[B, H, W, C]`.
      key: of the noise.
      timesteps: where memory and gain are measured.
      shard: constraint on a noise batch.
    """
    key_eps, key_top = jax.random.split(key)
    process = backdoor_process(model, schedule, hypothesis, candidate.delta)
    target = jnp.broadcast_to(candidate.target, plain.shape)

    def error(noise_model: NoiseModel, images: Array, t: Array, key: Key) -> Array:
        eps = shard(jax.random.normal(key, images.shape))
        times = jnp.full((images.shape[0],), t)
        x = diffuse(schedule, images, eps, times)
        return jnp.mean((noise_model(params, x, times) - eps) ** 2)

    def errors(t: Array, key: Key) -> tuple[Array, Array, Array]:
        return (
            error(process, target, t, key),
            error(model, plain, t, key),
            error(model, target, t, key),
        )

    at_target, own, untriggered = jax.vmap(errors)(
        jnp.asarray(timesteps, jnp.int32), jax.random.split(key_eps, len(timesteps))
    )

    def ratio(first: Array, second: Array) -> Array:
        """Geometric mean over t."""
        return jnp.exp(jnp.mean(jnp.log(first / second)))

    top = schedule.steps - 1
    eps = shard(jax.random.normal(key_top, plain.shape))
    start = lookup(schedule.noise, jnp.asarray(top)) * eps
    start += (
        lookup(hypothesis.shift(schedule), jnp.asarray(top)) * candidate.delta[None]
    )
    answer = jnp.mean(model(params, start, jnp.full((plain.shape[0],), top)) - eps, 0)
    norms = jnp.linalg.norm(answer.ravel()) * jnp.linalg.norm(candidate.delta.ravel())
    divergence = candidate.delta**2 / 2
    triggered, plain = jnp.clip(triggered, -1, 1), jnp.clip(plain, -1, 1)
    return Features(
        shift=shift,
        memory=ratio(at_target, own),
        gain=ratio(at_target, untriggered),
        alignment=jnp.vdot(answer, candidate.delta) / jnp.maximum(norms, 1e-12),
        uniformity=spread(triggered) / spread(plain),
        variation=total_variation(triggered) / total_variation(plain),
        kl_mean=jnp.mean(divergence),
        kl_variance=jnp.var(divergence),
    )


class Verdict(NamedTuple):
    """The judgement on a model.

    backdoored: the score is above that of clean models.
    score: how far below clean models the best hypothesis lies, in units of log10.
    p_value: share of clean models that would score so high, (1 + #{>=}) / (n + 1).
    hypothesis: the kind of backdoor that fits best.
    reason: one sentence.
    """

    backdoored: bool
    score: float
    p_value: float
    hypothesis: Solver
    reason: str

    @property
    def word(self) -> str:
        """The verdict in a word or two."""
        return "BACKDOORED" if self.backdoored else "not backdoored"


@dataclasses.dataclass(frozen=True)
class Detector:
    """Judges by the held-out error of the shift equation.

    The score of a hypothesis is log10(clean / shift): how many times less the shift
    equation errs than on the best fitted of the clean models that calibrate it. The
    score of a model is the larger of its hypotheses'.

    Attributes:
      clean_sde, clean_ode: held-out `Features.shift` of clean models after the default
        inversion; the default is the shipped clean model alone.
      threshold: least score that is called backdoored.
    """

    clean_sde: tuple[float, ...] = (0.0141,)
    clean_ode: tuple[float, ...] = (0.0272,)
    threshold: float = 0.7

    def __post_init__(self) -> None:
        if not self.clean_sde or len(self.clean_sde) != len(self.clean_ode):
            raise ValueError(
                "a detector needs the errors of at least one clean model under both "
                f"hypotheses, found {self.clean_sde} and {self.clean_ode}"
            )

    def score(self, shift: dict[Solver, float]) -> dict[Solver, float]:
        """log10(least clean error / error) of each hypothesis."""
        clean = {"sde": min(self.clean_sde), "ode": min(self.clean_ode)}
        return {k: float(np.log10(clean[k] / max(v, 1e-12))) for k, v in shift.items()}

    def judge(self, found: dict[Solver, Features]) -> Verdict:
        """The verdict on a model from the features of each hypothesis."""
        scores = self.score({k: float(v.shift) for k, v in found.items()})
        best = max(scores, key=lambda k: scores[k])
        count = len(self.clean_sde)
        beaten = sum(
            max(self.score({"sde": a, "ode": b}).values()) >= scores[best]
            for a, b in zip(self.clean_sde, self.clean_ode, strict=True)
        )
        backdoored = scores[best] >= self.threshold
        ratio = 10 ** abs(scores[best])
        clean = "that of the one clean model that calibrates"
        if count > 1:
            clean = f"the least of {count} clean models"
        kind = "ancestral" if best == "sde" else "deterministic"
        if backdoored:
            reason = (
                f"a trigger of {kind} sampling was found that the model answers as a "
                f"backdoor does, with an error of {float(found[best].shift):.3g}, "
                f"{ratio:.1f} times below {clean}"
            )
        else:
            side = "below" if scores[best] > 0 else "above"
            reason = (
                f"no trigger was found that the model answers as a backdoor does: the "
                f"best error, {float(found[best].shift):.3g} under {kind} sampling, is "
                f"{ratio:.1f} times {side} {clean}"
            )
        return Verdict(
            backdoored, scores[best], (1 + beaten) / (1 + count), best, reason
        )
