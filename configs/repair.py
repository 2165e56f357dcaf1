"""Repairs a backdoored model: audits it, trains the backdoor out, audits the result.

    python -m puredif_jax.main --config=configs/repair.py --config.model=FOLDER

The trigger is the one that the audit finds. Without data the model's own draws keep its
clean behaviour. The repaired model is a folder in diffusers' format, named in the
report, in the folder of the model below --config.workdir. FOLDER stays as it is. An
audit that is done in the same --config.workdir is not done again. Only a model that
is called backdoored is repaired; --config.repair.always=true repairs any. A result that
is not called clean is repaired once more. The exit status gives the last verdict.

Hardware: any. Duration: 15 minutes a model of the package's size on one CPU core.
"""

from puredif_jax.stages.experiment import Scan
from puredif_jax.stages.repair import Repair


def get_config() -> Scan:
    return Scan(model=("zoo/baddiffusion",), repair=Repair())
