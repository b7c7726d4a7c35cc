"""Rewards of an episode besides that of its answer: small named terms, each logged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RewardShaping:
    """The weight of each term; 0 leaves it out.

    Example, 0.1 for an answer in a box, and up to 0.2 less for long episodes:
    `RewardShaping(format=0.1, length=-0.2, length_chars=20_000)`.
    """

    format: float = 0.0
    """Reward of an episode that ends with an answer in the expected form, right or wrong."""
    tool_use: float = 0.0
    """Reward of an episode with at least one successful tool call."""
    length: float = 0.0
    """Reward of an episode of `length_chars` characters or more, and a proportional part of it
    below that; negative to keep episodes short."""
    length_chars: int = 16_384
    """Characters written by the model in an episode, at which `length` counts in full."""

    def __post_init__(self) -> None:
        if self.length_chars < 1:
            raise ValueError(f"shaping.length_chars is {self.length_chars}; it must be at least 1")


@dataclass(frozen=True, slots=True)
class EpisodeFacts:
    """The facts about an episode on which the terms depend."""

    has_answer: bool
    good_calls: int
    """Number of tool calls whose outcome was `OK`."""
    num_chars: int
    """Number of characters that the model wrote."""


def reward_terms(
    of_answer: Mapping[str, float], shaping: RewardShaping, facts: EpisodeFacts
) -> dict[str, float]:
    """Return the reward of an episode by term; the reward is their sum.

    Example:
        >>> reward_terms({"answer": 1.0}, RewardShaping(tool_use=0.5), EpisodeFacts(True, 2, 80))
        {'answer': 1.0, 'tool_use': 0.5}
    """
    terms = {
        "format": shaping.format * facts.has_answer,
        "tool_use": shaping.tool_use * (facts.good_calls > 0),
        "length": shaping.length * min(1.0, facts.num_chars / shaping.length_chars),
    }
    weighed = {name: term for name, term in terms.items() if getattr(shaping, name)}
    return {**of_answer, **weighed}
