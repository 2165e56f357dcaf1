"""Makes samplers.npz: ten steps of diffusers' schedulers, to check `diffusion`.

Run, in an environment of its own (the package does not need PyTorch):

    pip install torch==2.13.0 diffusers==0.42.1
    python tests/golden/make_samplers.py

For each case NAME of `CASES` the file has `NAME_t`, the timesteps `[10]`; `NAME_x`, the
states `[11, 2, 2, 2, 1]` of a chain without noise; and `NAME_std`, the factor `[10]` of
the noise that each step would add. The network is `predict`, taken for either
prediction.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np

OUTPUT = Path(__file__).parent / "samplers.npz"
STEPS = 10
BETAS: dict[str, dict[str, Any]] = {
    "linear": dict(beta_schedule="linear"),
    "scaled": dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "cosine": dict(beta_schedule="squaredcos_cap_v2"),
}
SPACINGS: dict[str, dict[str, Any]] = {
    "leading": dict(timestep_spacing="leading"),
    "offset": dict(timestep_spacing="leading", steps_offset=1),
    "linspace": dict(timestep_spacing="linspace"),
    "trailing": dict(timestep_spacing="trailing"),
}
SAMPLERS: dict[str, dict[str, Any]] = {
    "small": dict(kind="DDPM", variance_type="fixed_small", clip_sample=False),
    "large": dict(kind="DDPM", variance_type="fixed_large", clip_sample=True),
    "ddim": dict(kind="DDIM", clip_sample=False),
    "bounded": dict(kind="DDIM", clip_sample=True, set_alpha_to_one=False),
    "solver": dict(kind="DPMSolverMultistep"),
    "unipc": dict(kind="UniPCMultistep"),
}
PREDICTIONS = ("epsilon", "v_prediction")
CASES = {
    "_".join(names): names
    for names in itertools.product(BETAS, SPACINGS, SAMPLERS, PREDICTIONS)
}


def start() -> np.ndarray:
    """x_T, float32 `[2, 2, 2, 1]`."""
    return np.random.default_rng(5).normal(size=(2, 2, 2, 1)).astype(np.float32)


def predict(numpy: Any, x: Any, t: int) -> Any:
    """A network in one line, for torch and for jax.numpy; t is a Python int."""
    return numpy.sin(2 * x + t / 100) / 2 + x / 2


def main() -> None:
    import diffusers
    import torch
    from diffusers.schedulers import scheduling_ddpm

    def noise(value: float) -> None:
        scheduling_ddpm.randn_tensor = lambda shape, **_: torch.full(shape, value)

    arrays = {}
    for name, (betas, spacing, sampler, prediction) in CASES.items():
        options = {**BETAS[betas], **SPACINGS[spacing], **SAMPLERS[sampler]}
        options |= {"prediction_type": prediction}
        kind = getattr(diffusers, f"{options.pop('kind')}Scheduler")
        scheduler = kind(**options)
        scheduler.set_timesteps(STEPS)
        x = torch.tensor(start())
        states, stds = [x.numpy()], []
        for t in scheduler.timesteps:
            output = predict(torch, x, int(t))
            found = []
            for value in (0.0,) if sampler in ("solver", "unipc") else (0.0, 1.0):
                noise(value)
                found.append(scheduler.step(output, t, x).prev_sample)
            x = found[0]
            stds.append(float((found[-1] - found[0]).mean()))
            states.append(x.numpy())
        arrays[f"{name}_t"] = scheduler.timesteps.numpy().astype(np.int32)
        arrays[f"{name}_x"] = np.stack(states)
        arrays[f"{name}_std"] = np.array(stds, np.float32)
    np.savez_compressed(OUTPUT, **arrays)


if __name__ == "__main__":
    main()
