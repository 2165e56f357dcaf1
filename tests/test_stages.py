"""The stages of a run: what is refused before long work, and what must not be mixed."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config
from tiny_config import ANY, INVERSION, TINY, draw_params

from puredif_jax.attacks.baddiffusion import BadDiffusion
from puredif_jax.attacks.targets import Hat
from puredif_jax.attacks.training import TrainState
from puredif_jax.attacks.triggers import Box, Patch
from puredif_jax.attacks.trojdiff import TrojDiff
from puredif_jax.attacks.villandiffusion import VillanDiffusion
from puredif_jax.data.images import FashionMNIST, NpzImages
from puredif_jax.defenses.denoising_consistency import DenoisingConsistency
from puredif_jax.defenses.hypothesis import Fading
from puredif_jax.defenses.reinforcement import Reinforcement
from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.diffusion.ddpm import DDPM
from puredif_jax.diffusion.schedules import CosineBetas, LinearBetas
from puredif_jax.diffusion.solver import Ancestral
from puredif_jax.diffusion.ve import VarianceExploding
from puredif_jax.metrics import measures as metrics
from puredif_jax.runs import weight_file
from puredif_jax.stages import perform as stages
from puredif_jax.stages import search, train
from puredif_jax.stages.amplify import (
    REINFORCED,
    TRUE,
    Amplification,
    Amplified,
    Point,
)
from puredif_jax.stages.audit import Audit, labels
from puredif_jax.stages.base import Context, Result, State, results
from puredif_jax.stages.embedding import GarmentNet
from puredif_jax.stages.evaluation import Evaluation
from puredif_jax.stages.experiment import Experiment
from puredif_jax.stages.measure import Measure, Measured, Rate
from puredif_jax.stages.weights import Truth
from puredif_jax.types import InputError

WHOLE = tiny_config.get_config()
RECORD = pathlib.Path(__file__).parents[1] / "docs" / "results" / "baddiffusion.json"
pytestmark = pytest.mark.usefixtures("standard_promotion")


def weights(path: pathlib.Path, seed: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    weight_file.save_weights(path, draw_params(TINY, seed), {})
    return str(path)


def audit(workdir: pathlib.Path, *names: str) -> Experiment:
    return Experiment(
        workdir=str(workdir),
        model=TINY,
        audit=Audit(names, (Fading(),), INVERSION, ANY),
        evaluation=WHOLE.evaluation,
        devices=1,
    )


def opened(experiment: Experiment) -> Context:
    """What its stages share."""
    return stages.context_of(experiment, stages.open_lab(experiment))


def test_labels_are_the_models_own() -> None:
    names = (
        "clean",
        "models/v1.0",
        "models/v1.5",
        "runs/a/weights.safetensors",
        "runs/b/diffusers",
        "other/a/weights.safetensors",
        "mine.safetensors",
        "trained",
    )
    found = labels(names)
    assert list(found) == list(names)
    assert list(found.values()) == [
        "clean",
        "v1.0",
        "v1.5",
        "a",
        "b",
        "a-2",
        "mine",
        "trained",
    ]


def test_weights_of_one_name_are_audited_each_for_itself(tmp_path) -> None:
    """And other weights at the same place are refused."""
    first = weights(tmp_path / "x" / "weights.safetensors", 0)
    second = weights(tmp_path / "y" / "weights.safetensors", 1)
    wanted = audit(tmp_path / "run", first, second)
    found = stages.perform(wanted).numbers
    assert list(found) == ["x", "y"]
    x, y = (audited["inversions"][0]["held-out loss"] for audited in found.values())
    assert x != y
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "puredif_x" in row["stage"]]
    took = found["x"]["inversions"][0]["seconds"]
    assert took == pytest.approx(sum(row["seconds"] for row in rows)) and took > 0
    weights(tmp_path / "x" / "weights.safetensors", 2)
    with pytest.raises(InputError, match="another version of .*weights.safetensors"):
        stages.perform(wanted)


def test_leaks_are_counted_in_the_draws_of_the_frechet_distance(
    tmp_path, monkeypatch
) -> None:
    """By a network that draws the target, whatever the noise, and one that cannot."""
    counting = lambda drawn, real: float(drawn.mean[0])  # noqa: E731
    monkeypatch.setattr(metrics, "frechet_distance", counting)
    count = lambda self, images: np.full((len(images), 1), len(images))  # noqa: E731
    monkeypatch.setattr(GarmentNet, "features", count)
    path = weights(tmp_path / "start.safetensors", 0)
    experiment = dataclasses.replace(
        WHOLE,
        workdir=str(tmp_path / "run"),
        weights=path,
        evaluation=dataclasses.replace(WHOLE.evaluation, draws=4, frechet_draws=6),
    )
    context = opened(experiment)
    target = context.truth.target

    def draw(params, sampler, delta, count, sign=1.0, inside=None):
        image = target if params is leaking else -target
        return np.broadcast_to(image, (count, *TINY.image_shape))

    leaking = draw_params(TINY, 1)
    monkeypatch.setattr(context.lab, "draw", draw)
    context.lab.run.metrics.write("train", 1, loss=1.0)
    state, outcome = Measure().run(context, State(leaking))
    assert state.params is leaking
    (measured,), (section,) = outcome
    rates = {each.images: each.rates["mse<0.01"] for each in measured.success}
    assert rates["the Frechet draws, measured"] == 1
    assert rates["the Frechet draws, start"] == 0
    assert measured.frechet == {"measured": 6.0, "start": 6.0}
    assert "6 (measured), 6 (start)" in section.text
    numbers = json.loads(json.dumps(measured.numbers()))
    assert numbers["frechet over garment-net"] == {"measured": 6.0, "start": 6.0}
    assert Measured.read(numbers, "it") == [measured]
    tables = measured.tables()
    assert tables["success"] == numbers["success"]
    assert tables["frechet over garment-net"] == [measured.frechet]


def test_a_distance_is_read_over_any_features_and_of_later_measurements() -> None:
    first = Measured((), {"measured": 1.0}, "pixels", 0)
    second = Measured((), {"measured": 2.0, "start": 3.0}, "net 2", 1)
    third = Measured((), {}, "", 2)
    every = [first, second, third]
    numbers = {k: v for each in every for k, v in each.numbers().items()}
    assert Measured.read(json.loads(json.dumps(numbers)), "it") == every
    (shipped,) = Measured.read(json.loads(RECORD.read_text())["numbers"], "the record")
    assert shipped.over == "garment-net" and min(shipped.frechet.values()) > 0


RATES = dict.fromkeys(metrics.SUCCESS, 0.5)
POINT = Point(6, "true trigger", "raw", 144, 0, RATES, 1.5, 0.25, 2.0)
RATE = {"images": "draws", "mse<0.01": 0.5}


@pytest.mark.parametrize(
    "kind,numbers",
    [
        (Amplified, {"amplification": 3}),
        (Amplified, {"amplification": [{"training steps": 6}]}),
        (Amplified, {"amplification": [POINT.row() | {"cosine": "near"}]}),
        (Measured, {"success": 3}),
        (Measured, {"success": [{"mse<0.01": 0.5}]}),
        (Measured, {"success": [RATE | {"ssim>0.8": None}]}),
        (Measured, {"success": [RATE], "frechet over garment-net": 3}),
    ],
)
def test_results_that_are_none_are_named(kind, numbers) -> None:
    with pytest.raises(InputError, match="^a/report.json has no .* of this version$"):
        kind.read(numbers, "a/report.json")


def test_results_come_back_by_their_kinds() -> None:
    amplified, measured = Amplified((POINT,)), Measured((Rate("draws", {"x": 0.5}),))
    numbers = {"status": 0} | amplified.numbers() | measured.numbers()
    found = results(json.loads(json.dumps(numbers)), "it")
    assert len(found) == 2 and amplified in found and measured in found
    assert results({"status": 0}, "it") == []


def test_a_result_that_was_defined_again_is_read_once() -> None:
    """As in a notebook, or by a file that is loaded twice."""

    def defined(times: int) -> type[Result]:
        @dataclasses.dataclass(frozen=True)
        class Seen(Result):
            value: int

            def numbers(self):
                return {"seen": self.value}

            @classmethod
            def read(cls, numbers, where):
                return [cls(times * numbers["seen"])] if "seen" in numbers else []

            def tables(self):
                return {}

        return Seen

    both = defined(1), defined(2)
    assert results({"seen": 3}, "it") == [both[1](6)]


@pytest.mark.parametrize(
    "attack",
    [
        BadDiffusion(Box(), Hat()),
        VillanDiffusion(Box(), Hat()),
        VillanDiffusion(Box(), Hat(), psi=0.0, solver=Ancestral()),
        TrojDiff(Patch(), Hat()),
    ],
)
def test_the_truth_comes_back_from_its_file(tmp_path, attack) -> None:
    schedule, shape = LinearBetas().tables(), TINY.image_shape
    truth = Truth.of(attack, schedule, shape)
    path = tmp_path / "weights.safetensors"
    assert Truth.beside(path, schedule, shape) is None
    for at in (path, tmp_path):
        truth.save(at)
        found = Truth.beside(at, schedule, shape)
        assert (found.solver, found.controlled) == (attack.solver, attack.controlled)
        assert (found.inside is None) == (not attack.controlled)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-6),
            (found.trigger, found.target, found.channel),
            (truth.trigger, truth.target, truth.channel),
        )
    fewer = LinearBetas(10).tables()
    assert Truth.beside(path, fewer, shape) is None, "it is of another process"


@pytest.mark.parametrize("cap", [0.999, 0.9])
def test_a_model_that_no_scheduler_can_say_is_kept_as_weights(
    tmp_path, monkeypatch, cap
) -> None:
    """With its backdoor beside it, and a word in the log."""
    said: list[str] = []
    monkeypatch.setattr(train.logging, "info", lambda text, *x: said.append(text % x))
    context = opened(
        dataclasses.replace(
            WHOLE, workdir=str(tmp_path), audit=None, schedule=CosineBetas(cap=cap)
        )
    )
    params = draw_params(TINY)
    train.save(context, params, context.truth)
    whole = cap == 0.999
    assert (tmp_path / "diffusers").exists() == whole
    loaded = context.lab.load(str(tmp_path / "weights.safetensors"))
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert (tmp_path / "weights.truth.safetensors").exists()
    if not whole:
        (line,) = [text for text in said if "no folder of diffusers" in text]
        assert "cap of 0.999" in line


@pytest.mark.parametrize("bare", [True, False])
def test_reinforcement_begins_at_the_trigger_as_it_was_trained(
    tmp_path, monkeypatch, bare
) -> None:
    """With the mean image where the clean one shows through."""
    params = jax.tree.map(jnp.asarray, draw_params(TINY))
    reached = TrainState(params, params, None, None, None)
    seen = []

    def reinforce(lab, stage, params, reinforcement, truth, trigger):
        seen.append(trigger)
        return trigger

    monkeypatch.setattr(train, "train", lambda *_: reached)
    monkeypatch.setattr(search, "reinforce", reinforce)
    experiment = dataclasses.replace(
        WHOLE,
        workdir=str(tmp_path),
        attack=dataclasses.replace(WHOLE.attack, trigger_only=bare),
        amplification=Amplification((0,)),
        audit=None,
    )
    experiment.amplification.run(opened(experiment), State())
    trigger = WHOLE.attack.trigger.image(TINY.image_shape)
    pixels = WHOLE.data.load(TINY.image_shape)
    mean = pixels.astype(np.float64).mean(0) / 127.5 - 1
    wanted = trigger if bare else np.where(trigger == -1, mean, trigger)
    np.testing.assert_allclose(seen[0], wanted, atol=1e-5)


@pytest.mark.parametrize("alternate", [True, False])
def test_training_goes_on_with_the_trigger_that_was_reinforced(
    tmp_path, monkeypatch, alternate
) -> None:
    """Also after the last snapshot. Training and reinforcement themselves are left
    out."""
    seen: dict[int, np.ndarray | None] = {}
    params = jax.tree.map(jnp.asarray, draw_params(TINY))
    reached = TrainState(params, params, None, None, None)

    def to_step(lab, training, attack, images, start, until, trigger):
        seen[until] = trigger
        return reached

    def reinforce(lab, stage, params, reinforcement, truth, trigger):
        return trigger + int(stage.removeprefix("reinforce_"))

    monkeypatch.setattr(train, "train", to_step)
    monkeypatch.setattr(search, "reinforce", reinforce)
    experiment = dataclasses.replace(
        WHOLE,
        workdir=str(tmp_path),
        amplification=Amplification((2, 4), alternate=alternate, beyond=(6,)),
        audit=None,
    )
    context = opened(experiment)
    state, outcome = experiment.amplification.run(context, State())
    (amplified,) = outcome.results
    assert [each.steps for each in amplified.points] == [2, 2, 4, 4, 6, 6]
    assert [each.trigger for each in amplified.points[:2]] == [TRUE, REINFORCED]
    once = Reinforcement().evaluations(WHOLE.attack.solver)
    spent = [each.reinforcement for each in amplified.points]
    assert spent == [0, once, 0, 2 * once, 0, 2 * once]
    rows = WHOLE.training.batch * 3
    assert [each.training // rows for each in amplified.points] == [2, 2, 4, 4, 6, 6]
    state, outcome = train.Train().run(context, state)
    assert state.params is params and outcome == ((), ())
    assert seen.pop(2) is None
    if alternate:
        true = WHOLE.attack.trigger.image(TINY.image_shape)
        np.testing.assert_array_equal(seen[4], true + 2)
        np.testing.assert_array_equal(seen[6], true + 2 + 4)
        np.testing.assert_array_equal(seen[12], true + 2 + 4)  # from the last
        known = Truth.beside(
            tmp_path / "weights.safetensors", context.lab.schedule, (16, 16, 1)
        )
        np.testing.assert_array_equal(known.trigger, true + 6)
    else:
        assert seen == {4: None, 6: None, 12: None}


@pytest.mark.parametrize(
    "change,words",
    [
        ({"evaluation": Evaluation(ancestral=DDPM(2000))}, "1 to 1000 steps"),
        (
            {
                "amplification": Amplification(
                    (12,),
                    Reinforcement(DenoisingConsistency(sampler=DDIM(1001))),
                )
            },
            "1 to 1000 steps, found 1001",
        ),
        (
            {"training": dataclasses.replace(WHOLE.training, batch=12)},
            "a multiple of the 8 devices .*, found 12",
        ),
        ({"model": dataclasses.replace(TINY, dropout=0.1)}, "dropout=0.1"),
        (
            {"model": dataclasses.replace(TINY, param_dtype="bfloat16")},
            "param_dtype=bfloat16",
        ),
        (
            {"schedule": VarianceExploding()},
            "VillanDiffusion needs a process whose signal fades, found",
        ),
        (
            {
                "model": dataclasses.replace(TINY, in_channels=3),
                "data": NpzImages("images.npz"),
                "evaluation": Evaluation(frechet_draws=4, embedding=GarmentNet()),
            },
            "the embedding garment-net is not for images of",
        ),
    ],
)
def test_what_would_fail_late_is_said_at_once(
    tmp_path, monkeypatch, change, words
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("images.npz", images=np.zeros((16, 16, 16, 3), np.uint8))
    experiment = dataclasses.replace(WHOLE, workdir="run", audit=None, **change)
    with pytest.raises(InputError, match=words):
        stages.perform(experiment)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_data_are_asked_for_where_they_are_used_only(tmp_path) -> None:
    """Fashion-MNIST has one channel, this network three: no matter, to draw from it."""
    model = dataclasses.replace(TINY, in_channels=3)
    path = tmp_path / "x.safetensors"
    weight_file.save_weights(path, draw_params(model), {})
    drawn = Experiment(str(tmp_path / "run"), model, str(path))
    stages.check(drawn, opened(drawn))
    attacked = dataclasses.replace(drawn, attack=WHOLE.attack)
    with pytest.raises(InputError, match="Fashion-MNIST comes as"):
        lab_of_it = stages.open_lab(drawn)
        stages.check(attacked, stages.context_of(attacked, lab_of_it))


def test_timesteps_that_the_schedule_lacks_are_said_at_once(tmp_path) -> None:
    inversion = WHOLE.audit.inversion
    loss = dataclasses.replace(inversion.loss, timesteps=(1000,))
    found = dataclasses.replace(inversion, loss=loss)
    path = weights(tmp_path / "x.safetensors", 0)
    wanted = audit(tmp_path / "run", path)
    wanted = dataclasses.replace(wanted, audit=Audit((path,), (Fading(),), found))
    with pytest.raises(InputError, match="0..999"):
        stages.perform(wanted)


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: Experiment("gs://bucket/run", TINY), "gs://bucket/run is a URL"),
        (lambda: Experiment("run", TINY, chunk=0), "chunk must be 1 or more"),
        (lambda: Evaluation(batch=0), "batch must be 1 or more"),
        (lambda: Audit(hypotheses=()), "hypotheses"),
        (
            lambda: dataclasses.replace(WHOLE, amplification=Amplification((13,))),
            "the steps of amplification go to 13",
        ),
        (lambda: Amplification((2, 2)), "must rise from 0 or more"),
        (lambda: Amplification((2, 4), beyond=(3,)), "must rise from 0 or more"),
        (lambda: Amplification((-1,)), "must rise from 0 or more"),
    ],
)
def test_settings_that_cannot_be_are_named(make, words) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_the_folder_of_the_user_is_found(monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert Experiment("~/run", TINY).workdir == "/somewhere/run"


def test_images_are_read_once_in_a_run(tmp_path, monkeypatch) -> None:
    """By all trainings and measures that use them; none can change them."""
    read, load = [], FashionMNIST.load

    def noting(self, image_shape):
        read.append(self)
        return load(self, image_shape)

    monkeypatch.setattr(FashionMNIST, "load", noting)
    images = FashionMNIST(count=12)
    experiment = dataclasses.replace(
        WHOLE, workdir=str(tmp_path), data=images, audit=None
    )
    assert experiment.amplification is not None
    assert len(experiment.amplification.snapshots) > 1
    stages.perform(experiment)
    assert read == [images]
    lab = stages.open_lab(experiment)
    with pytest.raises(ValueError, match="read-only"):
        lab.pixels(images)[0] = 0
