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
        deterministic rollout. Its sampler must keep their path: a trigger that suits
        strides of DDPM does not suit all of its steps.
      descent: optimiser and bound, from the known trigger; one candidate, without
        scouts. `NormKeeping` keeps the trigger's norm.

    Raises:
      ValueError: the descent has several candidates, or scouts.
    """

    deterministic: DenoisingConsistency = DenoisingConsistency(
        sampler=DDIM(steps=10), samples=16, on_path=False, across_noise=0.0, aim=1.0
    )
    ancestral: DenoisingConsistency = DenoisingConsistency(
        sampler=PathKeeping(steps=10),
        samples=16,
        on_path=False,
        across_noise=0.0,
        aim=1.0,
    )
    descent: Descent = Descent(steps=80, learning_rate=0.05, b2=0.999, bound=None)

    def __post_init__(self) -> None:
        if (self.descent.candidates, self.descent.scout) != (1, 0):
            raise ValueError(
                "reinforcement needs a descent of candidates=1 and scout=0, found "
                f"{self.descent.candidates} and {self.descent.scout}"
            )

    def loss(
        self, solver: Solver, controlled: bool = False, psi: float | None = None
    ) -> DenoisingConsistency:
        """The loss for a kind of backdoor.

        Args:
          solver: the kind of sampling under which it fires.
          controlled: whether draws run inside the channel; then so does the rollout.
          psi: whose path the ancestral rollout keeps, where its sampler keeps one.
        """
        found = solver.pick(self.ancestral, self.deterministic)
        found = dataclasses.replace(found, sampler=found.sampler.keeping(psi))
        return dataclasses.replace(found, on_path=True) if controlled else found

    def evaluations(self, solver: Solver) -> int:
        """Network evaluations of one image; one with its gradient counts for three."""
        return 3 * self.descent.steps * self.loss(solver).evaluations
