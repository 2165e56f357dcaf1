"""Discovery: nothing in a folder is passed over, and names harm nobody."""

import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from tiny_config import TINY, draw_params

from puredif_jax.files import whole as files
from puredif_jax.formats import diffusers as convert
from puredif_jax.formats import discovery, opening
from puredif_jax.formats.base import Model, Spec
from puredif_jax.formats.scheduling import Scheduling
from puredif_jax.formats.weight_sets import WEIGHTS
from puredif_jax.runs import weight_file
from puredif_jax.stages import scan
from puredif_jax.stages.experiment import Scan
from puredif_jax.stages.weights import find_weights
from puredif_jax.types import InputError


def write(folder: pathlib.Path, seed: int = 0) -> pathlib.Path:
    spec = Spec(TINY, Scheduling())
    model = Model(spec, draw_params(TINY, seed))
    convert.write_folder(folder, model)
    return folder


def found(*names, **options) -> dict[str, object]:
    """The path of each row as text, or the reason."""
    models = discovery.find([str(name) for name in names], **options).models
    return {name: str(value) for name, value in models.items()}


def notes(*names) -> str:
    return "\n".join(discovery.find([str(name) for name in names]).notes)


def test_models_at_any_depth_and_lone_weights(tmp_path) -> None:
    for place in ("a", "group/b", "group/of/c"):
        write(tmp_path / "models" / place)
    for lone in ("lone.safetensors", "group/of/old.bin"):
        (tmp_path / "models" / lone).touch()
    (tmp_path / "models" / "up").symlink_to(tmp_path / "models")  # no end of it
    rows = found(tmp_path / "models")
    assert set(rows) == {"a", "group.b", "group.of.c", "models.loose", "group.of.loose"}
    assert "lone.safetensors (safetensors)" in rows["models.loose"]
    assert "old.bin (a pickle)" in rows["group.of.loose"]
    assert "up leads to" in notes(tmp_path / "models")
    (tmp_path / "lone").mkdir()
    (tmp_path / "lone" / "x.safetensors").touch()
    with pytest.raises(InputError, match="without a configuration"):
        found(tmp_path / "lone")


def test_a_model_hides_nothing_below_or_beside_it(tmp_path) -> None:
    top = write(tmp_path / "m")
    write(top / "epochs" / "ep9", 1)
    shutil.copytree(write(tmp_path / "x", 2) / "unet", top / "unet_ema")
    shutil.copytree(write(tmp_path / "y", 3) / "unet", top / "checkpoint-5" / "unet")
    other = write(tmp_path / "z", 4) / "unet" / WEIGHTS
    shutil.copy(other, top / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    shutil.copy(
        top / "unet" / WEIGHTS,
        top / "unet" / "diffusion_pytorch_model.same.safetensors",
    )
    (top / "unet" / "diffusion_pytorch_model-00001-of-00002.safetensors").touch()
    assert set(found(top)) == {
        "m",
        "m.fp16",
        "m.epochs.ep9",
        "m.unet_ema",
        "m.checkpoint-5",
        "m.unet.loose",
    }
    assert "same.safetensors holds the weights of" in notes(top)


def test_a_configuration_of_no_network_hides_nothing(tmp_path) -> None:
    for name, text in (("a", '{"lr": 0.1}'), ("b", "[1]"), ("c", "{"), ("d", "")):
        write(tmp_path / name / "model")
        (tmp_path / name / "config.json").write_text(text)
    assert set(found(tmp_path)) == {f"{name}.model" for name in "abcd"}


def test_a_run_of_ours_is_its_model_and_its_copy_is_compared(tmp_path) -> None:
    run = tmp_path / "runs" / "mine"
    write(run / "diffusers", 1)
    params = draw_params(TINY, 1)
    weight_file.save_weights(run / "weights.safetensors", params, {})
    (run / "config.json").write_text(json.dumps({"type": "Experiment"}))
    (run / "results").mkdir()
    np.savez(run / "results" / "x.npz", x=np.zeros(1))
    shutil.copytree(write(tmp_path / "other", 2), run / "checkpoints" / "hidden")
    assert set(found(tmp_path / "runs")) == {"mine", "mine.checkpoints.hidden"}
    assert "files of a run by this program: weights.safetensors" in notes(run)
    other = jax.tree.map(lambda x: x + 1, params)
    weight_file.save_weights(run / "weights.safetensors", other, {})
    assert "weights.safetensors" in found(tmp_path / "runs")["mine.loose"]


def test_what_a_training_leaves_is_noted_and_no_error(tmp_path) -> None:
    top = write(tmp_path / "m")
    (top / "checkpoint-1").mkdir()
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        (top / "checkpoint-1" / name).touch()
    assert set(found(top)) == {"m"}
    assert "optimizer.bin" in notes(top)


def test_links_are_followed_once(tmp_path) -> None:
    write(tmp_path / "m" / "one")
    write(tmp_path / "elsewhere" / "two")
    (tmp_path / "m" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "m" / "nowhere").symlink_to(tmp_path / "gone")
    rows = found(tmp_path / "m")
    assert rows["more.two"] == str(tmp_path / "m" / "more" / "two")
    assert set(rows) == {"one", "more.two"}


@pytest.mark.parametrize("what", ["one", "."], ids=["a model", "a folder of models"])
def test_a_link_may_be_given_itself(tmp_path, what) -> None:
    write(tmp_path / "m" / "one")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "m" / what)
    inside = "" if what == "one" else "one"
    assert list(found(link).values()) == [str(link / inside)]


def test_a_model_that_is_named_twice_has_one_row(tmp_path) -> None:
    """By the folder above it, by itself, by a link, by its configuration."""
    model, other = write(tmp_path / "m" / "one"), write(tmp_path / "n" / "one", 1)
    (tmp_path / "link").symlink_to(model)
    index = model / "model_index.json"
    rows = found(tmp_path / "m", model, tmp_path / "link", index, other)
    assert rows == {"one": str(model), "one-2": str(other)}


def test_files_that_link_to_one_file_are_models_of_their_own(tmp_path) -> None:
    """What they are depends on what lies beside them."""
    one, two = write(tmp_path / "one"), write(tmp_path / "two")
    (two / "unet" / WEIGHTS).unlink()
    (two / "unet" / WEIGHTS).symlink_to(one / "unet" / WEIGHTS)
    assert len(found(one / "unet" / WEIGHTS, two / "unet" / WEIGHTS)) == 2


def test_a_variant_that_is_asked_for(tmp_path) -> None:
    one, two = write(tmp_path / "one"), write(tmp_path / "two")
    special = one / "unet" / "diffusion_pytorch_model.ema.safetensors"
    shutil.copy(write(tmp_path / "x", 7) / "unet" / WEIGHTS, special)
    rows = found(one, two, variant="ema")
    assert rows["one"] == str(special)
    assert rows["one.safetensors"].endswith(WEIGHTS)
    assert "no weights of the variant 'ema'" in rows["two"]


def test_ways_to_name_a_model(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write(pathlib.Path("a, b,c"))
    for name in (folder / "model_index.json", folder):
        assert list(found(name).values()) == ["a, b,c"]
    assert list(found("a", "b", "c").values()) == ["a, b,c"]
    assert found(folder / "unet" / "config.json") == {"a-b-c": "a, b,c/unet"}
    for name, words in (
        (folder / "scheduler" / "scheduler_config.json", "of a scheduler: give"),
        ("https://example.org/a/b", "not an address of the Hub"),
        ("https://huggingface.co/datasets/a/b", "address of no model"),
        ("ftp://huggingface.co/a", "address of no model"),
    ):
        with pytest.raises(InputError, match=words):
            found(name)


HARD = [
    b"x\x1b[2J\x1b[31m",
    b"line\nclean: all good",
    b"\xff\xfe",
    b"</td><script>alert(1)</script>"[:20],
    "‮".encode() + b"live",
    b"-rf",
    b"...",
    b"n" * 250,
    "é".encode() * 120,
    b"report.html",
    b"REPORT.JSON",
    b" ",
    b"A",
    b"a",
]


def test_names_that_are_hard_become_plain_and_distinct(tmp_path) -> None:
    for name in HARD:
        write(tmp_path / "m" / os.fsdecode(name))
    rows = found(tmp_path / "m")
    assert len({name.lower() for name in rows}) == len(HARD)
    for name in rows:
        assert files.safe_name(name) == name and name.isascii()
        assert len(name) <= files.LONGEST_NAME + 4
        assert name.lower() not in discovery.RESERVED


def test_a_folder_too_deep_to_walk_is_a_row(tmp_path) -> None:
    write(tmp_path / "m" / "good")
    here = os.getcwd()
    try:
        os.chdir(tmp_path / "m")
        for _ in range(30):
            os.mkdir("d" * 200)
            os.chdir("d" * 200)
    finally:
        os.chdir(here)
    rows = found(tmp_path / "m")
    assert "good" in rows
    assert any("File name too long" in reason for reason in rows.values())


def test_weights_that_cannot_be_compared_are_a_row(tmp_path) -> None:
    top = write(tmp_path / "m")
    bad = top / "unet" / "diffusion_pytorch_model.bin"
    bad.write_bytes(b"other weights")
    assert found(top)["m.bin"] == str(bad)
    stored = safetensors.numpy.load_file(top / "unet" / WEIGHTS)
    stored["conv_in.bias"] = stored["conv_in.bias"] + np.float32(1)
    near = top / "unet" / "diffusion_pytorch_model.near.safetensors"
    safetensors.numpy.save_file(stored, near)
    assert found(top)["m.near"] == str(near)


def test_a_folder_named_like_a_shipped_model_is_itself(tmp_path, monkeypatch) -> None:
    """The scan gives paths on, so that no name of the package stands for a folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("clean", "trained", "~"):
        write(tmp_path / name, 5)
        wanted = Scan("scan", (f"./{name}",))
        ((row, place),) = scan.find_models(wanted).items()
        found = scan.as_experiment(wanted, row, place)
        (weights,) = found.audit.weights
        assert find_weights(weights).resolve() == (tmp_path / name).resolve()


def test_what_is_planted_beside_weights_decides_nothing(tmp_path) -> None:
    """A scheduler or a network in the folder of a pipeline's network."""
    top = write(tmp_path / "p")
    other = write(tmp_path / "x", 3) / "unet" / WEIGHTS
    special = top / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(other, special)
    planted = {"_class_name": "DDPMScheduler", "beta_start": 0.1, "beta_end": 0.9}
    (top / "unet" / "scheduler_config.json").write_text(json.dumps(planted))
    nested = top / "unet" / "unet" / "config.json"
    nested.parent.mkdir()
    unet = json.loads((top / "unet" / "config.json").read_text())
    nested.write_text(json.dumps(unet | {"norm_eps": 1e-2}))
    rows = discovery.find([str(top)]).models
    for name in ("p", "p.fp16"):
        spec = convert.DiffusersFolder().spec(rows[name])
        assert spec.scheduling == Scheduling() and spec.network == TINY
    assert "a pipeline of its own" in str(rows["p.unet"])
    with pytest.raises(InputError, match="say how to draw from"):
        convert.DiffusersFolder().spec(top / "unet")


def test_an_index_hides_nothing(tmp_path) -> None:
    top = write(tmp_path / "m")
    for part in ("_models", "models"):
        write(top / part / "inner")
    path = top / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"_models": ["a", "b"], "models": ["a", "b"]}))
    assert {"m._models.inner", "m.models.inner"} <= set(found(top))


@pytest.mark.parametrize(
    "name",
    [
        "model.ckpt-1000.data-00000-of-00001",
        "model.ckpt-1000.index",
        "checkpoint",
        "checkpoint_100",
        "flax_model",
        "__0_0.distcp",
        "x.safetensors.bak",
        "x.safetensors.1",
        "x.bin~",
        "x.pdparams",
        "x.truth.safetensors",
        "large.of-no-known-kind",
    ],
)
def test_weights_of_any_name_are_named(tmp_path, name) -> None:
    write(tmp_path / "m" / "good")
    (tmp_path / "m" / name).write_bytes(bytes(200_000))
    assert name in found(tmp_path / "m")["m.loose"]


def test_no_folder_ends_the_search_of_the_others(tmp_path) -> None:
    """Names of arrays that contradict each other, a pipe, and a link to above."""
    write(tmp_path / "m" / "good")
    for name in ("odd", "pipe"):
        write(tmp_path / "m" / name / "diffusers")
    twice = {"a": np.zeros(1, np.float32), "a.b": np.zeros(1, np.float32)}
    place = tmp_path / "m" / "odd" / "weights.safetensors"
    safetensors.numpy.save_file(twice, place)
    os.mkfifo(tmp_path / "m" / "pipe" / "weights.safetensors")
    (tmp_path / "m" / "root").symlink_to("/")
    (tmp_path / "m" / "system").symlink_to("/proc")
    rows = found(tmp_path / "m")
    assert {"good", "odd", "pipe", "odd.loose", "pipe.loose"} == set(rows)
    assert notes(tmp_path / "m").count("which is not searched") == 2


def test_many_folders_of_one_plain_name_are_told_apart(tmp_path) -> None:
    for i in range(300):
        (tmp_path / "m" / chr(0x4E00 + i)).mkdir(parents=True)
        (tmp_path / "m" / chr(0x4E00 + i) / "x.pt").touch()
    rows = found(tmp_path / "m", write(tmp_path / "good"))
    assert len(rows) == 301 and "loose-300" in rows


def test_a_link_to_a_place_that_only_sounds_like_the_system_is_followed(
    tmp_path, monkeypatch
) -> None:
    write(tmp_path / "devices" / "one")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "more").symlink_to(tmp_path / "devices")
    monkeypatch.setattr(opening, "_SYSTEM", (str(tmp_path / "dev"),))
    assert set(found(tmp_path / "m")) == {"more.one"}
