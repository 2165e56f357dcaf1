"""The weights in a network's folder: which files hold them, and what lies in those.

diffusers may keep several in one folder: one file or shards with an index, safetensors
or a pickle, and variants such as "fp16" or "ema". Nothing in a file is executed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import pathlib
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import safetensors

from puredif_jax.files.whole import shortened
from puredif_jax.formats.diffusers_config import ConvertError

STEM = "diffusion_pytorch_model"
WEIGHTS = f"{STEM}.safetensors"
INDEX = f"{WEIGHTS}.index.json"
PICKLE = f"{STEM}.bin"
TRUTH = "truth.safetensors"  # a trigger and a target, to compare with
MOST_COMPARED = 2**30  # numbers of an array
LARGEST_JSON = 10_000_000  # bytes
LONGEST_NAME = 200  # characters of a shard's

FLOATS = {
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
}  # bits of the kinds that are read
_TORCH = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}

_VARIANT = r"(?:\.(?P<variant>(?![\w.-]*-\d{5}-of-\d{5}\.)[\w.-]+))?"
_KIND = r"(?P<kind>safetensors|bin)"
# The files that name weights, as diffusers writes them, and as it did with variants.
_PRINCIPALS = (
    re.compile(rf"{STEM}\.{_KIND}\.index(?:\.(?P<variant>[\w-]+))?\.json"),
    re.compile(rf"{STEM}\.{_KIND}\.(?P<variant>[\w-]+)\.index\.json"),
    re.compile(rf"{STEM}{_VARIANT}\.{_KIND}"),
)


SUFFIXES = {
    ".safetensors": "safetensors",
    **dict.fromkeys(
        ".bin .pt .pth .ckpt .pkl .pickle .joblib .dill .th .torch .t7 .ot".split(),
        "a pickle",
    ),
    **dict.fromkeys(".pt2 .pte .distcp".split(), "PyTorch"),
    **dict.fromkeys(".msgpack .eqx".split(), "Flax"),
    **dict.fromkeys(".npz .npy .mat".split(), "arrays"),
    **dict.fromkeys(".h5 .hdf5 .keras .pb .tflite .index".split(), "TensorFlow"),
    **dict.fromkeys(".zarray .ocdbt".split(), "Orbax"),
    **dict.fromkeys(".pdparams .pdmodel .params".split(), "Paddle or MXNet"),
    **dict.fromkeys(".onnx .onnx_data".split(), "ONNX"),
    **dict.fromkeys(".dduf .gguf .ggml .engine .weights .model".split(), "a model"),
    **dict.fromkeys(".mlmodel .mlpackage".split(), "Core ML"),
    **dict.fromkeys(
        ".zip .tar .gz .tgz .bz2 .xz .lzma .lz4 .zst .7z .rar".split(), "packed"
    ),
}
"""What a file may be that holds a network, by a suffix in its name."""

HARMLESS = set(
    ".json .jsonl .txt .md .rst .py .ipynb .yaml .yml .toml .cfg .ini .sh .log .lock "
    ".png .jpg .jpeg .gif .bmp .webp .svg .pdf .html .css .js .csv .tsv .xml "
    ".gitattributes .gitignore".split()
)
"""Suffixes of files that hold no network."""

_PLAIN_NAMES = re.compile(r"checkpoint(_\d+)?|flax_model|.*\.data-\d+-of-\d+")
LARGE = 100_000  # bytes; a smaller file of an unknown kind holds no network


def may_hold(path: pathlib.Path) -> str | None:
    """What kind of network a file may hold, by its name and size; None for none."""
    name = path.name.lower().rstrip("~")
    suffixes = pathlib.PurePath(name).suffixes
    if suffixes and suffixes[-1] in HARMLESS:
        return None
    for suffix in reversed(suffixes):
        if suffix in SUFFIXES:
            return SUFFIXES[suffix]
    if path.name == "_CHECKPOINT_METADATA":
        return "Orbax"
    if _PLAIN_NAMES.fullmatch(name):
        return "a checkpoint"
    try:
        large = path.is_file() and path.stat().st_size >= LARGE
    except OSError:
        large = False
    return "unknown" if large else None


class WeightSet(NamedTuple):
    """Files that hold the weights of one network together.

    principal: the one file, or the index of the shards.
    variant: such as "fp16"; None for the weights that diffusers loads if not asked.
    pickled: whether they are pickles.
    """

    principal: pathlib.Path
    variant: str | None
    pickled: bool

    @property
    def rank(self) -> tuple[bool, str, bool, bool]:
        """By which diffusers prefers: shards before one file, pickles last.

        Of pickles one file comes first: shards of them are loaded only if asked for.
        """
        index = self.principal.suffix == ".json"
        return (
            self.variant is not None,
            self.variant or "",
            self.pickled,
            index == self.pickled,
        )

    def files(self) -> list[pathlib.Path]:
        """The files that hold arrays, in order.

        Raises:
          ConvertError: an index that is none, or that names files of another folder.
        """
        if self.principal.suffix != ".json":
            return [self.principal]
        return _shards(self.principal, "bin" if self.pickled else "safetensors")

    def label(self) -> str:
        """A short name among the sets of a folder."""
        kind = "bin" if self.pickled else "safetensors"
        shards = "-shards" if self.principal.suffix == ".json" else ""
        return f"{self.variant or kind}{shards}"


def weight_sets(folder: pathlib.Path) -> list[WeightSet]:
    """All weights in a network's folder, those that diffusers prefers first.

    Raises:
      ConvertError: the folder cannot be read.
    """
    found = []
    for path in listed(folder):
        for pattern in _PRINCIPALS:
            if match := pattern.fullmatch(path.name):
                pickled = match["kind"] == "bin"
                found.append(WeightSet(path, match["variant"], pickled))
                break
    return sorted(found, key=lambda each: each.rank)


def of_file(path: pathlib.Path) -> WeightSet | None:
    """The weights whose principal file this is, if it is one of its folder."""
    if not path.parent.is_dir():
        return None
    named = (each for each in weight_sets(path.parent) if each.principal == path)
    return next(named, None)


def choose(folder: pathlib.Path, variant: str | None = None) -> WeightSet:
    """The weights that diffusers' `from_pretrained` takes, or the only ones there are.

    Raises:
      ConvertError: there are none of this variant, or none without a variant and
        several with.
    """
    sets = weight_sets(folder)
    for each in sets:
        if each.variant == variant and each.principal.is_file():
            return each
    for each in sets:
        if each.variant == variant:  # a link to nowhere
            raise ConvertError(f"there is no file {each.principal}")
    variants = sorted({each.variant for each in sets if each.variant})
    if variant is None and len(variants) == 1:
        return sets[0]
    if variant is not None:
        plain = ", and one without a variant" if len(sets) > len(variants) else ""
        have = f"the folder has {shortened(variants) if variants else 'none'}{plain}"
        raise ConvertError(
            f"{folder} has no weights of the variant {variant!r}: {have}"
        )
    if variants:
        raise ConvertError(
            f"{folder} has weights of several variants only, {shortened(variants)}: "
            "give --config.variant"
        )
    others = [p.name for p in listed(folder) if p.suffix in (".safetensors", ".bin")]
    raise ConvertError(
        f"{folder} has none of {WEIGHTS}, {INDEX} and {PICKLE}"
        + (f"; {shortened(others)} has another name" if others else "")
    )


def unreadable(path: object, error: OSError) -> ConvertError:
    """The error for a file or folder that the system does not give."""
    reason = error.strerror or type(error).__name__
    return ConvertError(f"{path} cannot be read ({reason})")


def listed(folder: pathlib.Path) -> list[pathlib.Path]:
    """What lies in a folder, sorted; raises ConvertError where it cannot be read."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise unreadable(folder, error) from error


class Entry(NamedTuple):
    """An array in a file, not read yet; `name` is its name in the file.

    dtype: of `FLOATS`, or another one by its name.
    read: returns it in float32, a wider one rounded.
    """

    file: pathlib.Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


@contextlib.contextmanager
def entries(chosen: WeightSet) -> Iterator[list[Entry]]:
    """The arrays of some weights, open.

    Raises:
      ConvertError: a file is missing, damaged, or not what its name says.
    """
    with contextlib.ExitStack() as files:
        found: list[Entry] = []
        for path in chosen.files():
            if chosen.pickled:
                found += _pickled(path)
            else:
                found += _stored(files.enter_context(_open(path)), path)
        yield found


def same(first: WeightSet, second: WeightSet) -> bool:
    """Whether two hold the same arrays, as far as the coarser of their dtypes tells.

    Raises:
      ConvertError: one cannot be read.
    """
    with entries(first) as one, entries(second) as other:
        theirs = {entry.name: entry for entry in other}
        if {entry.name for entry in one} != theirs.keys():
            return False
        return all(_equal(entry, theirs[entry.name]) for entry in one)


def _equal(one: Entry, other: Entry) -> bool:
    if math.prod(one.shape) > MOST_COMPARED:
        return False
    if one.shape != other.shape or not {one.dtype, other.dtype} <= FLOATS.keys():
        return False
    coarse = min(one.dtype, other.dtype, key=lambda kind: FLOATS[kind])
    if {one.dtype, other.dtype} == {"F16", "BF16"}:
        return False
    kind = {"F16": "float16", "BF16": "bfloat16"}.get(coarse, "float32")
    with np.errstate(over="ignore"):
        first, second = (x.read().astype(np.dtype(kind)) for x in (one, other))
    return bool(np.array_equal(first, second))


def _stored(file: Any, path: pathlib.Path) -> Iterable[Entry]:
    """The arrays of an open safetensors file."""

    def read(name: str) -> np.ndarray:
        with np.errstate(over="ignore"):  # infinity is named by who reads
            return np.asarray(file.get_tensor(name)).astype(np.float32)

    for name in file.keys():  # noqa: SIM118
        head = file.get_slice(name)
        shape = tuple(head.get_shape())
        yield Entry(path, name, head.get_dtype(), shape, functools.partial(read, name))


def _pickled(path: pathlib.Path) -> Iterable[Entry]:
    """The arrays of a pickle, if PyTorch finds nothing else in it."""
    _explain(path)
    try:
        import torch
    except ImportError as error:
        raise ConvertError(
            f"{path} is a pickle: to read its arrays and nothing else, install the "
            f"extra 'torch', or store it as {WEIGHTS}"
        ) from error
    _refuse_packed(path)
    try:
        with warnings.catch_warnings():  # about the version of a pickle
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds; what they advise is not passed on
        raise ConvertError(
            f"{path} is not a pickle of arrays alone{_other_parts(path)}, and is not "
            "read: nothing in it was executed"
        ) from error
    if not isinstance(found, dict) or not all(
        isinstance(name, str)
        and isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
        for name, value in found.items()
    ):
        raise ConvertError(f"{path} is not a pickle of named, dense arrays")

    def read(value: Any) -> np.ndarray:
        whole = value.detach().resolve_conj().resolve_neg()
        return whole.to(torch.float32).numpy()

    for name, value in found.items():
        kind = str(value.dtype).removeprefix("torch.")
        shape = tuple(value.shape)
        yield Entry(
            path, name, _TORCH.get(kind, kind), shape, functools.partial(read, value)
        )


def _other_parts(path: pathlib.Path) -> str:
    """What a pickle would call, as far as PyTorch can tell without loading it."""
    import torch

    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a pickle at all, or one of an old kind
        return ""
    return f" (it would call {shortened(sorted(found))})" if found else ""


def _refuse_packed(path: pathlib.Path) -> None:
    """PyTorch stores arrays as they are; a packed file may unpack to any size."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as file:
            unpacked = sum(part.file_size for part in file.infolist())
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        raise ConvertError(f"{path} is not a whole pickle ({error})") from error
    if unpacked > path.stat().st_size:
        raise ConvertError(
            f"{path} is packed: its {path.stat().st_size} bytes unpack to {unpacked}, "
            "which PyTorch does not write, and it is not read"
        )


def _shards(index: pathlib.Path, kind: str) -> list[pathlib.Path]:
    """The files that an index names, all of its folder."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ConvertError(f"{index} has no weight_map")
    files = sorted({str(name) for name in names.values()})
    for name in files:
        if pathlib.PurePath(name).name != name or "\\" in name:
            raise ConvertError(f"{index} names {name!r}, outside its folder")
        if not name.endswith(f".{kind}") or len(name) > LONGEST_NAME:
            article = "safetensors" if kind == "safetensors" else ".bin"
            raise ConvertError(
                f"{index} names {name[:80]!r}: a shard is a {article} file"
            )
    return [index.parent / name for name in files]


def _open(path: pathlib.Path) -> Any:
    _explain(path)
    try:
        return safetensors.safe_open(path, "numpy")
    except (safetensors.SafetensorError, OSError) as error:
        reason = str(error)
        if "not fully covered" in reason:
            reason = "it is incomplete, or has been cut: fetch it again"
        raise ConvertError(f"{path} is not a safetensors file: {reason}") from error


def _explain(path: pathlib.Path) -> None:
    """Says what a broken download has left in the place of a file.

    Raises:
      ConvertError: there is no file; it is empty, a pointer of Git LFS or a web page.
    """
    if not path.is_file():
        raise ConvertError(f"there is no file {path}")
    try:
        with path.open("rb") as file:
            start = file.read(200)
    except OSError as error:
        raise unreadable(path, error) from error
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        raise ConvertError(f"{path} is empty: fetch it again")
    if text.startswith(b"version https://git-lfs"):
        raise ConvertError(
            f"{path} is a pointer of Git LFS, not the file: run 'git lfs pull' there"
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise ConvertError(f"{path} is a web page (HTML), not the file: fetch it again")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      ConvertError: it cannot be read, is larger than `LARGEST_JSON`, or is no object.
    """
    _explain(path)
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ConvertError(f"{path} is larger than {LARGEST_JSON} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ConvertError):
            raise
        raise ConvertError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConvertError(f"{path} holds no JSON object")
    return found
