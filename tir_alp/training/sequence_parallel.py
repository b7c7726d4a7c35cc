"""One forward divided over several ranks, each of which computes a share of the tokens (Ulysses).

Everywhere but in attention a token needs nothing of the others, so a rank computes the tokens of
its share alone. In attention the ranks exchange tokens for heads (arXiv 2309.14509): each gets the
queries, keys and values of all tokens for its share of the heads, attends as a single rank would,
and returns the outputs. So sequences and prompts may be cut anywhere, and positions, windows and
noise are those of the whole forward.

Every rank then learns the logprobs of all tokens and computes the whole loss. In the backward pass
it takes the gradients of its own tokens; those of the weights add up over ranks to the gradients of
a single one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from math import gcd
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tir_alp.training.attention import Layout
from tir_alp.training.ranks import Ranks

KEY = "trainer.sequence_parallel"


def divide_ranks(ranks: Ranks, size: int, timeout_s: float) -> tuple[Ranks | None, Ranks]:
    """Divide the ranks into teams of consecutive ones that share a forward; call on every rank.

    Args:
        ranks: All ranks.
        size: Number of ranks in a team.
        timeout_s: Deadline of a collective call in a team, in seconds.

    Returns:
        The team of this rank, None if it is alone in it; and the ranks with the same place in their
        teams, one for each team, of which each has other sequences.

    Raises:
        ValueError: If `size` does not divide the number of ranks.
    """
    if size == 1:
        return None, ranks
    if ranks.size % size:
        raise ValueError(
            f"{KEY} = {size} does not divide the number of ranks, {ranks.size}: start a multiple "
            f"of it, e.g. with --cluster local --cluster.trainer.count {size}"
        )
    teams = torch.arange(ranks.size).reshape(-1, size)
    return _among(ranks, teams, timeout_s), _among(ranks, teams.T, timeout_s)


def _among(ranks: Ranks, rows: Tensor, timeout_s: float) -> Ranks:
    """Return the ranks of the row in which this one is."""
    group, _ = dist.new_subgroups_by_enumeration(
        rows.tolist(), timeout=timedelta(seconds=timeout_s)
    )
    assert isinstance(group, dist.ProcessGroup)  # each rank is in a row
    mesh = DeviceMesh.from_group(group, ranks.device.type)
    return Ranks(dist.get_rank(group), rows.shape[1], ranks.device, mesh)


def check_heads(num_heads: int, size: int, owner: str) -> None:
    """Raise ValueError if attention heads cannot be divided over the ranks of a team."""
    if num_heads % size:
        raise ValueError(
            f"{KEY} = {size} does not divide the {num_heads} attention heads of {owner}: set it to "
            "a divisor of them"
        )


@dataclass(frozen=True, slots=True)
class TokenShare:
    """The consecutive tokens of a forward that this rank computes."""

    team: Ranks
    """The ranks that share the forward."""
    sizes: tuple[int, ...]
    """Number of tokens of each of them; they differ by at most 1."""

    @classmethod
    def of(cls, num_tokens: int, team: Ranks) -> TokenShare:
        """Divide the tokens of a forward over the ranks of a team."""
        ends = [num_tokens * (rank + 1) // team.size for rank in range(team.size)]
        starts = [0, *ends[:-1]]
        return cls(team, tuple(end - start for start, end in zip(starts, ends, strict=True)))

    @property
    def start(self) -> int:
        """Index of the first token of the share."""
        return sum(self.sizes[: self.team.rank])

    @property
    def size(self) -> int:
        """Number of tokens of the share."""
        return self.sizes[self.team.rank]

    def own(self, values: Tensor) -> Tensor:
        """Return the part of values [N, ...] of all tokens that belongs to the share."""
        return values[self.start : self.start + self.size]

    def find(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Find which of some tokens are in the share. A GPU is waited for.

        Args:
            index: [M] index of each token in the forward.

        Returns:
            Which of the M they are, and the index of each in the share: [K] each.
        """
        place = index - self.start
        found = ((place >= 0) & (place < self.size)).nonzero().squeeze(-1)
        return found, place[found]


class DividedLayout:
    """A layout of which each rank of a team computes some heads.

    Args:
        layout: What the tokens of the whole forward attend to.
        share: The tokens of this rank, in which the states come and go.
    """

    def __init__(self, layout: Layout, share: TokenShare) -> None:
        self._layout, self._share = layout, share

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None,
        window: int | None,
    ) -> Tensor:
        """As `Layout.attend`."""
        size = self._share.team.size
        check_heads(query.shape[1], size, f"layer {layer}")
        # Query i attends to key i // (queries per key). With the fewest copies by which the number
        # of keys can be divided, this holds within the heads of each rank.
        copies = size // gcd(size, key.shape[1])
        states = [query, *(each.repeat_interleave(copies, dim=1) for each in (key, value))]
        output = self._layout.attend(layer, *self._to_heads(states), scale=scale, window=window)
        return self._to_tokens(output)

    def _to_heads(self, states: Sequence[Tensor]) -> list[Tensor]:
        """Exchange some heads' states of own tokens for own heads' states of all tokens.

        Args:
            states: [own tokens, heads, D]; the numbers of heads and D may differ.

        Returns:
            [tokens, own heads, D] each.
        """
        size, number = self._share.team.size, self._share.size
        by_rank = [each.unflatten(1, (size, -1)).transpose(0, 1).flatten(2) for each in states]
        sent = torch.cat(by_rank, dim=-1).flatten(0, 1)
        got = _Exchange.apply(sent, self._share.team, (number,) * size, self._share.sizes)
        parts = got.split([each.shape[-1] for each in by_rank], dim=-1)
        return [
            part.unflatten(1, (-1, each.shape[-1]))
            for part, each in zip(parts, states, strict=True)
        ]

    def _to_tokens(self, output: Tensor) -> Tensor:
        """Undo `_to_heads`: from [tokens, own heads, D] to [own tokens, heads, D]."""
        size, number = self._share.team.size, self._share.size
        sent = output.flatten(1)
        got = _Exchange.apply(sent, self._share.team, self._share.sizes, (number,) * size)
        by_rank = got.unflatten(0, (size, number)).unflatten(-1, output.shape[1:])
        return by_rank.transpose(0, 1).flatten(1, 2)


class _Exchange(torch.autograd.Function):
    """Send rows [sum(sent), W] to the ranks of a team, and return those that they sent."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, team: Ranks, sent: tuple[int, ...], received: tuple[int, ...]
    ) -> Tensor:
        ctx.arguments = team, received, sent
        return _exchanged(rows, team, sent, received)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(grad, *ctx.arguments), None, None, None


def _exchanged(
    rows: Tensor, team: Ranks, sent: tuple[int, ...], received: tuple[int, ...]
) -> Tensor:
    found = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(
        found, rows.contiguous(), [*received], [*sent], group=team.mesh.get_group()
    )
    return found


def joined(own: Sequence[Tensor], places: Tensor, number: int, team: Ranks) -> list[Tensor]:
    """Return what all ranks of a team have computed, the same bits on each.

    Every rank must compute the same function of it: a gradient is taken on the rank that computed
    the value, and nowhere else.

    Args:
        own: Values of this rank, [K] each.
        places: [K] their places among those of all ranks.
        number: Number of places; each is filled by one rank.
        team: The ranks.

    Returns:
        Values [number]; those have a gradient whose own values have one.
    """
    whole = _Join.apply(torch.stack([*own]), places, number, team)
    return [
        every if each.requires_grad else every.detach()
        for every, each in zip(whole, own, strict=True)
    ]


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, places: Tensor, number: int, team: Ranks) -> Tensor:
        ctx.save_for_backward(places)
        return team.sum(own.new_zeros(len(own), number).index_copy_(1, places, own))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (places,) = ctx.saved_tensors
        return grad.index_select(1, places), None, None, None
