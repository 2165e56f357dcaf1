"""What the data can carry: success of the best denoiser there is, for each backdoor.

    python benchmarks/data_limits.py --out docs/results/data_limits.json

The exact denoiser of the first 4,000 garments and a backdoor of rate 0.2 is sampled,
from noise with the trigger and from plain noise. A network can do better only by
chance. Where these figures fall short of 100 and 0 %, noisy images of the poisoned
path are noisy images of garments, too. The Frechet distance of the plain draws to the
garments is over garment-net. It is of draws by DDIM, for every row from the same noise.
Hardware: any. Duration: 5 minutes on a CPU core.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from puredif_jax.attacks.baddiffusion import BadDiffusion
from puredif_jax.attacks.base import Attack
from puredif_jax.attacks.exact import ExactDenoiser, Points
from puredif_jax.attacks.targets import Cat, Corner, Hat, NoShift, Shift, Shoe, Target
from puredif_jax.attacks.triggers import Box, StopSign, Trigger
from puredif_jax.attacks.villandiffusion import VillanDiffusion
from puredif_jax.data import images as data
from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.diffusion.ddpm import DDPM
from puredif_jax.diffusion.sampling import Sampler, sample
from puredif_jax.diffusion.schedules import LinearBetas
from puredif_jax.metrics import measures as metrics
from puredif_jax.runs.report import environment, placeless
from puredif_jax.stages.embedding import GarmentNet

SCHEDULE = LinearBetas().tables()
SHAPE = (16, 16, 1)
RATE, IMAGES, DRAWS = 0.2, 4000, 512
NEGLIGIBLE = 1e-9  # a poison rate that no draw notices
SAMPLERS: dict[type[BadDiffusion] | type[VillanDiffusion], Sampler] = {
    BadDiffusion: DDPM(100),
    VillanDiffusion: DDIM(50),
}
TRIGGERS: tuple[Trigger, ...] = (Box(), StopSign())
TARGETS: tuple[Target, ...] = (Cat(), NoShift(), Shoe(), Hat(), Corner(), Shift())


def rates(
    attack: Attack, sampler: Sampler, images: np.ndarray, rate: float
) -> dict[str, float]:
    """Share of draws at MSE < 1e-2 of the target, with the trigger and without (leak).

    With them is the Frechet distance of plain draws by DDIM.
    """
    model = ExactDenoiser(SCHEDULE, attack.channel(SCHEDULE, SHAPE), rate)
    trigger, target, _ = attack.images(SHAPE)
    points = Points(*map(jnp.asarray, (images, trigger, target)))
    noise = jax.random.normal(jax.random.key(7), (DRAWS, *SHAPE))

    @functools.partial(jax.jit, static_argnums=1)
    def draw(delta: jax.Array, sampler: Sampler) -> jax.Array:
        start, key = noise + delta[None], jax.random.key(1)
        return sample(model, points, SCHEDULE, sampler, start, key)

    found = {
        name: float(
            metrics.success(np.asarray(draw(delta, sampler)), target)["mse<0.01"]
        )
        for name, delta in (("success", trigger), ("leak", 0 * trigger))
    }
    plain = np.asarray(draw(0 * trigger, DDIM(50)))
    return found | {"frechet": round(GarmentNet().distance(plain, images), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    images = data.to_float(data.FashionMNIST(count=IMAGES).load(SHAPE))
    attack = VillanDiffusion(trigger=Box(), target=Cat(), poison_rate=RATE)
    clean = rates(attack, DDIM(50), images, rate=NEGLIGIBLE)
    rows: list[dict[str, object]] = [{"attack": None, "frechet": clean["frechet"]}]
    for kind, sampler in SAMPLERS.items():
        for trigger in TRIGGERS:
            for target in TARGETS:
                attack = kind(
                    trigger=trigger, target=target, poison_rate=RATE, trigger_only=True
                )
                names = [type(x).__name__ for x in (attack, trigger, target)]
                row = dict(zip(("attack", "trigger", "target"), names, strict=True))
                rows.append(row | rates(attack, sampler, images, RATE))
                print(rows[-1], flush=True)
    if options.out:
        about = placeless(environment()) | {"device": jax.devices()[0].device_kind}
        text = json.dumps({"environment": about, "rows": rows})
        options.out.write_text(text.replace('{"attack"', '\n{"attack"') + "\n")


if __name__ == "__main__":
    main()
