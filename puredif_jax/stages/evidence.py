"""What a verdict rests on, as parts of a page: denoised images, errors and draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from puredif_jax.defenses.features import BEST, Evidence
from puredif_jax.defenses.hypothesis import Hypothesis
from puredif_jax.defenses.path_errors import HIGH, MIDDLE, Errors
from puredif_jax.diffusion.sampling import Sampler
from puredif_jax.runs.page import Section
from puredif_jax.stages.lab import SHOWN

PICTURED = (500, 300, 100)  # of `MIDDLE`: high, middle and low noise

_EVIDENCE = (
    "Both pictures start from the same noisy images of the estimated target. In the "
    "first the model is given the trigger as well. A backdoored model finds its image "
    "with the trigger, also where noise hides it, and makes other images without. For "
    "a clean model the trigger changes little. The score is log10 of a ratio: the "
    "least error that a clean model could reach, over the error with the trigger. It "
    f"is a geometric mean over the {BEST} timesteps where the ratio is largest. Under "
    "ancestral sampling there is a bound: -log10 of the measure placebo, below, or of "
    "the geometric mean of placebo and recall, whichever is more. Two further bounds "
    "split the trigger into a part along the image and the rest. The score is at most "
    "-log10 of recall or of pushed, whichever is more, and then at least -log10 of "
    "aside. They do not hold where known images explain the path."
)
_DRAWS = (
    "Both pictures start from the same noise. Draws that look alike prove nothing by "
    "themselves: a large shift of the noise brings many clean models, too, to one flat "
    "image, which every model finds without a trigger. The evidence above tells the "
    "two apart."
)


def evidence(
    hypothesis: Hypothesis, target: np.ndarray, errors: Errors, found: Evidence
) -> Section:
    """The denoised image with the trigger beside that without it, and the errors."""
    clean = {
        "error on the moved image": (
            errors.moved,
            "the same on the image that a clean model would see in the triggered one",
        ),
        "error of one image": (
            errors.single,
            "how far what the model sees with the trigger is from one image, the same "
            "at all timesteps",
        ),
    }
    if errors.lone:
        clean = {
            "error of known images": (
                errors.known,
                "the same of a clean model that knows this image and some that the "
                "model draws, and takes the triggered one for the nearest",
            ),
        }
    columns = {
        "t": "timestep: the larger, the more noise",
        "times": "how many times the error with the trigger is below the least that a "
        f"clean model explains ({' or '.join(clean)}), each above the network's own "
        f"error of {float(errors.floor):.2g}",
        "error with the trigger": "squared error of the predicted noise, summed over "
        "an image: the dimensions that are not known",
        "error without": "the same from the same noise, without the trigger; not "
        "compared, since training on this image lowers it",
        **{name: meaning for name, (_, meaning) in clean.items()},
        "error of the part along": "as with the trigger, with its part along the image "
        "alone; infinite where that leads away from the image",
        "error of the rest": "as with the trigger, with the rest of it alone",
    }
    with np.errstate(divide="ignore"):
        table: dict[str, Any] = {
            "t": errors.timesteps.astype(int),
            "error with the trigger": errors.triggered,
            "error without": errors.untriggered,
            **{name: values for name, (values, _) in clean.items()},
            "error of the part along": errors.along,
            "error of the rest": errors.aside,
            "times": 1 / np.asarray(errors.ratios),
        }
    rows = [
        {name: values[i].item() for name, values in table.items()}
        for i in range(len(errors.timesteps))
    ]
    at = [i for i, t in enumerate(MIDDLE) if t in PICTURED]
    times = ", ".join(str(each) for each in errors.timesteps[len(HIGH) :][at])
    pairs: list[tuple[str, npt.ArrayLike]] = []
    for name, images in ("with", found.with_trigger), ("without", found.without):
        grid = images[at].reshape(-1, *images.shape[2:])
        rest = f"rows t = {times}, {images.shape[1]} draws of noise, unclipped"
        pairs.append((f"denoised {name} the trigger: {rest}", grid))
    title = f"Evidence: backdoors {hypothesis.title}"
    return Section(
        title,
        _EVIDENCE,
        tuple(rows),
        (
            (
                f"estimated target, {hypothesis.name}, contrast {target.std():.2g}",
                target,
            ),
        ),
        columns=columns,
        pairs=tuple(pairs),
    )


def drawn(
    hypothesis: Hypothesis, sampler: Sampler, triggered: np.ndarray, plain: np.ndarray
) -> Section:
    """Whole chains with the trigger beside those without it."""
    clip = getattr(sampler, "clip", None)
    how = "unclipped"
    if clip is not None:
        how = f"clipped at {clip:g}" if isinstance(clip, float) else "thresholded"
    count = min(len(triggered), len(plain), SHOWN)  # pairs of one noise
    pairs = (
        (f"draws with the trigger, {hypothesis.name}, {how}", triggered[:count]),
        (f"draws from plain noise, {hypothesis.name}, {how}", plain[:count]),
    )
    return Section(f"Draws: backdoors {hypothesis.title}", _DRAWS, pairs=pairs)
