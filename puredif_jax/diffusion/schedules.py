"""Noise schedules: the tables of a forward process, and the rules that make them.

A schedule is two tables, signal s_t and noise v_t, and every other coefficient
is derived from them: x_t = s_t x_0 + v_t eps. The tables are float64 numpy, so
that differences such as 1 - alpha_t keep their digits; they become float32
constants where they meet an image.

Sources: DDPM (Ho et al. 2020, arXiv 2006.11239), improved DDPM (Nichol and Dhariwal
2021, 2102.09672), latent diffusion (Rombach et al. 2022, 2112.10752), zero terminal
SNR (Lin et al. 2024, 2305.08891), GeoDiff's sigmoid betas (Xu et al. 2022,
2203.02923).
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The forward process x_t = signal_t x_0 + noise_t eps.

    Attributes:
      signal: s_t, float64 `[T]`; sqrt(abar_t) for a variance-preserving process.
      noise: v_t, float64 `[T]`; sqrt(1 - abar_t).
      times: what the network is given at timestep t, float64 `[T]`; None for t itself.
      scale: what x_t is multiplied by before the network sees it, float64 `[T]`; None
        for a network that sees x_t in its own range.
      prior: standard deviation of the noise that sampling starts from.
      values: the range of the images that the network itself knows. The tables are of
        images in [-1, 1]; `prediction.predicting` translates. A range whose middle is
        not 0 needs a signal that stays 1.
    """

    signal: np.ndarray
    noise: np.ndarray
    times: np.ndarray | None = None
    scale: np.ndarray | None = None
    prior: float = 1.0
    values: tuple[float, float] = (-1.0, 1.0)

    def __post_init__(self) -> None:
        given = self.signal if self.times is None else self.times
        if self.signal.ndim != 1 or not (
            self.signal.shape == self.noise.shape == given.shape
        ):
            raise ValueError(
                "a schedule needs signal, noise and times of one shape [T], found "
                f"{self.signal.shape}, {self.noise.shape} and {given.shape}"
            )
        if sum(self.values) and self.fades:
            raise ValueError(
                f"images in {self.values} need a signal that stays 1, found one that "
                f"ends at {self.signal[-1]:.3g}"
            )

    @property
    def steps(self) -> int:
        """T, the number of timesteps."""
        return len(self.signal)

    @property
    def given(self) -> np.ndarray:
        """What the network is given at each timestep, float64 `[T]`."""
        return np.arange(self.steps) if self.times is None else self.times

    @property
    def previous(self) -> tuple[np.ndarray, np.ndarray]:
        """s_{t-1} and v_{t-1}, with s_{-1} = 1 and v_{-1} = 0; float64 `[T]`."""
        return (
            np.concatenate([[1.0], self.signal[:-1]]),
            np.concatenate([[0.0], self.noise[:-1]]),
        )

    @property
    def alpha(self) -> np.ndarray:
        """alpha_t = (s_t / s_{t-1})^2, float64 `[T]`."""
        found: np.ndarray = (self.signal / self.previous[0]) ** 2
        return found

    @property
    def added(self) -> np.ndarray:
        """w_t = v_t^2 - alpha_t v_{t-1}^2, the variance that step t adds, `[T]`.

        1 - alpha_t for a variance-preserving process, sigma_t^2 - sigma_{t-1}^2 for a
        variance-exploding one.
        """
        found: np.ndarray = self.noise**2 - self.alpha * self.previous[1] ** 2
        return found

    @property
    def fades(self) -> bool:
        """Whether noise replaces the signal, as in a variance-preserving process."""
        return bool(self.signal[-1] < self.signal[0])

    @property
    def least_signal(self) -> np.ndarray:
        """s_t, 1e-5 or more, so that a division by it stays finite; `[T]`."""
        found: np.ndarray = np.maximum(self.signal, 1e-5)
        return found

    @property
    def unit(self) -> float:
        """Half the width of `values`: how much 1 is in the network's own range."""
        low, high = self.values
        return (high - low) / 2

    @property
    def trigger_unit(self) -> float:
        """How much a trigger of 1 is in deviations of the noise that it is added to.

        A process that fades adds it, an image, to noise of deviation `prior`. A
        variance-exploding one adds it to noise of deviation 1.
        """
        return self.unit if self.fades else 1.0

    def start(self, noise: Any, trigger: Any = 0.0, first: int = -1) -> Any:
        """x from which sampling starts: standard noise with a trigger in it.

        prior (noise + trigger_unit trigger) + centre, where the network's own 0 lies.

        Args:
          noise: of deviation 1.
          trigger: what is added.
          first: the timestep from which it starts. Where the signal stays, the noise
            has the level of this timestep.
        """
        low, high = self.values
        centre = -(2 * low / (high - low) + 1)
        if not self.fades:
            level = self.prior * float(self.noise[first] / self.noise[-1])
            return level * (noise + trigger) + centre
        if self.prior != 1.0:
            noise = self.prior * noise
        return noise + trigger

    @property
    def log_snr(self) -> np.ndarray:
        """log(s_t^2 / v_t^2), float64 `[T]`, finite: s_t counts as 1e-12 or more."""
        found: np.ndarray = 2 * (
            np.log(np.maximum(self.signal, 1e-12)) - np.log(self.noise)
        )
        return found

    def matched(self, timesteps: Sequence[int]) -> np.ndarray:
        """The timesteps here for timesteps of `LinearBetas()`: nearest in SNR, int32.

        So a timestep that is named once means one noise level on every schedule; on
        `LinearBetas()` it means itself.

        Raises:
          ValueError: a timestep is not in 0..999.
        """
        standard = LinearBetas().tables().log_snr
        wanted = np.asarray(timesteps, np.int64)
        if not wanted.size or wanted.min() < 0 or wanted.max() >= len(standard):
            raise ValueError(
                f"timesteps are named on a linear schedule of {len(standard)}, so they "
                f"lie in 0..{len(standard) - 1}, found {list(timesteps)}"
            )
        gaps = np.abs(self.log_snr[None] - standard[wanted][:, None])
        found: np.ndarray = gaps.argmin(1).astype(np.int32)
        return found


@dataclasses.dataclass(frozen=True)
class Process(abc.ABC):
    """A rule for a forward process."""

    @property
    @abc.abstractmethod
    def steps(self) -> int:
        """T."""

    @abc.abstractmethod
    def tables(self) -> NoiseSchedule:
        """Float64 tables; from betas, s_t^2 = prod_{i<=t} (1 - beta_i) = 1 - v_t^2."""


def _tables(betas: np.ndarray) -> NoiseSchedule:
    with np.errstate(divide="ignore"):  # beta_t = 1 leaves no signal
        log_abar = np.cumsum(np.log1p(-betas))
    return NoiseSchedule(
        signal=np.exp(0.5 * log_abar), noise=np.sqrt(-np.expm1(log_abar))
    )


@dataclasses.dataclass(frozen=True)
class LinearBetas(Process):
    """beta_t linear in t, the schedule of DDPM (Ho et al. 2020).

    Attributes:
      steps: T.
      start, end: beta_0 and beta_{T-1}.
    """

    steps: int = 1000
    start: float = 1e-4
    end: float = 0.02

    def __post_init__(self) -> None:
        if self.steps < 2 or not 0 < self.start <= self.end < 1:
            raise ValueError(
                f"{type(self).__name__} needs steps >= 2 and 0 < start <= end < 1, "
                f"found steps={self.steps}, start={self.start}, end={self.end}"
            )

    def tables(self) -> NoiseSchedule:
        return _tables(np.linspace(self.start, self.end, self.steps))


@dataclasses.dataclass(frozen=True)
class ScaledLinearBetas(LinearBetas):
    """sqrt(beta_t) linear in t, the schedule of latent diffusion (Rombach et al. 2022).

    "scaled_linear" in diffusers.
    """

    start: float = 0.00085
    end: float = 0.012

    def tables(self) -> NoiseSchedule:
        roots = np.linspace(self.start**0.5, self.end**0.5, self.steps)
        return _tables(roots**2)


@dataclasses.dataclass(frozen=True)
class CosineBetas(Process):
    """The schedule of Nichol & Dhariwal 2021; "squaredcos_cap_v2" in diffusers.

    beta_t = min(1 - f((t + 1) / T) / f(t / T), cap) with
    f(u) = cos(pi / 2 (u + offset) / (1 + offset))^2.

    Attributes:
      steps: T.
      cap: bound of beta_t, which would reach 1 at the end.
      offset: keeps beta_0 from being too small.
    """

    steps: int = 1000
    cap: float = 0.999
    offset: float = 0.008

    def __post_init__(self) -> None:
        if self.steps < 2 or not 0 < self.cap < 1 or self.offset < 0:
            raise ValueError(
                "CosineBetas needs steps >= 2, 0 < cap < 1 and offset >= 0, found "
                f"steps={self.steps}, cap={self.cap}, offset={self.offset}"
            )

    def tables(self) -> NoiseSchedule:
        u = np.arange(self.steps + 1) / self.steps
        f = np.cos(np.pi / 2 * (u + self.offset) / (1 + self.offset)) ** 2
        return _tables(np.minimum(1 - f[1:] / f[:-1], self.cap))


@dataclasses.dataclass(frozen=True)
class SigmoidBetas(LinearBetas):
    """beta_t = start + (end - start) / (1 + e^-u), u from -6 to 6 (Xu et al. 2022).

    "sigmoid" in diffusers.
    """

    def tables(self) -> NoiseSchedule:
        u = np.linspace(-6, 6, self.steps)
        return _tables(self.start + (self.end - self.start) / (1 + np.exp(-u)))


@dataclasses.dataclass(frozen=True)
class TrainedBetas(Process):
    """A schedule by its numbers; "trained_betas" in diffusers.

    Attributes:
      betas: beta_0 to beta_{T-1}, each in (0, 1].
    """

    betas: tuple[float, ...] = dataclasses.field(repr=False)

    def __post_init__(self) -> None:
        if len(self.betas) < 2 or not all(0 < beta <= 1 for beta in self.betas):
            raise ValueError(
                "TrainedBetas needs two numbers or more in (0, 1], found "
                f"{len(self.betas)} from {min(self.betas, default=0)} to "
                f"{max(self.betas, default=0)}"
            )

    @property
    def steps(self) -> int:
        """T."""
        return len(self.betas)

    def tables(self) -> NoiseSchedule:
        return _tables(np.asarray(self.betas, np.float64))


Plain = LinearBetas | ScaledLinearBetas | CosineBetas | SigmoidBetas | TrainedBetas


@dataclasses.dataclass(frozen=True)
class ZeroTerminalSNR(Process):
    """Another schedule, rescaled so that nothing of the image is left at T - 1.

    s'_t = (s_t - s_{T-1}) s_0 / (s_0 - s_{T-1}) (Lin et al. 2024, algorithm 1);
    "rescale_betas_zero_snr" in diffusers.

    Attributes:
      betas: the other schedule.
      least: s'_{T-1}^2; schedulers that divide by it keep 2^-24.
    """

    betas: Plain
    least: float = 0.0

    @property
    def steps(self) -> int:
        """T."""
        return self.betas.steps

    def tables(self) -> NoiseSchedule:
        signal = self.betas.tables().signal
        signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
        signal[-1] = self.least**0.5
        return NoiseSchedule(signal, np.sqrt(1 - signal**2))


@dataclasses.dataclass(frozen=True)
class ContinuousTime(Process):
    """Another schedule whose network is given log(v_t / s_t) / 4 in place of t.

    "timestep_type": "continuous" in diffusers' EulerDiscreteScheduler.

    Attributes:
      betas: the other schedule.
    """

    betas: Plain | ZeroTerminalSNR

    @property
    def steps(self) -> int:
        """T."""
        return self.betas.steps

    def tables(self) -> NoiseSchedule:
        found = self.betas.tables()
        return dataclasses.replace(found, times=-found.log_snr / 8)


@dataclasses.dataclass(frozen=True)
class SineNoise(Process):
    """v_t = sin^2(pi / 2 (t + 1) / T); the network is given (2 / pi) arcsin(v_t).

    The process of diffusers' IPNDMScheduler.

    Attributes:
      steps: T.
    """

    steps: int = 1000

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"SineNoise needs steps >= 2, found {self.steps}")

    def tables(self) -> NoiseSchedule:
        noise = np.sin(np.pi / 2 * np.arange(1, self.steps + 1) / self.steps) ** 2
        noise[-1] = 1.0
        signal = np.sqrt((1 - noise) * (1 + noise))
        return NoiseSchedule(signal, noise, np.arcsin(noise) * 2 / np.pi)
