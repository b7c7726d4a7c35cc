"""What the trainer is given of an episode: a sample for each of its traces. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from tir_alp.types import Sample, Trajectory


def samples_of(
    trajectory: Trajectory,
    advantage: float,
    turn_advantages: Sequence[float] | None = None,
    credit: str = "equal",
) -> list[Sample]:
    """Return a sample for each trace of an episode, all with the advantage of the episode.

    Args:
        trajectory: The trajectory of the episode.
        advantage: Its advantage.
        turn_advantages: What is added in each turn of the conversation; None: nothing.
        credit: `RolloutConfig.trace_credit`. With `token` the weights of the traces are their
            shares of the loss tokens, which add up to 1: the episode weighs as much as another.
    """
    numbers = [sum(each.loss_mask) for each in trajectory.sequences]
    total = sum(numbers)
    added: dict[int, tuple[float, ...]] = {}
    if turn_advantages is not None:
        rest = iter(turn_advantages)
        for each in trajectory.conversation:
            added[each.sequence_uid] = tuple(next(rest) for _ in each.turns)
    return [
        Sample(
            each,
            advantage,
            added.get(each.sequence_uid),
            number / total if credit == "token" and total else 1.0,
        )
        for each, number in zip(trajectory.sequences, numbers, strict=True)
    ]


def advantages_by_token(sample: Sample) -> list[float]:
    """Return the advantage of each token: that of its trajectory, and what its turn adds."""
    added = sample.turn_advantages or ()
    return [
        sample.advantage + (added[turn] if added and turn >= 0 else 0.0)
        for turn in sample.trajectory.turn_ids
    ]
