"""Configurations in diffusers' format: of a network, and of a scheduler.

What a model folder says before its weights are opened. Every field is read, known to
change nothing here, or refused by name.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from puredif_jax.diffusion import (
    CosineBetas,
    LinearBetas,
    Prediction,
    ScaledLinearBetas,
    Spacing,
    Variance,
)
from puredif_jax.types import InputError
from puredif_jax.unet import UNet

# Fields of UNet2DModel's configuration that ours has too; "sample_size" is apart.
_SHARED = (
    "in_channels block_out_channels down_block_types up_block_types layers_per_block "
    "attention_head_dim norm_num_groups norm_eps downsample_padding flip_sin_to_cos "
    "freq_shift dropout"
).split()
# What diffusers takes where a configuration is silent.
_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "block_out_channels": [224, 448, 672, 896],
    "down_block_types": ["DownBlock2D"] + ["AttnDownBlock2D"] * 3,
    "up_block_types": ["AttnUpBlock2D"] * 3 + ["UpBlock2D"],
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "dropout": 0.0,
}
# Options that the network does not have, and the values that leave them off.
_OFF: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "attn_norm_num_groups": (None,),
    "resnet_time_scale_shift": ("default",),
    "add_attention": (True,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
}
# Fields without meaning for a forward pass.
_IGNORED = {"out_channels", "sample_size", "num_train_timesteps"}

_SCHEDULES: dict[str, type[LinearBetas] | type[ScaledLinearBetas]] = {
    "linear": LinearBetas,
    "scaled_linear": ScaledLinearBetas,
}
WIDEST_CLIP = 1e6  # pixels lie in [-1, 1]
LONGEST_SCHEDULE = 100_000  # timesteps; more is a mistake, or meant to take memory
# What is read of a scheduler, and what DDPMScheduler takes where it is silent.
_READ: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "variance_type": "fixed_small",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "set_alpha_to_one": True,
}
# Schedulers of the variance-preserving process that betas define, and where their
# silence means something else. How they step from one timestep to the next is not read.
_SOLVER = {"clip_sample": False, "timestep_spacing": "linspace"}
_LATENT = {"beta_start": 0.00085, "beta_end": 0.012}
_SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {},
    "DDIMScheduler": {},
    "DEISMultistepScheduler": _SOLVER,
    "DPMSolverMultistepScheduler": _SOLVER,
    "DPMSolverSinglestepScheduler": _SOLVER,
    "EulerAncestralDiscreteScheduler": _SOLVER,
    "EulerDiscreteScheduler": _SOLVER,
    "HeunDiscreteScheduler": _SOLVER | _LATENT,
    "KDPM2AncestralDiscreteScheduler": _SOLVER | _LATENT,
    "KDPM2DiscreteScheduler": _SOLVER | _LATENT,
    "LMSDiscreteScheduler": _SOLVER,
    "PNDMScheduler": {"clip_sample": False, "set_alpha_to_one": False},
    "UniPCMultistepScheduler": _SOLVER,
}
# Options of another process or of another estimate of the image, which must be off.
_SCHEDULER_OFF = (
    "rescale_betas_zero_snr shift_terminal thresholding trained_betas "
    "use_dynamic_shifting use_flow_sigmas"
).split()
# Options of how one of these schedulers steps, or of one of those that are off.
_STEPPING = (
    "algorithm_type disable_corrector dynamic_thresholding_ratio euler_at_final "
    "final_sigmas_type flow_shift interpolation_type lambda_min_clipped "
    "lower_order_final predict_x0 sample_max_value sigma_max sigma_min skip_prk_steps "
    "solver_order solver_p solver_type tensor_format time_shift_type timestep_type "
    "timestep_values use_beta_sigmas use_exponential_sigmas use_karras_sigmas "
    "use_lu_lambdas"
).split()


class ConvertError(InputError):
    """A folder that is not a model we can read; says what was found."""


@dataclasses.dataclass(frozen=True)
class Scheduling:
    """What a folder says of the forward process and of sampling.

    Attributes:
      betas: the noise schedule.
      prediction_type: "epsilon" or "v_prediction", what the network predicts.
      variance_type: of ancestral sampling, "fixed_small" (that of the posterior) or
        "fixed_large" (beta_t).
      clip: bound on x0hat while sampling, None without `clip_sample`.
      timestep_spacing: "leading", "linspace" or "trailing".
      steps_offset: added to leading timesteps.
      to_clean: the last step of DDIM leads to the clean image, not to t = 0
        ("set_alpha_to_one").
    """

    betas: LinearBetas | ScaledLinearBetas | CosineBetas = LinearBetas()
    prediction_type: Prediction = "epsilon"
    variance_type: Variance = "fixed_small"
    clip: float | None = 1.0
    timestep_spacing: Spacing = "leading"
    steps_offset: int = 0
    to_clean: bool = True


def read_unet(config: Mapping[str, Any], where: str = "config.json") -> UNet:
    """The network of a UNet2DModel configuration.

    Raises:
      ConvertError: another class, an option that is not supported, or a value that is
        none; each is named.
    """
    kind = config.get("_class_name")
    if kind != "UNet2DModel":
        raise ConvertError(f"{where} is of class {kind!r}: only UNet2DModel is read")
    for name, valid in _OFF.items():
        if name in config and config[name] not in valid:
            raise ConvertError(
                f"{where} sets {name}={config[name]!r}, which is not supported: only "
                f"{' or '.join(map(repr, valid))} is"
            )
    _refuse_unknown(config, where, {*_SHARED, *_OFF, *_IGNORED})
    fields = {name: config.get(name, _DEFAULTS[name]) for name in _SHARED}
    for name, value in fields.items():
        if isinstance(_DEFAULTS[name], list) != isinstance(value, (list, tuple)):
            raise ConvertError(
                f"{where} sets {name}={value!r}, which is of another kind"
            )
    channels = config.get("out_channels", fields["in_channels"])
    if channels != fields["in_channels"]:
        raise ConvertError(
            f"{where} has in_channels={fields['in_channels']} and out_channels="
            f"{channels}: only equal ones are read"
        )
    size = config.get("sample_size")
    sides = size if isinstance(size, list) else [size, size]
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    try:
        return UNet(sample_size=tuple(sides), **fields)
    except (TypeError, ValueError) as error:
        raise ConvertError(f"{where} is not a network: {error}") from error


def write_unet(unet: UNet) -> dict[str, Any]:
    """The configuration of UNet2DModel for a network of ours."""
    shared = {name: getattr(unet, name) for name in _SHARED}
    height, width = unet.sample_size
    return {
        "_class_name": "UNet2DModel",
        "sample_size": height if height == width else [height, width],
        "out_channels": unet.in_channels,
        **{name: values[0] for name, values in _OFF.items()},
        **shared,
    }


def read_scheduling(
    config: Mapping[str, Any], where: str = "scheduler_config.json"
) -> Scheduling:
    """The noise schedule and the sampling options of a scheduler configuration.

    Raises:
      ConvertError: an option that is not supported, or a value that is none; each is
        named.
    """
    kind = str(config.get("_class_name", "DDPMScheduler"))
    if kind not in _SCHEDULERS:
        raise ConvertError(
            f"{where} is of class {kind}: read are {', '.join(_SCHEDULERS)}"
        )
    for option in _SCHEDULER_OFF:
        if config.get(option):
            raise ConvertError(f"{where} sets {option}, which is not supported")
    _refuse_unknown(config, where, {*_READ, *_STEPPING, *_SCHEDULER_OFF})
    silent = _READ | _SCHEDULERS[kind]
    said = {k: v for k, v in config.items() if k in _READ}
    if said.get("variance_type", "") is None:  # DPM-Solver's way of being silent
        del said["variance_type"]
    found = silent | said
    for name, choices in (
        ("prediction_type", typing.get_args(Prediction)),
        ("variance_type", typing.get_args(Variance)),
        ("timestep_spacing", typing.get_args(Spacing)),
        ("beta_schedule", (*_SCHEDULES, "squaredcos_cap_v2")),
        ("clip_sample", (True, False)),
        ("set_alpha_to_one", (True, False)),
    ):
        value = found[name]
        if type(value) is not type(choices[0]) or value not in choices:
            raise ConvertError(
                f"{where} sets {name}={value!r}: supported are "
                f"{', '.join(map(str, choices))}"
            )
    for name, kinds, least, most in (
        ("num_train_timesteps", (int,), 2, LONGEST_SCHEDULE),
        ("steps_offset", (int,), 0, LONGEST_SCHEDULE),
        ("beta_start", (int, float), 0, 1),
        ("beta_end", (int, float), 0, 1),
        ("clip_sample_range", (int, float), 0, WIDEST_CLIP),
    ):
        value = found[name]
        if type(value) not in kinds or not least <= value <= most:
            raise ConvertError(
                f"{where} sets {name}={value!r}: it must be "
                f"{'a whole number' if kinds == (int,) else 'a number'} from {least} "
                f"to {most}"
            )
    steps = found["num_train_timesteps"]
    betas: LinearBetas | ScaledLinearBetas | CosineBetas
    if found["beta_schedule"] == "squaredcos_cap_v2":
        betas = CosineBetas(steps)
    else:
        rule = _SCHEDULES[found["beta_schedule"]]
        try:
            betas = rule(steps, float(found["beta_start"]), float(found["beta_end"]))
        except ValueError as error:
            raise ConvertError(f"{where} is not a schedule: {error}") from error
    return Scheduling(
        betas=betas,
        prediction_type=found["prediction_type"],
        variance_type=found["variance_type"],
        clip=float(found["clip_sample_range"]) if found["clip_sample"] else None,
        timestep_spacing=found["timestep_spacing"],
        steps_offset=found["steps_offset"],
        to_clean=found["set_alpha_to_one"],
    )


def write_scheduling(scheduling: Scheduling) -> dict[str, Any]:
    """The configuration of diffusers' DDPMScheduler that says the same.

    It is that of DDIMScheduler where the last step does not lead to the clean image.

    Raises:
      ConvertError: diffusers has no scheduler that says the same.
    """
    betas, to_clean = scheduling.betas, scheduling.to_clean
    if isinstance(betas, CosineBetas):
        if betas != CosineBetas(betas.steps):
            raise ConvertError(
                f"diffusers' squaredcos_cap_v2 has a cap of {CosineBetas.cap} and an "
                f"offset of {CosineBetas.offset}, found {betas.cap} and {betas.offset}"
            )
        rule: dict[str, Any] = {"beta_schedule": "squaredcos_cap_v2"}
    else:
        name = next(k for k, kind in _SCHEDULES.items() if kind is type(betas))
        ends = {"beta_start": betas.start, "beta_end": betas.end}
        rule = ends | {"beta_schedule": name}
    if not to_clean and scheduling.variance_type != "fixed_small":
        raise ConvertError(
            "no scheduler of diffusers has both to_clean=False and variance_type="
            f"{scheduling.variance_type!r}"
        )
    last = {"variance_type": scheduling.variance_type}
    return {
        "_class_name": "DDPMScheduler" if to_clean else "DDIMScheduler",
        "num_train_timesteps": betas.steps,
        "prediction_type": scheduling.prediction_type,
        "clip_sample": scheduling.clip is not None,
        "clip_sample_range": 1.0 if scheduling.clip is None else scheduling.clip,
        "timestep_spacing": scheduling.timestep_spacing,
        "steps_offset": scheduling.steps_offset,
        **(last if to_clean else {"set_alpha_to_one": False}),
        **rule,
    }


def _refuse_unknown(config: Mapping[str, Any], where: str, known: set[str]) -> None:
    unknown = [name for name in config if name not in known and name[:1] != "_"]
    if unknown:
        raise ConvertError(f"{where} sets {', '.join(unknown)}, which we do not know")
