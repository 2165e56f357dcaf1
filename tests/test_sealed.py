"""Files that carry their digest: every damage is found, or changes nothing."""

import json

import numpy as np
import pytest

from puredif_jax.files.sealed import (
    DamagedError,
    digest,
    read_arrays,
    read_json,
    seal,
    write_arrays,
)

ARRAYS = {
    "delta": np.arange(6, dtype=np.float32).reshape(2, 3),
    "seconds": np.float64(3.5),
    "none": np.zeros((0, 2), np.int32),
}


@pytest.mark.parametrize(
    "other",
    [
        {"delta": ARRAYS["delta"].reshape(3, 2)},
        {"delta": ARRAYS["delta"].view(np.int32)},
        {"delta": -ARRAYS["delta"]},
        {"none": np.zeros((0, 3), np.int32)},
        {"more": np.zeros(1)},
    ],
)
def test_a_digest_is_of_names_types_shapes_and_values(other) -> None:
    assert digest(ARRAYS) == digest(dict(reversed(ARRAYS.items())))
    assert digest(ARRAYS) == digest({**ARRAYS, "delta": np.array(ARRAYS["delta"].T).T})
    assert digest(ARRAYS | other) != digest(ARRAYS)


def test_a_flipped_bit_never_changes_an_array_without_a_word(tmp_path) -> None:
    """In any byte of the file; and wherever it is cut."""
    path = tmp_path / "found.npz"
    write_arrays(path, ARRAYS)
    content, found = path.read_bytes(), 0
    damaged = [content[:cut] for cut in range(0, len(content), 7)]
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        damaged.append(bytes(flipped))
    for harmed in damaged:
        path.write_bytes(harmed)
        try:
            arrays = read_arrays(path)
        except DamagedError as error:
            assert "found.npz is damaged" in str(error) and "\n" not in str(error)
            found += 1
        else:
            assert digest(arrays) == digest(ARRAYS)
    assert found > len(damaged) / 2
    path.write_bytes(content)
    for name, array in read_arrays(path).items():
        np.testing.assert_array_equal(array, ARRAYS[name], strict=True)


def test_arrays_without_their_digest_are_not_ours(tmp_path) -> None:
    np.savez(tmp_path / "found.npz", **ARRAYS)
    for name in ("found.npz", "missing.npz"):
        with pytest.raises(DamagedError, match=f"{name} is damaged"):
            read_arrays(tmp_path / name)


def test_a_flipped_bit_of_an_object_is_found(tmp_path) -> None:
    path = tmp_path / "report.json"
    text = json.dumps(seal({"p": 0.905, "verdict": "clean", "rows": [1, None]}))
    for place in range(len(text)):
        flipped = bytearray(text.encode())
        flipped[place] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(DamagedError, match="report.json is damaged"):
            read_json(path)
    path.write_text(text)
    assert read_json(path)["p"] == 0.905
    for other in ("[1]", "7", "", "[" * 100_000):
        path.write_text(other)
        with pytest.raises(DamagedError):
            read_json(path)
