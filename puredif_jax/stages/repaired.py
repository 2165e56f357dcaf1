"""What a repair did, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from puredif_jax.runs.binding import RunError
from puredif_jax.stages.base import Result, Row

REPAIR = "repair"


@dataclasses.dataclass(frozen=True)
class Repaired(Result):
    """What a repair did.

    Attributes:
      removal: its name.
      images: clean images that it had.
      own: whether the model itself drew them.
      embedding: what the Frechet distance is over.
      steps, seconds: of the training.
      success: of draws with the inverted trigger at MSE < 1e-2 of its image, and with
        the true trigger of the true target if that is known: before and after, by name.
      frechet: distance of plain draws to the clean images, before and after.
      place: how many repairs of the run came before.
    """

    removal: str
    embedding: str
    images: int
    own: bool
    steps: int
    seconds: float
    success: Mapping[str, float]
    frechet: Mapping[str, float]
    place: int = 0

    def numbers(self) -> dict[str, Any]:
        found = vars(self) | {
            "success": dict(self.success),
            "frechet": dict(self.frechet),
        }
        found.pop("place")
        return {_key(self.place): found}

    @classmethod
    def read(cls, numbers: Mapping[str, Any], where: str) -> list[Self]:
        found: list[Self] = []
        while _key(len(found)) in numbers:
            found.append(cls._read(numbers[_key(len(found))], len(found), where))
        return found

    @classmethod
    def _read(cls, found: Any, place: int, where: str) -> Self:
        try:
            return cls(
                str(found["removal"]),
                str(found["embedding"]),
                int(found["images"]),
                bool(found["own"]),
                int(found["steps"]),
                float(found["seconds"]),
                {str(k): float(v) for k, v in found["success"].items()},
                {str(k): float(v) for k, v in found["frechet"].items()},
                place,
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RunError(f"{where} has no {REPAIR} of this version") from error

    def tables(self) -> dict[str, list[Row]]:
        apart = ("success", "frechet", "place")
        row = {k: v for k, v in vars(self).items() if k not in apart}
        row |= {f"success, {k}": v for k, v in self.success.items()}
        row |= {f"Frechet, {k}": v for k, v in self.frechet.items()}
        return {REPAIR: [row]}


def _key(place: int) -> str:
    """The name by which a report keeps a repair."""
    return f"{REPAIR} {place + 1}" if place else REPAIR
