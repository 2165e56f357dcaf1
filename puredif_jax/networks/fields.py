"""Which values the fields of a network may have; each check names what it found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

# More is a mistake, or meant to keep the reader busy.
MOST_BLOCKS = 32
WIDEST = 2**14  # of a width or a side


class Levels(Protocol):
    """The fields of a network that say what it is built of."""

    @property
    def sample_size(self) -> tuple[int, int]: ...
    @property
    def in_channels(self) -> int: ...
    @property
    def block_out_channels(self) -> tuple[int, ...]: ...
    @property
    def down_block_types(self) -> tuple[str, ...]: ...
    @property
    def up_block_types(self) -> tuple[str, ...]: ...
    @property
    def layers_per_block(self) -> int: ...
    @property
    def attention_head_dim(self) -> int | None: ...


def check_whole(name: str, found: Any) -> None:
    """Raises ValueError for what is not a whole number from 1 to `WIDEST`."""
    if type(found) is not int or not 1 <= found <= WIDEST:
        raise ValueError(
            f"{name} must be a whole number from 1 to {WIDEST}, found {found!r}"
        )


def check_levels(
    network: Levels, down_blocks: Sequence[str], up_blocks: Sequence[str]
) -> None:
    """Raises ValueError for an invalid width, depth or type of block."""
    widths, levels = network.block_out_channels, len(network.block_out_channels)
    for name in ("block_out_channels", "sample_size"):
        for found in getattr(network, name):
            check_whole(f"each of {name}", found)
    if network.attention_head_dim is not None:
        check_whole("attention_head_dim", network.attention_head_dim)
    if not 1 <= levels * network.layers_per_block <= MOST_BLOCKS:
        raise ValueError(
            f"a network may have 1 to {MOST_BLOCKS} blocks on its way down, found "
            f"block_out_channels={widths[:MOST_BLOCKS]} with layers_per_block="
            f"{network.layers_per_block}"
        )
    for name, valid in (("down", down_blocks), ("up", up_blocks)):
        found = getattr(network, f"{name}_block_types")
        if len(found) != levels or any(kind not in valid for kind in found):
            raise ValueError(
                f"{name}_block_types needs {levels} names out of "
                f"{', '.join(valid)}, found {found}"
            )


def attending(network: Levels) -> list[tuple[int, bool]]:
    """Each width, and whether a block attends at it; the middle block does."""
    last = len(network.block_out_channels) - 1
    types = zip(
        network.block_out_channels,
        network.down_block_types,
        reversed(network.up_block_types),
        strict=True,
    )
    return [
        (width, down.startswith("Attn") or up.startswith("Attn") or i == last)
        for i, (width, down, up) in enumerate(types)
    ]


def check_heads(network: Levels, width: int) -> None:
    """Raises ValueError where a width with attention is no multiple of a head's."""
    if width % (network.attention_head_dim or 1):
        raise ValueError(
            f"the width of a block with attention must be a multiple of "
            f"attention_head_dim={network.attention_head_dim}, found {width}"
        )


def check_sides(network: Levels) -> None:
    """Raises ValueError for a side that cannot be halved at every level but one."""
    levels = len(network.block_out_channels)
    factor = 2 ** (levels - 1)
    if len(network.sample_size) != 2 or any(n % factor for n in network.sample_size):
        raise ValueError(
            f"{levels} resolutions need a sample_size of two multiples of {factor},"
            f" found {network.sample_size}"
        )


def check_numbers(network: Levels, *bounds: tuple[str, float, float]) -> None:
    """Raises ValueError for a field that is not a number from a least to a most."""
    for name, least, most in bounds:
        found = getattr(network, name)
        if type(found) not in (int, float) or not least <= found <= most:
            raise ValueError(
                f"{name} must be a number from {least} to {most}, found {found!r}"
            )


def check_choices(network: Levels, *pairs: tuple[str, tuple[Any, Any]]) -> None:
    """Raises ValueError for a field that is neither of two values."""
    for name, choices in pairs:
        found = getattr(network, name)
        if type(found) is not type(choices[0]) or found not in choices:
            raise ValueError(
                f"{name} must be {choices[0]} or {choices[1]}, found {found}"
            )
