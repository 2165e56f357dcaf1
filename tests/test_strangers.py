"""What a stranger's files may hold: no wait, no memory, one sentence."""

import json
import os
import pathlib
import pickle
import shutil
import zipfile

import pytest
import tiny_config

from puredif_jax.files import npz
from puredif_jax.formats import ddim_checkpoint, discovery, entries, opening, search
from puredif_jax.formats import diffusers as convert
from puredif_jax.formats.base import Model, Spec
from puredif_jax.formats.ddim_config import read_config
from puredif_jax.formats.diffusers_config import ConvertError
from puredif_jax.formats.scheduling import Scheduling
from puredif_jax.stages import cost
from puredif_jax.stages.experiment import Scan
from puredif_jax.types import InputError


@pytest.fixture
def model(tmp_path) -> pathlib.Path:
    folder = tmp_path / "models" / "good"
    params = tiny_config.draw_params(tiny_config.TINY)
    convert.write_folder(folder, Model(Spec(tiny_config.TINY, Scheduling()), params))
    return folder


def change(path: pathlib.Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refusal(folder: pathlib.Path) -> str:
    """Why a folder is not read, in a line."""
    with pytest.raises(InputError) as raised:
        convert.read_folder(folder)
    said = str(raised.value)
    assert "\n" not in said and len(said) < 1000
    return said


# Files that are none.


def test_a_pipe_is_not_waited_for(model) -> None:
    os.mkfifo(model / "truth.safetensors")
    rows = discovery.find([str(model)]).models
    assert rows["good"] == model
    os.mkfifo(model / "noise.npz")
    with pytest.raises(npz.NpzError, match="no regular file"):
        npz.headers(model / "noise.npz")
    (model / "unet" / "config.json").unlink()
    os.mkfifo(model / "unet" / "config.json")
    with pytest.raises(ConvertError, match="no regular file"):
        opening.read_json(model / "unet" / "config.json")


def test_a_link_into_the_system_is_not_followed(model) -> None:
    (model / "unet" / "config.json").unlink()
    (model / "unet" / "config.json").symlink_to("/proc/self/environ")
    assert "leads to /proc/" in refusal(model)


def test_a_link_to_nowhere_is_no_file(model) -> None:
    (model / "unet" / "config.json").unlink()
    (model / "unet" / "config.json").symlink_to("nowhere")
    with pytest.raises(ConvertError, match="there is no file"):
        opening.read_json(model / "unet" / "config.json")
    assert not opening.of_system(pathlib.Path("/dev/shm/model"))


def test_a_bad_link_hides_no_model_beside_it(model) -> None:
    (model.parent / "long").symlink_to("a" * 300)
    rows = discovery.find([str(model.parent)]).models
    assert rows["good"] == model
    assert all("good" not in str(row) for name, row in rows.items() if name != "good")


def test_a_folder_is_listed_as_often_with_many_files(model, monkeypatch) -> None:
    """Of samples beside a model, each would else list the folder again."""
    counts, listed = [], opening.listed

    def counting(folder):
        counts.append(folder)
        return listed(folder)

    monkeypatch.setattr(search, "listed", counting)
    monkeypatch.setattr("puredif_jax.formats.weight_sets.listed", counting)
    discovery.find([str(model)])
    before = len(counts)
    (model / "samples").mkdir()
    for i in range(200):
        (model / "samples" / f"{i}.png").touch()
    counts.clear()
    discovery.find([str(model)])
    assert len(counts) < before + 5


# Pickles.


def as_pickle(tmp_path, content: bytes) -> pathlib.Path:
    path = tmp_path / "diffusion_pytorch_model.bin"
    path.write_bytes(content)
    return path


def refused_pickle(path: pathlib.Path) -> str:
    pytest.importorskip("torch")
    with pytest.raises(ConvertError) as raised:
        entries.unpickled(path)
    return str(raised.value)


@pytest.mark.parametrize("name", [b"__builtin__\nbytearray", b"builtins\nbytearray"])
def test_a_pickle_that_would_make_bytes_is_refused(tmp_path, name) -> None:
    """Of any size, and PyTorch allows it: here half a GiB out of 30 bytes."""
    size = (2**29).to_bytes(5, "little")
    made = b"\x80\x02c" + name + b"\n\x8a\x05" + size + b"\x85R."
    path = as_pickle(tmp_path, made)
    assert "it would call" in (said := refused_pickle(path)) and "bytearray" in said
    packed = as_pickle(tmp_path, b"")
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("archive/data.pkl", made)
        file.writestr("archive/version", "3")
    assert "bytearray" in refused_pickle(packed)


BYTES = b"\x80\x02cbuiltins\nbytearray\n\x8a\x04" + (2**20).to_bytes(4, "little")
BYTES += b"\x85R."


def archive(path: pathlib.Path, name: str, content: bytes, mode="w") -> None:
    with zipfile.ZipFile(path, mode) as file:
        file.writestr(f"archive/{name}", content)
        file.writestr("archive/version", "3")
        file.writestr("archive/byteorder", "little")


def test_an_archive_behind_a_pickle_does_not_speak_for_it(tmp_path) -> None:
    """PyTorch loads by the first bytes of a file; an archive is found by the last."""
    path = as_pickle(tmp_path, BYTES)
    archive(path, "data.pkl", pickle.dumps({}, protocol=2), "a")
    assert "is packed" in refused_pickle(path)


@pytest.mark.parametrize("name", ["DATA.PKL", "data.pkl"])
def test_the_part_that_pytorch_loads_is_looked_at(tmp_path, name) -> None:
    path = as_pickle(tmp_path, b"")
    archive(path, name, BYTES)
    said = refused_pickle(path)
    assert "bytearray" in said or "not a pickle of arrays alone" in said


def test_a_storage_of_any_size_is_not_made(tmp_path) -> None:
    made = b"\x80\x02ctorch.storage\nUntypedStorage\n\x8a\x04"
    made += (2**20).to_bytes(4, "little") + b"\x85R."
    path = as_pickle(tmp_path, b"")
    archive(path, "data.pkl", made)
    assert "torch.storage.UntypedStorage" in refused_pickle(path)


def test_tuples_that_would_be_hashed_for_hours_are_refused(tmp_path) -> None:
    """Each is a pair of the one before, and the last the key of a dictionary."""
    pairs = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
    path = as_pickle(tmp_path, b"\x80\x02}K\x01" + pairs + b"Ns.")
    assert "not a pickle of arrays alone" in refused_pickle(path)


def test_an_end_that_leads_to_no_record_is_refused(tmp_path) -> None:
    """Zip64: its locator must lead to its record, or PyTorch reads another one."""
    path = as_pickle(tmp_path, b"")
    archive(path, "data.pkl", pickle.dumps({}, protocol=2))
    whole = path.read_bytes()
    end = whole.rindex(b"PK\x05\x06")
    locator = b"PK\x06\x07" + bytes(4) + (7).to_bytes(8, "little") + bytes(4)
    path.write_bytes(whole[:end] + locator + whole[end:])
    assert "pickle" in refused_pickle(path) or "is packed" in refused_pickle(path)


def test_a_pickle_of_another_protocol_is_refused(tmp_path) -> None:
    path = as_pickle(tmp_path, pickle.dumps({"a": pathlib.Path("x")}, protocol=4))
    assert "not a pickle of arrays alone" in refused_pickle(path)


def saved(tmp_path, state) -> pathlib.Path:
    torch = pytest.importorskip("torch")
    path = tmp_path / "diffusion_pytorch_model.bin"
    torch.save(state, path)
    return path


def test_an_archive_is_read_where_its_end_says_that_it_begins(tmp_path) -> None:
    """Else Python may judge another directory than PyTorch reads."""
    torch = pytest.importorskip("torch")
    path = saved(tmp_path, {"a": torch.zeros(3)})
    assert list(entries.unpickled(path)) == ["a"]
    path.write_bytes(b"x" * 100 + path.read_bytes())
    assert "is packed" in refused_pickle(path)


def test_a_packed_archive_is_refused(tmp_path) -> None:
    torch = pytest.importorskip("torch")
    path = saved(tmp_path, {"a": torch.arange(3.0)})
    with zipfile.ZipFile(path) as file:
        parts = {part: file.read(part) for part in file.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in parts.items():
            file.writestr(name, content)
    assert "is packed" in refused_pickle(path)


def test_attributes_that_stand_before_methods_change_nothing(tmp_path) -> None:
    torch = pytest.importorskip("torch")
    x = torch.zeros(3)
    x.numel = 5
    path = saved(tmp_path, {"a": x})
    with pytest.raises(ConvertError, match="not a pickle of"):
        list(entries.tensors(path, entries.unpickled(path)))


# Checkpoints of DDIM.


@pytest.mark.parametrize("ema,taken", [(True, 2.0), (False, 1.0)])
def test_the_weights_are_those_that_the_code_draws_from(tmp_path, ema, taken) -> None:
    torch = pytest.importorskip("torch")
    parts = [{"x": torch.full((1,), 1.0)}, {}, 0, 0, {"x": torch.full((1,), 2.0)}]
    path = tmp_path / "ckpt.pth"
    torch.save(parts, path)
    found = ddim_checkpoint._open(path, ema)
    assert found.entries["x"].read() == taken
    assert "not scanned" in found.remark
    torch.save([*parts, {"x": torch.full((1,), 3.0)}], path)
    with pytest.raises(ConvertError, match="a list of 6: expected a state dict"):
        ddim_checkpoint._open(path, ema)


@pytest.mark.parametrize(
    "text,words",
    [
        ("data: {image_size: 64, rescaled: false}", "data.rescaled='False'"),
        ("data:\n  image_size: 32\n  image_size: 64", "image_size is set twice"),
        ("diffusion:\n  num_diffusion_timesteps: 500.9", "a whole number"),
        ("diffusion:\n  beta_schedule: [quad]", "beta_schedule"),
        ("data: 5", "data='5', which is no section"),
        ("model: {ema: maybe}", "model.ema='maybe'"),
        ("data:\n\timage_size: 3", "cannot be read as YAML"),
        ("- 1", "no sections"),
        ("[" * 5000, "cannot be read as YAML"),
        ("data: &a [1]\nmodel: *a", "it has an alias"),
        ("data: !!map [a]", "cannot be read as YAML"),
        ("data: !!int ''", "cannot be read as YAML"),
        ("data: !!bool maybe", "cannot be read as YAML"),
    ],
)
def test_a_configuration_that_means_something_else_is_refused(
    tmp_path, text, words
) -> None:
    (tmp_path / "config.yml").write_text(text)
    with pytest.raises(ConvertError, match=words) as raised:
        read_config(tmp_path / "config.yml")
    assert "\n" not in str(raised.value)


def test_a_size_of_another_level_is_not_the_size(tmp_path) -> None:
    path = tmp_path / "config.yml"
    path.write_text("data:\n  augment:\n    image_size: 8\nmodel:\n  'ema': false\n")
    assert read_config(path) == (None, None, False)


# Configurations of diffusers.


def test_betas_that_do_not_fall_are_no_schedule(model) -> None:
    path = model / "scheduler" / "scheduler_config.json"
    for betas in ([1e-300] * 1000, [1e-9] * 1000):
        change(path, trained_betas=betas, num_train_timesteps=1000)
        assert "must fall" in refusal(model)


def test_an_old_name_says_what_to_put_in_its_place(model) -> None:
    change(model / "unet" / "config.json", predict_epsilon=False)
    assert "put prediction_type='sample' in its place" in refusal(model)


@pytest.mark.parametrize("widths", [[{"a": 1}, 32, 64], [None, 32], []])
def test_widths_of_no_numbers_are_one_sentence(model, widths) -> None:
    change(model / "unet" / "config.json", block_out_channels=widths)
    assert "config.json" in refusal(model)


def test_lists_within_lists_are_one_sentence(model) -> None:
    path = model / "unet" / "config.json"
    deep = "[" * 990 + "]" * 990
    text = path.read_text()
    start = text.index('"down_block_types"')
    end = text.index("]", start) + 1
    path.write_text(f'{text[:start]}"down_block_types": {deep}{text[end:]}')
    assert "config.json" in refusal(model)


def test_a_first_stage_of_null_is_none(model) -> None:
    change(model / "model_index.json", vqvae=[None, None])
    assert discovery.find([str(model)]).models == {"good": model}


# Names.


def test_a_list_of_models_names_its_line(model, tmp_path) -> None:
    names = tmp_path / "list.txt"
    names.write_text(f"# a remark\n{model}\nnowhere\n")
    rows = discovery.find([str(names)]).models
    assert f"line 3 of {names}: nowhere is no model" in str(rows["nowhere"])
    shutil.copy(names, tmp_path / "README.md")
    with pytest.raises(InputError, match="not a text"):
        discovery.find([str(tmp_path / "README.md")])


def test_all_names_that_lead_to_nothing_are_told() -> None:
    with pytest.raises(InputError, match=r"nosuch1 is no model.*nosuch2 is no model"):
        discovery.find(["nosuch1", "nosuch2"])


def test_the_cost_of_a_model_that_breaks_the_reader_is_a_sentence(
    model, monkeypatch
) -> None:
    def broken(*given):
        raise TypeError("of no kind")

    monkeypatch.setattr(cost, "as_experiment", broken)
    with pytest.raises(InputError, match="TypeError: of no kind"):
        cost.estimate(Scan("scan", (str(model),)))
