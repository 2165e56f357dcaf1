"""Trains the feature network of the Frechet distance and writes it to the package.

    python benchmarks/train_garment_net.py

About a minute on two CPU cores; prints the accuracy on the 2,000 test images.
"""

import importlib.resources
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from puredif_jax.data import images as data
from puredif_jax.metrics import garment_net
from puredif_jax.runs import weight_file

STEPS, BATCH, SEED = 1500, 128, 0


def load(split: str) -> tuple[np.ndarray, np.ndarray]:
    images = data.to_float(data.FashionMNIST(split).load((16, 16, 1)))
    path = (
        importlib.resources.files("puredif_jax") / f"assets/fashion_mnist_{split}.npz"
    )
    with path.open("rb") as file:
        return images, np.load(file, allow_pickle=False)["labels"].astype(np.int32)


def main() -> None:
    images, labels = load("train")
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, STEPS))
    params = garment_net.init(jax.random.key(SEED))

    def loss(params, x, y):
        logits = garment_net.classify(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(params, state, x, y):
        updates, state = optimizer.update(jax.grad(loss)(params, x, y), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    rng = np.random.default_rng(SEED)
    for _ in range(STEPS):
        pick = rng.integers(0, len(images), BATCH)
        params, state = step(params, state, images[pick], labels[pick])
    test_images, test_labels = load("test")
    guess = jnp.argmax(jax.jit(garment_net.classify)(params, test_images), axis=-1)
    accuracy = float((np.asarray(guess) == test_labels).mean())
    path = pathlib.Path(str(importlib.resources.files("puredif_jax"))) / "assets"
    metadata = {"name": garment_net.NAME, "test_accuracy": f"{accuracy:.3f}"}
    weight_file.save_weights(path / "garment-net.safetensors", params, metadata)
    print(f"test accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
