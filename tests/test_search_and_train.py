"""Search and training on a lab, against the same steps by hand."""

import dataclasses
import functools
import pathlib
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config
from tiny_config import TINY, draw_params

from puredif_jax.attacks.poisoning import poison, training_loss
from puredif_jax.attacks.training import Training, trainer
from puredif_jax.data import batches
from puredif_jax.data import images as data
from puredif_jax.data.images import FashionMNIST
from puredif_jax.defenses.descent import Descent, GradientDescent
from puredif_jax.defenses.hypothesis import Fading, Trojan
from puredif_jax.defenses.inversion import Inversion
from puredif_jax.defenses.reversed_loss import Reversed
from puredif_jax.runs import run, weight_file
from puredif_jax.stages import search, train
from puredif_jax.stages.experiment import Experiment
from puredif_jax.stages.perform import open_lab

pytestmark = pytest.mark.usefixtures("standard_promotion")
ATTACK = dataclasses.replace(tiny_config.get_config().attack, poison_rate=0.5)
TRAINING = Training(steps=3, batch=4, learning_rate=1e-2, warmup=1, ema_decay=0.5)
IMAGES = FashionMNIST(count=10)  # an epoch ends within the third batch
STARTED = draw_params(TINY, 7)


@pytest.mark.parametrize("trigger", [None, "reinforced"])
def test_training_from_weights_takes_the_steps_of_the_trainer(
    tmp_path: pathlib.Path, trigger: str | None
) -> None:
    """In chunks of two; kept is the moving average.

    Where a gradient is all rounding, Adam makes that a part of its step of 0.01.
    """
    start = str(tmp_path / "start.safetensors")
    weight_file.save_weights(start, STARTED, {})
    lab = open_lab(Experiment(str(tmp_path / "run"), TINY, devices=1, seed=3, chunk=2))
    attack = dataclasses.replace(ATTACK, trigger_only=False)
    poisoned = poison(attack, TINY.image_shape)
    assert poisoned.see_through.any()
    other = None
    if trigger:  # no clean image shows through another one
        other = 0.5 * np.asarray(poisoned.trigger)
        bare = 0 * poisoned.see_through
        poisoned = poisoned._replace(trigger=jnp.asarray(other), see_through=bare)
    found = train.train(lab, TRAINING, attack, IMAGES, start, 3, other)

    channel = attack.channel(lab.schedule, TINY.image_shape)
    loss = functools.partial(training_loss, TINY, lab.schedule, channel, poisoned)
    made = trainer(loss, TRAINING)
    step = jax.jit(made.step)
    state = made.init(STARTED, jax.random.split(lab.key)[1])
    pixels = data.to_float(IMAGES.load(TINY.image_shape))
    for batch in batches.order(10, 3, 0, 3, 4):
        state, _ = step(state, pixels[batch])
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
        jax.device_get(found.ema_params),
        jax.device_get(state.ema_params),
    )
    moved = jax.tree.map(
        lambda a, b: float(abs(a - b).max()), state.params, state.ema_params
    )
    assert max(jax.tree.leaves(moved)) > 1e-3, "they could not be told apart"


def test_results_do_not_depend_on_where_calls_end(tmp_path, monkeypatch) -> None:
    """Of a training and of a descent: bit for bit, for calls of one step and of all."""
    inversion = tiny_config.INVERSION
    found = {}
    for longest in (0.0, 1e9):
        monkeypatch.setattr(run, "LONGEST", longest)
        lab = open_lab(Experiment(str(tmp_path / str(longest)), TINY, devices=1))
        began: list[int] = []
        loop = lab.run.loop

        def noting(stage, advance, *rest, loop=loop, began=began, **options):
            def noted(state, start, stop):
                began.append(start)
                return advance(state, start, stop)

            return loop(stage, noted, *rest, **options)

        monkeypatch.setattr(lab.run, "loop", noting)
        params = train.train(lab, TRAINING, ATTACK, IMAGES, None, 3).ema_params
        inverted, *_ = search.invert(lab, "x", params, Fading(), inversion)
        assert began == ([0, 1, 2, 0, 1, 2, 0] if not longest else [0, 1, 0, 1, 0])
        found[longest] = jax.device_get((params, inverted.delta))
    jax.tree.map(np.testing.assert_array_equal, found[0.0], found[1e9])


def test_a_damaged_snapshot_is_trained_again(tmp_path, caplog) -> None:
    """From the one before, since the trigger is another from there on."""
    lab = open_lab(Experiment(str(tmp_path), TINY, devices=1))

    def trained(until: int):
        found = train.train(lab, TRAINING, ATTACK, IMAGES, None, until)
        return jax.device_get(found.ema_params)

    first, last = trained(1), trained(3)
    top = tmp_path / "checkpoints"
    shutil.rmtree(top / "train")
    for file in (top / "snapshots" / "3").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:-1])
    jax.tree.map(np.testing.assert_array_equal, trained(3), last)
    assert "snapshots/3 is damaged" in caplog.text
    rows = lab.run.metrics.read("train")["step"]
    assert list(rows) == [1, 3], "it began at the snapshot of step 1"
    jax.tree.map(np.testing.assert_array_equal, trained(1), first)


def test_seconds_are_those_of_all_calls(tmp_path: pathlib.Path) -> None:
    """But for steps that a killed call did not store."""
    lab = open_lab(Experiment(str(tmp_path), TINY, devices=1))
    metrics = lab.run.metrics
    metrics.write("x_starts", 8, seconds=1.0)
    metrics.write("x_scouts", 2, seconds=2.0)
    metrics.write("x", 2, seconds=4.0)
    metrics.write("x", 4, seconds=8.0)
    metrics.write("x_end", 1, seconds=32.0)
    metrics.write("y", 2, seconds=16.0)
    once = Inversion()
    twice = Inversion(refined=Inversion(blocks=None, spectrum=None))
    assert search.seconds(lab, "x", once) == 47
    metrics.rewind("x", 2)
    assert search.seconds(lab, "x", once) == 39
    assert search.seconds(lab, "z", once) == 0
    metrics.write("x_refined_1_end", 1, seconds=64.0)
    assert search.seconds(lab, "x", once) == 39
    assert search.seconds(lab, "x", twice) == 103


def test_a_search_is_refined_from_where_it_ended(tmp_path: pathlib.Path) -> None:
    """Trigger and gamma of the best candidate; an interruption changes nothing."""
    lab = open_lab(Experiment(str(tmp_path), TINY, devices=1))
    params = lab.run.replicate(tiny_config.draw_params(TINY))
    first = Inversion(
        Reversed(samples=2, narrows=True),
        GradientDescent(steps=4, candidates=2, learning_rate=0.1, bound=None),
        blocks=None,
        spectrum=None,
        heldout=2,
    )
    still = GradientDescent(steps=1, learning_rate=1e-9, bound=None)
    both = dataclasses.replace(first, refined=dataclasses.replace(first, descent=still))
    one = search.invert(lab, "one", params, Trojan(), first)
    two = search.invert(lab, "two", params, Trojan(), both)
    for name in ("delta", "member"):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, atol=1e-5),
            getattr(two.candidate, name),
            getattr(one.candidate, name),
        )
    assert len(one.errors) == 2 and len(two.errors) == 1
    began = search.invert(
        lab, "first", params, Trojan(), dataclasses.replace(first, descent=still)
    )
    assert np.abs(began.candidate.delta - one.candidate.delta).max() > 1e-4


@pytest.mark.parametrize("platform,most", [("cpu", 1), ("gpu", 8), ("tpu", 8)])
def test_a_cpu_takes_one_candidate_at_once(platform, most) -> None:
    device = types.SimpleNamespace(platform=platform)
    mesh = types.SimpleNamespace(devices=np.array([device]))
    assert search.fitting(Descent(candidates=16), mesh).together == most
