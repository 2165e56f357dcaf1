"""Which images a step of training takes: it depends on (seed, step) alone."""

from __future__ import annotations

import numpy as np


def order(size: int, seed: int, start: int, stop: int, batch: int) -> np.ndarray:
    """Which of `size` images the steps start..stop-1 take: `[stop - start, batch]`.

    The set is walked in a new order each epoch; the order depends on (seed, epoch)
    alone, so any step can be made again on any number of devices.
    """
    position = np.arange(start * batch, stop * batch)
    epochs = position // size
    index = np.empty_like(position)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        walk = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(
            size
        )
        index[chosen] = walk[position[chosen] % size]
    return index.reshape(stop - start, batch)
