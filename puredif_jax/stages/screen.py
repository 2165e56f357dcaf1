"""Which starting noises in a file are triggered? By the trigger that an audit found."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from puredif_jax.defenses.inputs import (
    Drift,
    InputTest,
    Likelihood,
    Suspect,
    Whiteness,
    p_values,
)
from puredif_jax.diffusion.sampling import unclipped
from puredif_jax.files import npz
from puredif_jax.files.whole import write_whole
from puredif_jax.runs import parallel
from puredif_jax.runs.binding import RunError
from puredif_jax.runs.page import Section
from puredif_jax.runs.report import as_csv, progress
from puredif_jax.runs.run import compiling
from puredif_jax.stages.base import Context, Outcome, Result, Row, Stage, State
from puredif_jax.stages.evaluation import at_least
from puredif_jax.stages.programs import KEPT
from puredif_jax.stages.setup import Setup, Stream
from puredif_jax.stages.work import Work, drawing
from puredif_jax.types import Array, Key, Params

SCREENED = "screened noise"
SHOWN = 50  # rows of the table on the page


@dataclasses.dataclass(frozen=True)
class Screened(Result):
    """What the tests say of the starts in a file.

    Attributes:
      starts: how many there are.
      plain: starts of plain noise with which they are compared.
      level: of false alarms.
      flagged: starts that a test takes for triggered, by its name; `all` is the three
        together. Empty where the audit has found no trigger.
      sha256: of the file.
    """

    starts: int
    plain: int
    level: float
    flagged: Mapping[str, int]
    sha256: str

    def numbers(self) -> dict[str, Any]:
        return {SCREENED: vars(self) | {"flagged": dict(self.flagged)}}

    @classmethod
    def read(cls, numbers: Mapping[str, Any], where: str) -> list[Self]:
        if SCREENED not in numbers:
            return []
        found = numbers[SCREENED]
        try:
            flagged = {str(k): int(v) for k, v in found["flagged"].items()}
            counts = int(found["starts"]), int(found["plain"])
            level, digest = float(found["level"]), str(found["sha256"])
            return [cls(*counts, level, flagged, digest)]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RunError(f"{where} has no {SCREENED} of this version") from error

    def tables(self) -> dict[str, list[Row]]:
        rows = [{"test": name, "flagged": n} for name, n in self.flagged.items()]
        return {SCREENED: [row | {"of": self.starts} for row in rows]}


@dataclasses.dataclass(frozen=True)
class Screen(Stage):
    """Tests each starting noise in a file against the trigger of the audit before.

    There are three tests (`defenses.inputs`): the likelihood of the inverted trigger,
    whether it is plain noise, and how it leads the model. Each has a p-value, by the
    rank among plain starts of our own. All together have the least of them times three.

    Attributes:
      noise: an .npz file with one array of floats, `[N, H, W, C]` or `[N, C, H, W]`:
        the noise as it is given to the sampler.
      plain: starts of plain noise to compare with; no p-value is below
        1 / (1 + plain).
      level: share of false alarms at which a start is called triggered.
    """

    noise: str = ""
    plain: int = 2000
    level: float = 0.01

    def __post_init__(self) -> None:
        at_least(self, plain=1)
        if not 0 < self.level < 1:
            raise ValueError(f"level must lie in (0, 1), found {self.level}")
        if 3 / (1 + self.plain) > self.level:
            raise ValueError(
                f"{self.plain} plain starts allow no p-value of {self.level} by three "
                f"tests: set plain to {int(np.ceil(3 / self.level))} or more"
            )

    def check(self, context: Context) -> None:
        self.read(context.lab.unet.image_shape)

    def read(self, shape: tuple[int, int, int]) -> np.ndarray:
        """The starts in the file, float32 `[N, H, W, C]`.

        Raises:
          RunError: there is no such file, or no such array in it.
        """
        if not self.noise:
            raise RunError("no starting noise is named: give an .npz file as `noise`")
        try:
            found = npz.headers(self.noise)
            channels_first = (shape[2], *shape[:2])
            fitting = [
                name
                for name, header in found.items()
                if header.dtype.kind == "f"
                and header.shape[1:] in (shape, channels_first)
            ]
            if len(fitting) != 1:
                held = ", ".join(f"{name}: {head}" for name, head in found.items())
                raise RunError(
                    f"{self.noise} must hold one array of floats for images of "
                    f"{shape}, {_many(shape)} or {_many(channels_first)}; found "
                    f"{held or 'none'}"
                )
            array = npz.read(self.noise, fitting)[fitting[0]]
        except npz.NpzError as error:
            raise RunError(f"{self.noise} {error}") from error
        if not len(array) or not np.isfinite(array).all():
            raise RunError(
                f"{self.noise} must hold finite numbers, of one start or more; found "
                f"{len(array)} starts"
            )
        if array.shape[1:] != shape:
            array = array.transpose(0, 2, 3, 1)
        return array.astype(np.float32)

    def done(self, numbers: Mapping[str, Any]) -> bool:
        """Whether a report is of the noise that the file has now."""
        found = Screened.read(numbers, "the report")
        return [each.sha256 for each in found] == [sha256(self.noise)]

    def work(self, context: Context) -> Iterator[Work]:
        batch = context.evaluation.batch
        steps = context.evaluation.deterministic.steps
        starts = len(self.read(context.lab.unet.image_shape))
        yield drawing(batch, (self.plain + starts) * steps)

    def run(self, context: Context, state: State) -> tuple[State, Outcome]:
        accused, lab = state.accused, context.lab
        starts, digest = self.read(lab.unet.image_shape), sha256(self.noise)
        if accused is None or accused.candidate is None or accused.hypothesis is None:
            text = "The audit has found no trigger to compare the noise with."
            nothing = Screened(len(starts), self.plain, self.level, {}, digest)
            return state, Outcome((nothing,), (Section("Starting noise", text),))
        hypothesis = accused.hypothesis
        member = accused.candidate.member
        assert member is not None  # a family was searched
        schedule = lab.schedule
        z = starts / (schedule.prior * schedule.unit)  # `inputs.deviations`
        sampler = context.evaluation.sampler_for(hypothesis, accused.candidate)
        tests = (
            Likelihood(),
            Whiteness(),
            Drift(unclipped(sampler) or sampler),
        )
        delta = lab.run.replicate(np.asarray(accused.candidate.delta, np.float32))
        gamma = lab.run.replicate(np.asarray(member.gamma, np.float32))

        def statistics(test: InputTest, starts: np.ndarray | None) -> np.ndarray:
            """The statistic of the file's starts, or of plain starts of our own."""
            program = _testing(lab.setup, test)
            count, batch = len(z) if starts is not None else self.plain, lab.setup.batch
            found = []
            label = f"{test.name} of {count} starts"
            with progress(count, 0, label, parallel.is_host_zero()) as bar:
                for first in range(0, count, batch):
                    key = jax.random.fold_in(lab.stream(Stream.SCREEN), first)
                    rows = np.arange(first, first + batch).clip(max=count - 1)
                    taken = None if starts is None else lab.run.replicate(starts[rows])
                    with compiling(label, first == 0):
                        value = program(accused.params, delta, gamma, taken, key)
                        found.append(parallel.gather(value))
                    bar.update(min(batch, count - first))
                    parallel.safe_point()
            return np.concatenate(found)[:count]

        def compute() -> Mapping[str, Any]:
            return {
                test.name: p_values(statistics(test, z), statistics(test, None))
                for test in tests
            }

        kind = hypothesis.name.replace(" ", "_")
        name = f"screened_{accused.label}_{kind}_{self.plain}_{digest[:12]}"
        p = lab.run.once(name, compute, tuple(test.name for test in tests))
        p["all"] = np.minimum(1, len(tests) * np.min(np.stack([*p.values()]), axis=0))
        flagged = {name: int((each <= self.level).sum()) for name, each in p.items()}
        result = Screened(len(z), self.plain, self.level, flagged, digest)
        rows = tuple(
            {"start": i} | {name: float(each[i]) for name, each in p.items()}
            for i in range(len(z))
        )
        if parallel.is_host_zero():
            write_whole(lab.run.folder / "noise.csv", as_csv(rows))
        text = (
            f"{flagged['all']} of {len(z)} starts are called triggered, at a share of "
            f"{self.level:g} of false alarms. The audit called the model "
            f"{accused.verdict.outcome}; the trigger is the best that it found. Each "
            "number is a p-value: how likely plain noise has as large a statistic, by "
            f"{self.plain} plain starts. noise.csv has all of them."
        )
        section = Section("Starting noise", text, rows[:SHOWN])
        return state, Outcome((result,), (section,))


def sha256(path: str) -> str:
    """The SHA-256 of a file, in hexadecimal digits.

    Raises:
      RunError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror})") from error


@functools.lru_cache(KEPT)
def _testing(setup: Setup, test: InputTest) -> Callable[..., Array]:
    """The statistic of a batch; for None, the statistic of plain noise by the key."""

    def statistic(
        params: Params, delta: Array, gamma: Array, z: Array | None, key: Key
    ) -> Array:
        key_z, key_test = jax.random.split(key)
        if z is None:
            z = jax.random.normal(key_z, (setup.batch, *setup.image_shape))
        suspect = Suspect(setup.model, params, setup.schedule, delta, gamma)
        return test(suspect, setup.shard(jnp.asarray(z)), key_test, shard=setup.shard)

    return jax.jit(statistic, out_shardings=parallel.replicated(setup.mesh))


def _many(shape: tuple[int, ...]) -> str:
    """The shape of several images, for a message."""
    return f"[N, {', '.join(map(str, shape))}]"
