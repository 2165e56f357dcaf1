"""Makes ddim_checkpoint.npz: outputs of a network of the DDIM code, to check ours.

The network is written here from its published description (Ho et al. 2020, in the
layout of the code of Song et al. 2021), by PyTorch and with the names of that code.
Run, in an environment of its own (the package does not need PyTorch):

    pip install torch==2.13.0
    python tests/golden/make_ddim_checkpoint.py

Weights, images and times are not stored: `draw` makes them again from the seed. For
each configuration NAME the file has `NAME_output`, float32 `[B, C, H, W]`, and
`NAME_parameters`, one "name d0,d1,..." for each entry of the state dict, sorted.
tests/test_formats.py imports this file for what needs NumPy only.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

SEED = 20262
OUTPUT = Path(__file__).parent / "ddim_checkpoint.npz"
GROUPS = 32

# Of the published settings, with their least width; the golden images are smaller.
CONFIGS: dict[str, dict[str, Any]] = {
    "cifar10": dict(
        ch=32, ch_mult=(1, 2, 2), blocks=1, channels=3, attention=(1,), side=16
    ),
    "single": dict(ch=32, ch_mult=(1,), blocks=1, channels=1, attention=(0,), side=16),
    "celeba": dict(
        ch=32, ch_mult=(1, 1, 2, 1), blocks=2, channels=1, attention=(2,), side=16
    ),
}
TIMES = (0, 1, 500, 999)

Shapes = dict[str, tuple[int, ...]]


def draw(name: str, shapes: Shapes) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Weights by name, and images `[B, C, H, W]`, from the seed.

    Kernels have variance 1 / fan-in, biases and the scales' distance from 1 have
    standard deviation 0.1 and 0.2: nothing vanishes, nothing grows much.
    """
    rng = np.random.default_rng(SEED)
    weights = {}
    for key in sorted(shapes):
        value = rng.standard_normal(shapes[key])
        if key.endswith("bias"):
            value = 0.1 * value
        elif len(shapes[key]) == 1:
            value = 1 + 0.2 * value
        else:
            value = value / math.sqrt(math.prod(shapes[key][1:]))
        weights[key] = value.astype(np.float32)
    config = CONFIGS[name]
    batch = (len(TIMES), config["channels"], config["side"], config["side"])
    return weights, rng.standard_normal(batch).astype(np.float32)


def model(name: str):
    """The network of a configuration."""
    import torch
    from torch import nn
    from torch.nn import functional

    config = CONFIGS[name]
    torch.set_num_threads(1)

    def norm(channels: int) -> nn.Module:
        return nn.GroupNorm(GROUPS, channels, eps=1e-6)

    def swish(x):
        return x * torch.sigmoid(x)

    def sinusoids(t, width: int):
        half = width // 2
        steps = torch.arange(half, dtype=torch.float32) / (half - 1)
        angles = t.float()[:, None] * torch.exp(-math.log(10000) * steps)[None]
        return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)

    class Block(nn.Module):
        def __init__(self, inward: int, outward: int, times: int) -> None:
            super().__init__()
            self.norm1 = norm(inward)
            self.conv1 = nn.Conv2d(inward, outward, 3, padding=1)
            self.temb_proj = nn.Linear(times, outward)
            self.norm2 = norm(outward)
            self.conv2 = nn.Conv2d(outward, outward, 3, padding=1)
            if inward != outward:
                self.nin_shortcut = nn.Conv2d(inward, outward, 1)

        def forward(self, x, temb):
            h = self.conv1(swish(self.norm1(x)))
            h = h + self.temb_proj(swish(temb))[:, :, None, None]
            h = self.conv2(swish(self.norm2(h)))
            return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)

    class Attention(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.norm = norm(channels)
            for part in ("q", "k", "v", "proj_out"):
                setattr(self, part, nn.Conv2d(channels, channels, 1))

        def forward(self, x):
            h = self.norm(x)
            q, k, v = (part(h).flatten(2) for part in (self.q, self.k, self.v))
            scores = torch.einsum("bci,bcj->bij", q, k) / math.sqrt(x.shape[1])
            out = torch.einsum("bij,bcj->bci", scores.softmax(-1), v)
            return x + self.proj_out(out.reshape(x.shape))

    class Down(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(channels, channels, 3, stride=2)

        def forward(self, x):
            return self.conv(functional.pad(x, (0, 1, 0, 1)))

    class Up(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)

        def forward(self, x):
            return self.conv(functional.interpolate(x, scale_factor=2.0))

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            ch, blocks, times = config["ch"], config["blocks"], 4 * config["ch"]
            widths = [ch * times for times in config["ch_mult"]]
            attends, last = config["attention"], len(config["ch_mult"]) - 1
            self.temb = nn.Module()
            self.temb.dense = nn.ModuleList(
                [nn.Linear(ch, times), nn.Linear(times, times)]
            )
            self.conv_in = nn.Conv2d(config["channels"], ch, 3, padding=1)
            self.down, self.up = nn.ModuleList(), nn.ModuleList()
            skips, inward = [ch], ch
            for i, width in enumerate(widths):
                level = nn.Module()
                level.block, level.attn = nn.ModuleList(), nn.ModuleList()
                for _ in range(blocks):
                    level.block.append(Block(inward, width, times))
                    inward = width
                    if i in attends:
                        level.attn.append(Attention(width))
                    skips.append(width)
                if i < last:
                    level.downsample = Down(width)
                    skips.append(width)
                self.down.append(level)
            self.mid = nn.Module()
            self.mid.block_1 = Block(inward, inward, times)
            self.mid.attn_1 = Attention(inward)
            self.mid.block_2 = Block(inward, inward, times)
            for i in reversed(range(len(widths))):
                level = nn.Module()
                level.block, level.attn = nn.ModuleList(), nn.ModuleList()
                for _ in range(blocks + 1):
                    both = inward + skips.pop()
                    level.block.append(Block(both, widths[i], times))
                    inward = widths[i]
                    if i in attends:
                        level.attn.append(Attention(inward))
                if i:
                    level.upsample = Up(inward)
                self.up.insert(0, level)
            self.norm_out = norm(inward)
            self.conv_out = nn.Conv2d(inward, config["channels"], 3, padding=1)

        def forward(self, x, t):
            temb = self.temb.dense[0](sinusoids(t, config["ch"]))
            temb = self.temb.dense[1](swish(temb))
            skips = [self.conv_in(x)]
            for level in self.down:
                for i, block in enumerate(level.block):
                    h = block(skips[-1], temb)
                    skips.append(level.attn[i](h) if level.attn else h)
                if hasattr(level, "downsample"):
                    skips.append(level.downsample(skips[-1]))
            h = self.mid.attn_1(self.mid.block_1(skips[-1], temb))
            h = self.mid.block_2(h, temb)
            for level in reversed(self.up):
                for i, block in enumerate(level.block):
                    h = block(torch.cat([h, skips.pop()], dim=1), temb)
                    h = level.attn[i](h) if level.attn else h
                if hasattr(level, "upsample"):
                    h = level.upsample(h)
            return self.conv_out(swish(self.norm_out(h)))

    return Network().eval()


def compute(name: str) -> tuple[Shapes, np.ndarray]:
    """The shapes of the state dict, and the output for what `draw` makes."""
    import torch

    network = model(name)
    shapes = {k: tuple(v.shape) for k, v in network.state_dict().items()}
    weights, images = draw(name, shapes)
    network.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
    with torch.no_grad():
        out = network(torch.from_numpy(images), torch.tensor(TIMES))
    return shapes, out.numpy()


def main() -> None:
    arrays: dict[str, np.ndarray] = {}
    for name in CONFIGS:
        shapes, output = compute(name)
        lines = [f"{k} {','.join(map(str, v))}" for k, v in sorted(shapes.items())]
        arrays |= {f"{name}_output": output, f"{name}_parameters": np.array(lines)}
    np.savez_compressed(OUTPUT, **arrays)


if __name__ == "__main__":
    main()
