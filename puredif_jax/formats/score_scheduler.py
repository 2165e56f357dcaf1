"""The configuration of diffusers' scheduler for variance-exploding models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from puredif_jax.diffusion.ve import VarianceExploding
from puredif_jax.formats.diffusers_config import ConvertError, refuse_unknown
from puredif_jax.formats.scheduling import ScoreScheduling

SCORE = "ScoreSdeVeScheduler"
SCORE_PIPELINE = "ScoreSdeVePipeline"
# What diffusers takes where a configuration is silent, and the bounds of each.
_FIELDS: dict[str, tuple[float, float, float]] = {
    "num_train_timesteps": (2000, 2, 100_000),
    "snr": (0.15, 1e-6, 1e3),
    "sigma_min": (0.01, 1e-9, 1e9),
    "sigma_max": (1348.0, 1e-9, 1e9),
    "sampling_eps": (1e-5, 0, 1e-3),
    "correct_steps": (1, 0, 1000),
}
_WHOLE = ("num_train_timesteps", "correct_steps")


def read_score(config: Mapping[str, Any], where: str) -> ScoreScheduling:
    """The process and the sampling of a ScoreSdeVeScheduler configuration.

    Its images lie in [0, 1]. Its network is given sigma and predicts the score. The
    times of sampling end at sampling_eps; with 1e-3 or less all levels are reached.

    Raises:
      ConvertError: an unknown field, or an invalid value; each is named.
    """
    refuse_unknown(config, where, {*_FIELDS})
    found: dict[str, Any] = {}
    for name, (default, least, most) in _FIELDS.items():
        value = found[name] = config.get(name, default)
        kinds = (int,) if name in _WHOLE else (int, float)
        if type(value) not in kinds or not least <= value <= most:
            raise ConvertError(
                f"{where} sets {name}={value!r}: it must be "
                f"{'a whole number' if name in _WHOLE else 'a number'} from {least:g} "
                f"to {most:g}"
            )
    low, high = (float(found[name]) for name in ("sigma_min", "sigma_max"))
    try:
        process = VarianceExploding(found["num_train_timesteps"], low, high)
    except ValueError as error:
        raise ConvertError(f"{where} is not a schedule: {error}") from error
    return ScoreScheduling(
        process, corrections=found["correct_steps"], snr=float(found["snr"])
    )


def write_score(scheduling: ScoreScheduling) -> dict[str, Any]:
    """The configuration of ScoreSdeVeScheduler that says the same.

    Raises:
      ConvertError: diffusers has no scheduler that says the same.
    """
    process = scheduling.betas
    if not isinstance(process, VarianceExploding) or (
        (process.values, process.given_sigma) != ((0.0, 1.0), True)
    ):
        raise ConvertError(
            f"the scheduler of diffusers for {process} is not written: it knows images "
            "in [0, 1], and networks that are given sigma"
        )
    if scheduling.prediction_type != "score":
        raise ConvertError(
            f"{SCORE} is of networks that predict the score, found "
            f"{scheduling.prediction_type}"
        )
    return {
        "_class_name": SCORE,
        "num_train_timesteps": process.steps,
        "snr": scheduling.snr,
        "sigma_min": process.sigma_min,
        "sigma_max": process.sigma_max,
        "sampling_eps": _FIELDS["sampling_eps"][0],
        "correct_steps": scheduling.corrections,
    }
