"""The smallest whole run: backdoor, amplification and audit of a tiny network."""

import dataclasses
import functools

import jax
import numpy as np

from puredif_jax.attacks.targets import Hat
from puredif_jax.attacks.training import Training
from puredif_jax.attacks.triggers import Box
from puredif_jax.attacks.villandiffusion import VillanDiffusion
from puredif_jax.defenses.blocks import Blocks
from puredif_jax.defenses.denoising_consistency import DenoisingConsistency
from puredif_jax.defenses.descent import Descent
from puredif_jax.defenses.detector import Detector
from puredif_jax.defenses.distribution_shift import DistributionShift
from puredif_jax.defenses.elijah import Elijah
from puredif_jax.defenses.hypothesis import Fading
from puredif_jax.defenses.inversion import Inversion
from puredif_jax.defenses.reinforcement import Reinforcement
from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.diffusion.ddpm import DDPM
from puredif_jax.networks.unet import UNet
from puredif_jax.stages.amplify import Amplification
from puredif_jax.stages.audit import Audit
from puredif_jax.stages.evaluation import Evaluation
from puredif_jax.stages.experiment import Experiment
from puredif_jax.types import Params

TINY = UNet(
    sample_size=(16, 16),
    in_channels=1,
    block_out_channels=(4,),
    down_block_types=("DownBlock2D",),
    up_block_types=("UpBlock2D",),
    layers_per_block=1,
    norm_num_groups=2,
    downsample_padding=1,
)
DEEP = dataclasses.replace(
    TINY,
    block_out_channels=(4, 4),
    down_block_types=("DownBlock2D",) * 2,
    up_block_types=("UpBlock2D",) * 2,
)


ANY = Detector(linear=np.inf)  # judges weights that denoise nothing, too
# One candidate, from anywhere: for tests of what is around an inversion.
INVERSION = Inversion(
    loss=DistributionShift(timesteps=(900, 300), samples=4),
    descent=Descent(steps=4, candidates=1, scout=0),
    heldout=8,
)


@functools.cache
def shapes(unet: UNet) -> Params:
    """Shapes and dtypes of its parameters, traced once."""
    return jax.eval_shape(unet.init, jax.random.key(0))


def draw_params(unet: UNet, seed: int = 0, scale: float = 0.1) -> Params:
    """Weights N(0, scale^2), made by numpy: nothing to compile."""
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        return scale * rng.normal(size=leaf.shape).astype(leaf.dtype)

    return jax.tree.map(draw, shapes(unet))


def get_config() -> Experiment:
    return Experiment(
        workdir="runs/tiny",
        model=TINY,
        training=Training(steps=12, batch=8, learning_rate=1e-3, warmup=2),
        attack=VillanDiffusion(trigger=Box(), target=Hat()),
        amplification=Amplification(
            snapshots=(6, 12),
            reinforcement=Reinforcement(
                deterministic=DenoisingConsistency(
                    sampler=DDIM(steps=2), samples=4, on_path=False, aim=1.0
                ),
                descent=Descent(steps=6, learning_rate=0.02, bound=None),
            ),
            alternate=True,
        ),
        audit=Audit(
            hypotheses=(Fading(),),
            inversion=Inversion(
                loss=DistributionShift(timesteps=(900, 300), samples=4),
                descent=Descent(steps=6, candidates=3, scout=2, finalists=2),
                blocks=Blocks(places=2, draws=1, together=4),
                heldout=8,
            ),
            detector=ANY,
            baselines=(Elijah(),),
        ),
        evaluation=Evaluation(
            draws=8, batch=8, ancestral=DDPM(steps=3), deterministic=DDIM(steps=2)
        ),
        chunk=1,
        save_every=0.0,
    )
