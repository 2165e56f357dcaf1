"""The arrays in a file and the parameters of a network: compared, then read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from puredif_jax.files.whole import shortened
from puredif_jax.formats.diffusers_config import ConvertError
from puredif_jax.formats.entries import FLOATS, Entry
from puredif_jax.formats.state_dict import from_torch, torch_shapes
from puredif_jax.networks.base import Network
from puredif_jax.types import Params


def fitting(
    stored: Iterable[Entry],
    network: Network,
    home: object,
    renamed: Callable[[str], str],
) -> dict[str, Entry]:
    """The arrays of a network, by the names of its state dict; none is read.

    Args:
      stored: what lies in the files.
      network: the network.
      home: of the files, in messages.
      renamed: the name in the network's state dict, by that in the files.

    Raises:
      ConvertError: names, shapes or dtypes do not fit the network. "-" marks a name
        that is missing, "+" one too many.
    """
    wanted, found = torch_shapes(network), dict[str, Entry]()
    for entry in stored:
        name = renamed(entry.name)
        if name in found:
            first = found[name]
            raise ConvertError(
                f"{entry.file} has {entry.name}, which is also "
                f"{first.name} in {first.file.name}"
            )
        found[name] = entry
    missing = [f"-{name}" for name in wanted if name not in found]
    surplus = [f"+{name}" for name in found if name not in wanted]
    if missing or surplus:
        both = "; ".join(shortened(names) for names in (missing, surplus) if names)
        raise ConvertError(f"{home} does not have the weights expected: {both}")
    for name, need in wanted.items():
        entry = found[name]
        # Attention layers were 1x1 convolutions before diffusers 0.12, and in DDIM.
        if entry.dtype not in FLOATS or entry.shape not in (need, (*need, 1, 1)):
            raise ConvertError(
                f"{entry.file} has {entry.name} as {entry.dtype}"
                f"{list(entry.shape)}, expected one of {', '.join(FLOATS)} and "
                f"{list(need)}"
            )
    return found


def cast(found: Mapping[str, Entry]) -> tuple[str, ...]:
    """A remark on the dtypes that become float32, if there are any."""
    kinds = sorted({entry.dtype for entry in found.values()} - {"F32"})
    if not kinds:
        return ()
    return (f"weights of {' and '.join(kinds)} are cast to float32",)


def parameters(found: Mapping[str, Entry], network: Network) -> Params:
    """The parameters of a network from what `fitting` has found.

    Half and double precision become float32.

    Raises:
      ConvertError: a value is not finite.
    """
    tensors: dict[str, np.ndarray] = {}
    for name, need in torch_shapes(network).items():
        entry = found[name]
        value = entry.read().reshape(need)
        if not np.isfinite(value).all():
            raise ConvertError(f"{entry.file} has NaN or infinity in {entry.name}")
        tensors[name] = value
    return from_torch(tensors, network)
