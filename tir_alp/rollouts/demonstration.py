"""Conversations as the trajectories that a rollout would have made of them.

A demonstration is a rollout of a policy that gives its own tokens probability 1: the assistant's
tokens carry the logprob 0, and everything else follows as for any trajectory, the loss mask first
of all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from tir_alp.rollouts.history import Conversation, Following, Role
from tir_alp.rollouts.renderer import Renderer
from tir_alp.rollouts.traces import GrowingTrace, joined
from tir_alp.rollouts.transcripts import Message, Transcript
from tir_alp.tools.outcome import Outcome
from tir_alp.types import StopReason, TokenSpan, Trajectory, Turn

_MOST_RENDERERS = 64  # distinct pairs of system message and tools that are kept ready

MakeRenderer = Callable[[str, Sequence[Mapping[str, Any]]], Renderer]
"""Makes a renderer for a system message and the schemas of tools; both may be empty: then those of
the config and the environment hold."""


class Demonstrator:
    """Encodes conversations.

    Args:
        make_renderer: Called once for each system message and list of tools.
    """

    def __init__(self, make_renderer: MakeRenderer) -> None:
        @lru_cache(_MOST_RENDERERS)
        def renderer_for(system: str, tools: str) -> Renderer:
            return make_renderer(system, json.loads(tools))

        self._renderer_for = renderer_for

    def trajectory(self, transcript: Transcript, uid: int) -> Trajectory:
        """Encode a conversation.

        Args:
            transcript: The conversation.
            uid: Identity of the sequence within the run.

        Raises:
            ValueError: It is not what a rollout could have been; the message names the row.
        """
        where = transcript.transcript_id
        try:
            renderer = self._renderer_for(
                transcript.system, json.dumps(transcript.tools, sort_keys=True)
            )
            task, *rest = transcript.messages
            answers = [*rest[1::2], None]
            traces = self._traces(renderer, task.text, [*zip(rest[::2], answers, strict=True)])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        return joined(
            traces,
            task_id=where,
            group_id=uid,
            sequence_uid=uid,
            terminated=True,
            truncated=False,
        )

    def _traces(
        self, renderer: Renderer, task: str, turns: Sequence[tuple[Message, Message | None]]
    ) -> list[GrowingTrace]:
        """Encode a task, and turns of the assistant with what followed each."""
        traces = [GrowingTrace(renderer.prompt(task))]
        conversation = Conversation.about(task)
        for number, (written, answer) in enumerate(turns, start=1):
            try:
                ids, stop = _written(renderer, written, answer)
                found = Following(TokenSpan(()), begins=False)
                if answer is not None:
                    role: Role = "tool" if answer.role == "tool" else "user"
                    conversation, found = renderer.go_on(conversation, ids, stop, answer.text, role)
            except ValueError as error:
                raise ValueError(f"turn {number} of the assistant: {error}") from None
            shown = TokenSpan(()) if found.begins else found.span
            is_call = answer is not None and answer.role == "tool"
            turn = demonstrated_turn(ids, shown, stop, written.trainable, is_call)
            traces[-1].turns.append(turn)
            if found.begins:
                traces.append(GrowingTrace(found.span))
        return traces


def _written(
    renderer: Renderer, written: Message, answer: Message | None
) -> tuple[tuple[int, ...], StopReason]:
    before_tool = answer is not None and answer.role == "tool"
    ids, stop = renderer.demonstrated(written.text, written.call, before_tool=before_tool)
    if answer is not None and not before_tool and stop is StopReason.STOP:
        raise ValueError("a user's message follows a call: a tool's output must come first")
    return ids, stop


def demonstrated_turn(
    ids: tuple[int, ...],
    observation: TokenSpan,
    stop: StopReason,
    trainable: bool,
    is_call: bool,
) -> Turn:
    """Return a turn that was not sampled by the policy: each token has the logprob 0."""
    return Turn(
        completion=TokenSpan(ids, (0.0,) * len(ids), trainable),
        observation=observation,
        policy_version=0,
        stop_reason=stop,
        outcome=Outcome.OK,
        reward=0.0,
        info={"tool_calls": int(is_call)},
    )
