"""Images and curves as PNG files within a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

from puredif_jax.types import shown

Lines = Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]]

_GREY = "#767d86"  # of axes: readable on a light and on a dark page


def picture(caption: str, pixels: npt.ArrayLike) -> str:
    """An image, or a grid in rows of eight, in its own pixels; nan is transparent.

    Images of neither 1 nor 3 channels are shown channel by channel, in grey, side by
    side. A caption that starts with "difference" is drawn in blue and red around 0.

    Raises:
      ValueError: the shape is neither `[H, W, C]` nor `[N, H, W, C]`.
    """
    from PIL import Image

    images = np.asarray(pixels, np.float32)
    if images.ndim not in (3, 4):
        found = f"picture {caption!r} has shape {images.shape}"
        raise ValueError(f"{found}: expected [H, W, C] or [N, H, W, C]")
    if not images.size:
        return "(no images)"
    width = 128 if images.ndim == 3 else 64
    images = images.reshape(-1, *images.shape[-3:])
    columns = min(len(images), 8)
    if (channels := images.shape[-1]) not in (1, 3):
        images = np.moveaxis(images, -1, 1).reshape(-1, *images.shape[1:3], 1)
        columns = channels
    scale = max(1, round(width / images.shape[-2]))
    gaps = ((0, -len(images) % columns), (0, 1), (0, 1), (0, 0))
    tiles = np.pad(images, gaps, constant_values=np.nan)
    rows = tiles.reshape(-1, columns, *tiles.shape[1:])
    grid = np.vstack([np.hstack(row) for row in rows])[:-1, :-1]
    if caption.lower().startswith("difference"):
        colours, key = _signed(grid)
    else:
        alpha = np.isfinite(grid).all(-1, keepdims=True) * 2 - 1
        rgba = np.dstack([np.broadcast_to(grid, (*grid.shape[:2], 3)), alpha])
        levels = np.nan_to_num((rgba + 1) * 127.5).round().clip(0, 255)
        colours, key = levels.astype(np.uint8), ""
    image = Image.fromarray(colours)
    return _img(image.save, caption, image.width * scale, "pixels") + key


def _signed(grid: np.ndarray) -> tuple[np.ndarray, str]:
    """Blue below 0, red above, by the channel that differs most; and a colour bar."""
    import matplotlib
    from PIL import Image

    most = np.nan_to_num(np.abs(grid)).argmax(-1, keepdims=True)
    values = np.take_along_axis(grid, most, -1)[..., 0]
    limit = np.abs(values[np.isfinite(values)]).max(initial=0) or 1.0
    colours = matplotlib.colormaps["RdBu_r"]  # nan is transparent
    ramp = Image.fromarray(colours(np.linspace(0, 1, 64)[None], bytes=True))
    key = f"{-limit:.3g} {_img(ramp.save, 'to', 64, 'ramp')} {limit:.3g}"
    pixels = colours((values / limit + 1) / 2, bytes=True)
    return pixels, f'<div class="key">{key}</div>'


def curves(caption: str, lines: Lines) -> str:
    """Named lines on one pair of axes, logarithmic over more than two decades.

    Lines named after scouts are thin and grey, and one of them is in the legend.
    """
    from matplotlib.figure import Figure

    plot = Figure((6.4, 3.2), dpi=200, facecolor="none", layout="constrained")
    axes = plot.add_subplot(facecolor="none", frame_on=False)
    scouts = [name for name in lines if "scout" in name]
    for name, (x, y) in lines.items():
        style: dict[str, Any] = {"label": name.replace("$", r"\$")}  # not a formula
        if name in scouts:
            label = "scouts" if name == scouts[0] else None
            style = {"label": label, "color": _GREY, "linewidth": 0.6, "zorder": 1}
        axes.plot(np.ravel(x), np.ravel(y), marker="." * (np.size(y) == 1), **style)
    if 0 < 100 * axes.dataLim.ymin < axes.dataLim.ymax:  # of what is finite
        axes.set_yscale("log")
    axes.grid(color=_GREY, alpha=0.25, linewidth=0.6)
    axes.tick_params(colors=_GREY, which="both", length=0)
    if lines:
        axes.legend(frameon=False, labelcolor=_GREY)
    return _img(plot.savefig, caption, 640, "plot")


def _img(save: Callable[..., object], alt: str, width: int, kind: str) -> str:
    file = io.BytesIO()
    save(file, format="png")
    data = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    text = escape(shown(alt))
    return f'<img class="{kind}" width="{width}" alt="{text}" src="{data}">'
