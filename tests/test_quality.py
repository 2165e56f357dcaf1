"""Quality of plain draws: stored moments, PNG files, and what is refused."""

import dataclasses

import numpy as np
import pytest
from PIL import Image
from tiny_config import TINY, draw_params

from puredif_jax.data.images import FashionMNIST, to_float
from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.metrics import measures as metrics
from puredif_jax.runs.binding import RunError
from puredif_jax.stages.embedding import Pixels
from puredif_jax.stages.evaluation import Evaluation
from puredif_jax.stages.experiment import Experiment
from puredif_jax.stages.inception import Inception
from puredif_jax.stages.perform import open_lab
from puredif_jax.stages.quality import check_quality, quality, write_png
from puredif_jax.types import InputError

FEW, OTHER = FashionMNIST(count=40), FashionMNIST(count=41)
DRAWN = Evaluation(
    batch=8, deterministic=DDIM(steps=2), frechet_draws=6, embedding=Pixels()
)


class Unfit(Pixels):
    """An embedding of no images."""

    def fits(self, shape):
        return False


def opened(folder, evaluation=DRAWN):
    return open_lab(Experiment(str(folder), model=TINY, evaluation=evaluation))


def measured(folder, evaluation, images=FEW):
    params = draw_params(TINY, 1)
    return quality(opened(folder, evaluation), evaluation, "it", params, images)[0]


def test_a_distance_is_that_of_the_features(tmp_path):
    lab, params = opened(tmp_path), draw_params(TINY, 1)
    found, rates = quality(lab, DRAWN, "it", params, FEW)
    halves = [lab.draw(params, DRAWN.deterministic, lab.zero, 3, x) for x in (1, -1)]
    real = to_float(FEW.load(TINY.image_shape))
    assert found == pytest.approx(Pixels().distance(np.concatenate(halves), real))
    assert rates == {}


def test_moments_are_stored_and_read(tmp_path, monkeypatch):
    path = tmp_path / "moments.npz"
    evaluation = dataclasses.replace(DRAWN, reference=str(path))
    first = measured(tmp_path / "a", evaluation)
    with np.load(path) as stored:
        assert set(stored) == {"mu", "sigma", "embedding", "images"}
        assert stored["mu"].shape == (64,) and stored["sigma"].shape == (64, 64)
    assert measured(tmp_path / "b", DRAWN) == first
    plain, asked = Pixels.features, []

    def features(self, images):
        asked.append(len(images))
        return plain(self, images)

    monkeypatch.setattr(Pixels, "features", features)
    assert measured(tmp_path / "c", evaluation) == first
    assert asked == [6], "the training images were asked again"


def test_moments_of_other_tools_are_taken(tmp_path):
    path = tmp_path / "theirs.npz"
    known = Pixels().moments(to_float(FEW.load(TINY.image_shape)))
    np.savez(path, mu=known.mean, sigma=known.covariance)
    evaluation = dataclasses.replace(DRAWN, reference=str(path))
    found = measured(tmp_path / "a", evaluation, OTHER)
    assert found == pytest.approx(measured(tmp_path / "b", DRAWN, FEW))


@pytest.mark.parametrize(
    "arrays,text",
    [
        ({"mu": np.zeros(64)}, "has no `sigma`"),
        (
            {"mu": np.zeros(64), "sigma": np.zeros((3, 3))},
            r"of pixels they are \(64,\) and \(64, 64\)",
        ),
        ({"mu": np.zeros(3), "sigma": np.zeros((3, 3))}, r"has mu of \(3,\)"),
        ({"mu": np.full(64, np.nan), "sigma": np.zeros((64, 64))}, "not finite"),
        ({"mu": np.array([None]), "sigma": np.zeros((1, 1))}, "Python objects"),
        (
            {"mu": np.zeros(1), "sigma": np.zeros((1, 1)), "embedding": "garment-net"},
            "of other embedding, found garment-net for pixels",
        ),
        (
            {"mu": np.zeros(1), "sigma": np.zeros((1, 1)), "images": "ab"},
            "of other images, found ab for",
        ),
    ],
)
def test_moments_of_other_things_are_refused(tmp_path, arrays, text):
    path = tmp_path / "moments.npz"
    np.savez(path, **arrays)
    evaluation = dataclasses.replace(DRAWN, reference=str(path))
    with pytest.raises(RunError, match=text):
        check_quality(opened(tmp_path / "run"), evaluation, FEW)


@pytest.mark.parametrize(
    "change,text",
    [
        ({"reference": "moments.json"}, "an .npz in a folder that exists, found"),
        ({"reference": "none/there/a.npz"}, "an .npz in a folder that exists, found"),
        ({"embedding": Unfit()}, r"the embedding pixels is not for images of \("),
        ({"embedding": Inception("i.pth")}, "a .safetensors file, found i.pth"),
        ({"embedding": Inception("none.safetensors")}, "none.safetensors"),
    ],
)
def test_a_measure_that_cannot_be_made_is_refused(tmp_path, change, text):
    evaluation = dataclasses.replace(DRAWN, **change)
    with pytest.raises(InputError, match=text):
        check_quality(opened(tmp_path / "run"), evaluation, FEW)


@pytest.mark.parametrize("change", [{"reference": "a.npz"}, {"png": True}])
def test_what_is_about_the_distance_needs_one(change):
    with pytest.raises(ValueError, match="set frechet_draws, found 0"):
        Evaluation(**change)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_files_hold_the_images_in_eight_bits(tmp_path, channels):
    rng = np.random.default_rng(0)
    images = rng.uniform(-1.2, 1.2, (3, 8, 10, channels)).astype(np.float32)
    write_png(tmp_path / "a", images)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["00000.png", "00001.png", "00002.png"]
    for name, image in zip(names, images, strict=True):
        with Image.open(tmp_path / "a" / name) as file:
            found = np.asarray(file, np.float32).reshape(image.shape) / 255
        np.testing.assert_allclose(found, metrics.to_unit(image), atol=0.5 / 255 + 1e-6)


def test_a_run_writes_what_the_distance_was_taken_of(tmp_path):
    evaluation = dataclasses.replace(DRAWN, png=True)
    measured(tmp_path, evaluation)
    assert len(list((tmp_path / "draws" / "it").glob("*.png"))) == 6
