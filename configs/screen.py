"""Which starting noises in a file are triggered? Audits a model, then tests the noise.

    python -m puredif_jax.main --config=configs/screen.py --config.model=FOLDER \
        --config.screen.noise=FILE.npz

FILE.npz has one array of floats, [N, H, W, C] or [N, C, H, W]: the noise as it is
given to the sampler. The trigger is the best that the audit finds. An audit that is
done in the same --config.workdir is not done again. noise.csv, in the folder of the
model there, has a p-value of each start by each of three tests.

Hardware: any. Duration: as configs/scan.py, and a minute for 2,000 plain starts.
Expected: docs/screen.md.
"""

from puredif_jax.stages.experiment import Scan
from puredif_jax.stages.screen import Screen


def get_config() -> Scan:
    return Scan(model=("zoo/baddiffusion",), screen=Screen())
