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

from puredif_jax import checkpoint, convert, discovery, files
from puredif_jax.types import InputError
from puredif_jax.weight_sets import WEIGHTS


def write(folder: pathlib.Path, seed: int = 0) -> pathlib.Path:
    model = convert.Model(TINY, draw_params(TINY, seed), convert.Scheduling())
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
    checkpoint.save_weights(run / "weights.safetensors", params, {})
    (run / "config.json").write_text(json.dumps({"type": "Experiment"}))
    (run / "results").mkdir()
    np.savez(run / "results" / "x.npz", x=np.zeros(1))
    shutil.copytree(write(tmp_path / "other", 2), run / "checkpoints" / "hidden")
    assert set(found(tmp_path / "runs")) == {"mine", "mine.checkpoints.hidden"}
    assert "files of a run by this program: weights.safetensors" in notes(run)
    other = jax.tree.map(lambda x: x + 1, params)
    checkpoint.save_weights(run / "weights.safetensors", other, {})
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
