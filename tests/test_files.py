"""Files are there whole or not at all."""

import os

import pytest

from puredif_jax.files.whole import WriteError, shortened, write_whole


def test_a_file_is_replaced_whole(tmp_path) -> None:
    path = tmp_path / "found.json"
    write_whole(path, b"one")
    write_whole(str(path), b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["found.json"]


def test_a_write_that_fails_leaves_the_file_before(tmp_path, monkeypatch) -> None:
    path = tmp_path / "found.json"
    write_whole(path, b"one")

    def full(number: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match="found.json cannot be written .no space"):
        write_whole(path, b"two")
    assert path.read_bytes() == b"one"
    assert [p.name for p in tmp_path.iterdir()] == ["found.json"]


def test_processes_do_not_share_their_partial_files(tmp_path, monkeypatch) -> None:
    """One that is half way while another of its number writes the same file."""
    path = tmp_path / "found.json"
    replace = os.replace

    def meanwhile(partial, final) -> None:
        monkeypatch.setattr(os, "replace", replace)
        write_whole(path, b"other")
        assert partial.read_bytes() == b"mine"
        replace(partial, final)

    monkeypatch.setattr(os, "replace", meanwhile)
    write_whole(path, b"mine")
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize(
    "count,shown",
    [(0, ""), (1, "0"), (5, "0, 1, 2, 3, 4"), (7, "0, 1, 2, 3, 4, 2 more")],
)
def test_names_are_shortened(count: int, shown: str) -> None:
    assert shortened([str(i) for i in range(count)]) == shown
