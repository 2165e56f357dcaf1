"""training: one step by hand, the moving average, keys, and resumption."""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puredif_jax.attacks.training import Training, trainer

pytestmark = pytest.mark.usefixtures("standard_promotion")

CURVATURE = np.array([1.0, 4.0, 0.25], np.float32)
START = {"w": np.array([1.0, -2.0, 3.0], np.float32), "b": np.float32(0.5)}


def quadratic(params, images, key):
    """sum c (w - mean(images) - noise / 10)^2 / 2 + 8 b^2: a gradient known by hand."""
    aim = jnp.mean(images) + 0.1 * jax.random.normal(key, (3,))
    distance = params["w"] - aim
    return jnp.sum(jnp.asarray(CURVATURE) * distance**2) / 2 + 8 * params["b"] ** 2


def by_hand(training: Training, root: jax.Array, images: np.ndarray) -> list[dict]:
    """Adam (0.9, 0.999, 1e-8), clipping and the rate in float64; a dict a step."""
    theta = np.append(START["w"], START["b"]).astype(np.float64)
    first, second, history = np.zeros(4), np.zeros(4), []
    average = theta.copy()
    for n, batch in enumerate(images):
        noise = np.asarray(jax.random.normal(jax.random.fold_in(root, n), (3,)))
        distance = theta[:3] - (np.mean(batch, dtype=np.float64) + 0.1 * noise)
        loss = np.sum(CURVATURE * distance**2) / 2 + 8 * theta[3] ** 2
        gradient = np.append(CURVATURE * distance, 16 * theta[3])
        norm = math.sqrt(sum(gradient**2))
        gradient = gradient * min(1, training.clip / norm)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        unbiased = first / (1 - 0.9 ** (n + 1)), second / (1 - 0.999 ** (n + 1))
        theta = theta - rate(training, n) * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
        decay = min(training.ema_decay, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * theta
        history.append(
            {"params": theta, "ema": average, "loss": loss, "grad_norm": norm}
        )
    return history


def rate(training: Training, n: int) -> float:
    """Linear from 0 to the peak, then a half cosine to 0 or constant."""
    if n < training.warmup:
        return training.learning_rate * n / training.warmup
    if not training.cosine:
        return training.learning_rate
    share = (n - training.warmup) / (training.steps - training.warmup)
    return training.learning_rate * (1 + math.cos(math.pi * min(share, 1))) / 2


def flat(params) -> np.ndarray:
    return np.append(params["w"], params["b"])


def data(steps: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.uniform(-1, 1, (steps, 2, 4, 4, 1)).astype(np.float32)


def start() -> dict:
    return jax.tree.map(jnp.asarray, START)


def assert_identical(one, other):
    """Equal bit for bit, keys as their data."""
    chex.assert_trees_all_equal_shapes_and_dtypes(one, other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


SETTINGS = [
    Training(steps=12, warmup=3, learning_rate=0.1, clip=2.0, ema_decay=0.9),
    Training(steps=12, warmup=0, learning_rate=0.1, clip=1e9, ema_decay=0.5),
    Training(steps=12, warmup=4, learning_rate=0.1, clip=2.0, cosine=False),
    Training(steps=12, warmup=0, learning_rate=0.1, clip=2.0, cosine=False),
    Training(steps=12, warmup=12, learning_rate=0.1, clip=2.0, cosine=False),
]
INIT, STEP = trainer(quadratic, SETTINGS[0])


@jax.jit
def scanned(state, images):
    """The training steps over `images` as one scan: (state, info of each)."""
    return jax.lax.scan(STEP, state, images)


@pytest.mark.parametrize("training", SETTINGS, ids=range(len(SETTINGS)))
def test_steps_equal_adam_by_hand(training):
    images, key = data(12), jax.random.key(7)
    init, step = trainer(quadratic, training)
    state, step = init(start(), key), jax.jit(step)
    clipped = 0
    for batch, expected in zip(images, by_hand(training, key, images), strict=True):
        state, info = step(state, jnp.asarray(batch))
        close = {"rtol": 1e-4, "atol": 1e-5}
        np.testing.assert_allclose(flat(state.params), expected["params"], **close)
        np.testing.assert_allclose(flat(state.ema_params), expected["ema"], **close)
        np.testing.assert_allclose(info.loss, expected["loss"], **close)
        np.testing.assert_allclose(info.grad_norm, expected["grad_norm"], **close)
        clipped += expected["grad_norm"] > training.clip
    assert clipped == 0 if training.clip == 1e9 else 0 < clipped
    assert int(state.step) == 12
    assert np.abs(flat(state.params) - flat(START)).max() > 0.1


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("warmup, steps", [(0, 1), (0, 6), (1, 1), (3, 6), (6, 6)])
def test_every_accepted_schedule_has_its_rate(cosine, warmup, steps):
    """On a linear loss each Adam step is as long as the rate."""
    training = Training(
        steps=steps, warmup=warmup, cosine=cosine, learning_rate=0.1, clip=1e9
    )
    init, step = trainer(lambda params, images, key: 3 * params, training)
    state = init(jnp.float32(0), jax.random.key(0))
    for n in range(steps):
        before = float(state.params)
        state, _ = step(state, jnp.zeros((1, 1, 1, 1)))
        moved = before - float(state.params)
        assert moved == pytest.approx(rate(training, n), rel=1e-3, abs=1e-6)


def test_init_starts_at_the_parameters():
    key = jax.random.key(3)
    state = INIT(start(), key)
    chex.assert_trees_all_equal(state.params, start())
    chex.assert_trees_all_equal(state.ema_params, start())
    assert state.step.dtype == jnp.int32 and int(state.step) == 0
    assert_identical(state.key, key)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    # Separate buffers: a donated state must not hold the same array twice.
    pairs = zip(
        jax.tree.leaves(state.params), jax.tree.leaves(state.ema_params), strict=True
    )
    assert all(a.unsafe_buffer_pointer() != b.unsafe_buffer_pointer() for a, b in pairs)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_moving_average_in_closed_form(decay):
    """ema_n = p_0n theta_0 + sum_k (1 - d_k) p_kn theta_k; p_kn: of the d after k.

    d_n = min(decay, (1 + n) / (10 + n)), n from 0.
    """
    training = Training(steps=8, warmup=2, learning_rate=0.3, ema_decay=decay)
    init, step = trainer(quadratic, training)
    state, path = init(start(), jax.random.key(0)), []
    for batch in data(8):
        state, _ = step(state, jnp.asarray(batch))
        path.append(flat(state.params).astype(np.float64))
    decays = [min(decay, (1 + n) / (10 + n)) for n in range(8)]
    expected = math.prod(decays) * flat(START)
    for k, params in enumerate(path):
        expected = expected + (1 - decays[k]) * math.prod(decays[k + 1 :]) * params
    np.testing.assert_allclose(flat(state.ema_params), expected, rtol=1e-5)


def test_resumed_run_is_the_same_run():
    images = jnp.asarray(data(6))
    begin = INIT(start(), jax.random.key(5))
    whole, info = scanned(begin, images)
    half, first = scanned(begin, images[:3])
    # As through a file: host arrays, and the key by its data.
    key = jax.random.wrap_key_data(np.array(jax.random.key_data(half.key)))
    half = jax.tree.map(np.array, half.replace(key=None))
    half = jax.tree.map(jnp.asarray, half).replace(key=key)
    resumed, second = scanned(half, images[3:])
    assert_identical(resumed, whole)
    joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)
    assert_identical(joined, info)
    assert int(resumed.step) == 6


def test_step_n_uses_the_key_folded_with_n():
    def draw(params, images, key):
        return jax.random.uniform(key) + 0 * params

    training = Training(steps=5, warmup=0)
    init, step = trainer(draw, training)
    root = jax.random.key(11)
    state, found = init(jnp.float32(0), root), []
    for _ in range(5):
        state, info = step(state, jnp.zeros((1, 1, 1, 1)))
        found.append(float(info.loss))
    expected = [
        float(jax.random.uniform(jax.random.fold_in(root, n))) for n in range(5)
    ]
    assert found == expected and len(set(found)) == 5
    assert_identical(state.key, root)


def test_seeds_give_different_runs():
    images = jnp.asarray(data(3))
    one, other = (
        scanned(INIT(start(), jax.random.key(seed)), images)[0] for seed in (0, 1)
    )
    assert np.abs(flat(one.params) - flat(other.params)).max() > 1e-3


def test_step_is_traced_once():
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(STEP, n=1))
    state = INIT(start(), jax.random.key(0))
    for batch in data(4):
        state, _ = step(state, jnp.asarray(batch))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 0}, "steps must be above 0, found 0"),
        ({"batch": -1}, "batch must be above 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"clip": 0.0}, "clip must be above 0"),
        ({"ema_decay": 1.0}, "ema_decay must lie in"),
        ({"ema_decay": -0.1}, "ema_decay must lie in"),
        ({"warmup": -1}, "warmup must lie in"),
        ({"warmup": 1001}, "warmup must lie in 0..steps=1000, found 1001"),
    ],
)
def test_hyperparameters_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        Training(**{"steps": 1000, **changes})
