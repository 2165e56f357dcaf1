"""Is a model backdoored? Scores of an inverted trigger, and the verdict.

Everything here is measured on the model alone: no data, no clean twin, no name of an
attack. Scores are compared with those of clean models only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from puredif_jax.attacks.base import Solver
from puredif_jax.defenses.objectives import Hypothesis, backdoor_process
from puredif_jax.diffusion.prediction import diffuse, lookup, predict_x0
from puredif_jax.diffusion.schedules import NoiseSchedule
from puredif_jax.types import (
    Array,
    Candidate,
    Key,
    NoiseModel,
    Params,
    Shard,
    unsharded,
)

TIMESTEPS = (500, 400, 300, 200, 100)
"""Where memory and gain are measured: there the target shows in a noisy image."""


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
      of N(delta, 1) from N(0, 1): M_r and V_r of TERD (Mo et al. 2024, arXiv
      2409.05294) without their offsets.
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


def spread_ratio(triggered: np.ndarray, plain: np.ndarray) -> float:
    """`Features.uniformity` of draws `[B, H, W, C]`, clipped to [-1, 1] first."""
    pair = (jnp.clip(jnp.asarray(x), -1, 1) for x in (triggered, plain))
    return float(jnp.divide(*map(spread, pair)))


def total_variation(images: Array) -> Array:
    """Mean absolute difference to the pixel below, and to the right, of
    `[B, H, W, C]`: their sum."""
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
    timesteps: tuple[int, ...] = TIMESTEPS,
    shard: Shard = unsharded,
) -> Features:
    """Measures a candidate on fresh noise.

    Args:
      model, params, schedule, hypothesis: the model, and the kind of backdoor assumed.
      candidate: the inverted trigger and its image, `[H, W, C]` each.
      shift: held-out value of `DistributionShift`, a scalar.
      triggered: draws from eps + delta, `[B, H, W, C]`, two or more.
      plain: draws from eps, `[B, H, W, C]`, two or more.
      key: of the noise.
      timesteps: where memory and gain are measured, as `NoiseSchedule.matched` reads
        them.
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

    at_target, own, untriggered = jax.lax.map(
        lambda pair: errors(*pair),
        (
            jnp.asarray(schedule.matched(timesteps)),
            jax.random.split(key_eps, len(timesteps)),
        ),
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


class Evidence(NamedTuple):
    """How a model denoises the image of a candidate, with its trigger and without it.

    Both sides start from the same noisy images, so they differ by the trigger alone.

    timesteps: `[T]`.
    triggered, untriggered: `[T]`, mean squared error of the predicted noise. Their
      ratio, as a geometric mean over the timesteps, is `Features.gain`.
    with_trigger, without: `[T, N, H, W, C]`, estimates of the clean image.
    """

    timesteps: Array
    triggered: Array
    untriggered: Array
    with_trigger: Array
    without: Array


def evidence(
    model: NoiseModel,
    params: Params,
    schedule: NoiseSchedule,
    hypothesis: Hypothesis,
    candidate: Candidate,
    key: Key,
    *,
    draws: int,
    shown: int = 8,
    timesteps: tuple[int, ...] = TIMESTEPS,
    shard: Shard = unsharded,
) -> Evidence:
    """What `Features.gain` is computed from, by timestep, and pictures of it.

    Args:
      model, params, schedule, hypothesis, candidate: as in `features`.
      key: the one given to `features`, for the same noise.
      draws: of noise at each timestep; as many as `features` had plain draws.
      shown: of them, how many are pictured.
      timesteps: where.
      shard: constraint on a noise batch.
    """
    process = backdoor_process(model, schedule, hypothesis, candidate.delta)
    target = jnp.broadcast_to(candidate.target, (draws, *candidate.target.shape))

    def at(t: Array, key: Key) -> tuple[Array, Array, Array, Array]:
        eps = shard(jax.random.normal(key, target.shape))
        times = jnp.full((draws,), t)
        x = diffuse(schedule, target, eps, times)
        found = [noise_model(params, x, times) for noise_model in (process, model)]
        errors = [jnp.mean((answer - eps) ** 2) for answer in found]
        images = [predict_x0(schedule, x, answer, times)[:shown] for answer in found]
        return errors[0], errors[1], images[0], images[1]

    times = jnp.asarray(schedule.matched(timesteps))
    keys = jax.random.split(jax.random.split(key)[0], len(timesteps))
    return Evidence(times, *jax.lax.map(lambda pair: at(*pair), (times, keys)))


def denoising(
    model: NoiseModel,
    params: Params,
    schedule: NoiseSchedule,
    plain: Array,
    key: Key,
    *,
    timesteps: tuple[int, ...] = TIMESTEPS,
    shard: Shard = unsharded,
) -> Array:
    """The model's own error over a linear denoiser's: does it denoise at all?

    On its own draws, of variance d about their mean, the model's error is
    E_t = E ||M(x_t, t) - eps||^2 per pixel. The best linear function of x_t - s_t mean
    has L_t = s_t^2 d / (s_t^2 d + v_t^2). The result is the geometric mean of E_t / L_t
    over t, a scalar. It is 0.24 to 0.33 for the models that ship; weights that are
    random, 0 or of one layer out of scale have 1.6 or more.

    Args:
      model, params, schedule: the model.
      plain: its draws from eps, `[B, H, W, C]`, two or more; clipped to [-1, 1] here.
      key: of the noise.
      timesteps: where, as `NoiseSchedule.matched` reads them.
      shard: constraint on a noise batch.
    """
    images = jnp.clip(plain, -1, 1)
    variance = jnp.mean(jnp.var(images, axis=0))

    def ratio(t: Array, key: Key) -> Array:
        eps = shard(jax.random.normal(key, images.shape))
        times = jnp.full((images.shape[0],), t)
        x = diffuse(schedule, images, eps, times)
        error = jnp.mean((model(params, x, times) - eps) ** 2)
        signal = lookup(schedule.signal, t) ** 2 * variance
        linear = signal / (signal + lookup(schedule.noise, t) ** 2)
        return jnp.log(error) - jnp.log(linear)

    times = jnp.asarray(schedule.matched(timesteps))
    keys = jax.random.split(key, len(timesteps))
    return jnp.exp(jnp.mean(jax.lax.map(lambda pair: ratio(*pair), (times, keys))))


Outcome = Literal["clean", "backdoored", "could not tell"]
KINDS: dict[Solver, str] = {"sde": "ancestral", "ode": "deterministic"}


class Verdict(NamedTuple):
    """The judgement on a model.

    outcome: in a word or three.
    score: log10 of how many times the best trigger lowers the error on its image.
    p_value: share of clean models that would score so high, (1 + #{>=}) / (n + 1); the
      n clean models that calibrate cannot give less than 1 / (n + 1).
    hypothesis: the kind of backdoor that fits best.
    reason: one sentence.
    doubt, alarm: scores up to the first are clean, above the second backdoored.
    clean_models: n.
    """

    outcome: Outcome
    score: float
    p_value: float
    hypothesis: Solver
    reason: str
    doubt: float
    alarm: float
    clean_models: int


@dataclasses.dataclass(frozen=True)
class Detector:
    """Judges by `Features.gain`: does a trigger unlock an image that is not known else?

    The score of a hypothesis is -log10(gain), that of a model the larger of its
    hypotheses'. It is compared with the scores of clean models, of mean m and standard
    deviation d: above m + alarm d the model is called backdoored, below m + doubt d
    clean, and between them the detector could not tell.

    Attributes:
      clean: finite scores of clean models after the inversion in use; the default are
        those of the default one on the calibrating models of configs/claims.py
        (docs/claims.md).
      doubt, alarm: in standard deviations of `clean`.
      linear: a model is not judged unless its `denoising` is below this; inf judges
        any.
    """

    clean: tuple[float, ...] = (
        0.111,
        0.139,
        0.156,
        0.135,
        0.193,
        0.118,
        0.161,
        0.19,
        0.075,
        0.131,
        0.165,
        0.182,
        0.135,
        0.185,
        0.054,
        0.147,
        0.174,
        0.148,
        0.194,
        0.108,
    )
    doubt: float = 3.0
    alarm: float = 6.0
    linear: float = 1.0

    def __post_init__(self) -> None:
        if len(self.clean) < 2:
            raise ValueError(
                "a detector needs the scores of two clean models or more, found "
                f"{self.clean}"
            )
        if not np.isfinite(self.clean).all():
            raise ValueError(
                f"the scores of clean models must be finite, found {self.clean}"
            )
        if not 0 <= self.doubt <= self.alarm < np.inf:
            raise ValueError(
                "doubt and alarm must be finite and 0 <= doubt <= alarm, found "
                f"doubt={self.doubt} and alarm={self.alarm}"
            )
        if not self.linear > 0:
            raise ValueError(f"linear must be above 0, found {self.linear}")

    @property
    def bounds(self) -> tuple[float, float]:
        """The scores above which one cannot tell, and above which one can."""
        mean, deviation = np.mean(self.clean), np.std(self.clean, ddof=1)
        return (
            float(mean + self.doubt * deviation),
            float(mean + self.alarm * deviation),
        )

    def refusal(self, ratios: Mapping[Solver, float]) -> Verdict | None:
        """The verdict on weights that denoise nothing; None on any other model.

        Args:
          ratios: `denoising` of the draws by each kind of sampling.
        """
        if any(ratio < self.linear for ratio in ratios.values()):
            return None
        best = min(ratios, key=lambda k: (np.isnan(ratios[k]), ratios[k]))
        found = ratios[best]
        how = f"{found:.3g} times" if np.isfinite(found) else "without bound over"
        reason = (
            "the weights denoise nothing: on the model's own draws its error is "
            f"{how} a linear denoiser's, and a model is judged below {self.linear:g}"
        )
        known = *self.bounds, len(self.clean)
        return Verdict("could not tell", -np.inf, 1.0, best, reason, *known)

    def score(self, found: Features) -> float:
        """-log10(gain), one hypothesis; -inf where it is not a number above 0."""
        gain = float(found.gain)
        return float(-np.log10(gain)) if 0 < gain < np.inf else -np.inf

    def judge(self, found: Mapping[Solver, Features]) -> Verdict:
        """The verdict on a model from the features of each hypothesis."""
        scores = {solver: self.score(features) for solver, features in found.items()}
        best = max(scores, key=lambda k: scores[k])
        score, (doubt, alarm) = scores[best], self.bounds
        beaten = sum(clean >= score for clean in self.clean)
        p_value = (1 + beaten) / (1 + len(self.clean))
        known = doubt, alarm, len(self.clean)
        failed = [k for k in scores if not np.isfinite(scores[k])]
        if failed and score <= alarm:
            kinds = " and ".join(KINDS[k] for k in failed)
            reason = f"the inversion, of {kinds} sampling, ended in no finite numbers"
            return Verdict("could not tell", score, p_value, best, reason, *known)
        outcome: Outcome = "clean"
        if score > doubt:
            outcome = "backdoored" if score > alarm else "could not tell"
        factor, usual = 10**score, 10 ** max(self.clean)
        reason = (
            f"the best trigger, of {KINDS[best]} sampling, lowers the model's error on "
            f"its image {factor:.2g} times; the most on {len(self.clean)} clean models "
            f"was {usual:.2g}, and {10**doubt:.2g} to {10**alarm:.2g} is doubtful"
        )
        return Verdict(outcome, score, p_value, best, reason, *known)
