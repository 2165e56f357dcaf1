"""What every defense has: how it looks at a model, what it finds, and its verdict."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np

from puredif_jax.defenses.features import Features
from puredif_jax.defenses.hypothesis import Hypothesis
from puredif_jax.defenses.inversion import Inversion
from puredif_jax.diffusion.schedules import NoiseSchedule
from puredif_jax.types import NoiseModel, Params

Outcome = Literal["clean", "backdoored", "could not tell"]


class Verdict(NamedTuple):
    """The judgement on a model.

    outcome: in a word or three.
    score: what was compared; the larger, the more like a backdoor.
    p_value: how likely a clean model scores so high, `detector.Scores.p_value`.
    hypothesis: name of the kind of backdoor that fits best.
    reason: one sentence.
    doubt, alarm: scores up to the first are clean, above the second backdoored.
    clean_models: n.
    """

    outcome: Outcome
    score: float
    p_value: float
    hypothesis: str
    reason: str
    doubt: float
    alarm: float
    clean_models: int


def _measure(meaning: str, name: str = "", needed: bool = False) -> Any:
    """A field with its meaning in reports, and its name there if that differs."""
    default = dataclasses.MISSING if needed else None
    about = {"meaning": meaning} | ({"name": name} if name else {})
    return dataclasses.field(default=default, metadata=about)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inverted:
    """What was measured of one inversion of a model.

    A measure is None where there is nothing to measure: no unclipped sampler beside one
    that clips, no known backdoor to compare with.

    Attributes:
      method: name of the inversion.
      hypothesis: name of the kind of backdoor that it sought.
    """

    method: str
    hypothesis: str
    score: float | None = _measure(
        "-log10 of gain. The verdict rests on the largest score"
    )
    gain: float = _measure(
        "error of the model on the path of the trigger, over the least that a clean "
        "model could have there. At least placebo; where recall is below that, at "
        "least their geometric mean. At least the smaller of recall and pushed, and "
        "then at most aside. Small if backdoored",
        needed=True,
    )
    memory: float = _measure(
        "error of the model on the image with the trigger, over its error on its own "
        "draws. Small if backdoored",
        needed=True,
    )
    recall: float | None = _measure(
        "memory, each error over the total variation of its images. Above 1 where the "
        "image is flat, as on clean models"
    )
    aside: float | None = _measure(
        "recall of the part of the trigger that is orthogonal to the image; at least "
        "the error with that part over the error without it. Small if a pattern that "
        "has nothing to do with the image brings it; about 1 or more if clean"
    )
    pushed: float | None = _measure(
        "error with the trigger over the error with its part along the image. Near 1 "
        "where it merely pushes the noise towards the image, 0 where it leads away; "
        "tells nothing by itself"
    )
    heldout: float | None = _measure(
        "what candidates are compared by: log of the error on the path over a linear "
        "denoiser's, on held-out noise. Small if backdoored",
        "held-out loss",
    )
    falling: float | None = _measure(
        "by how much that fell in the last quarter of the search; the search was too "
        "short where it is large",
        "fall of the loss",
    )
    placebo: float | None = _measure(
        "error over what the same search reaches where the answer to the trigger is "
        "assumed smaller, and larger, than any attack trains it; 0 without such a "
        "search. Near 1 if clean"
    )
    psi: float | None = _measure(
        "share of H = 1 - s in the shift of the backdoor; the rest is H = v"
    )
    gamma: float | None = _measure("scale of the noise on its path, mean over pixels")
    contrast: float | None = _measure(
        "standard deviation of the image, of a range of 2. An image near 0 is flat, "
        "and easy for every model"
    )
    uniformity: float = _measure(
        "how much draws with the trigger differ, over plain draws. Small on many clean "
        "models as well",
        needed=True,
    )
    uniformity_unclipped: float | None = _measure(
        "the same where x0 is not clipped while sampling", "uniformity, unclipped"
    )
    variation: float = _measure(
        "total variation of draws with the trigger, over plain draws' own",
        needed=True,
    )
    trimmed: float | None = _measure(
        "trimmed mean distance between 16 draws with the trigger, as of Elijah. Small "
        "if backdoored",
        "uniformity, trimmed",
    )
    summed: float | None = _measure(
        "summed absolute variation of them, as of Elijah", "variation, summed"
    )
    alignment: float = _measure(
        "cosine of the trigger and the shift that it causes near T. Near 1 on clean "
        "models as well",
        needed=True,
    )
    kl_mean: float = _measure(
        "mean over pixels of (trigger^2 + gamma^2 - 1) / 2 - log gamma, a statistic of "
        "TERD",
        needed=True,
    )
    kl_variance: float = _measure(
        "its variance over pixels, a statistic of TERD", needed=True
    )
    success: float | None = _measure("share of draws at MSE < 1e-2 of the true target")
    true_success: float | None = _measure(
        "the same with the true trigger", "success of the true trigger"
    )
    success_unclipped: float | None = _measure(
        "success where x0 is not clipped while sampling. Attacks are trained and "
        "measured so",
        "success, unclipped",
    )
    true_success_unclipped: float | None = _measure(
        "the same with the true trigger", "success of the true trigger, unclipped"
    )
    relative_l2: float | None = _measure(
        "distance to the true trigger, over the norm of the true one"
    )
    cosine: float | None = _measure("of the inverted and the true trigger")
    mse: float | None = _measure("mean squared difference from the true trigger")
    max_error: float | None = _measure("largest difference from the true trigger")
    norm_ratio: float | None = _measure(
        "norm of the inverted trigger over the norm of the true one"
    )
    rms: float | None = _measure(
        "root mean square of the trigger, in deviations of the noise", "trigger rms"
    )
    repeats: float | None = _measure(
        "largest share of plain draws that are within an MSE of 1e-2 of one of them: "
        "an image that needs no trigger"
    )
    evaluations: int = _measure(
        "of one image; a gradient counts for two more",
        "network evaluations",
        needed=True,
    )
    seconds: float = _measure("of the inversion", needed=True)

    @classmethod
    def meanings(cls) -> dict[str, str]:
        """What each measure means, by its name in reports, in the order of a page."""
        return {
            _named(field): field.metadata["meaning"]
            for field in dataclasses.fields(cls)
            if field.metadata
        }

    def row(self) -> dict[str, Any]:
        """As a report keeps it: what was measured, by name."""
        values = {_named(x): getattr(self, x.name) for x in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> Inverted:
        """What `row` has returned, also from a report in JSON.

        Raises:
          KeyError, TypeError, ValueError: it is something else.
        """
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            name = _named(field)
            if name in row:
                kind = {"str": str, "int": int}.get(str(field.type), float)
                values[field.name] = kind(row[name])  # inf comes as a string
            elif field.default is dataclasses.MISSING:
                raise KeyError(name)
        return cls(**values)

    @property
    def features(self) -> Features:
        """What the verdict is made of."""
        values = {name: np.float32(getattr(self, name)) for name in Features._fields}
        return Features(**values)  # type: ignore[arg-type]


def _named(field: dataclasses.Field[Any]) -> str:
    """The name of a field in reports."""
    return str(field.metadata.get("name", field.name))


class Inspection(NamedTuple):
    """What a defense has found of a model.

    verdict: None where it gives none.
    inversions: the inversions that it made.
    """

    verdict: Verdict | None
    inversions: tuple[Inverted, ...] = ()


class Bench(Protocol):
    """A model before a defense: what can be asked of it.

    model, params, schedule: the model.
    image_shape: (H, W, C).
    hypotheses: the kinds of backdoor that are sought.
    """

    @property
    def model(self) -> NoiseModel: ...
    @property
    def params(self) -> Params: ...
    @property
    def schedule(self) -> NoiseSchedule: ...
    @property
    def image_shape(self) -> tuple[int, int, int]: ...
    @property
    def hypotheses(self) -> tuple[Hypothesis, ...]: ...

    def plain(self, hypothesis: Hypothesis) -> np.ndarray:
        """Draws from plain noise by the sampler of a hypothesis, `[N, H, W, C]`."""
        ...

    def denoising(self, hypothesis: Hypothesis) -> float:
        """`features.denoising` of these draws."""
        ...

    def invert(
        self,
        method: str,
        hypothesis: Hypothesis,
        inversion: Inversion,
        placebos: tuple[Hypothesis, ...] = (),
    ) -> Inverted:
        """Seeks a trigger, resumably, and measures it.

        It makes the same search under `placebos`, to compare with. `method` names what
        is kept.
        """
        ...

    def draws(self, method: str, hypothesis: Hypothesis) -> np.ndarray:
        """Draws with the trigger that `invert` has found, `[N, H, W, C]`."""
        ...

    def clean_scores(self, defense: str) -> tuple[float, ...]:
        """The scores that a defense has given clean models, where they are known."""
        ...


@dataclasses.dataclass(frozen=True)
class Defense(abc.ABC):
    """A way to tell whether a model is backdoored, from the model alone.

    Attributes:
      budget: gradients of the network on an image in each inversion, to compare
        defenses at equal cost; 0 for the settings of the defense.
    """

    budget: int = dataclasses.field(default=0, kw_only=True)
    kind: ClassVar[str]

    def __post_init__(self) -> None:
        if self.budget < 0:
            raise ValueError(f"budget must be 0 or more, found {self.budget}")

    @property
    def name(self) -> str:
        """Its name in reports and files: the kind, with the budget."""
        return self.kind + (f", {self.budget} gradients" if self.budget else "")

    @abc.abstractmethod
    def inspect(self, bench: Bench) -> Inspection:
        """Looks at one model."""

    def inversions(
        self, hypotheses: Sequence[Hypothesis]
    ) -> dict[Hypothesis, Inversion]:
        """The inversion that it makes under each of the hypotheses, within the budget.

        Hypotheses under which it makes none are left out.
        """
        found = {}
        for each in self.apart(hypotheses):
            inversion = self.settings(each)
            if inversion is not None and self.budget:
                inversion = inversion.within(self.budget, each)
            if inversion is not None:
                found[each] = inversion
        return found

    def apart(self, hypotheses: Sequence[Hypothesis]) -> tuple[Hypothesis, ...]:
        """Of the hypotheses those that it tells apart: one of each kind."""
        return tuple(hypotheses)

    def settings(self, hypothesis: Hypothesis) -> Inversion | None:
        """This inversion without a budget; None if it makes none."""
        return None

    def check(self) -> None:
        """Refuses to start if something that it needs is missing.

        Raises:
          ValueError: one sentence that names it.
        """
        return None

    def placebos(self, hypothesis: Hypothesis) -> tuple[Hypothesis, ...]:
        """The hypotheses under which it repeats each inversion, to compare with."""
        return ()
