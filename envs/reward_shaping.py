"""What an episode earns beside its answer: small, named parts, so that each can be watched."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RewardShaping:
    """How much each part weighs; 0 leaves it out.

    Example, a tenth for an answer in its box, and up to two tenths less for many words:
    `RewardShaping(format=0.1, length=-0.2, length_chars=20_000)`.
    """

    format: float = 0.0
    """Earned by an episode that ends with an answer where answers belong, right or wrong."""
    tool_use: float = 0.0
    """Earned once by an episode in which a tool call came out well."""
    length: float = 0.0
    """Earned in full by an episode of `length_chars` characters or more, in proportion below;
    negative to keep episodes short."""
    length_chars: int = 16_384
    """Of all that the model wrote in an episode."""

    def __post_init__(self) -> None:
        if self.length_chars < 1:
            raise ValueError(f"shaping.length_chars is {self.length_chars}; it must be at least 1")


@dataclass(frozen=True, slots=True)
class EpisodeFacts:
    """What the parts depend on."""

    has_answer: bool
    good_calls: int
    """Tool calls whose outcome was `OK`."""
    num_chars: int
    """That the model wrote."""


def reward_parts(
    answer_reward: float, shaping: RewardShaping, facts: EpisodeFacts
) -> dict[str, float]:
    """Return what an episode earns, by part; the reward is their sum.

    Example:
        >>> reward_parts(1.0, RewardShaping(tool_use=0.5), EpisodeFacts(True, 2, 80))
        {'answer': 1.0, 'tool_use': 0.5}
    """
    parts = {
        "format": shaping.format * facts.has_answer,
        "tool_use": shaping.tool_use * (facts.good_calls > 0),
        "length": shaping.length * min(1.0, facts.num_chars / shaping.length_chars),
    }
    weighed = {name: part for name, part in parts.items() if getattr(shaping, name)}
    return {"answer": answer_reward, **weighed}
