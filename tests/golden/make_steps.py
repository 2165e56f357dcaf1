"""Makes steps.npz: single steps of TrojDiff's samplers and of a score SDE's.

    python tests/golden/make_steps.py

All is float64 NumPy after the published formulas, in their own variables and units;
neither the package nor JAX nor diffusers is used.

TrojDiff (Chen, Song and Li 2023, arXiv 2303.05762), with abar_t = A_t, s = sqrt(A),
v = sqrt(1 - A), A_{-1} = 1, a step from t to n and a = A_t / A_n:
  x0   = (x_t - v_t gamma e - v_t mu) / s_t,
  DDPM   mean = [s_n (1 - a) x0 + sqrt(a) (1 - A_n) x_t + c mu] / (1 - A_t),
         variance = gamma^2 (1 - A_n) / (1 - A_t) (1 - a),
  DDIM   x_n = s_n x0 + c1 gamma z + c2 gamma e + v_n mu,
         c1 = eta sqrt((1 - A_t / A_n) (1 - A_n) / (1 - A_t)),
         c2 = sqrt(1 - A_n - c1^2).
For steps to t - 1 the published c is v_{t-1} beta_t - (1 - A_{t-1}) sqrt(alpha_t) k_t,
where sum_{i <= t} k_i prod_{i < j <= t} sqrt(alpha_j) = v_t. Of a patch this holds in
its square, and the ordinary formulas elsewhere.

Score SDE: `step_pred` and `step_correct` of diffusers' ScoreSdeVeScheduler, for images
in [0, 1]; the last predictor step returns its mean, as the pipeline does.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

OUTPUT = Path(__file__).parent / "steps.npz"
Array = np.ndarray

BETA = np.linspace(1e-4, 0.02, 1000)
ABAR = np.append(np.cumprod(1 - BETA), 1.0)  # ABAR[-1] is of the clean end
STEPS = ((999, 998), (500, 499), (50, 49), (1, 0), (0, -1))  # to t - 1
STEPS += ((980, 960), (800, 632), (39, 9), (19, -1))
ETAS = {"ddim": 0.0, "ddim_half": 0.5, "ddim_one": 1.0}
GAMMA = {"blend": 0.6, "patch": 0.1}
BLOCK = slice(-3, None)  # rows and columns of the patch, in 8 x 8

SIGMA = np.exp(np.linspace(np.log(0.01), np.log(380.0), 2000))
SNR = 0.075
LEVELS = (1999, 1500, 1000, 3, 1, 0)


# --- TrojDiff ------------------------------------------------------------------------


def predict(x: Array, t: int) -> Array:
    """A network in one line: its noise prediction."""
    return np.sin(2 * x + t / 100) / 2 + x / 2


def solved_k() -> Array:
    """k_t from its definition, term by term."""
    v, k = np.sqrt(1 - ABAR[:1000]), np.zeros(1000)
    for t in range(1000):
        carried = np.sqrt(ABAR[t] / ABAR[:t])  # prod of sqrt(alpha) after i
        k[t] = v[t] - (carried * k[:t]).sum()
    return k


def coefficient(t: int, n: int, k: Array) -> float:
    """c, of mu in the mean of DDPM."""
    v_t, v_n = np.sqrt(1 - ABAR[t]), np.sqrt(1 - ABAR[n])
    if n == t - 1:
        return v_n * BETA[t] - (1 - ABAR[n]) * np.sqrt(1 - BETA[t]) * k[t]
    return v_n * (1 - ABAR[t]) - np.sqrt(ABAR[t] / ABAR[n]) * (1 - ABAR[n]) * v_t


def image(x: Array, e: Array, t: int, mu: Array | float, gamma: float) -> Array:
    """x0, not clamped."""
    v = np.sqrt(1 - ABAR[t])
    return (x - v * gamma * e - v * mu) / np.sqrt(ABAR[t])


def ddpm(
    x: Array,
    z: Array,
    t: int,
    n: int,
    mu: Array | float,
    gamma: float,
    k: Array,
    clamp: bool = False,
) -> Array:
    """One step of the trojan DDPM; the published one clamps x0 to [-1, 1]."""
    a, x0 = ABAR[t] / ABAR[n], image(x, predict(x, t), t, mu, gamma)
    if clamp:
        x0 = np.clip(x0, -1, 1)
    mean = np.sqrt(ABAR[n]) * (1 - a) * x0 + np.sqrt(a) * (1 - ABAR[n]) * x
    mean = (mean + coefficient(t, n, k) * mu) / (1 - ABAR[t])
    variance = gamma**2 * (1 - ABAR[n]) / (1 - ABAR[t]) * (1 - a)
    return mean + np.sqrt(variance) * z


def ddim(
    x: Array, z: Array, t: int, n: int, mu: Array | float, gamma: float, eta: float
) -> Array:
    """One step of the trojan DDIM."""
    e = predict(x, t)
    share = (1 - ABAR[t] / ABAR[n]) * (1 - ABAR[n]) / (1 - ABAR[t])
    c1 = eta * np.sqrt(share)
    c2 = np.sqrt(1 - ABAR[n] - c1**2)
    x0 = image(x, e, t, mu, gamma)
    drawn = np.sqrt(ABAR[n]) * x0 + c1 * gamma * z + c2 * gamma * e
    return drawn + np.sqrt(1 - ABAR[n]) * mu


def in_block(trojan: Array, benign: Array) -> Array:
    """The first in the square of the patch, the second elsewhere; `[..., 8, 8, 1]`."""
    found = benign.copy()
    found[..., BLOCK, BLOCK, :] = trojan[..., BLOCK, BLOCK, :]
    return found


def step(
    kind: str, x: Array, z: Array, t: int, n: int, trigger: str, mu: Array, k: Array
) -> Array:
    """One step of a sampler for a trigger of TrojDiff."""

    def by(mu: Array | float, gamma: float) -> Array:
        if kind in ETAS:
            return ddim(x, z, t, n, mu, gamma, ETAS[kind])
        return ddpm(x, z, t, n, mu, gamma, k, clamp=kind == "clamped")

    trojan = by(mu, GAMMA[trigger])
    return trojan if trigger == "blend" else in_block(trojan, by(0.0, 1.0))


KINDS = ("ddpm", "clamped", *ETAS)


# --- Score SDE -----------------------------------------------------------------------


def score(x: Array, sigma: float) -> Array:
    """A network in one line: the score of images in [0, 1]."""
    return (np.sin(3 * x / (1 + sigma)) / 2 + 0.3 - x) / (sigma**2 + 0.05)


def predicted(x: Array, z: Array, sigma: float, adjacent: float) -> Array:
    """`step_pred` from sigma to adjacent; to 0 without noise."""
    diffusion = np.sqrt(sigma**2 - adjacent**2)
    mean = x + diffusion**2 * score(x, sigma)
    return mean + (diffusion * z if adjacent > 0 else 0)


def corrected(x: Array, z: Array, sigma: float) -> Array:
    """`step_correct` at sigma."""
    found = score(x, sigma)
    norms = [np.sqrt((y.reshape(len(y), -1) ** 2).sum(1)).mean() for y in (z, found)]
    size = (SNR * norms[0] / norms[1]) ** 2 * 2
    return x + size * found + np.sqrt(2 * size) * z


def main() -> None:
    rng = np.random.default_rng(3)
    x, z = rng.normal(size=(2, 1, 8, 8, 1))
    picture = {"blend": rng.uniform(size=(8, 8, 1)), "patch": np.ones((8, 8, 1))}
    arrays, k = {"x": x, "z": z}, solved_k()
    for trigger, gamma in GAMMA.items():
        mu = (1 - gamma) * (2 * picture[trigger] - 1)
        arrays[f"mu_{trigger}"] = mu
        for kind in KINDS:
            steps = [step(kind, x, z, t, n, trigger, mu, k) for t, n in STEPS]
            arrays[f"{kind}_{trigger}"] = np.stack(steps)
    x, z = rng.normal(size=(2, 2, 4, 4, 1))
    arrays |= {"ve_x": x, "ve_z": z}
    states = [0.5 + 0.2 * x + SIGMA[i] * x[::-1] for i in LEVELS]
    arrays["ve_states"] = np.stack(states)
    arrays["ve_predicted"] = np.stack(
        [
            predicted(state, z, SIGMA[i], SIGMA[i - 1] if i else 0.0)
            for state, i in zip(states, LEVELS, strict=True)
        ]
    )
    arrays["ve_corrected"] = np.stack(
        [corrected(y, z, SIGMA[i]) for y, i in zip(states, LEVELS, strict=True)]
    )
    np.savez_compressed(OUTPUT, **arrays)


if __name__ == "__main__":
    main()
