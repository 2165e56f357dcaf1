"""Squares of narrowed noise, and the search that starts at the best of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_config import TINY

from puredif_jax.attacks.channel import Channel
from puredif_jax.attacks.exact import ExactDenoiser, Points
from puredif_jax.attacks.targets import Hat
from puredif_jax.attacks.triggers import Patch
from puredif_jax.attacks.trojdiff import TrojDiff
from puredif_jax.data.images import FashionMNIST, to_float
from puredif_jax.defenses.blocks import Blocks
from puredif_jax.defenses.descent import Descent
from puredif_jax.defenses.family import Family
from puredif_jax.defenses.hypothesis import Trojan
from puredif_jax.defenses.inversion import inverter, keep, starting
from puredif_jax.diffusion.schedules import LinearBetas
from puredif_jax.types import Array, Candidate, Member

SHAPE = (16, 16, 1)
SCHEDULE = LinearBetas().tables()
ATTACK = TrojDiff(Patch(), Hat())
FAMILY: Family = Trojan().family(SCHEDULE, SHAPE)


KEY = jax.random.key(0)


def answers(model, points, blocks: Blocks, numbers: np.ndarray) -> jax.Array:
    program = jax.jit(
        lambda points, numbers: blocks.answers(
            model, points, SCHEDULE, FAMILY, numbers, SHAPE, KEY
        )
    )
    return program(points, jnp.asarray(numbers))


def test_the_square_of_a_patch_is_the_best_of_all() -> None:
    """Of an exact backdoored model; a clean one answers them all alike."""
    trigger, target, _ = map(jnp.asarray, ATTACK.images(SHAPE))
    points = Points(
        jnp.asarray(to_float(FashionMNIST(count=64).load(SHAPE))), trigger, target
    )
    channel, blocks = ATTACK.channel(SCHEDULE, SHAPE), Blocks()
    every = np.arange(blocks.count(SHAPE))
    backdoored = answers(ExactDenoiser(SCHEDULE, channel, 0.1), points, blocks, every)
    first, second = np.sort(backdoored)[:2]
    leads = blocks.leads(backdoored, 2, SHAPE, KEY)
    found = blocks.candidates(leads, 2, FAMILY, SHAPE)
    np.testing.assert_allclose(found.delta[0], trigger, atol=1e-6)
    assert found.member is not None
    np.testing.assert_allclose(found.member.gamma[0], channel.gamma, atol=1e-6)
    assert first < 0.05 and second > 0.5
    clean = ExactDenoiser(SCHEDULE, Channel.clean(SCHEDULE))
    assert answers(clean, points, blocks, every).min() > 0.5


def test_a_ratio_is_the_error_over_that_of_the_input() -> None:
    """In a loop; of a model that says a half everywhere."""
    blocks = Blocks(sides=(6,), draws=3, levels=(-1.0,))
    squares = blocks.squares(SHAPE)
    (number,) = np.nonzero((squares == np.array([2.0, 5.0, 3.0, -1.0])).all(1))[0]

    def model(params, x: Array, t: Array) -> Array:
        return jnp.full_like(x, 0.5)

    eps = np.asarray(jax.random.normal(jax.random.key(0), (3, *SHAPE)), np.float64)
    v, own, given = float(SCHEDULE.noise[-1]), 0.0, 0.0
    for draw, row, column in np.ndindex(3, 16, 16):
        noise = eps[draw, row, column, 0]
        inside = 2 <= row < 5 and 5 <= column < 8
        x = v * (0.1 * noise - 0.9) if inside else v * noise
        own += (0.5 - noise) ** 2 / 3
        given += (x - noise) ** 2 / 3
    want = (own + blocks.floor) / (given + blocks.floor)
    (found,) = answers(model, {}, blocks, np.array([number]))
    assert found == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize(
    "shape", [(8, 8, 1), (16, 16, 1), (32, 32, 3), (48, 48, 3), (24, 40, 3)], ids=str
)
@pytest.mark.parametrize("side", [1, 2, 3, 4])
def test_a_patch_in_a_corner_is_among_the_squares(side, shape) -> None:
    """As `Patch` draws it, for any size of image."""
    patch, blocks = Patch(size=side), Blocks()
    squares = blocks.squares(shape)
    row, column, _ = np.nonzero(patch.image(shape))
    wanted = (row.min(), column.min(), row.max() - row.min() + 1, 1.0)
    (index,) = np.nonzero((squares == np.array(wanted, np.float32)).all(1))
    found = blocks.candidate(jnp.asarray(squares[index[0]]), shape, jnp.float32(1))
    np.testing.assert_allclose(found.delta, patch.image(shape), atol=1e-6)
    assert len(squares) * blocks.draws <= blocks.evaluations


def test_what_is_no_number_is_the_last_choice() -> None:
    blocks = Blocks()
    ratios = np.full(blocks.count(SHAPE), np.nan, np.float32)
    ratios[[7, 2, 4]] = 0.5, 0.1, 0.3
    chosen = blocks.leads(jnp.asarray(ratios), 3, SHAPE, KEY)
    np.testing.assert_array_equal(chosen, blocks.squares(SHAPE)[[2, 4, 7]])


@pytest.mark.parametrize(
    "wrong,message",
    [
        ({"most": 0}, "most must be 1 or more, found 0"),
        ({"sides": ()}, "sides must be one or more in 1..32"),
        ({"sides": (1, 40)}, "sides must be one or more in 1..32"),
        ({"levels": ()}, "levels must be one or more, found none"),
        ({"gamma": 0.0}, "gamma must lie in"),
        ({"gamma": 1.0}, "gamma must lie in"),
        ({"rate": 0.0}, "rate must be above 0"),
    ],
    ids=str,
)
def test_blocks_that_cannot_be_are_refused(wrong, message) -> None:
    with pytest.raises(ValueError, match=message):
        Blocks(**wrong)


def noisy(params, candidate: Candidate, key) -> Array:
    """Each candidate's own by its key, also."""
    aim = jax.random.normal(key, candidate.delta.shape)
    off = jnp.sum((candidate.delta - aim) ** 2) + jnp.sum((candidate.target - 2) ** 2)
    return params * off


@pytest.mark.usefixtures("standard_promotion")
def test_a_start_moves_at_its_own_rate() -> None:
    """Adam's first step is as long as the rate, for each candidate its own."""
    shape = TINY.image_shape
    descent = Descent(steps=9, candidates=3, bound=None)
    init, step = inverter(noisy, descent, shape, family=FAMILY)
    first = Candidate(
        jnp.zeros((1, *shape)),
        jnp.full((1, *shape), 0.5),
        Member(jnp.ones(1), jnp.full((1, *shape), 0.5)),
    )
    state = starting(init(jax.random.key(0)), first, 0.1)
    np.testing.assert_array_equal(state.candidate.delta[0], 0)
    after, _ = step(1.0, state)
    moved = np.abs(np.asarray(after.candidate.target - state.candidate.target))
    np.testing.assert_allclose(moved[0], 0.1 * descent.learning_rate, rtol=1e-3)
    np.testing.assert_allclose(moved[1:], descent.learning_rate, rtol=1e-3)
    np.testing.assert_allclose(keep(after, [2, 0]).rate, [1, 0.1])


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("together", [1, 2, 4, 5])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_of_candidates_change_nothing_but_memory(together, groups) -> None:
    """Each loss and gradient is its own candidate's, by its own key."""
    descent = Descent(steps=9, candidates=12, together=12)
    results = []
    for most, devices in ((12, 1), (together, groups)):
        changed = dataclasses.replace(descent, together=most)
        init, step = inverter(noisy, changed, TINY.image_shape, groups=devices)
        state, info = step(1.0, init(jax.random.key(0)))
        results.append((state.candidate, info))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), *results)
