"""The shift of a trigger along a process, and what a backdoored model answers to it.

The rows of the published backdoors, in float64: H_t, the coefficient of the trigger in
x_t, and C_t, its coefficient in the answer of a network that was trained for ancestral
sampling. Sources: Chou, Chen and Ho, BadDiffusion (arXiv 2212.05400) and
VillanDiffusion (arXiv 2306.06874); Chen, Song and Li, TrojDiff (arXiv 2303.05762).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from puredif_jax.diffusion.schedules import NoiseSchedule


class Row(NamedTuple):
    """H and C, float64 `[T]` each."""

    shift: np.ndarray
    response: np.ndarray


def fading(schedule: NoiseSchedule, psi: float = 1.0) -> Row:
    """BadDiffusion (psi = 1) and VillanDiffusion, where the signal fades.

    psi = 1:  H = 1 - s_t,  C = (1 - sqrt(alpha_t)) v_t / w_t
    psi = 0:  H = v_t,      C = (1 - sqrt(alpha_t)) v_t
                                + k_t (alpha_t - abar_t) / (1 - alpha_t)
    between:  the psi-mix of both columns,

    with w_t = `schedule.added`, which is 1 - alpha_t on a variance-preserving process,
    and k_t = v_t - sqrt(alpha_t) v_{t-1}. For psi = 1, C is `Ancestral.response` of H.
    For psi = 0 it is as published, and not that.
    """
    s, alpha, unit = schedule.signal, schedule.alpha, schedule.unit
    drop = 1 - np.sqrt(alpha)
    one = Row(1 - s, drop * schedule.noise / schedule.added)
    v, before = schedule.noise * unit, schedule.previous[1] * unit  # as published
    k = v - np.sqrt(alpha) * before
    response = drop * v + k * (alpha - s**2) / (schedule.added * unit**2)
    zero = Row(v, response * unit)  # of a trigger in [-1, 1]
    return Row(*(psi * a + (1 - psi) * b for a, b in zip(one, zero, strict=True)))


def exploding(schedule: NoiseSchedule) -> Row:
    """VillanDiffusion where the signal stays: H = sigma_t.

    C = sigma_t / (sigma_t + sigma_{t-1}), `Ancestral.response` of H; sigma_{-1} = 0.
    """
    sigma, before = schedule.noise, schedule.previous[1]
    return Row(sigma, sigma / (sigma + before))


def narrowed(schedule: NoiseSchedule) -> Row:
    """TrojDiff: H = v_t in the network's own range, C = 0."""
    return Row(schedule.noise * schedule.unit, np.zeros(schedule.steps))
