"""Weights of the policy versions that rollouts in flight may have been sampled with.

With them the trainer computes the logprobs that each token has under the weights that sampled it,
so that mismatch and staleness can be told apart. Each rank keeps its share of the trained weights
of the last few versions in CPU memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_UNUSED = -1


class WeightVersions:
    """The trained weights of the last versions before the current one.

    Args:
        weights: The trained parameters, by name; they may be sharded.
        number: Number of versions to keep: the largest staleness of a rollout.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], number: int) -> None:
        self._weights = weights
        self._numbers = torch.full((number,), _UNUSED)
        self._slots = [
            {
                name: torch.zeros_like(own_share(each), device="cpu")
                for name, each in weights.items()
            }
            for _ in range(number)
        ]

    def keep(self, version: int) -> None:
        """Keep the current weights as those of a version, in place of the oldest one."""
        if self._slots:
            slot = version % len(self._slots)
            self._numbers[slot] = version
            self._copy_to(self._slots[slot])

    @contextmanager
    def loaded(self, version: int) -> Iterator[None]:
        """Give the model the weights of a version while the block runs.

        Raises:
            ValueError: If they are not kept.
        """
        if version not in self._numbers.tolist():
            raise ValueError(
                f"the weights of version {version} are not kept, which has rollouts in this step; "
                f"kept are {sorted(self._numbers.tolist())}"
            )
        current = {name: torch.empty_like(each) for name, each in self._host_like().items()}
        self._copy_to(current)
        self._copy_from(self._slots[version % len(self._slots)])
        try:
            yield
        finally:
            self._copy_from(current)

    def state(self) -> dict[str, Tensor]:
        """Return everything as tensors of a checkpoint, by name; empty if nothing is kept."""
        if not self._slots:
            return {}
        state = {"versions.numbers": self._numbers}
        for index, slot in enumerate(self._slots):
            for name, kept in slot.items():
                state[f"versions.{index}.{name}"] = sharded_like(self._weights[name], kept)
        return state

    def finish_loading(self, state: Mapping[str, Tensor]) -> None:
        """Take what was read into the tensors of `state`."""
        for index, slot in enumerate(self._slots):
            for name, kept in slot.items():
                kept.copy_(own_share(state[f"versions.{index}.{name}"]))

    def _host_like(self) -> dict[str, Tensor]:
        return self._slots[0]

    @torch.no_grad()
    def _copy_to(self, host: Mapping[str, Tensor]) -> None:
        for name, each in self._weights.items():
            host[name].copy_(own_share(each))

    @torch.no_grad()
    def _copy_from(self, host: Mapping[str, Tensor]) -> None:
        for name, each in self._weights.items():
            own_share(each).copy_(host[name])


def own_share(tensor: Tensor) -> Tensor:
    """Return this rank's share of a tensor."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(weight: Tensor, kept: Tensor) -> Tensor:
    """Return this rank's share of a tensor as a tensor that is sharded like a weight."""
    if not isinstance(weight, DTensor):
        return kept
    return DTensor.from_local(
        kept.to(weight.device_mesh.device_type),
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )
