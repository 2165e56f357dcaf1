"""Every sampler, spacing and schedule against ten steps of diffusers' schedulers."""

import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puredif_jax.diffusion.ddim import DDIM, QuadraticDDIM
from puredif_jax.diffusion.ddpm import DDPM
from puredif_jax.diffusion.multistep import DPMSolver, UniPC
from puredif_jax.diffusion.prediction import VPrediction, estimates
from puredif_jax.diffusion.sampling import grid, sample
from puredif_jax.diffusion.schedules import CosineBetas, LinearBetas, ScaledLinearBetas

GOLDEN = Path(__file__).parent / "golden"


def load_maker():
    spec = importlib.util.spec_from_file_location("maker", GOLDEN / "make_samplers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


maker = load_maker()
BETAS = {
    "linear": LinearBetas(),
    "scaled": ScaledLinearBetas(),
    "cosine": CosineBetas(),
}
SPACINGS = {
    "leading": {},
    "offset": {"offset": 1},
    "linspace": {"spacing": "linspace"},
    "trailing": {"spacing": "trailing"},
}
SAMPLERS = {
    "small": functools.partial(DDPM, maker.STEPS),
    "large": functools.partial(DDPM, maker.STEPS, clip=1.0, variance="fixed_large"),
    "ddim": functools.partial(DDIM, maker.STEPS),
    "bounded": functools.partial(DDIM, maker.STEPS, clip=1.0, to_clean=False),
    "solver": functools.partial(DPMSolver, maker.STEPS),
    "unipc": functools.partial(UniPC, maker.STEPS),
}

PREDICTIONS = {"epsilon": lambda model, _: model, "v_prediction": VPrediction}


@functools.cache
def golden():
    with np.load(GOLDEN / "samplers.npz") as arrays:
        return dict(arrays)


ONE_STEP = [k for k, v in maker.CASES.items() if v[2] not in ("solver", "unipc")]
DETERMINISTIC = [k for k, v in maker.CASES.items() if v[2] not in ("small", "large")]


def network(params, x, t):
    del params
    return maker.predict(jnp, x, t[0].astype(jnp.float32))


@pytest.mark.parametrize("name", ONE_STEP)
def test_each_step_is_that_of_diffusers(name) -> None:
    betas, spacing, kind, prediction = maker.CASES[name]
    schedule, sampler = BETAS[betas].tables(), SAMPLERS[kind](**SPACINGS[spacing])
    times, before = sampler.path(schedule)
    states, stds = golden()[f"{name}_x"], golden()[f"{name}_std"]
    np.testing.assert_array_equal(times, golden()[f"{name}_t"])
    key = jax.random.key(3)
    z = np.asarray(jax.random.normal(key, states[0].shape))
    step = jax.jit(functools.partial(sampler.step, schedule))
    for i, (t, t_prev) in enumerate(zip(times, before, strict=True)):
        x = jnp.asarray(states[i])
        model = PREDICTIONS[prediction](network, schedule)
        estimated = estimates(model, {}, schedule, x, jnp.int32(t))
        found, _ = step(estimated, x, jnp.int32(t), jnp.int32(t_prev), key)
        wanted = states[i + 1] + stds[i] * z
        scale = max(np.abs(wanted).max(), np.abs(states[i]).max())
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_trajectories_are_those_of_diffusers(name) -> None:
    betas, spacing, kind, prediction = maker.CASES[name]
    schedule = BETAS[betas].tables()
    sampler = SAMPLERS[kind](**({"spacing": "leading"} | SPACINGS[spacing]))
    times, _ = sampler.path(schedule)
    np.testing.assert_array_equal(times, golden()[f"{name}_t"])

    start, key = jnp.asarray(maker.start()), jax.random.key(0)
    model = PREDICTIONS[prediction](network, schedule)
    found = sample(model, {}, schedule, sampler, start, key)
    wanted = golden()[f"{name}_x"][-1]
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize(
    "arguments,words",
    [
        ((1000, "leading", 1), "0..999"),
        ((10, "karras"), "leading, linspace, trailing"),
        ((0,), "1 to 1000"),
        ((61, "trailing"), "rounds to 62"),
    ],
)
def test_bad_grids_are_refused(arguments, words) -> None:
    with pytest.raises(ValueError, match=words):
        grid(LinearBetas().tables(), *arguments)


def test_the_quadratic_grid_is_that_of_trojdiff() -> None:
    times, goals = QuadraticDDIM(10).path(LinearBetas().tables())
    assert list(times) == [800, 632, 483, 355, 246, 158, 88, 39, 9, 0]
    assert list(goals) == [*times[1:], -1]
    assert QuadraticDDIM(10, to_clean=False).path(LinearBetas().tables())[1][-1] == 0
    with pytest.raises(ValueError, match="900 steps are too many for a quadratic grid"):
        QuadraticDDIM(900).path(LinearBetas().tables())
