"""Amplification: a known trigger made stronger on the weights as they are.

The attacker's side of inversion, for red-team evaluation of a model that one has
trained: start at the true trigger r and descend the denoising-consistency loss, by
default its aim at the known target alone. The reinforced trigger is used in place of r.
"""

from __future__ import annotations

import dataclasses

from puredif_jax.attacks import Solver
from puredif_jax.diffusion import DDIM, DDPM, NoiseSchedule
from puredif_jax.inversion import Descent, Inverter, inverter
from puredif_jax.objectives import DenoisingConsistency, Hypothesis
from puredif_jax.types import Candidate, NoiseModel, Shard, unsharded


@dataclasses.dataclass(frozen=True)
class Reinforcement:
    """How a known trigger is reinforced.

    Attributes:
      deterministic: the loss for backdoors of deterministic sampling; its `aim` draws
        the last images to the known target.
      ancestral: that for backdoors of ancestral sampling, which do not fire under a
        deterministic rollout. Expect nothing of it: where it was measured, the
        reinforced trigger fired less often than the true one (docs/method.md).
      descent: optimiser and bound of the reinforced trigger, from the true one; one
        candidate, without scouts and refreshes.

    Raises:
      ValueError: `descent` has more than that.
    """

    deterministic: DenoisingConsistency = DenoisingConsistency(
        sampler=DDIM(steps=10), samples=48, on_path=False, across_noise=0.0, aim=1.0
    )
    ancestral: DenoisingConsistency = DenoisingConsistency(
        sampler=DDPM(steps=20), samples=24, on_path=False, across_noise=0.0, aim=1.0
    )
    descent: Descent = Descent(steps=100, learning_rate=0.05, b2=0.999, bound=None)

    def __post_init__(self) -> None:
        descent = self.descent
        if (descent.candidates, descent.scout, descent.refresh) != (1, 0, 0):
            raise ValueError(
                "reinforcement needs a descent of candidates=1, scout=0 and refresh=0, "
                f"found {descent.candidates}, {descent.scout} and {descent.refresh}"
            )

    def loss(self, solver: Solver) -> DenoisingConsistency:
        """That for a kind of backdoor."""
        return self.deterministic if solver == "ode" else self.ancestral

    def evaluations(self, solver: Solver) -> int:
        """Network evaluations of one image; one with its gradient counts for three."""
        return 3 * self.descent.steps * self.loss(solver).evaluations

    def inverter(
        self,
        model: NoiseModel,
        schedule: NoiseSchedule,
        solver: Solver,
        start: Candidate,
        shard: Shard = unsharded,
    ) -> Inverter:
        """The (init, step) pair that starts at the true trigger and target.

        Args:
          model, schedule: the model, and its forward process.
          solver: the kind of sampler under which the backdoor fires.
          start: the true trigger and target, `[H, W, C]` each.
          shard: constraint on a noise batch.
        """
        hypothesis = Hypothesis.of(solver)
        objective = self.loss(solver).bind(model, schedule, hypothesis, shard)
        height, width, channels = start.delta.shape
        return inverter(objective, self.descent, (height, width, channels), start)
