"""Makes defenses.npz: losses and gradients of Elijah and TERD, by PyTorch.

    pip install torch==2.13.0
    python tests/golden/make_defenses.py

All is float64 PyTorch after the published formulas, in their own variables; of the
package nothing is used. The noise is what JAX draws from the keys of the losses.

Elijah (An et al. 2024, arXiv 2312.00050):
  mean | lambda tau - mean_b M(eps_b + tau, T - 1) |,  100 draws that stay the same.
TERD (Mo et al. 2024, arXiv 2409.05294), T = 1000, beta linear from 1e-4 to 0.02:
  x_i = s_t x0 + v_t gamma eps_i + mu,
  L = 1/2 mean_b sum [(eps_1 - M(x_1, t)) - (eps_2 - M(x_2, t))]^2,
  first stage: L at t in 990..999, x0 standard noise, less l1 ||mu||_1;
  second: the mean of L at 990..999 and of L at 0..9, the latter without mu, with x0
  drawn from eps + mu by ten steps of DDIM at t = 900, 800, ..., 0, x0 clipped to
  [-1, 1]; for TrojDiff from gamma eps + mu by its own DDIM,
    x0 = (x_t - v_t gamma e - v_t mu) / s_t,  x_n = s_n x0 + v_n gamma e + v_n mu,
  at t = 800, 632, 483, 355, 246, 158, 88, 39, 9, 0.
"""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import torch

OUTPUT = pathlib.Path(__file__).parent / "defenses.npz"
SHAPE, BATCH, L1 = (8, 8, 1), 6, 0.01
ABAR = np.append(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)), 1.0)  # [-1]: clean
LEADING = (900, 800, 700, 600, 500, 400, 300, 200, 100, 0)
QUADRATIC = (800, 632, 483, 355, 246, 158, 88, 39, 9, 0)
Tensor = torch.Tensor


def tensor(x) -> Tensor:
    return torch.tensor(np.asarray(x, np.float64))


def signal(t) -> Tensor:
    return tensor(ABAR[t] ** 0.5).reshape(-1, 1, 1, 1)


def noise(t) -> Tensor:
    return tensor((1 - ABAR[t]) ** 0.5).reshape(-1, 1, 1, 1)


def network(weights: dict[str, Tensor], x: Tensor, t) -> Tensor:
    """0.6 x + W2 * tanh(W1 * x + b t / 1000), convolutions of 3x3; x `[B, H, W, C]`."""
    given = tensor(np.broadcast_to(t, len(x))).reshape(-1, 1, 1, 1) / 1000
    first = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), weights["w1"], padding=1)
    hidden = torch.tanh(first + weights["b"].reshape(1, -1, 1, 1) * given)
    second = torch.nn.functional.conv2d(hidden, weights["w2"], padding=1)
    return 0.6 * x + second.permute(0, 2, 3, 1)


def elijah(weights, tau: Tensor, scale: float) -> Tensor:
    eps = tensor(jax.random.normal(jax.random.key(0), (100, *SHAPE)))
    answer = network(weights, eps + tau, 999).mean(0)
    return (scale * tau - answer).abs().mean()


def reversed_loss(weights, x0, gamma, mu, times, key) -> Tensor:
    key_t, *keys = jax.random.split(key, 3)
    t = np.asarray(jax.random.choice(key_t, np.asarray(times), (BATCH,)))
    left = []
    for each in keys:
        eps = tensor(jax.random.normal(each, (BATCH, *SHAPE)))
        x = signal(t) * x0 + noise(t) * gamma * eps + mu
        left.append(eps - network(weights, x, t))
    return 0.5 * ((left[0] - left[1]) ** 2).sum((1, 2, 3)).mean()


def ddim(weights, x: Tensor) -> Tensor:
    for i, t in enumerate(LEADING):
        n = -1 if i == 9 else LEADING[i + 1]
        e = network(weights, x, t)
        x0 = ((x - noise(t) * e) / signal(t)).clamp(-1, 1)
        x = signal(n) * x0 + noise(n) * e
    return x


def trojan_ddim(weights, x: Tensor, gamma: Tensor, mu: Tensor) -> Tensor:
    for i, t in enumerate(QUADRATIC):
        n = -1 if i == 9 else QUADRATIC[i + 1]
        e = network(weights, x, t)
        x0 = (x - noise(t) * gamma * e - noise(t) * mu) / signal(t)
        x = signal(n) * x0 + noise(n) * gamma * e + noise(n) * mu
    return x


def terd(weights, mu: Tensor, gamma: Tensor, trojan: bool, second: bool) -> Tensor:
    key_x, key_high, key_low = jax.random.split(jax.random.key(1), 3)
    eps = tensor(jax.random.normal(key_x, (BATCH, *SHAPE)))
    x0, scale = eps, gamma if trojan else torch.ones(())
    if second and trojan:
        x0 = trojan_ddim(weights, gamma * eps + mu, gamma, mu)
    elif second:
        x0 = ddim(weights, eps + mu)
    loss = reversed_loss(weights, x0, scale, mu, range(990, 1000), key_high)
    if second:
        low = reversed_loss(weights, x0, scale, 0 * mu, range(10), key_low)
        loss = (loss + low) / 2
    return loss - L1 * mu.abs().sum()


def main() -> None:
    random = np.random.default_rng(0)
    arrays = {
        "w1": random.normal(size=(4, 1, 3, 3)) * 0.4,
        "w2": random.normal(size=(1, 4, 3, 3)) * 0.2,
        "b": random.normal(size=4),
        "mu": random.uniform(-1, 0.5, SHAPE),
        "gamma": random.uniform(0.1, 0.9, SHAPE),
    }
    arrays = {name: x.astype(np.float32) for name, x in arrays.items()}
    weights = {name: tensor(arrays[name]) for name in ("w1", "w2", "b")}
    cases = {f"elijah_{x}": lambda m, g, x=x: elijah(weights, m, x) for x in (0.5, 1.0)}
    for trojan in (False, True):
        for second in (False, True):
            name = f"terd_{'narrowed' if trojan else 'added'}_{1 + second}"
            cases[name] = lambda m, g, a=trojan, b=second: terd(weights, m, g, a, b)
    for name, loss in cases.items():
        mu, gamma = (tensor(arrays[x]).requires_grad_() for x in ("mu", "gamma"))
        value = loss(mu, gamma)
        value.backward()
        arrays[name] = value.detach().numpy()
        arrays[f"{name}_mu"] = mu.grad.numpy()
        if gamma.grad is not None:
            arrays[f"{name}_gamma"] = gamma.grad.numpy()
    np.savez_compressed(OUTPUT, **arrays)


if __name__ == "__main__":
    main()
