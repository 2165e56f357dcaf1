"""The weights in a network's folder: which files hold them, and which are taken.

diffusers may keep several in one folder: one file or shards with an index, safetensors
or a pickle, and variants such as "fp16" or "ema". `puredif_jax.formats.entries` reads
what lies in the files.
"""

from __future__ import annotations

import os
import pathlib
import re
from typing import NamedTuple

from puredif_jax.files.whole import shortened
from puredif_jax.formats.diffusers_config import ConvertError
from puredif_jax.formats.opening import listed, read_json

STEM = "diffusion_pytorch_model"
WEIGHTS = f"{STEM}.safetensors"
INDEX = f"{WEIGHTS}.index.json"
PICKLE = f"{STEM}.bin"
TRUTH = "truth.safetensors"  # a backdoor, to compare with
TRUTH_IMAGES, TRUTH_TABLES = ("trigger", "target", "gamma"), ("shift", "response")
LONGEST_NAME = 200  # characters of a shard's

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
        """The order of diffusers' preference: shards before one file, pickles last.

        Among pickles one file comes first: their shards are loaded only if asked for.
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
          ConvertError: the index is damaged, or names files of another folder.
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
    """All weights in a network's folder, in the order of diffusers' preference.

    Raises:
      ConvertError: the folder cannot be read.
    """
    found = filter(None, map(_named, listed(folder)))
    return sorted(found, key=lambda each: each.rank)


def of_file(path: pathlib.Path) -> WeightSet | None:
    """The weights whose principal file this is, if it is there and is one."""
    return _named(path) if os.path.lexists(path) else None


def _named(path: pathlib.Path) -> WeightSet | None:
    """The weights that a file of this name is the principal one of."""
    for pattern in _PRINCIPALS:
        if match := pattern.fullmatch(path.name):
            return WeightSet(path, match["variant"], match["kind"] == "bin")
    return None


def choose(folder: pathlib.Path, variant: str | None = None) -> WeightSet:
    """The weights that diffusers' `from_pretrained` takes, or the only ones there are.

    Raises:
      ConvertError: there are none of this variant; or there are several variants only,
        and none is given.
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
