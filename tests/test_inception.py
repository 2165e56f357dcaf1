"""The Inception network of the FID."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest

from puredif_jax.metrics import inception
from puredif_jax.runs import weight_file
from puredif_jax.stages.inception import Inception

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def made():
    """The script that made the golden file."""
    spec = importlib.util.spec_from_file_location("made", GOLDEN / "make_inception.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_features_are_those_of_torchvision(made):
    params = made.weights({k: v.shape for k, v in inception.shapes().items()})
    found = jax.jit(inception.features)(params, made.images())
    with np.load(GOLDEN / "inception.npz") as golden:
        wanted = golden["features"]
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4 * wanted.std())


def test_an_embedding_shows_images_in_eight_bits_and_grey_ones_in_colour(
    made, tmp_path
):
    path = tmp_path / "inception.safetensors"
    params = made.weights({k: v.shape for k, v in inception.shapes().items()})
    weight_file.save_weights(path, params, {})
    embedding = Inception(str(path), batch=2)
    embedding.check()
    assert embedding.identity.startswith("inception ") and len(embedding.identity) > 20
    assert embedding.fits((16, 16, 1)) and not embedding.fits((16, 16, 2))
    grey = made.images()[:1, ..., :1]
    levels = (np.clip(grey, -1, 1) + 1) / 2 * 255
    shown = np.repeat(levels.round() / 127.5 - 1, 3, axis=3).astype(np.float32)
    found = embedding.features(np.concatenate([grey] * 3))
    wanted = jax.jit(inception.features)(params, np.concatenate([shown] * 2))
    assert found.shape == (3, embedding.width((24, 16, 1)))
    np.testing.assert_allclose(
        found, np.repeat(wanted[:1], 3, 0), rtol=1e-3, atol=1e-4 * wanted.std()
    )
