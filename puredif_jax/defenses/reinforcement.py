"""Amplification: a known trigger made stronger on the weights as they are.

The attacker's side of inversion, for red-team evaluation of a model that one has
trained: start at the true trigger r and descend the denoising-consistency loss, by
default its aim at the known target alone. The reinforced trigger is used in place of r.
"""

from __future__ import annotations

import dataclasses

from puredif_jax.defenses.denoising_consistency import DenoisingConsistency
from puredif_jax.defenses.descent import Descent
from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.diffusion.path_keeping import PathKeeping
from puredif_jax.diffusion.solver import Solver


@dataclasses.dataclass(frozen=True)
class Reinforcement:
    """How a known trigger is reinforced.

    Attributes:
      deterministic: the loss for backdoors of deterministic sampling; its `aim` pulls
        the last images to the known target.
      ancestral: the loss for backdoors of ancestral sampling, which do not fire under a
        deterministic rollout. The chain must be as long as can be afforded: the trigger
        that suits a short one does not suit the sampler (docs/method.md).
      descent: optimiser and bound for `deterministic`, from the true trigger; one
        candidate, without scouts.
      ancestral_descent: the same for `ancestral`: few small steps, since the gradient
        through a chain of random steps is mostly noise.

    Raises:
      ValueError: a descent has several candidates, or scouts.
    """

    deterministic: DenoisingConsistency = DenoisingConsistency(
        sampler=DDIM(steps=10), samples=48, on_path=False, across_noise=0.0, aim=1.0
    )
    ancestral: DenoisingConsistency = DenoisingConsistency(
        sampler=PathKeeping(steps=10),
        samples=16,
        on_path=False,
        across_noise=0.0,
        aim=1.0,
    )
    descent: Descent = Descent(steps=100, learning_rate=0.05, b2=0.999, bound=None)
    ancestral_descent: Descent = Descent(
        steps=12, learning_rate=0.02, b2=0.999, bound=None
    )

    def __post_init__(self) -> None:
        for each in (self.descent, self.ancestral_descent):
            if (each.candidates, each.scout) != (1, 0):
                raise ValueError(
                    "reinforcement needs a descent of candidates=1 and scout=0, found "
                    f"{each.candidates} and {each.scout}"
                )

    def loss(self, solver: Solver, controlled: bool = False) -> DenoisingConsistency:
        """The loss for a kind of backdoor; inside the channel where draws run there."""
        found = solver.pick(self.ancestral, self.deterministic)
        return dataclasses.replace(found, on_path=True) if controlled else found

    def descending(self, solver: Solver) -> Descent:
        """How the loss for a kind of backdoor is descended."""
        return solver.pick(self.ancestral_descent, self.descent)

    def evaluations(self, solver: Solver) -> int:
        """Network evaluations of one image; one with its gradient counts for three."""
        return 3 * self.descending(solver).steps * self.loss(solver).evaluations
