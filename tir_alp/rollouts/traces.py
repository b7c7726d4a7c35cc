"""The traces of an episode: how its conversation goes on, and what of it is trained on. Pure.

Rollouts and the audit share these functions; everything that they decide follows from the record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from numpy.typing import NDArray

from tir_alp.config import RolloutConfig
from tir_alp.engines.base import Completion
from tir_alp.rollouts.history import Conversation, Following, Role, checked_messages
from tir_alp.rollouts.outputs import outputs_of
from tir_alp.rollouts.renderer import Renderer
from tir_alp.types import MAX_TRACES, StopReason, TokenSpan, Trajectory, Turn, trace_uid


@dataclass(slots=True)
class GrowingTrace:
    """A trace that is being sampled."""

    prompt: TokenSpan
    turns: list[Turn] = field(default_factory=list)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All tokens so far."""
        pairs = ((turn.completion, turn.observation) for turn in self.turns)
        spans = (self.prompt, *(span for pair in pairs for span in pair))
        return tuple(token for span in spans for token in span.token_ids)

    def new_routing(self, completion: Completion) -> NDArray | None:
        """Return the experts of the tokens for which no turn of the trace has them yet.

        Args:
            completion: The next completion, whose tokens after a cut may be left out.
        """
        if completion.routing is None or any(turn.routing is None for turn in self.turns):
            return None
        start = sum(len(turn.routing) for turn in self.turns if turn.routing is not None)
        return completion.routing[start : len(self.token_ids) + len(completion.token_ids)]


def following(
    renderer: Renderer,
    conversation: Conversation,
    completion: Sequence[int],
    stop: StopReason,
    text: str,
    info: Mapping[str, Any],
) -> tuple[Conversation, Following]:
    """Return the conversation with one more turn, and what the policy reads next.

    Args:
        renderer: Renderer of the run.
        conversation: The conversation before the completion.
        completion: The tokens of the completion.
        stop: How it ended.
        text: The environment's observation.
        info: What the environment returned with it. `messages` replaces the conversation, and
            `role` says whose message the observation is.

    Raises:
        ValueError: The environment returned messages or a role that are none, or the template
            cannot show them.
    """
    if info.get("messages") is not None:
        return renderer.start_over(checked_messages(info["messages"]))
    role: Role = info.get("role", "tool")
    if role not in ("tool", "user"):
        raise ValueError(f"info['role'] is {role!r:.60}; it can be 'tool' or 'user'")
    return renderer.go_on(conversation, completion, stop, outputs_of(text, info), role)


def is_full(following: Following, num_tokens: int, num_traces: int, limits: RolloutConfig) -> bool:
    """Return whether there is no room for a completion after what the policy would read next.

    Args:
        following: What it would read.
        num_tokens: Number of tokens of the trace, the last completion included.
        num_traces: Number of traces so far.
        limits: Limits of the run.
    """
    if following.begins:
        return len(following.span) >= limits.max_context_tokens or num_traces >= MAX_TRACES
    return num_tokens + len(following.span) >= limits.max_context_tokens


def joined(
    traces: Sequence[GrowingTrace],
    *,
    task_id: str,
    group_id: int,
    sequence_uid: int,
    terminated: bool,
    truncated: bool,
) -> Trajectory:
    """Return the trajectory of an episode: its last trace, with the earlier ones as branches.

    Args:
        traces: The traces, in order, each with at least one turn.
        task_id: Id of the task.
        group_id: Id of the group.
        sequence_uid: Uid of the episode's sequence.
        terminated: Whether the environment ended the episode.
        truncated: Whether a limit ended it.
    """
    sequences = [
        Trajectory(
            task_id=task_id,
            group_id=group_id,
            prompt=each.prompt,
            turns=tuple(each.turns),
            terminated=terminated,
            truncated=truncated,
            sequence_uid=trace_uid(sequence_uid, number),
        )
        for number, each in enumerate(traces)
    ]
    *earlier, last = sequences
    return replace(last, branches=tuple(earlier), is_forked=bool(earlier))


def mask_traces(traces: Sequence[GrowingTrace], limits: RolloutConfig, truncated: bool) -> None:
    """Take out of the loss what the config says, of all traces of an episode together.

    Args:
        traces: The traces, in order, whose turns are replaced.
        limits: `void_turns`, `overlong` and `trace_credit` are read.
        truncated: Whether a limit ended the episode.
    """
    turns = mask_void_turns([turn for each in traces for turn in each.turns], limits.void_turns)
    turns = mask_overlong(turns, limits.overlong, truncated)
    if limits.trace_credit == "last":
        turns = _mask(turns, [each is not traces[-1] for each in traces for _ in each.turns])
    rest = iter(turns)
    for each in traces:
        each.turns = [next(rest) for _ in each.turns]


def mask_void_turns(turns: Sequence[Turn], policy: str) -> tuple[Turn, ...]:
    """Take void turns, or all turns of a trajectory with one, out of the loss (SimpleTIR).

    Args:
        turns: The turns of one episode.
        policy: `keep`, `mask_turn` or `mask_trajectory`.
    """
    is_void = [turn.is_void for turn in turns]
    if policy == "keep":
        return tuple(turns)
    return _mask(turns, is_void if policy == "mask_turn" else [any(is_void)] * len(turns))


def mask_overlong(turns: Sequence[Turn], policy: str, truncated: bool) -> tuple[Turn, ...]:
    """Take completions that a limit cut off, or all of an overlong trajectory, out of the loss.

    For whole trajectories this is the overlong filtering of DAPO: a trajectory that a limit ended
    is unfinished, and its reward means little.

    Args:
        turns: The turns of one episode.
        policy: `mask_turn` or `mask_trajectory`; other values leave the turns unchanged.
        truncated: Whether a limit ended the trajectory.
    """
    is_cut = [turn.is_cut for turn in turns]
    if policy not in ("mask_turn", "mask_trajectory"):
        return tuple(turns)
    whole = [truncated or any(is_cut)] * len(turns)
    return _mask(turns, is_cut if policy == "mask_turn" else whole)


def _mask(turns: Sequence[Turn], is_out: Sequence[bool]) -> tuple[Turn, ...]:
    return tuple(
        replace(turn, completion=replace(turn.completion, trainable=False)) if out else turn
        for turn, out in zip(turns, is_out, strict=True)
    )
