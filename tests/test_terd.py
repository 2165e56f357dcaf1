"""Losses of Elijah and TERD against PyTorch, and TERD's inversion where it is known."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puredif_jax.defenses.elijah import ElijahLoss
from puredif_jax.defenses.family import Family
from puredif_jax.defenses.hypothesis import Fading, Hypothesis, Trojan
from puredif_jax.defenses.objective import Loss
from puredif_jax.defenses.reversed_loss import Reversed
from puredif_jax.diffusion.ddim import DDIM, QuadraticDDIM
from puredif_jax.diffusion.schedules import LinearBetas
from puredif_jax.types import Candidate, Member

pytestmark = pytest.mark.usefixtures("standard_promotion")
GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "defenses.npz")
SCHEDULE = LinearBetas().tables()
SHAPE = (8, 8, 1)
HALVES = Reversed(samples=6, l1=0.01), Reversed(samples=6, l1=0.01, narrows=True)
CASES: dict[str, tuple[Loss, Hypothesis]] = {
    "elijah_0.5": (ElijahLoss(scale=0.5), Fading()),
    "elijah_1.0": (ElijahLoss(scale=1.0), Fading()),
    "terd_added_1": (HALVES[0], Fading()),
    "terd_narrowed_1": (HALVES[1], Trojan()),
    "terd_added_2": (
        Reversed(samples=6, l1=0.01, rollout=DDIM(10, clip=1.0)),
        Fading(),
    ),
    "terd_narrowed_2": (
        Reversed(samples=6, l1=0.01, narrows=True, rollout=QuadraticDDIM(10)),
        Trojan(),
    ),
}


def network(params, x, t):
    """That of tests/golden/make_defenses.py."""

    def convolved(x, kernel):
        kernel = jnp.asarray(kernel).transpose(2, 3, 1, 0)
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision="highest",
        )

    given = t.astype(jnp.float32).reshape(-1, 1, 1, 1) / 1000
    bias = params["b"].reshape(1, 1, 1, -1)
    hidden = jnp.tanh(convolved(x, params["w1"]) + bias * given)
    return 0.6 * x + convolved(hidden, params["w2"])


@pytest.mark.parametrize("name", CASES)
def test_a_loss_and_its_gradient_are_those_of_pytorch(name: str) -> None:
    loss, hypothesis = CASES[name]
    family: Family = hypothesis.family(SCHEDULE, SHAPE)
    bound = loss.bind(network, SCHEDULE, family)
    params = {each: GOLDEN[each] for each in ("w1", "w2", "b")}
    mu, gamma = (jnp.asarray(GOLDEN[each]) for each in ("mu", "gamma"))
    member = Member(jnp.float32(1), gamma if hypothesis.narrows else 0 * gamma + 1)
    candidate = Candidate(mu, jnp.zeros(SHAPE), member)
    value, grads = jax.jit(jax.value_and_grad(bound, argnums=1))(
        params, candidate, jax.random.key(1)
    )
    assert float(value) == pytest.approx(float(GOLDEN[name]), rel=1e-4)

    def close(found, wanted) -> None:
        np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())

    close(grads.delta, GOLDEN[f"{name}_mu"])
    assert grads.member is not None
    if f"{name}_gamma" in GOLDEN:
        close(grads.member.gamma, GOLDEN[f"{name}_gamma"])
    elif name.startswith("terd"):  # it is not sought, nor does it count when clipped
        assert not np.any(grads.member.gamma)
