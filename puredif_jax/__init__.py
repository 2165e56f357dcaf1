"""Backdoors in diffusion models: trigger inversion, detection and amplification.

For defense research, on models that the user has trained. The public names:

>>> from puredif_jax import UNet, LinearBetas, DistributionShift, Hypothesis

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
    from puredif_jax.amplification import Reinforcement as Reinforcement
    from puredif_jax.attacks import BadDiffusion as BadDiffusion
    from puredif_jax.attacks import VillanDiffusion as VillanDiffusion
    from puredif_jax.convert import read_folder as read_folder
    from puredif_jax.convert import write_folder as write_folder
    from puredif_jax.detection import Detector as Detector
    from puredif_jax.detection import Features as Features
    from puredif_jax.detection import features as features
    from puredif_jax.diffusion import DDIM as DDIM
    from puredif_jax.diffusion import DDPM as DDPM
    from puredif_jax.diffusion import DPMSolver as DPMSolver
    from puredif_jax.diffusion import UniPC as UniPC
    from puredif_jax.diffusion import sample as sample
    from puredif_jax.inversion import Descent as Descent
    from puredif_jax.inversion import inverter as inverter
    from puredif_jax.objectives import DenoisingConsistency as DenoisingConsistency
    from puredif_jax.objectives import DistributionShift as DistributionShift
    from puredif_jax.objectives import Hypothesis as Hypothesis
    from puredif_jax.schedules import LinearBetas as LinearBetas
    from puredif_jax.survey import Survey as Survey
    from puredif_jax.types import Candidate as Candidate
    from puredif_jax.unet import UNet as UNet

__version__ = "0.1.0"

_HOMES = {
    "amplification": ("Reinforcement",),
    "attacks": ("BadDiffusion", "VillanDiffusion"),
    "convert": ("read_folder", "write_folder"),
    "detection": ("Detector", "Features", "features"),
    "diffusion": ("DDIM", "DDPM", "DPMSolver", "UniPC", "sample"),
    "inversion": ("Descent", "inverter"),
    "objectives": ("DenoisingConsistency", "DistributionShift", "Hypothesis"),
    "schedules": ("LinearBetas",),
    "survey": ("Survey",),
    "types": ("Candidate",),
    "unet": ("UNet",),
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
