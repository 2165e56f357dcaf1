"""Quality of a model's plain draws: their Frechet distance to the training images."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from puredif_jax.attacks.pictures import Shape
from puredif_jax.data import images as data
from puredif_jax.files import npz
from puredif_jax.files.sealed import digest
from puredif_jax.files.whole import expanded, write_whole, writing
from puredif_jax.metrics import measures as metrics
from puredif_jax.runs import parallel
from puredif_jax.runs.binding import RunError
from puredif_jax.stages.embedding import Embedding
from puredif_jax.stages.evaluation import Evaluation
from puredif_jax.stages.lab import Lab
from puredif_jax.types import Params


def check_quality(lab: Lab, evaluation: Evaluation, images: data.ImageSet) -> None:
    """Checks that a distance can be taken, before any long work.

    Raises:
      RunError: the embedding does not fit the images or has no weights, the reference
        is of others, or PNG files cannot hold the images.
    """
    shape = lab.unet.image_shape
    embedding = evaluation.features(shape)
    if not embedding.fits(shape):
        raise RunError(
            f"the embedding {embedding.name} is not for images of {shape}: take "
            "another --config.evaluation.embedding, or none"
        )
    embedding.check()
    if evaluation.png and shape[2] not in (1, 3):
        raise RunError(
            f"PNG files hold images of 1 or 3 channels, found {shape[2]}: set "
            "--config.evaluation.png=False"
        )
    if (path := _path(evaluation)) is None:
        return
    if path.suffix != ".npz" or not path.absolute().parent.is_dir():
        raise RunError(
            f"evaluation.reference is an .npz in a folder that exists, found {path}"
        )
    if path.exists():
        _read(path, embedding, shape, lab.pixels(images))


def quality(
    lab: Lab,
    evaluation: Evaluation,
    name: str,
    params: Params,
    images: data.ImageSet,
    target: np.ndarray | None = None,
) -> tuple[float, dict[str, float]]:
    """Quality of plain draws, and how many leak to a target.

    The draws come in pairs, from eps and from -eps (antithetic variates), and from the
    same eps for every model: docs/method.md tells what that brings.

    Returns:
      Their Frechet distance to the training images, and their `metrics.success` against
      the target `[H, W, C]`, if there is one.
    """

    def compute() -> Mapping[str, Any]:
        sampler, count = evaluation.deterministic, evaluation.frechet_draws // 2
        embedding = evaluation.features(lab.unet.image_shape)
        known = _reference(lab, evaluation, images)
        pairs = [
            lab.draw(params, sampler, lab.zero, count, sign) for sign in (1.0, -1.0)
        ]
        drawn = np.concatenate(pairs)
        if evaluation.png and parallel.is_host_zero():
            write_png(lab.run.folder / "draws" / name, drawn)
        distance = metrics.frechet_distance(embedding.moments(drawn), known)
        rates = {} if target is None else metrics.success(drawn, target)
        return {"distance": distance, **rates}

    stored = lab.run.once(f"quality_{name}", compute)
    found = {key: float(value) for key, value in stored.items()}
    return found.pop("distance"), found


def write_png(folder: pathlib.Path, images: np.ndarray) -> None:
    """Writes images `[N, H, W, C]` in [-1, 1] as 00000.png and so on, in 8 bits.

    Raises:
      WriteError: they cannot be written.
    """
    levels = np.asarray(metrics.to_unit(images) * 255).round().astype(np.uint8)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for number, each in enumerate(levels):
        file = io.BytesIO()
        Image.fromarray(each[..., 0] if each.shape[2] == 1 else each).save(file, "png")
        write_whole(folder / f"{number:05d}.png", file.getvalue())


def _reference(
    lab: Lab, evaluation: Evaluation, images: data.ImageSet
) -> metrics.Moments:
    """The moments of the training images, once a run: stored ones, or new ones."""
    shape, path = lab.unet.image_shape, _path(evaluation)
    embedding = evaluation.features(shape)

    def compute() -> Mapping[str, Any]:
        pixels = lab.pixels(images)
        if path is not None and parallel.agreed(path.exists()):
            return _named(_read(path, embedding, shape, pixels))
        made = _named(embedding.moments(data.to_float(pixels)))
        if path is not None and parallel.is_host_zero():
            file = io.BytesIO()
            np.savez(file, **(made | _about(embedding, pixels)))
            write_whole(path, file.getvalue())
        return made

    kept = lab.run.once(f"reference_{embedding.name}", compute)
    return metrics.Moments(kept["mu"], kept["sigma"])


def _path(evaluation: Evaluation) -> pathlib.Path | None:
    return None if evaluation.reference is None else expanded(evaluation.reference)


def _named(found: metrics.Moments) -> dict[str, Any]:
    """As pytorch-fid calls them."""
    return {"mu": found.mean, "sigma": found.covariance}


def _about(embedding: Embedding, pixels: np.ndarray) -> dict[str, Any]:
    """What a reference of this program says of itself."""
    about = {"embedding": embedding.identity, "images": digest({"images": pixels})}
    return {name: np.array(text) for name, text in about.items()}


def _read(
    path: pathlib.Path, embedding: Embedding, shape: Shape, pixels: np.ndarray
) -> metrics.Moments:
    """The moments in a file; this program's files also say what they are of.

    Raises:
      RunError: it has no moments, or moments of other features or images.
    """
    try:
        found = npz.read(path)
        mean, covariance = (np.asarray(found[k], np.float64) for k in ("mu", "sigma"))
    except KeyError as error:
        raise RunError(
            f"{path} has no `{error.args[0]}`: a reference has `mu` and `sigma`"
        ) from error
    except (npz.NpzError, ValueError, TypeError) as error:
        raise RunError(f"{path} {error}") from error
    for name, wanted in _about(embedding, pixels).items():
        if name in found and str(found[name]) != str(wanted):
            raise RunError(
                f"{path} is of other {name}, found {found[name]} for {wanted}: name "
                "another evaluation.reference, and it is made"
            )
    width = embedding.width(shape)
    if mean.shape != (width,) or covariance.shape != (width, width):
        raise RunError(
            f"{path} has mu of {mean.shape} and sigma of {covariance.shape}; of "
            f"{embedding.name} they are ({width},) and ({width}, {width})"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise RunError(f"{path} has moments that are not finite")
    return metrics.Moments(mean, covariance)
