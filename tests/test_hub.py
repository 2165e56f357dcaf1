"""Names of the Hub: revisions, addresses, and what is fetched."""

import logging
import sys
import types

import pytest
from tiny_config import TINY, draw_params

from puredif_jax.formats import diffusers as convert
from puredif_jax.formats import hub
from puredif_jax.formats.base import Model, Spec
from puredif_jax.formats.scheduling import Scheduling
from puredif_jax.types import InputError


@pytest.mark.parametrize(
    "name,wanted",
    [
        ("owner/name", ("owner/name", None)),
        ("owner/name@v1.0", ("owner/name", "v1.0")),
        ("owner/name@refs/pr/3", ("owner/name", "refs/pr/3")),
        ("https://huggingface.co/owner/name", ("owner/name", None)),
        ("https://huggingface.co/owner/name/", ("owner/name", None)),
        ("https://huggingface.co/owner/name/tree/main/unet", ("owner/name", "main")),
        ("http://hf.co/owner/name/blob/abc123/a.bin?x=1", ("owner/name", "abc123")),
        ("https://huggingface.co/o%77ner/name", ("owner/name", None)),
        (
            "https://huggingface.co/owner/name/tree/refs/pr/1",
            ("owner/name", "refs/pr/1"),
        ),
    ],
)
def test_names_that_are_understood(name, wanted) -> None:
    assert tuple(hub.parsed(name)) == wanted


@pytest.mark.parametrize(
    "name", ["name", "./x", "../x", "a/b/c", "owner/na me", "owner/é", "@v1"]
)
def test_names_that_are_no_names_of_the_hub(name) -> None:
    assert hub.parsed(name) is None


@pytest.mark.parametrize(
    "address,words",
    [
        ("https://example.org/owner/name", "not an address of the Hub"),
        ("https://huggingface.co.evil.org/owner/name", "not an address of the Hub"),
        ("https://huggingface.co/spaces/a/b", "the address of no model"),
        ("https://huggingface.co/owner", "the address of no model"),
        ("https://huggingface.co/owner/na%20me", "the address of no model"),
        ("s3://bucket/model", "not an address of the Hub"),
        ("http://[", "is no address"),
    ],
)
def test_addresses_of_no_model_say_what_to_give(address, words) -> None:
    with pytest.raises(InputError, match=f"{words}: give a folder in diffusers"):
        hub.parsed(address)


def test_a_part_of_a_repository_is_not_taken_for_its_top() -> None:
    with pytest.raises(InputError, match="is a part of a repository, .* download"):
        hub.parsed("https://huggingface.co/owner/name/tree/main/sub/model")


def test_a_folder_here_is_not_looked_for_on_the_hub(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    with pytest.raises(InputError, match="no models/mint, and models is a folder here"):
        hub.find_folder("models/mint")


def test_what_else_may_be_weights_is_named(tmp_path, monkeypatch, caplog) -> None:
    """A variant is fetched where it is asked for; the log names what is left."""
    model = Model(Spec(TINY, Scheduling()), draw_params(TINY))
    convert.write_folder(tmp_path, model)
    plain = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    plain.rename(plain.with_name("diffusion_pytorch_model.ema.safetensors"))
    asked = []

    def snapshot_download(name, revision, allow_patterns, local_files_only):
        asked.append((name, revision, allow_patterns))
        return str(tmp_path)

    source = types.ModuleType("huggingface_hub")
    source.snapshot_download = snapshot_download
    source.list_repo_files = lambda name, revision: [
        "unet/diffusion_pytorch_model.ema.safetensors",
        "checkpoint-9/unet/diffusion_pytorch_model.bin",
        "odd\x1b[2J.ckpt",
        "README.md",
    ]
    monkeypatch.setitem(sys.modules, "huggingface_hub", source)
    with caplog.at_level(logging.WARNING):
        assert hub.find_folder("owner/name@v1", variant="ema") == tmp_path
    assert asked[0][:2] == ("owner/name", "v1")
    assert "unet/diffusion_pytorch_model.ema.safetensors" in asked[1][2]
    assert "checkpoint-9/unet/diffusion_pytorch_model.bin" in caplog.text
    assert "README" not in caplog.text and "\x1b" not in caplog.text
    assert ".ema." not in caplog.text
