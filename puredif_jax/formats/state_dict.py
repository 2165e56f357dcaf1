"""PyTorch's state dict of a network of diffusers, and the parameters of ours."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from puredif_jax.networks.base import Network
from puredif_jax.types import Params

# Modules that PyTorch keeps in lists.
_NUMBERED = (
    "down_blocks up_blocks resnets attentions downsamplers upsamplers to_out".split()
)
# Other modules that have modules.
_PARENTS = (
    "encoder decoder quantize mid_block time_embedding resnet_down resnet_up".split()
)
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "embedding": "weight",
    "weight": "weight",
}
# Names of attention layers before diffusers 0.12.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def from_torch(tensors: Mapping[str, np.ndarray], network: Network) -> Params:
    """Parameters of ours from the arrays of a PyTorch state dict, by its names."""

    def leaf(path: Any, like: Any) -> np.ndarray:
        value = tensors[torch_name(path)]
        if _is_kernel(path):  # OIHW to HWIO, (out, in) to (in, out)
            value = np.moveaxis(value, (0, 1), (-1, -2))
        return np.ascontiguousarray(value, like.dtype)

    return jax.tree.map_with_path(leaf, _abstract(network))


def to_torch(params: Params) -> dict[str, np.ndarray]:
    """The PyTorch state dict of parameters, as NumPy arrays."""
    tensors = {}
    for path, value in jax.tree.leaves_with_path(params):
        value = np.asarray(value)
        if _is_kernel(path):
            value = np.moveaxis(value, (-1, -2), (0, 1))
        tensors[torch_name(path)] = np.ascontiguousarray(value)
    return tensors


def torch_name(path: Any) -> str:
    """PyTorch's name of the parameter at a path of ours."""
    *modules, leaf = (entry.key for entry in path)
    name = "_".join(modules)
    for numbered in _NUMBERED:
        name = re.sub(rf"{numbered}_(\d+)_?", rf"{numbered}.\1.", name)
    for parent in _PARENTS:
        name = re.sub(rf"(^|\.){parent}_", rf"\1{parent}.", name)
    return f"{name.strip('.')}.{_LEAVES[leaf]}"


def _is_kernel(path: Any) -> bool:
    """Whether PyTorch has the axes of a parameter in another order."""
    return bool(path[-1].key == "kernel")


@functools.lru_cache(maxsize=4)
def _abstract(network: Network) -> Any:
    return jax.eval_shape(network.init, jax.random.key(0))


def named_leaves(network: Network) -> dict[str, Any]:
    """The shapes of the parameters, by their names in PyTorch."""
    leaves = jax.tree.leaves_with_path(_abstract(network))
    return {torch_name(path): leaf for path, leaf in leaves}


def torch_shapes(network: Network) -> dict[str, tuple[int, ...]]:
    """The shapes in PyTorch, by its names."""
    return {
        torch_name(path): torch_shape(leaf.shape) if _is_kernel(path) else leaf.shape
        for path, leaf in jax.tree.leaves_with_path(_abstract(network))
    }


def torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A kernel's shape as PyTorch has it: HWIO as OIHW, (in, out) as (out, in)."""
    return (*shape[:-3:-1], *shape[:-2])


def new_name(name: str) -> str:
    """Today's name of a parameter by its name in any version of diffusers."""
    return re.sub(
        r"(?<=\.)(query|key|value|proj_attn)(?=\.(weight|bias)$)",
        lambda found: _OLD_NAMES[found[1]],
        name,
    )
