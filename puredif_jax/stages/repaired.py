"""What a repair did, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from puredif_jax.runs.binding import RunError
from puredif_jax.stages.base import Result, Row

REPAIR = "repair"
REPAIRED = "repaired-"  # the names of results begin with it


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
      round: of the run, from 0.
    """

    removal: str
    embedding: str
    images: int
    own: bool
    steps: int
    seconds: float
    success: Mapping[str, float]
    frechet: Mapping[str, float]
    round: int = 0

    def numbers(self) -> dict[str, Any]:
        found = vars(self) | {
            "success": dict(self.success),
            "frechet": dict(self.frechet),
        }
        found.pop("round")
        return {_key(self.round): found}

    @classmethod
    def read(cls, numbers: Mapping[str, Any], where: str) -> list[Self]:
        found: list[Self] = []
        while _key(len(found)) in numbers:
            found.append(cls._read(numbers[_key(len(found))], len(found), where))
        return found

    @classmethod
    def _read(cls, found: Any, round_: int, where: str) -> Self:
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
                round_,
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RunError(f"{where} has no {REPAIR} of this version") from error

    def tables(self) -> dict[str, list[Row]]:
        apart = ("success", "frechet", "round")
        row: dict[str, Any] = {"round": self.round + 1}
        row |= {k: v for k, v in vars(self).items() if k not in apart}
        row |= {f"success, {k}": v for k, v in self.success.items()}
        row |= {f"Frechet, {k}": v for k, v in self.frechet.items()}
        return {REPAIR: [row]}


def _key(round_: int) -> str:
    """The name by which a report keeps a repair."""
    return f"{REPAIR} {round_ + 1}" if round_ else REPAIR
