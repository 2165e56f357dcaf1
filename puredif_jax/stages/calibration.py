"""The scores that defenses have given clean models: an asset of the package.

assets/calibration.json holds them by network and by defense. A network is held with its
process and what it predicts, and a defense with the settings of its search.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any, Literal

from puredif_jax.defenses.base import Defense
from puredif_jax.runs import config
from puredif_jax.stages.setup import Setup
from puredif_jax.stages.weights import ASSETS

Calibration = Literal["this network", "another network", "given scores"]
"""Whose clean models a detector knows: its own of the network at hand, its own of
another one, or those that the user has given."""

_PATH = ASSETS / "calibration.json"


@functools.cache
def _known() -> Mapping[str, Any]:
    known: Mapping[str, Any] = json.loads(_PATH.read_text("utf-8"))
    return known


def clean_scores(defense: str) -> tuple[float, ...]:
    """The scores of a defense, by its name, for all networks; () if none are known."""
    return tuple(
        score
        for network in _known().values()
        for score in network["scores"].get(defense, {}).get("clean", ())
    )


def networks() -> tuple[str, ...]:
    """The names of the networks whose clean models have calibrated."""
    return tuple(_known())


def covers(defense: Defense, setup: Setup) -> bool:
    """Whether a defense has scores of such models, after the search in use."""
    network = _network(setup)
    found = None if network is None else network["scores"].get(defense.name)
    return found is not None and found["search"] == search_of(defense)


def _network(setup: Setup) -> Mapping[str, Any] | None:
    """What is known of a network; how its memory is spared makes no difference."""
    network = {**config.to_dict(setup.network), "remat": False}
    here = {
        "network": network,
        "process": config.to_dict(setup.process),
        "prediction": setup.prediction,
    }
    plain = json.loads(json.dumps(here))
    return next((x for x in _known().values() if x["model"] == plain), None)


def search_of(defense: Defense) -> dict[str, Any]:
    """The settings of a defense without its detector, as the asset has them.

    Settings by which memory is spared (`together`) are left out, too.
    """

    plain: dict[str, Any] = json.loads(json.dumps(config.to_dict(defense)))
    kept: dict[str, Any] = config.without(plain, ("together", "detector"))
    return kept
