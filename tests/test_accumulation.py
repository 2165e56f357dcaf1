"""The gradient of a batch by parts is the whole batch's."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puredif_jax.attacks.training import Training
from puredif_jax.networks.accumulation import Accumulation
from puredif_jax.runs import parallel

KEYS = jax.random.split(jax.random.key(3), 4)
PARAMS = {
    "w": jax.random.normal(KEYS[0], (5, 2)),
    "b": jax.random.normal(KEYS[1], (2,)),
}
BATCH = jax.random.normal(KEYS[2], (12, 5)), jax.random.normal(KEYS[3], (12, 2))


def loss(params, batch):
    """No part of a batch has the gradient of another."""
    x, aim = batch
    return jnp.mean((jnp.tanh(x @ params["w"] + params["b"][None]) - aim) ** 2)


WHOLE = jax.value_and_grad(loss)(PARAMS, BATCH)


def widest(seen: list[int]):
    """The loss; adds the images that it has been shown at a time."""

    def watched(params, batch):
        seen.append(len(batch[0]))
        return loss(params, batch)

    return watched


@pytest.mark.parametrize(
    "together,devices,images",
    [(1, 1, 1), (4, 1, 4), (5, 1, 4), (12, 1, 12), (99, 1, 12), (2, 3, 2), (5, 5, 12)],
)
def test_value_and_gradient_are_those_of_the_whole(together, devices, images) -> None:
    seen: list[int] = []
    mesh = parallel.make_mesh(devices)
    made = Accumulation(together, mesh)(widest(seen))
    value, grads = jax.jit(jax.value_and_grad(made))(PARAMS, BATCH)
    chex.assert_trees_all_close((value, grads), WHOLE, rtol=1e-5, atol=1e-6)
    assert set(seen) == {images}
    np.testing.assert_allclose(jax.jit(made)(PARAMS, BATCH), WHOLE[0], rtol=1e-6)


def test_a_factor_of_the_loss_is_one_of_its_gradient() -> None:
    made = Accumulation(4)(loss)
    grads = jax.grad(lambda params: 3 * made(params, BATCH))(PARAMS)
    expected = jax.tree.map(lambda x: 3 * x, WHOLE[1])
    chex.assert_trees_all_close(grads, expected, rtol=1e-5, atol=1e-6)


def test_devices_exchange_gradients_once_and_no_image() -> None:
    mesh = parallel.make_mesh(2)
    batch = jax.device_put(BATCH, parallel.along(mesh, "batch"))
    made = jax.value_and_grad(Accumulation(2, mesh)(loss))
    program = jax.jit(made).lower(PARAMS, batch).compile()
    text = program.as_text()
    assert "while" in text
    for moved in ("all-gather", "all-to-all", "collective-permute"):
        assert moved not in text
    (loop,) = re.findall(r"body=(%[\w.]+)", text)
    body = text.split(f"\n{loop} ")[1].split("\n}")[0]
    assert "all-reduce" in text and "all-reduce" not in body
    chex.assert_trees_all_close(program(PARAMS, batch), WHOLE, rtol=1e-5, atol=1e-6)


def test_a_part_has_an_image() -> None:
    with pytest.raises(ValueError, match="together must be 1 or more, found 0"):
        Accumulation(0)


def test_a_cpu_takes_few_images_at_once() -> None:
    assert Training(steps=1, batch=64, warmup=0).at_once == 16
    assert Training(steps=1, batch=64, warmup=0, together=5).at_once == 5
    with pytest.raises(ValueError, match="together must be above 0, found 0"):
        Training(steps=1, warmup=0, together=0)
