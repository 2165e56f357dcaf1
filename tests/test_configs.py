"""Every config: builds, tells its command, survives JSON, fits its own network."""

import json
import pathlib

import jax
import pytest
from tiny_config import shapes

from puredif_jax.runs import config, sources
from puredif_jax.stages.experiment import Experiment, Scan, Sweep
from puredif_jax.stages.scan import as_experiment
from puredif_jax.stages.weights import ZOO

CONFIGS = sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config(path: pathlib.Path) -> None:
    wanted = sources.load(str(path))
    home = wanted.located() if isinstance(wanted, Scan) else wanted
    one = "scan-zoo-baddiffusion"
    place = {"scan": "scan-zoo", "screen": one, "repair": one}
    place = place.get(path.stem, path.stem)
    assert home.workdir == f"runs/{place}"
    text = json.dumps(config.to_dict(wanted), allow_nan=False)
    assert json.loads(text)["type"] == type(wanted).__name__
    text = path.read_text()
    assert f"python -m puredif_jax.main --config=configs/{path.name}" in text
    assert "Hardware:" in text and "Duration" in text
    if isinstance(wanted, Scan):
        wanted = as_experiment(wanted, "clean", ZOO / "clean")
    experiments = wanted.chosen() if isinstance(wanted, Sweep) else (wanted,)
    for experiment in experiments:
        assert isinstance(experiment, Experiment)
        changed = config.override(experiment, "seed", "3")
        assert changed.seed == 3 and changed.model == experiment.model
    for model in {experiment.model for experiment in experiments}:
        assert sum(x.size for x in jax.tree.leaves(shapes(model))) > 1e5
