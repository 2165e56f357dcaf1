"""The shipped backdoors on other noise schedules, at the same noise levels.

    python -m puredif_jax.main --config=configs/retimed.py

The weights are the same. On each schedule the network is given the timestep of the
linear one at which the signal-to-noise ratio is equal, so it is the same model and the
same backdoor: its scores should be, too.

Hardware: two CPU cores. Duration: 30 minutes. Expected: docs/scan.md.
"""

import dataclasses

import numpy as np

from puredif_jax.diffusion.schedules import (
    CosineBetas,
    LinearBetas,
    NoiseSchedule,
    Process,
    ScaledLinearBetas,
)
from puredif_jax.networks.unet import SHIPPED
from puredif_jax.stages.audit import Audit
from puredif_jax.stages.experiment import Experiment, Sweep

SCHEDULES = {
    "linear": LinearBetas(),
    "scaled-linear": ScaledLinearBetas(),
    "cosine": CosineBetas(),
}


@dataclasses.dataclass(frozen=True)
class Retimed(Process):
    """A schedule for a network that was trained on the linear one."""

    betas: LinearBetas | CosineBetas

    @property
    def steps(self) -> int:
        return self.betas.steps

    def tables(self) -> NoiseSchedule:
        found, known = self.betas.tables(), LinearBetas().tables()
        rising = -known.log_snr
        times = np.interp(-found.log_snr, rising, np.arange(known.steps))
        return dataclasses.replace(found, times=times)


def get_config() -> Sweep:
    return Sweep(
        workdir="runs/retimed",
        experiments=tuple(
            Experiment(
                workdir=f"{model}/{name}",
                model=SHIPPED,
                schedule=Retimed(schedule),
                audit=Audit(weights=(model,)),
            )
            for model in ("baddiffusion", "villandiffusion")
            for name, schedule in SCHEDULES.items()
        ),
    )
