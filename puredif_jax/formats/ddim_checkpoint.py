"""Checkpoint files of the DDIM and TrojDiff code bases.

Such a file holds the weights of one network, and little that says which: network and
image size follow from names and shapes of the arrays. The network is Ho et al.'s (2020)
in the layout of the DDIM code (Song et al. 2021, arXiv 2010.02502).

The file is a list: state dict, state of the optimiser, epoch, step and, where there is
one, the moving average of the weights. A port of the first DDPM models has the state
dict alone. A `config.yml` beside the file, as the code bases write it, is taken into
account.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import re
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

from puredif_jax.diffusion.sampling import unclipped
from puredif_jax.formats.base import Format, Spec
from puredif_jax.formats.ddim_config import CONFIG, Config, read_config
from puredif_jax.formats.diffusers_config import ConvertError, Remarks
from puredif_jax.formats.entries import Entry, tensors, unpickled
from puredif_jax.formats.fitting import cast, fitting, parameters
from puredif_jax.formats.opening import of_system
from puredif_jax.formats.scheduling import Samplers, Scheduling
from puredif_jax.networks.fields import MOST_BLOCKS
from puredif_jax.networks.unet import UNet
from puredif_jax.types import Params

SUFFIXES = (".pth", ".ckpt", ".pt")
ATTENTION = 16  # side of the resolution at which the published networks attend
_MARK = b"temb.dense.0.weight"  # a name that no other layout has
_LONGEST_HEAD = 2**22  # bytes in which it is looked for
_GROUPS = 32  # of every norm, in the code
_PARTS = 5  # of the list

_NAMES = {
    r"temb\.dense\.0": "time_embedding.linear_1",
    r"temb\.dense\.1": "time_embedding.linear_2",
    r"norm_out": "conv_norm_out",
    r"mid\.block_1": "mid_block.resnets.0",
    r"mid\.attn_1": "mid_block.attentions.0",
    r"mid\.block_2": "mid_block.resnets.1",
    r"down\.(\d+)\.block\.": r"down_blocks.\1.resnets.",
    r"down\.(\d+)\.attn\.": r"down_blocks.\1.attentions.",
    r"down\.(\d+)\.downsample\.": r"down_blocks.\1.downsamplers.0.",
    r"up\.(\d+)\.block\.": r"up_blocks.\1.resnets.",
    r"up\.(\d+)\.attn\.": r"up_blocks.\1.attentions.",
    r"up\.(\d+)\.upsample\.": r"up_blocks.\1.upsamplers.0.",
}
_OF_BLOCK = {"temb_proj": "time_emb_proj", "nin_shortcut": "conv_shortcut"}
_OF_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}


@dataclasses.dataclass(frozen=True)
class DDIMScheduling(Scheduling):
    """Sampling as TrojDiff's code does it: x0hat is bounded by DDPM, and not by DDIM.

    The variance of a step of DDPM is the smaller one; in the DDIM code it is beta_t.
    """

    def samplers(self, steps: int) -> Samplers:
        found = super().samplers(steps)
        free = unclipped(found.deterministic)
        return found if free is None else found._replace(deterministic=free)


class DDIMCheckpoint(Format):
    """A checkpoint file; it is opened once for all that is asked of it in turn.

    Arrays are read by PyTorch's weights-only loading, which executes nothing; this
    needs the extra "torch". The moving average is taken, unless config.yml says that
    the code draws from the raw weights. Betas are linear from 1e-4 to 0.02 in 1,000
    timesteps, unless config.yml says otherwise. A scheduler of
    diffusers has no effect.
    """

    name = "a checkpoint file of DDIM"

    def knows(self, path: pathlib.Path) -> bool:
        if path.suffix.lower() not in SUFFIXES or not os.path.isfile(path):
            return False
        return not of_system(path) and _MARK in _head(path)

    def spec(self, path: pathlib.Path, scheduler: str | None = None) -> Spec:
        config = read_config(path.with_name(CONFIG))
        found = _open(path, config.ema)
        shapes = {name: entry.shape for name, entry in found.entries.items()}
        remarks = [found.remark]
        network = read_network(shapes, path, config, remarks)
        if config.betas is None:
            remarks.append(
                f"{path} does not name its schedule: betas are linear from 1e-4 to "
                "0.02 in 1000 timesteps, as in the published configurations"
            )
            return Spec(network, DDIMScheduling(), remarks=tuple(remarks))
        return Spec(network, DDIMScheduling(config.betas), remarks=tuple(remarks))

    def check(self, path: pathlib.Path, spec: Spec) -> tuple[str, ...]:
        return cast(self._fitting(path, spec))

    def read(self, path: pathlib.Path, spec: Spec) -> Params:
        params = parameters(self._fitting(path, spec), spec.network)
        _opened.cache_clear()  # the arrays of one file are enough
        return params

    def files(self, path: pathlib.Path) -> list[pathlib.Path]:
        return [path]

    def _fitting(self, path: pathlib.Path, spec: Spec) -> dict[str, Entry]:
        entries = _open(path, read_config(path.with_name(CONFIG)).ema).entries
        renamed = functools.partial(diffusers_name, levels=_levels(entries, path))
        stored = [entry._replace(name=name) for name, entry in entries.items()]
        return fitting(stored, spec.network, path, renamed)


class _Checkpoint(NamedTuple):
    """The arrays that are taken, by their names in the code, and why these."""

    entries: Mapping[str, Entry]
    remark: str


def _head(path: pathlib.Path) -> bytes:
    """The bytes in which a file of PyTorch names its arrays, if it is one."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                names = (x for x in file.namelist() if x.endswith("/data.pkl"))
                if (name := next(names, None)) is None:
                    return b""
                with file.open(name) as member:
                    return member.read(_LONGEST_HEAD)
        with path.open("rb") as plain:
            return plain.read(_LONGEST_HEAD)
    except Exception:  # of many kinds: then it is a file that no format knows
        return b""


def _open(path: pathlib.Path, ema: bool) -> _Checkpoint:
    try:
        stat = path.stat()
    except OSError as error:
        raise ConvertError(f"there is no file {path}") from error
    return _opened(path, ema, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=1)
def _opened(path: pathlib.Path, ema: bool, changed: int, size: int) -> _Checkpoint:
    """What lies in a file, as long as it stays the same."""
    state, remark = _taken(unpickled(path), path, ema)
    entries: dict[str, Entry] = {}
    for entry in tensors(path, state):
        name = entry.name.removeprefix("module.")
        if name in entries:
            raise ConvertError(f"{path} has {name} with and without 'module.'")
        entries[name] = entry
    return _Checkpoint(entries, remark)


def _taken(found: Any, path: pathlib.Path, ema: bool) -> tuple[Any, str]:
    """The state dict from which the code draws, and a remark on the choice."""
    if isinstance(found, dict):
        return found, f"{path} has one set of weights, which may be a moving average"
    if (
        not isinstance(found, list)
        or not 1 <= len(found) <= _PARTS
        or not isinstance(found[0], dict)
    ):
        many = f" of {len(found)}" if isinstance(found, list) else ""
        raise ConvertError(
            f"{path} holds a {type(found).__name__}{many}: expected a state dict, or a "
            "list of it, the optimiser's state, the epoch, the step and the moving "
            "average"
        )
    if len(found) < _PARTS or not isinstance(found[-1], dict):
        return found[0], f"{path} has no moving average: the raw weights are taken"
    if ema:
        return found[-1], (
            f"of {path} the moving average of the weights is taken, as its code draws; "
            "the raw ones are another set, which is not scanned"
        )
    return found[0], (
        f"of {path} the raw weights are taken, since its {CONFIG} has model.ema false; "
        "their moving average is not scanned"
    )


def diffusers_name(name: str, levels: int) -> str:
    """The diffusers name of an array, by its name in the code; others stay the same.

    Args:
      name: without "module.".
      levels: resolutions of the network; the code counts up blocks from the highest.
    """
    for before, new in _NAMES.items():
        replaced, count = re.subn(rf"^{before}", new, name)
        if not count:
            continue
        if match := re.match(r"up_blocks\.(\d+)\.", replaced):
            at = levels - 1 - int(match[1])
            replaced = f"up_blocks.{at}.{replaced[match.end() :]}"
        *home, part, leaf = replaced.split(".")
        if ".attentions." in replaced:
            part = _OF_ATTENTION.get(part, part)
        elif ".resnets." in replaced:
            part = _OF_BLOCK.get(part, part)
        return ".".join([*home, part, leaf])
    return name


def _levels(names: Mapping[str, Any], path: pathlib.Path) -> int:
    found = {int(m[1]) for x in names if (m := re.match(r"down\.(\d{1,4})\.", x))}
    if not found or {*found} != {*range(len(found))} or len(found) > MOST_BLOCKS:
        raise ConvertError(
            f"{path} must have blocks down.0 to down.{MOST_BLOCKS - 1} at most, "
            f"without a gap, found {sorted(found)[:MOST_BLOCKS]}"
        )
    return len(found)


def read_network(
    shapes: Mapping[str, tuple[int, ...]],
    path: pathlib.Path,
    config: Config,
    remarks: Remarks,
) -> UNet:
    """The network whose arrays have these shapes.

    Args:
      shapes: in PyTorch's order, by the names in the code.
      path: in messages.
      config: what config.yml says.
      remarks: takes where the size of images comes from.

    Raises:
      ConvertError: it is no such network, or its image size is not known.
    """
    levels = _levels(shapes, path)

    def shape(name: str) -> tuple[int, ...]:
        if len(found := shapes.get(name, ())) != 4:
            raise ConvertError(f"{path} has no kernel {name} of four axes")
        return found

    def attends(side: str, level: int) -> bool:
        return any(name.startswith(f"{side}.{level}.attn.") for name in shapes)

    first = shape("conv_in.weight")
    widths = tuple(shape(f"down.{i}.block.0.conv1.weight")[0] for i in range(levels))
    layers = sum(
        re.fullmatch(r"down\.0\.block\.\d+\.conv1\.weight", x) is not None
        for x in shapes
    )
    side = _side(
        config, [i for i in range(levels) if attends("down", i)], path, remarks
    )
    down, up = (
        tuple(f"{'Attn' if attends(way.lower(), i) else ''}{way}Block2D" for i in order)
        for way, order in (("Down", range(levels)), ("Up", range(levels - 1, -1, -1)))
    )
    try:
        return UNet(
            sample_size=(side, side),
            in_channels=first[1],
            block_out_channels=widths,
            down_block_types=down,
            up_block_types=up,
            layers_per_block=layers,
            norm_num_groups=_GROUPS,
            norm_eps=1e-6,
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1.0,
        )
    except ValueError as error:
        raise ConvertError(f"{path} is not a network of DDIM: {error}") from error


def _side(
    config: Config, attending: list[int], path: pathlib.Path, remarks: Remarks
) -> int:
    """The side of an image, in pixels."""
    if config.image_size is not None:
        return config.image_size
    if len(attending) != 1:
        levels = ", ".join(map(str, attending)) or "none"
        raise ConvertError(
            f"{path} does not tell the size of its images: the published networks "
            f"attend at one resolution, {ATTENTION}x{ATTENTION}, and this one at the "
            f"levels {levels}: put its {CONFIG} with data.image_size beside it"
        )
    side = ATTENTION << attending[0]
    remarks.append(
        f"{path} does not name the size of its images: it is {side}x{side} if the "
        f"network attends at {ATTENTION}x{ATTENTION}, as the published ones do"
    )
    return side
