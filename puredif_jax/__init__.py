"""Backdoors in diffusion models: trigger inversion, detection and amplification.

For defense research, on models that the user has trained. The public names:

>>> from puredif_jax import UNet, LinearBetas, DenoisingError, Fading

A name is imported when it is first used, so that a program says what is wrong with a
command, and hears Ctrl-C, before JAX is there.
"""

import importlib
import sys
from typing import TYPE_CHECKING

if sys.version_info < (3, 11):  # noqa: UP036, or it would be a traceback
    sys.exit(
        "error: puredif_jax needs Python 3.11 or newer, found "
        f"{sys.version.split()[0]}: install it there, such as with python3.11 -m pip"
    )

if TYPE_CHECKING:
    from puredif_jax.attacks.baddiffusion import BadDiffusion as BadDiffusion
    from puredif_jax.attacks.trojdiff import TrojDiff as TrojDiff
    from puredif_jax.attacks.villandiffusion import VillanDiffusion as VillanDiffusion
    from puredif_jax.attacks.villandiffusion_ve import (
        VillanDiffusionVE as VillanDiffusionVE,
    )
    from puredif_jax.defenses.denoising_consistency import (
        DenoisingConsistency as DenoisingConsistency,
    )
    from puredif_jax.defenses.denoising_error import DenoisingError as DenoisingError
    from puredif_jax.defenses.descent import Descent as Descent
    from puredif_jax.defenses.detector import Detector as Detector
    from puredif_jax.defenses.distribution_shift import (
        DistributionShift as DistributionShift,
    )
    from puredif_jax.defenses.features import Features as Features
    from puredif_jax.defenses.features import features as features
    from puredif_jax.defenses.hypothesis import Fading as Fading
    from puredif_jax.defenses.hypothesis import Hypothesis as Hypothesis
    from puredif_jax.defenses.hypothesis import Trojan as Trojan
    from puredif_jax.defenses.inversion import inverter as inverter
    from puredif_jax.defenses.reinforcement import Reinforcement as Reinforcement
    from puredif_jax.diffusion.ddim import DDIM as DDIM
    from puredif_jax.diffusion.ddpm import DDPM as DDPM
    from puredif_jax.diffusion.multistep import DPMSolver as DPMSolver
    from puredif_jax.diffusion.multistep import UniPC as UniPC
    from puredif_jax.diffusion.sampling import sample as sample
    from puredif_jax.diffusion.schedules import LinearBetas as LinearBetas
    from puredif_jax.diffusion.solver import Ancestral as Ancestral
    from puredif_jax.diffusion.solver import Deterministic as Deterministic
    from puredif_jax.formats.diffusers import read_folder as read_folder
    from puredif_jax.formats.diffusers import write_folder as write_folder
    from puredif_jax.networks.unet import UNet as UNet
    from puredif_jax.types import Candidate as Candidate

__version__ = "0.1.0"

_HOMES = {
    "attacks.baddiffusion": ("BadDiffusion",),
    "attacks.trojdiff": ("TrojDiff",),
    "attacks.villandiffusion": ("VillanDiffusion",),
    "attacks.villandiffusion_ve": ("VillanDiffusionVE",),
    "defenses.denoising_consistency": ("DenoisingConsistency",),
    "defenses.denoising_error": ("DenoisingError",),
    "defenses.detector": ("Detector",),
    "defenses.distribution_shift": ("DistributionShift",),
    "defenses.features": ("Features", "features"),
    "defenses.hypothesis": ("Fading", "Hypothesis", "Trojan"),
    "defenses.descent": ("Descent",),
    "defenses.inversion": ("inverter",),
    "defenses.reinforcement": ("Reinforcement",),
    "diffusion.ddim": ("DDIM",),
    "diffusion.ddpm": ("DDPM",),
    "diffusion.multistep": ("DPMSolver", "UniPC"),
    "diffusion.sampling": ("sample",),
    "diffusion.schedules": ("LinearBetas",),
    "diffusion.solver": ("Ancestral", "Deterministic"),
    "formats.diffusers": ("read_folder", "write_folder"),
    "networks.unet": ("UNet",),
    "types": ("Candidate",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOME[name]}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
