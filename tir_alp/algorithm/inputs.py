"""What a loss is computed from. Importing this module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class LossInputs:
    """Inputs for one micro-batch: one row per sequence, one column per token.

    Example: two sequences, the second of which has one loss token. `*` may be any value:

        logprobs   = [[-0.1, -1.2], [-0.7, *]]      loss_mask  = [[1, 1], [1, 0]]
        rollout    = [[-0.3, -1.0], [-1.5, *]]      advantages = [+1, -1]
    """

    logprobs: Tensor
    """[B, T] under the current policy, or under ALP the perturbed one; carries the gradient."""
    rollout_logprobs: Tensor
    """[B, T] under the policy that sampled the tokens, as its engine reported them."""
    advantages: Tensor
    """[B], or [B, T] where credit differs from token to token."""
    loss_mask: Tensor
    """[B, T] bool; True for the tokens that enter the loss."""
    proximal_logprobs: Tensor | None = None
    """[B, T] under the trainer's own policy at the start of the step."""
    reference_logprobs: Tensor | None = None
    """[B, T] under the frozen initial policy."""
    turn_ids: Tensor | None = None
    """[B, T] int64, index of the turn that a token belongs to; read where the mask is True."""
    entropy: Tensor | None = None
    """[B, T] entropy of the current policy, in nats; carries a gradient for an entropy bonus."""
    selected: Tensor | None = None
    """[B, T] bool, the tokens that `AlgorithmConfig.selection` has selected in the update."""
    weights: Tensor | None = None
    """[B] weights of the sequences where sequences are averaged; None: all are 1."""

    def token_wise_advantages(self) -> Tensor:
        """Return the advantage of each token, [B, T]; anything outside the mask."""
        wide = self.advantages if self.advantages.dim() == 2 else self.advantages[:, None]
        return wide.expand(self.loss_mask.shape)

    def require(self, name: str) -> Tensor:
        """Return an optional tensor. Raises ValueError if it is None."""
        tensor = getattr(self, name)
        if tensor is None:
            raise ValueError(f"the algorithm reads {name}, but LossInputs.{name} is None")
        return tensor
