"""npz: archives that numpy wrote, and those that somebody else did."""

import io
import pathlib
import random
import tracemalloc
import zipfile

import numpy as np
import pytest

from puredif_jax.files import npz
from puredif_jax.files.npz import NpzError

ARRAYS = {
    "images": np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8),
    "labels": np.arange(5),
    "rate": np.float32(0.5),
    "names": np.array(["a", "bc"]),
    "turned": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "none": np.zeros((0, 4)),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_writes_is_read(tmp_path, save) -> None:
    path = tmp_path / "x.npz"
    save(path, **ARRAYS)
    found = npz.read(path)
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
    assert list(npz.read(path, ["labels"])) == ["labels"]
    assert str(npz.headers(path)["images"]) == "uint8 (5, 8, 8, 3)"


def member(shape: str, data: bytes = b"", descr: str = "'|u1'") -> bytes:
    """An .npy file whose header says what it likes."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def archive(path: pathlib.Path, method=zipfile.ZIP_DEFLATED, **members) -> pathlib.Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


@pytest.mark.parametrize(
    "content, words",
    [
        (member("(2, 2)", b"123"), "damaged: x.npy"),
        (member("(2, 2)", b"12345"), "damaged: x.npy"),
        (member("(99999, 99999, 99999)", b"1234"), "damaged: x.npy"),
        (member("(-1, -4)", b"1234"), "damaged one"),
        (member("2", b"12"), "damaged one"),
        (member("(2,)", b"12", "'nonsense'"), "damaged one"),
        (member("(" * 5000), "damaged one"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(99), "damaged one"),
        (b"\x93NUMPY\x09\x00" + bytes(99), "damaged one"),
        (b"no array", "damaged one"),
        (b"", "damaged one"),
        (member("(1,)", b"cbuiltins\nexit\n(tR.", "'|O'"), "Python objects in `x`"),
    ],
)
def test_a_member_that_is_not_what_it_says_is_refused(tmp_path, content, words):
    path = archive(tmp_path / "x.npz", x=content)
    with pytest.raises(NpzError, match=words):
        npz.read(path)


def test_more_than_is_allowed_is_not_unpacked(tmp_path) -> None:
    """100 MB of zeros: by the directory, and by a header that claims them."""
    path = tmp_path / "zeros.npz"
    np.savez_compressed(path, x=np.zeros(50_000_000, np.uint8), y=np.zeros(1))
    np.savez_compressed(path, x=np.zeros(100_000_000, np.uint8), y=np.zeros(1))
    assert path.stat().st_size < 200_000
    claims = archive(tmp_path / "claims.npz", x=member("(100_000_000,)", b"1234"))
    tracemalloc.start()
    with pytest.raises(NpzError, match="would unpack to 0.0931 GiB, and 0.0466 are"):
        npz.read(path, limit=50_000_000)
    with pytest.raises(NpzError, match="damaged"):
        npz.read(claims, limit=50_000_000)
    assert npz.read(path, ["y"], limit=50_000_000)["y"] == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6
    # What is read together counts together.
    np.savez(path, x=np.zeros(60, np.uint8), y=np.zeros(60, np.uint8))
    with pytest.raises(NpzError, match="would unpack"):
        npz.read(path, limit=100)


@pytest.mark.parametrize("wrong", [10, 1_000, 4_000_000_000])
def test_a_directory_that_lies_about_a_size_is_refused(tmp_path, wrong) -> None:
    """It says less or more than there is, and so does the header."""
    real = member("(200,)", bytes(200))
    lie = member(f"({wrong},)", bytes(200))
    path = archive(tmp_path / "x.npz", x=lie)
    size = len(lie).to_bytes(4, "little")
    said = (len(lie) - 200 + wrong).to_bytes(4, "little")
    content = path.read_bytes()
    at = content.rindex(size, 0, content.rindex(b"PK\x05\x06"))
    path.write_bytes(content[:at] + said + content[at + 4 :])
    tracemalloc.start()
    with pytest.raises(NpzError, match="damaged|would unpack"):
        npz.read(path, limit=2_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6
    assert npz.read(archive(path, x=real))["x"].shape == (200,)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressions_that_numpy_never_writes_are_refused(tmp_path, method) -> None:
    """zipfile unpacks them without a bound."""
    path = archive(tmp_path / "x.npz", method, x=member("(4,)", b"1234"))
    with pytest.raises(NpzError, match="compressed as numpy never does: x.npy"):
        npz.read(path)


def test_files_that_are_no_arrays_are_named(tmp_path) -> None:
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.png", b"")
    with pytest.raises(NpzError, match="no arrays: a.png"):
        npz.read(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_arrays_of_one_name_are_refused(tmp_path) -> None:
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as file:
        for data in (b"1234", b"5678"):
            file.writestr("x.npy", member("(4,)", data))
    with pytest.raises(NpzError, match="two files of one name: x.npy"):
        npz.read(path)


def test_what_is_not_there_is_named(tmp_path) -> None:
    with pytest.raises(NpzError, match="cannot be read .No such file"):
        npz.read(tmp_path / "nowhere.npz")
    np.savez(tmp_path / "x.npz", y=np.zeros(1), z=np.zeros(1))
    with pytest.raises(NpzError, match="no array `x`, but y, z"):
        npz.read(tmp_path / "x.npz", ["x"])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("seed", range(10))
def test_a_damaged_archive_is_never_read_wrongly(tmp_path, save, seed) -> None:
    """Bits flipped, or cut: the arrays are as they were, or it is said."""
    file, chance = io.BytesIO(), random.Random(seed)
    save(file, **ARRAYS)
    content = bytearray(file.getvalue())
    path = tmp_path / "x.npz"
    for _ in range(20):
        damaged = content.copy()
        for _ in range(chance.choice([1, 1, 3])):
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        if chance.random() < 0.2:
            del damaged[chance.randrange(len(damaged)) :]
        path.write_bytes(damaged)
        try:
            found = npz.read(path)
        except NpzError:
            continue
        assert list(found) == list(ARRAYS)
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(found[name], array, strict=True)
