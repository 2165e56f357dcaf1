"""What Elijah takes from other libraries: LPIPS and a random forest."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from puredif_jax.defenses.uniformity import PairDistance, Statistics
from puredif_jax.runs.binding import RunError


@dataclasses.dataclass(frozen=True)
class LPIPS(PairDistance):
    """LPIPS over VGG (Zhang et al. 2018, arXiv 1801.03924), by the package `lpips`.

    Grey images are shown in three equal channels. The weights of VGG are torchvision's,
    which it downloads once.

    Attributes:
      pretrained: False leaves the network random, for tests.
    """

    pretrained: bool = True

    name = "lpips-vgg"

    def check(self) -> None:
        _lpips(self.pretrained)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        torch, network = _lpips(self.pretrained)
        shown = np.asarray(images, np.float32) * 2 - 1
        if shown.shape[3] == 1:
            shown = np.repeat(shown, 3, axis=3)
        batch = torch.from_numpy(shown.transpose(0, 3, 1, 2).copy())
        with torch.no_grad():
            rows = [
                network(x[None].expand_as(batch), batch).reshape(-1).numpy()
                for x in batch
            ]
        return np.stack(rows)


@functools.cache
def _lpips(pretrained: bool) -> tuple[Any, Any]:
    """PyTorch, and the network.

    Raises:
      RunError: the package is not installed, or its weights cannot be had.
    """
    try:
        import lpips
        import torch
    except (ImportError, RuntimeError) as error:  # the latter of torchvision
        raise RunError(
            "LPIPS needs the package lpips, with a torchvision that fits torch: "
            f"pip install -e '.[lpips]' ({error})"
        ) from error
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = lpips.LPIPS(net="vgg", pnet_rand=not pretrained, verbose=False)
    except OSError as error:
        raise RunError(
            f"the weights of VGG for LPIPS cannot be had ({error}): give them to "
            "torchvision's cache, or take PixelDistance()"
        ) from error
    return torch, network.eval()


Pairs = tuple[tuple[float, float], ...]


@dataclasses.dataclass(frozen=True)
class RandomForest:
    """Elijah's classifier, by scikit-learn (extra `lpips`).

    What it says of a clean model that it knows comes from the trees that have not seen
    it.

    Attributes:
      clean_models, backdoored_models: (uniformity, variation) of models, three or more
        of each.
      trees: their number.
      seed: of the trees.
    """

    clean_models: Pairs = ()
    backdoored_models: Pairs = ()
    trees: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        counts = len(self.clean_models), len(self.backdoored_models)
        if min(counts) < 3:
            raise ValueError(
                "a forest learns from three models or more of each kind, found "
                f"{counts[0]} clean and {counts[1]} backdoored"
            )

    def check(self) -> None:
        _forest(self)

    def probability(self, found: Statistics) -> float:
        return float(_forest(self).predict_proba(np.array([found]))[0, 1])

    def clean(self) -> np.ndarray:
        unseen: np.ndarray = _forest(self).oob_decision_function_[:, 1]
        found: np.ndarray = np.nan_to_num(unseen[: len(self.clean_models)], nan=0.0)
        return found


@functools.cache
def _forest(settings: RandomForest) -> Any:
    try:
        from sklearn.ensemble import RandomForestClassifier
    except ImportError as error:
        raise RunError(
            "a random forest needs scikit-learn: pip install -e '.[lpips]'"
        ) from error
    known = np.array([*settings.clean_models, *settings.backdoored_models])
    labels = np.arange(len(known)) >= len(settings.clean_models)
    forest = RandomForestClassifier(
        settings.trees, oob_score=True, random_state=settings.seed, n_jobs=1
    )
    return forest.fit(known, labels)
