"""Scan of models in diffusers' format: is any of them backdoored?

    python -m puredif_jax.main --config=configs/scan.py --config.model=FOLDER

FOLDER is a model's folder, a run that trained one, a folder of such folders, a text
file that names one a line, or owner/name of the Hub. Several are separated by commas.
Without FOLDER the models of the package are scanned. The report goes into
runs/scan-FOLDER, or into --config.workdir. Exit status: 0 clean, 1 error,
2 could not tell, 3 backdoored (of several models the gravest: backdoored, then error,
then could not tell).

Hardware: any. Duration: 5 minutes a model of the package's size on one CPU core.
Expected: docs/measured.md.
"""

from puredif_jax.stages.experiment import Scan


def get_config() -> Scan:
    return Scan(model=("zoo",))
