"""Undoes the updates of a step if the engine's policy has not gained from them.

The samples of a step were drawn by the engine with the weights that the step before has made. So at
the beginning of a step, trainer and engine can be compared on them. Where the gap is too large, the
trainer goes back to the state from before those updates, and the step makes none: its samples were
drawn by a policy that is given up.

Each rank keeps its share of that state in CPU memory, and in checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tir_alp.algorithm.acceptance import inference_gap, tolerance_at
from tir_alp.algorithm.presets import AcceptanceConfig
from tir_alp.training.ranks import Ranks
from tir_alp.training.weight_versions import own_share, sharded_like
from tir_alp.types import Batch

_PREFIX = "accepted."
_JUDGED = "acceptance.is_open"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was decided at the beginning of a step."""

    is_rejected: bool
    """Whether the updates of the step before were undone, and this one makes none."""
    metrics: Mapping[str, float]


class Acceptance:
    """The last accepted state of the trainer.

    Args:
        how: The tolerance.
        state: The state of the trainer, as tensors by name; they may be sharded.
    """

    def __init__(self, how: AcceptanceConfig, state: Mapping[str, Tensor]) -> None:
        self._how = how
        self._like = state
        self._kept = {name: _host(each).clone() for name, each in state.items()}
        self._is_open = torch.zeros((), dtype=torch.int64)  # whether updates are to be judged

    def judge(
        self, batches: Sequence[Batch], step: int, ranks: Ranks, state: Mapping[str, Tensor]
    ) -> Verdict:
        """Decide on the updates of the step before; call on every rank, with proximal logprobs.

        Args:
            batches: The micro-batches of this rank, of the whole step.
            step: Number of the step.
            ranks: The processes that train together.
            state: The state of the trainer now. If the updates are rejected, the accepted state is
                copied into its tensors; otherwise it is kept as the accepted one.
        """
        own = [each for batch in batches for each in _sequences(batch)]
        sequences = [each for of_rank in ranks.gather(own) for each in of_rank]
        if not sequences:
            return Verdict(False, {})
        if not self._is_open:
            self._keep(state)
            return Verdict(False, {})
        gap = inference_gap(*map(list, zip(*sequences, strict=True)))
        is_rejected = not gap >= -tolerance_at(max(step - 1, 0), self._how)  # NaN is rejected
        if is_rejected:
            _copy(self._kept, state)
            self._is_open.zero_()
        else:
            self._keep(state)
        metrics = {"acceptance/gap": gap, "acceptance/rejected": float(is_rejected)}
        return Verdict(is_rejected, metrics)

    def state(self) -> dict[str, Tensor]:
        """Return everything as tensors of a checkpoint, by name."""
        kept = {
            _PREFIX + name: sharded_like(self._like[name], each)
            for name, each in self._kept.items()
        }
        return {_JUDGED: self._is_open, **kept}

    def finish_loading(self, state: Mapping[str, Tensor]) -> None:
        """Take what was read into the tensors of `state`."""
        for name, each in self._kept.items():
            each.copy_(own_share(state[_PREFIX + name]))

    def _keep(self, state: Mapping[str, Tensor]) -> None:
        for name, each in self._kept.items():
            each.copy_(own_share(state[name]))
        self._is_open.fill_(1)


def _sequences(batch: Batch) -> list[tuple[float, float]]:
    """Return the mean log ratio over the loss tokens and the advantage of each sequence."""
    assert batch.proximal_logprobs is not None
    mask = batch.loss_mask
    numbers = mask.sum(-1)
    log_ratios = torch.where(mask, batch.proximal_logprobs - batch.rollout_logprobs, 0.0)
    means = log_ratios.double().sum(-1) / numbers.clamp(min=1)
    columns = zip(means.tolist(), batch.advantages.tolist(), numbers.tolist(), strict=True)
    return [(mean, advantage) for mean, advantage, number in columns if number]


def _host(tensor: Tensor) -> Tensor:
    return own_share(tensor).cpu()


@torch.no_grad()
def _copy(kept: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    for name, each in kept.items():
        own_share(state[name]).copy_(each)
