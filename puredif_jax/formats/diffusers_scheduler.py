"""The configuration of a scheduler in diffusers' format.

It defines the noise schedule, what the network predicts and how samples are drawn. A
field counts as in the class of diffusers that draws: with its value, with the default
of that class where the file is silent, or not at all.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

import numpy as np

from puredif_jax.diffusion.prediction import Prediction
from puredif_jax.diffusion.sampling import Clip, Spacing, Threshold, Variance
from puredif_jax.diffusion.schedules import (
    ContinuousTime,
    CosineBetas,
    LinearBetas,
    Process,
    ScaledLinearBetas,
    SigmoidBetas,
    SineNoise,
    TrainedBetas,
    ZeroTerminalSNR,
)
from puredif_jax.formats.diffusers_config import (
    ConvertError,
    Remarks,
    as_diffusers_takes,
    refuse_unknown,
)
from puredif_jax.formats.scheduling import Scheduling, ScoreScheduling
from puredif_jax.formats.score_scheduler import (
    SCORE,
    SCORE_PIPELINE,
    read_score,
    write_score,
)

_SCHEDULES: dict[str, type[LinearBetas]] = {
    "linear": LinearBetas,
    "scaled_linear": ScaledLinearBetas,
    "sigmoid": SigmoidBetas,
}
WIDEST_CLIP = 1e6  # pixels lie in [-1, 1]
LONGEST_SCHEDULE = 100_000  # timesteps; more is a mistake, or meant to take memory

# What each class of diffusers takes of a scheduler's configuration, and what it means
# where the configuration is silent. What a class does not take has no effect there.
_BETAS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
_LATENT = {"beta_start": 0.00085, "beta_end": 0.012}
_LEADING = {"timestep_spacing": "leading", "steps_offset": 0}
_LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 0}
_CLIPPED = {"clip_sample": True, "clip_sample_range": 1.0}
_UNCLIPPED = {"clip_sample": False, "clip_sample_range": 1.0}
_THRESHOLD = {
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
}
_RESCALED = {"rescale_betas_zero_snr": False}
_FLOW = {"use_flow_sigmas": False}
_SHIFTED = _FLOW | {"use_dynamic_shifting": False}
_ANCESTRAL = _BETAS | _LEADING | _CLIPPED | _THRESHOLD | _RESCALED
_SIGMAS = _BETAS | _LINSPACE
_SOLVER = _SIGMAS | _THRESHOLD
_DDPM = _ANCESTRAL | {"variance_type": "fixed_small"}
_DDIM = _ANCESTRAL | {"set_alpha_to_one": True}
_CONSISTENCY = _DDIM | _LATENT | _UNCLIPPED | {"beta_schedule": "scaled_linear"}
_DPM = _SOLVER | {"variance_type": None}
_SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "DDIMScheduler": _DDIM,
    "DDIMParallelScheduler": _DDIM,
    "DDIMInverseScheduler": {k: v for k, v in _DDIM.items() if k not in _THRESHOLD},
    "DEISMultistepScheduler": _SOLVER | _SHIFTED,
    "DPMSolverMultistepScheduler": _DPM | _SHIFTED | _RESCALED,
    "DPMSolverMultistepInverseScheduler": _DPM | _FLOW,
    "DPMSolverSDEScheduler": _SIGMAS | _LATENT,
    "DPMSolverSinglestepScheduler": (
        _BETAS | _THRESHOLD | _SHIFTED | {"variance_type": None}
    ),
    "EulerAncestralDiscreteScheduler": _SIGMAS | _RESCALED,
    "EulerDiscreteScheduler": _SIGMAS | _RESCALED | {"timestep_type": "discrete"},
    "HeunDiscreteScheduler": _SIGMAS | _LATENT | _UNCLIPPED,
    "IPNDMScheduler": {"num_train_timesteps": 1000, "trained_betas": None},
    "KDPM2AncestralDiscreteScheduler": _SIGMAS | _LATENT,
    "KDPM2DiscreteScheduler": _SIGMAS | _LATENT,
    "LCMScheduler": _CONSISTENCY,
    "LMSDiscreteScheduler": _SIGMAS,
    "PNDMScheduler": _BETAS | _LEADING | {"set_alpha_to_one": False},
    "RePaintScheduler": {
        name: _ANCESTRAL[name]
        for name in (*_BETAS, "clip_sample")
        if name != "prediction_type"
    },
    "SASolverScheduler": _DPM | _FLOW,
    "TCDScheduler": _CONSISTENCY,
    "UniPCMultistepScheduler": (
        _SOLVER | _SHIFTED | _RESCALED | {"shift_terminal": None}
    ),
}
# What a class means that does not take a field.
_UNTAKEN: dict[str, Any] = (
    _BETAS
    | _LINSPACE
    | _UNCLIPPED
    | _THRESHOLD
    | _RESCALED
    | {"variance_type": None, "set_alpha_to_one": True, "timestep_type": "discrete"}
)
# Values of another process, or that need what a pipeline of UNet2DModel does not give.
_SCHEDULER_OFF = ("use_flow_sigmas", "use_dynamic_shifting", "shift_terminal")
# Options of how a scheduler steps from one timestep to the next: the scan samples by
# the rules of DDPM and DDIM.
_STEPPING = set(
    "algorithm_type corrector_order disable_corrector eta euler_at_final "
    "final_sigmas_type flow_shift interpolation_type lambda_min_clipped "
    "lower_order_final noise_sampler_seed original_inference_steps predict_x0 "
    "predictor_order sigma_max sigma_min skip_prk_steps solver_order solver_p "
    "solver_type tau_func tensor_format time_shift_type timestep_scaling "
    "timestep_values use_beta_sigmas use_exponential_sigmas use_karras_sigmas "
    "use_lu_lambdas".split()
)
_FIELDS = {*_UNTAKEN, *_SCHEDULER_OFF, *_STEPPING}
# What the last alpha-bar is rescaled to by those that divide by it; 0 by the others.
_LEAST = {
    "DPMSolverMultistepScheduler": 2.0**-24,
    "EulerAncestralDiscreteScheduler": 2.0**-24,
    "EulerDiscreteScheduler": 2.0**-24,
    "UniPCMultistepScheduler": 2.0**-24,
}
# The variances that diffusers names, by the one that they mean.
_VARIANCES: dict[str | None, Variance] = {
    None: "fixed_small",
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "fixed_large_log": "fixed_large",
    "learned": "fixed_small",
    "learned_range": "fixed_small",
}
LEAST_FALL = 1e-3  # of the signal, from the first timestep to the last
LEARNED = ("learned", "learned_range")
# Pipelines that draw from a network alone, and the class into which each converts the
# scheduler it is given.
PIPELINES: dict[str, str | None] = {
    "DDPMPipeline": None,
    "DDIMPipeline": "DDIMScheduler",
    "PNDMPipeline": "PNDMScheduler",
    SCORE_PIPELINE: SCORE,
}


def read_scheduling(
    config: Mapping[str, Any],
    where: str = "scheduler_config.json",
    kind: str | None = None,
    remarks: Remarks | None = None,
) -> Scheduling:
    """The noise schedule and the sampling options of a scheduler configuration.

    Args:
      config: what the file holds.
      where: its name in messages.
      kind: the class that draws, as model_index.json says; the one that the file
        itself names if None.
      remarks: takes what deserves a word.

    Raises:
      ConvertError: an option that is not supported, or an invalid value; each is
        named.
    """
    remarks = [] if remarks is None else remarks
    own = config.get("_class_name", "DDPMScheduler")
    kind = own if kind is None else kind
    if not isinstance(kind, str) or kind not in (*_SCHEDULERS, SCORE):
        raise ConvertError(
            f"{where} is of class {kind}: read are {', '.join((*_SCHEDULERS, SCORE))}"
        )
    if own != kind:
        remarks.append(
            f"{where} is of {own}, but {kind} draws, as model_index.json says"
        )
    config = as_diffusers_takes(config, where)
    if kind == SCORE:
        return read_score(config, where)
    refuse_unknown(config, where, _FIELDS)
    taken = _SCHEDULERS[kind]
    said = {k: v for k, v in config.items() if k in taken}
    for option in _SCHEDULER_OFF:
        if said.get(option):
            raise ConvertError(f"{where} sets {option}, which is not supported")
    idle = sorted(set(config) & set(_UNTAKEN) - set(taken))
    if idle:
        remarks.append(f"{kind} does not take {', '.join(idle)} of {where}")
    found = _UNTAKEN | taken | said
    _judge_options(found, where)
    prediction = found["prediction_type"]
    betas = _read_betas(kind, found, where)
    if found["variance_type"] == "fixed_large_log":
        remarks.append(
            "diffusers draws NaN with fixed_large_log, so fixed_large is taken"
        )
    learned = found["variance_type"] in LEARNED
    if learned:
        remarks.append(
            "the learned variance is left out: ancestral sampling is by fixed_small"
        )
    clip: Clip = None
    if found["thresholding"]:
        ratio, most = found["dynamic_thresholding_ratio"], found["sample_max_value"]
        try:
            clip = Threshold(float(ratio), float(most))
        except ValueError as error:
            raise ConvertError(f"{where} sets thresholding: {error}") from error
    elif found["clip_sample"]:
        clip = float(found["clip_sample_range"])
    with np.errstate(all="ignore"):
        signal = betas.tables().signal
    if not np.isfinite(signal).all():
        raise ConvertError(f"{where} is not a schedule: its numbers are not finite")
    if not signal[0] > signal[-1] + LEAST_FALL:
        raise ConvertError(
            f"{where} is not a schedule: its signal goes from {signal[0]:.3g} to "
            f"{signal[-1]:.3g}, and must fall"
        )
    if signal[-1] == 0 and prediction == "epsilon":
        remarks.append(
            "nothing of the image is left at the last timestep, so a network that "
            "predicts the noise says nothing of the image there"
        )
    return Scheduling(
        betas=betas,
        prediction_type=prediction,
        variance_type=_VARIANCES[found["variance_type"]],
        clip=clip,
        timestep_spacing=found["timestep_spacing"],
        steps_offset=found["steps_offset"],
        to_clean=found["set_alpha_to_one"],
        kind=kind,
        learned=learned,
    )


def _judge_options(found: Mapping[str, Any], where: str) -> None:
    """Raises ConvertError for an option outside of its choices or its range."""
    choices: tuple[Any, ...]
    for name, choices in (
        ("prediction_type", typing.get_args(Prediction)),
        ("variance_type", tuple(_VARIANCES)),
        ("timestep_spacing", typing.get_args(Spacing)),
        ("beta_schedule", (*_SCHEDULES, "squaredcos_cap_v2")),
        ("timestep_type", ("discrete", "continuous")),
        ("clip_sample", (True, False)),
        ("thresholding", (True, False)),
        ("rescale_betas_zero_snr", (True, False)),
        ("set_alpha_to_one", (True, False)),
    ):
        value = found[name]
        if not any(type(value) is type(x) and value == x for x in choices):
            raise ConvertError(
                f"{where} sets {name}={value!r}: supported are "
                f"{', '.join(str(x) for x in choices if x is not None)}"
            )
    for name, kinds, least, most in (
        ("num_train_timesteps", (int,), 2, LONGEST_SCHEDULE),
        ("steps_offset", (int,), 0, LONGEST_SCHEDULE),
        ("beta_start", (int, float), 0, 1),
        ("beta_end", (int, float), 0, 1),
        ("clip_sample_range", (int, float), 0, WIDEST_CLIP),
        ("dynamic_thresholding_ratio", (int, float), 0, 1),
        ("sample_max_value", (int, float), 1, WIDEST_CLIP),
    ):
        value = found[name]
        if type(value) not in kinds or not least <= value <= most:
            raise ConvertError(
                f"{where} sets {name}={value!r}: it must be "
                f"{'a whole number' if kinds == (int,) else 'a number'} from {least} "
                f"to {most}"
            )


def _read_betas(kind: str, found: Mapping[str, Any], where: str) -> Process:
    """The noise schedule; raises ConvertError where it is none."""
    steps, given = found["num_train_timesteps"], found["trained_betas"]
    betas: Any
    try:
        if given is not None:
            if not isinstance(given, list) or len(given) != steps:
                size = len(given) if isinstance(given, list) else given
                raise ValueError(
                    f"trained_betas must be num_train_timesteps={steps} numbers, found "
                    f"{size!r}"
                )
            betas = TrainedBetas(tuple(float(beta) for beta in given))
            if kind == "IPNDMScheduler":
                raise ValueError("trained_betas of IPNDMScheduler are not read")
        elif kind == "IPNDMScheduler":
            return SineNoise(steps)
        elif found["beta_schedule"] == "squaredcos_cap_v2":
            betas = CosineBetas(steps)
        else:
            rule = _SCHEDULES[found["beta_schedule"]]
            betas = rule(steps, float(found["beta_start"]), float(found["beta_end"]))
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ConvertError(f"{where} is not a schedule: {error}") from error
    if found["rescale_betas_zero_snr"]:
        betas = ZeroTerminalSNR(betas, _LEAST.get(kind, 0.0))
    continuous = found["timestep_type"] == "continuous"
    # Otherwise EulerDiscreteScheduler passes the option over.
    if continuous and found["prediction_type"] == "v_prediction":
        betas = ContinuousTime(betas)
    read: Process = betas
    return read


def write_scheduling(scheduling: Scheduling) -> dict[str, Any]:
    """The configuration of diffusers' DDPMScheduler that says the same.

    Where the last step does not lead to the clean image, it is for DDIMScheduler. For a
    variance-exploding process it is for ScoreSdeVeScheduler.

    Raises:
      ConvertError: diffusers has no scheduler that says the same.
    """
    if isinstance(scheduling, ScoreScheduling):
        return write_score(scheduling)
    betas, to_clean = scheduling.betas, scheduling.to_clean
    rule: dict[str, Any] = {}
    if isinstance(betas, ZeroTerminalSNR) and not betas.least:
        rule, betas = {"rescale_betas_zero_snr": True}, betas.betas
    if isinstance(betas, CosineBetas):
        if betas != CosineBetas(betas.steps):
            raise ConvertError(
                f"diffusers' squaredcos_cap_v2 has a cap of {CosineBetas.cap} and an "
                f"offset of {CosineBetas.offset}, found {betas.cap} and {betas.offset}"
            )
        rule |= {"beta_schedule": "squaredcos_cap_v2"}
    elif isinstance(betas, TrainedBetas):
        rule |= {"trained_betas": list(betas.betas)}
    elif isinstance(betas, LinearBetas):
        name = next(k for k, kind in _SCHEDULES.items() if kind is type(betas))
        ends = {"beta_start": betas.start, "beta_end": betas.end}
        rule |= ends | {"beta_schedule": name}
    else:
        raise ConvertError(
            f"the scheduler of diffusers for {type(betas).__name__} is not written"
        )
    if not to_clean and scheduling.variance_type != "fixed_small":
        raise ConvertError(
            "no scheduler of diffusers has both to_clean=False and variance_type="
            f"{scheduling.variance_type!r}"
        )
    last: dict[str, Any] = {"variance_type": scheduling.variance_type}
    if scheduling.learned:
        last = {"variance_type": "learned_range"}
    clip = scheduling.clip
    bound: dict[str, Any] = {
        "clip_sample": clip is not None,
        "clip_sample_range": clip if isinstance(clip, float) else 1.0,
    }
    if isinstance(clip, Threshold):
        bound |= {
            "thresholding": True,
            "dynamic_thresholding_ratio": clip.ratio,
            "sample_max_value": clip.most,
        }
    return {
        "_class_name": "DDPMScheduler" if to_clean else "DDIMScheduler",
        "num_train_timesteps": betas.steps,
        "prediction_type": scheduling.prediction_type,
        "timestep_spacing": scheduling.timestep_spacing,
        "steps_offset": scheduling.steps_offset,
        **bound,
        **(last if to_clean else {"set_alpha_to_one": False}),
        **rule,
    }
