"""Makes inception.npz: features of FID's Inception, by torchvision's network.

    pip install torch==2.13.0
    pip install --no-deps torchvision==0.28.0
    python tests/golden/make_inception.py

The network is torchvision's Inception v3, with random weights (`weights`) and the two
changes of FID: average pooling leaves out the margin, and the last block takes a
maximum. Images are brought to 299x299 by PyTorch. Of the package nothing is used.
"""

from __future__ import annotations

import importlib
import importlib.util
import pathlib
import sys
import types

import numpy as np

OUTPUT = pathlib.Path(__file__).parent / "inception.npz"


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Random values by which no layer's answers grow or vanish, float32."""
    rng = np.random.default_rng(17)
    found = {}
    for name in sorted(shapes):
        shape = shapes[name]
        if name.endswith("conv.weight"):
            value = rng.normal(size=shape) * (2 / np.prod(shape[1:])) ** 0.5
        elif name.endswith(("running_var", "bn.weight")):
            value = rng.uniform(0.5, 1.5, shape)
        else:
            value = 0.1 * rng.normal(size=shape)
        found[name] = value.astype(np.float32)
    return found


def images() -> np.ndarray:
    """Two colour images in [-1, 1], smaller than the network's, `[2, 24, 16, 3]`."""
    rng = np.random.default_rng(18)
    return rng.uniform(-1, 1, (2, 24, 16, 3)).astype(np.float32)


def network():
    """torchvision's module, by its file alone: its compiled parts are not needed."""
    top = pathlib.Path(importlib.util.find_spec("torchvision").origin).parent
    for name in ("torchvision", "torchvision.models", "torchvision.transforms"):
        bare = types.ModuleType(name)
        bare.__path__ = [str(top.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = bare
    presets = types.ModuleType("torchvision.transforms._presets")
    presets.ImageClassification = dict  # anything that can be called
    sys.modules[presets.__name__] = presets
    return importlib.import_module("torchvision.models.inception")


def main() -> None:
    import torch
    from torch.nn import functional as F

    module = network()
    mean, most = F.avg_pool2d, F.max_pool2d
    module.F.avg_pool2d = lambda x, **how: mean(x, **how, count_include_pad=False)
    net = module.Inception3(aux_logits=False, init_weights=False).eval()
    parts = ("conv.weight", "bn.weight", "bn.bias", "running_mean", "running_var")
    shapes = {
        name: tuple(value.shape)
        for name, value in net.state_dict().items()
        if name.endswith(parts)
    }
    values = {name: torch.tensor(x) for name, x in weights(shapes).items()}
    net.load_state_dict(values, strict=False)

    def maximum(x):
        """The last block, whose pool is a maximum."""
        module.F.avg_pool2d = lambda x, **how: most(x, **how)
        return plain(x)

    plain = net.Mixed_7c.forward
    net.Mixed_7c.forward = maximum
    net.fc = torch.nn.Identity()
    x = torch.tensor(images().transpose(0, 3, 1, 2))
    size = {"size": (299, 299), "mode": "bilinear", "align_corners": False}
    with torch.no_grad():
        found = net(F.interpolate(x, **size)).numpy()
    assert found.shape == (2, 2048)
    np.savez_compressed(OUTPUT, features=found)
    print(f"{OUTPUT}: {found.mean():.3g} on average, {found.std():.3g} apart")


if __name__ == "__main__":
    main()
