"""Backdoors in diffusion models: trigger inversion, detection and amplification.

For defense research, on models that the user has trained. The public names:

>>> from puredif_jax import UNet, LinearBetas, DistributionShift, Hypothesis
"""

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
