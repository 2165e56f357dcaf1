"""Writes the model card of the shipped clean model: loss by timestep, sample grid.

    python benchmarks/model_card.py

Half a minute on two CPU cores. Writes the README.md of the shipped model `clean` and
docs/clean.png.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from puredif_jax.data import images as data
from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.diffusion.prediction import diffuse
from puredif_jax.diffusion.sampling import sample
from puredif_jax.diffusion.schedules import LinearBetas
from puredif_jax.formats import diffusers as convert
from puredif_jax.networks.unet import SHIPPED
from puredif_jax.stages.weights import ZOO

TIMESTEPS = (0, 10, 50, 100, 200, 300, 400, 500, 600, 700, 800, 900, 999)
CARD = """# clean

A diffusion model of garments at 16x16 in grey, for tests and tutorials of puredif_jax.

- Network: `puredif_jax.networks.unet.SHIPPED`, {count:,} parameters, float32.
- Data: the 10,000 training images of Fashion-MNIST in the package (MIT).
- Training: configs/pretrain.py: 8,000 steps of 64 images, Adam at 1e-3 with cosine
  decay, moving average 0.999, seed 0; linear betas 1e-4 to 0.02, T = 1000.
- Sample grid, DDIM-50: docs/clean.png.
- Not for any other use than research on backdoors: it draws nothing but small garments.

Denoising loss, mean || M(x_t, t) - eps ||^2 per pixel, on the 2,000 test images:

| t | loss |
| --- | --- |
{rows}
"""


def main() -> None:
    schedule = LinearBetas().tables()
    params = convert.read_folder(ZOO / "clean").params
    images = data.to_float(data.FashionMNIST("test").load(SHIPPED.image_shape))

    @jax.jit
    def loss(params, images, t, key):
        eps = jax.random.normal(key, images.shape)
        times = jnp.full((len(images),), t)
        return jnp.mean(
            (SHIPPED(params, diffuse(schedule, images, eps, times), times) - eps) ** 2
        )

    rows = [
        f"| {t} | {float(loss(params, images, t, jax.random.key(t))):.4f} |"
        for t in TIMESTEPS
    ]
    count = sum(x.size for x in jax.tree.leaves(params))
    (ZOO / "clean/README.md").write_text(CARD.format(count=count, rows="\n".join(rows)))

    @jax.jit
    def draw(params, key):
        start = jax.random.normal(key, (64, *SHIPPED.image_shape))
        return sample(SHIPPED, params, schedule, DDIM(50), start, key)

    drawn = np.clip(np.asarray(draw(params, jax.random.key(0)))[..., 0], -1, 1)
    grid = drawn.reshape(8, 8, 16, 16).transpose(0, 2, 1, 3).reshape(128, 128)
    picture = Image.fromarray(((grid + 1) * 127.5).astype(np.uint8))
    docs = pathlib.Path(__file__).parent.parent / "docs"
    picture.resize((512, 512), Image.Resampling.NEAREST).save(docs / "clean.png")


if __name__ == "__main__":
    main()
