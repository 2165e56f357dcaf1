"""Metrics against closed forms and plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puredif_jax.data import images as data
from puredif_jax.data.images import FashionMNIST
from puredif_jax.metrics import garment_net
from puredif_jax.metrics import measures as metrics
from puredif_jax.runs import weight_file
from puredif_jax.stages import weights
from puredif_jax.stages.embedding import GarmentNet, Pixels, embedding_for


def test_trigger_distance() -> None:
    r = jnp.zeros((2, 2, 1)).at[0, 0, 0].set(3.0).at[0, 1, 0].set(4.0)
    same = metrics.trigger_distance(r, r)
    assert [float(x) for x in same] == pytest.approx([0, 1, 0, 0, 1])
    half = metrics.trigger_distance(-0.5 * r, r)
    assert [float(x) for x in half] == pytest.approx([1.5, -1, 56.25 / 4, 6, 0.5])


def test_mse_is_in_unit_pixels_and_clips() -> None:
    target = jnp.full((2, 2, 1), -1.0)
    images = jnp.stack([target, -target, target - 9, target + 0.2])
    np.testing.assert_allclose(metrics.mse(images, target), [0, 1, 0, 0.01], atol=1e-6)


def test_ssim_equals_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.uniform(-1, 1, (2, 13, 12, 1)).astype(np.float32)
    weights = np.exp(-((np.arange(11) - 5.0) ** 2) / 4.5)
    weights = np.outer(weights, weights) / weights.sum() ** 2
    values = []
    for i in range(3):
        for j in range(2):
            a, b = ((z[i : i + 11, j : j + 11, 0] + 1) / 2 for z in (x, y))
            ma, mb = (weights * a).sum(), (weights * b).sum()
            va, vb = (weights * (a - ma) ** 2).sum(), (weights * (b - mb) ** 2).sum()
            vab = (weights * (a - ma) * (b - mb)).sum()
            values.append(
                (2 * ma * mb + 1e-4)
                * (2 * vab + 9e-4)
                / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
            )
    got = metrics.ssim(jnp.asarray(x)[None], jnp.asarray(y))
    assert float(got[0]) == pytest.approx(np.mean(values), rel=1e-4)
    assert float(
        metrics.ssim(jnp.asarray(x)[None], jnp.asarray(x))[0]
    ) == pytest.approx(1)


def test_success_rates() -> None:
    target = jnp.zeros((12, 12, 1))
    errors = [0.0, 0.02, 0.05, 0.2, 0.5]  # squares 0, 4e-4, 2.5e-3, 0.04, 0.25
    images = jnp.stack([target + 2 * e for e in errors])
    got = metrics.success(images, target)
    assert got["mse<0.001"] == pytest.approx(0.4)
    assert got["mse<0.01"] == pytest.approx(0.6)
    assert got["mse<0.1"] == pytest.approx(0.8)
    noise = np.random.default_rng(0).uniform(-1, 1, images.shape)
    pair = np.stack([noise[0], noise[1], noise[0]])
    assert metrics.success(pair, noise[0])["ssim>0.8"] == pytest.approx(2 / 3)
    assert got["mean_mse"] == pytest.approx(np.mean(np.square(errors)), rel=1e-4)


def test_garment_net_classifies_as_well_as_its_file_says() -> None:
    """The features of all Frechet distances, with their clipping."""
    shapes = jax.eval_shape(garment_net.init, jax.random.key(0))
    path = weights.ASSETS / f"{garment_net.NAME}.safetensors"
    params = weight_file.load_weights(path, shapes)
    images = data.to_float(FashionMNIST("test").load((16, 16, 1)))
    with np.load(weights.ASSETS / "fashion_mnist_test.npz") as file:
        labels = file["labels"]
    classify = jax.jit(garment_net.classify)
    share = (np.asarray(classify(params, images)).argmax(1) == labels).mean()
    noted = float(weight_file.read_metadata(path)["test_accuracy"])
    assert float(share) == pytest.approx(noted, abs=5e-3)
    np.testing.assert_allclose(
        garment_net.embed(params, 3 * images[:8]),
        garment_net.embed(params, np.clip(3 * images[:8], -1, 1)),
        rtol=1e-5,
    )


def test_frechet_distance_of_gaussians() -> None:
    """||m1 - m2||^2 + sum (sigma1 - sigma2)^2 for commuting covariances."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(4000, 3))
    base = (base - base.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(base.T))).T
    first = base * [1.0, 2.0, 0.5]
    second = base * [2.0, 2.0, 1.5] + [1.0, 0.0, -2.0]
    first, second = metrics.moments(first), metrics.moments(second)
    got = metrics.frechet_distance(first, second)
    assert got == pytest.approx(5 + 1 + 0 + 1, rel=1e-6)
    assert metrics.frechet_distance(first, first) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_nan_is_nan() -> None:
    images = np.zeros((4, 16, 16, 1), np.float32)
    images[1, 2, 3] = np.nan
    assert np.isnan(GarmentNet().distance(images, images))


@pytest.mark.parametrize("shapes", [((1, 3), (5, 3)), ((5, 3), (5, 4)), ((5,), (5, 3))])
def test_frechet_distance_refuses(shapes) -> None:
    with pytest.raises(ValueError, match="found"):
        metrics.frechet_distance(*(metrics.moments(np.zeros(s)) for s in shapes))


def test_auc_is_the_share_of_pairs_in_order() -> None:
    positive, negative = [0.9, 0.4, 0.4], [0.1, 0.4, 0.5, 0.95]
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert metrics.auc(positive, negative) == pytest.approx(np.mean(pairs))
    assert metrics.auc([2, 3], [0, 1]) == 1 and metrics.auc([0], [1]) == 0


@pytest.mark.parametrize(
    "count,total,low,high",
    [(8, 8, 0.6756, 1.0), (0, 8, 0.0, 0.3244), (5, 10, 0.2366, 0.7634)],
)
def test_share_interval_is_that_of_published_tables(count, total, low, high) -> None:
    assert metrics.share_interval(count, total) == pytest.approx((low, high), abs=1e-4)


def test_true_positive_rate_by_counting() -> None:
    negative = np.arange(200.0)
    positive = np.array([150.0, 197.0, 198.0, 199.0, 300.0])
    assert metrics.true_positive_rate(positive, negative) == 3 / 5  # above 197
    assert metrics.true_positive_rate(positive, negative, 0.0) == 1 / 5
    assert (negative > 197).mean() <= 0.01 < (negative > 196).mean()
    with pytest.raises(ValueError, match="false_positives must lie"):
        metrics.true_positive_rate(positive, negative, 1.0)


def test_bootstrap_has_the_interval_of_a_mean() -> None:
    """Within a tenth of 1.96 standard errors; resamples are of each sample alone."""
    rng = np.random.default_rng(1)
    x = rng.normal(3.0, 2.0, 400)
    low, high = metrics.bootstrap(lambda x: float(np.mean(x)), x, resamples=4000)
    error = 1.96 * x.std() / 20
    assert low == pytest.approx(x.mean() - error, abs=0.1 * error)
    assert high == pytest.approx(x.mean() + error, abs=0.1 * error)
    assert metrics.bootstrap(metrics.auc, x + 99, x, resamples=20) == (1.0, 1.0)
    apart = metrics.bootstrap(metrics.auc, x + 2, x, resamples=200)
    assert apart[0] < metrics.auc(x + 2, x) < apart[1]


def test_ssim_is_that_of_scikit_image() -> None:
    """structural_similarity(x, y, gaussian_weights=True, sigma=1.5, data_range=1,
    use_sample_covariance=False, channel_axis=2) of scikit-image 0.26."""
    rng = np.random.default_rng(0)
    x, y = (rng.uniform(-1, 1, (16, 13, 3)).astype(np.float32) for _ in range(2))
    mixed = (0.8 * x + 0.2 * y).astype(np.float32)
    found = [float(metrics.ssim(a[None], x)[0]) for a in (y, mixed)]
    assert found == pytest.approx([0.06141503, 0.95801697], abs=1e-5)


def test_pixels_are_means_of_cells_and_fit_any_image() -> None:
    images = np.random.default_rng(0).uniform(-1, 1, (5, 16, 16, 3)).astype(np.float32)
    found = Pixels().features(images)
    cells = images.reshape(5, 8, 2, 8, 2, 3).mean((2, 4))
    assert found.shape == (5, 192)
    assert np.corrcoef(found.ravel(), cells.ravel())[0, 1] > 0.9
    np.testing.assert_allclose(Pixels().features(images * 0 + 0.5), 0.5, rtol=1e-5)
    assert embedding_for((16, 16, 1)) == GarmentNet()
    assert embedding_for((32, 32, 3)) == embedding_for((16, 16, 3)) == Pixels()
    assert GarmentNet().name != Pixels().name
    small = Pixels().features(images[:, :4, :5])
    assert small.shape == (5, 60)
    assert np.isnan(Pixels().distance(images, images * np.nan))
    twice = np.concatenate([images, images[::-1]])
    assert Pixels().distance(twice, twice) == pytest.approx(0, abs=1e-4)
