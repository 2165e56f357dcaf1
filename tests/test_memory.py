"""A network in slices gives the numbers of the whole, and keeps no more than inputs."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_objectives import tiny_network

from puredif_jax.defenses.denoising_consistency import DenoisingConsistency
from puredif_jax.defenses.distribution_shift import DistributionShift
from puredif_jax.defenses.hypothesis import Fading
from puredif_jax.defenses.objective import Sum
from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.diffusion.prediction import VPrediction
from puredif_jax.diffusion.sampling import sample
from puredif_jax.diffusion.schedules import LinearBetas
from puredif_jax.networks.memory import activations, sliced
from puredif_jax.runs import parallel
from puredif_jax.runs.run import RunError
from puredif_jax.stages import lab
from puredif_jax.types import Candidate

SCHEDULE = LinearBetas().tables()
SHAPE = (8, 8, 1)


@pytest.fixture(scope="module")
def network():
    """(model, params)."""
    return tiny_network()


def small(params, x, t):
    """Mixes the pixels of each image, nonlinearly."""
    time = t.astype(x.dtype)[:, None, None, None] / 1000
    mixed = jnp.tanh(x + jnp.roll(x, 1, axis=1) * params + time)
    return mixed * jnp.mean(x**2, axis=(1, 2, 3), keepdims=True)


class Widest:
    """A model that notes the largest batch it is traced for."""

    def __init__(self) -> None:
        self.batch = 0

    def __call__(self, params, x, t):
        self.batch = max(self.batch, x.shape[0])
        return small(params, x, t)


@pytest.mark.parametrize("together", [1, 4, 5, 100])
@pytest.mark.parametrize(
    "loss",
    [
        DistributionShift(timesteps=(900, 300), samples=3),
        DenoisingConsistency(sampler=DDIM(steps=2), samples=3, aim=1.0),
        Sum(
            DistributionShift(timesteps=(900,), samples=3),
            DenoisingConsistency(sampler=DDIM(steps=2), samples=3),
        ),
    ],
    ids=lambda x: type(x).__name__,
)
def test_losses_and_gradients_are_those_of_the_whole(loss, together) -> None:
    candidates = Candidate(
        jax.random.normal(jax.random.key(2), (2, *SHAPE)),
        jax.random.normal(jax.random.key(3), (2, *SHAPE)),
    )
    widest = Widest()

    def both(model):
        bound = loss.bind(model, SCHEDULE, Fading().channel(SCHEDULE, SHAPE))
        each = jax.vmap(jax.value_and_grad(bound, argnums=1), in_axes=(None, 0, None))
        return jax.jit(each)(jnp.float32(0.3), candidates, jax.random.key(4))

    whole, parts = both(small), both(sliced(widest, together))
    chex.assert_trees_all_close(parts, whole, rtol=1e-4, atol=1e-5)
    assert widest.batch <= together


def test_draws_are_those_of_the_whole(network) -> None:
    net, params = network
    start = jax.random.normal(jax.random.key(5), (7, *SHAPE))
    key = jax.random.key(6)
    whole, parts = (
        sample(model, params, SCHEDULE, DDIM(steps=3), start, key)
        for model in (net, sliced(net, 3))
    )
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-5)


def test_parameters_are_shared_and_not_trained() -> None:
    model = sliced(small, 2)
    x, t = jnp.ones((3, *SHAPE)), jnp.zeros(3, jnp.int32)
    assert jax.grad(lambda p: model(p, x, t).sum())(jnp.float32(0.3)) == 0
    with pytest.raises(ValueError, match="over parameters"):
        jax.vmap(model, in_axes=(0, None, None))(jnp.ones(2), x, t)


def test_a_slice_has_an_image() -> None:
    with pytest.raises(ValueError, match="found 0"):
        sliced(small, 0)


def test_activations_bound_what_a_compiled_gradient_takes(network) -> None:
    """Of 64 images more, by XLA's own account; within a factor of five."""
    net, params = network

    def gradient(params, x, t):
        return jax.grad(lambda x: net(params, x, t).sum())(x)

    def compiled(count: int) -> int:
        x, t = jnp.zeros((count, *SHAPE)), jnp.zeros(count, jnp.int32)
        program = jax.jit(gradient).lower(params, x, t).compile()
        return program.memory_analysis().temp_size_in_bytes

    taken = (compiled(128) - compiled(64)) / 64
    assert taken < activations(net, params, SHAPE) < 5 * taken


def test_rematerialised_blocks_keep_less_and_give_the_same(network) -> None:
    net, params = network
    light = dataclasses.replace(net, remat=True)
    assert activations(light, params, SHAPE) < 0.6 * activations(net, params, SHAPE)
    x = jax.random.normal(jax.random.key(7), (2, *SHAPE))
    t = jnp.asarray([10, 900])

    def both(model):
        def energy(params, x):
            return (model(params, x, t) ** 2).sum()

        return jax.jit(jax.value_and_grad(energy, (0, 1)))(params, x)

    chex.assert_trees_all_close(both(light), both(net), rtol=1e-4, atol=1e-5)


def test_images_are_as_many_as_fit_and_the_log_says_so(network, monkeypatch) -> None:
    """On each of two devices, into half of what is free; else remat; else a refusal."""
    net, params = network
    net = dataclasses.replace(net, sample_size=SHAPE[:2], in_channels=SHAPE[2])
    size = activations(net, params, SHAPE)
    light = activations(dataclasses.replace(net, remat=True), params, SHAPE)
    said: list[str] = []
    monkeypatch.setattr(lab.logging, "info", lambda text, *x: said.append(text % x))

    def fitted(free: int) -> tuple[bool, int]:
        monkeypatch.setattr(parallel, "free_memory", lambda: free)
        unet, count = lab._fitted(net, 64, 2)
        return unet.remat, count

    assert fitted(2 * 1000 * size) == (False, 2000) and not said
    assert fitted(2 * 5 * size) == (False, 10)
    assert "10 of 64 images at a time" in said[0] and "2 devices" in said[0]
    assert fitted(2 * (size - 1)) == (True, 2 * ((size - 1) // light))
    assert "rematerialised" in said[1]
    with pytest.raises(RunError, match="one image of .* half of what is free is"):
        fitted(2 * (light - 1))


def test_v_prediction_is_the_noise_in_the_input() -> None:
    """With v = s eps - v x_0 given, eps comes back, whatever x_0."""
    eps, clean = (jax.random.normal(jax.random.key(k), (4, *SHAPE)) for k in (8, 9))
    t = jnp.asarray([0, 200, 600, 999])
    signal, noise = (
        jnp.asarray(table, jnp.float32)[t][:, None, None, None]
        for table in (SCHEDULE.signal, SCHEDULE.noise)
    )
    x = signal * clean + noise * eps
    model = VPrediction(lambda params, x, t: signal * eps - noise * clean, SCHEDULE)
    np.testing.assert_allclose(model({}, x, t), eps, atol=1e-5)


def test_free_memory_is_that_of_a_device() -> None:
    assert 2**20 < parallel.free_memory() < 2**50


def test_files_in_memory_are_free_memory(monkeypatch) -> None:
    """What a container counts as used, but gives up when asked."""
    told = {
        "/sys/fs/cgroup/memory.max": f"{2**33}",
        "/sys/fs/cgroup/memory.current": f"{2**33 - 2**20}",
        "/sys/fs/cgroup/memory.stat": f"anon 7\ninactive_file {2**30}\n",
        "/proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {2**30} kB\n",
    }

    def read_text(path) -> str:
        if str(path) not in told:
            raise FileNotFoundError(path)
        return told[str(path)]

    monkeypatch.setattr(parallel.pathlib.Path, "read_text", read_text)
    monkeypatch.setattr(parallel.os, "sysconf", lambda name: 2**30)
    assert parallel.free_memory() == (2**30 + 2**20) // 8  # of eight devices


def test_a_system_that_does_not_tell_its_memory_has_a_little(monkeypatch) -> None:
    def unknown(name: str) -> int:
        raise ValueError("unrecognized configuration name")

    def missing(path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(parallel.os, "sysconf", unknown)
    monkeypatch.setattr(parallel.pathlib.Path, "read_text", missing)
    assert parallel.free_memory() == 2**32 // 8  # of eight devices
