"""The shipped backdoors on other noise schedules, at the same noise levels.

    python benchmarks/retimed.py

The weights are the same. On each schedule the network is given the timestep of the
linear schedule at which the signal-to-noise ratio is equal. So it is the same model
with the same backdoor, and its scores should be the same, too. Writes
docs/results/retimed.json after each verdict, and starts over when started again.

Hardware: two CPU cores. Duration: 20 minutes. Expected: docs/measured.md.
"""

import dataclasses
import json
import pathlib

import numpy as np
from family import judged

from puredif_jax.diffusion.schedules import (
    CosineBetas,
    LinearBetas,
    NoiseSchedule,
    Process,
    ScaledLinearBetas,
)
from puredif_jax.formats.diffusers import read_folder
from puredif_jax.runs.report import environment, placeless
from puredif_jax.stages.weights import ZOO

RESULTS = pathlib.Path(__file__).parents[1] / "docs" / "results" / "retimed.json"
SCHEDULES = {
    "cosine": CosineBetas(),
    "scaled linear": ScaledLinearBetas(),
    "linear": LinearBetas(),
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
        times = np.interp(-found.log_snr, -known.log_snr, np.arange(known.steps))
        return dataclasses.replace(found, times=times)


def main() -> None:
    rows = []
    for name, betas in SCHEDULES.items():
        for model in ("baddiffusion", "villandiffusion"):
            folder = read_folder(str(ZOO / model))
            process = Retimed(betas)
            found = judged(process, folder.spec.network, folder.params, None, 0)
            rows.append({"model": model, "schedule": name} | found)
            stored = {
                "command": "python benchmarks/retimed.py",
                "environment": placeless(environment()),
                "rows": rows,
            }
            RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
            print(
                f"{model}, {name}: {found['verdict']}, score {found['score']:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
