"""Compares one trajectory with the ledger's attempt, the renderer and the environment. Pure.

The caller replays the episode in the environment and passes the result, a `Replayed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tir_alp.audit.findings import Findings, Location
from tir_alp.audit.records import RecordedTrajectory
from tir_alp.config import RolloutConfig
from tir_alp.records.ledger_rows import Attempt, Call, answer_digest, digest, ids_digest
from tir_alp.records.readable import holds_redacted
from tir_alp.rollouts.history import Conversation, Following
from tir_alp.rollouts.renderer import Renderer
from tir_alp.rollouts.traces import following, is_full
from tir_alp.types import StopReason, TokenSpan, Trajectory, Turn, trace_uid

_NOT_COMPARED = "library_info"  # key of `info`: what a library adds to its answer, e.g. times
_REDACTED = (
    "in some turns a secret was redacted: that their observations encode to the recorded tokens "
    "cannot be proved"
)
_ROUNDING = 1e-5  # a logprob may exceed 0 by this much


@dataclass(frozen=True, slots=True)
class Answer:
    """What an environment's step returned for one action."""

    text: str
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Replayed:
    """An episode, replayed with the recorded actions."""

    prompt: str
    answers: Sequence[Answer]
    error: str = ""
    """Why the replay stopped early; empty if it did not."""


@dataclass(frozen=True, slots=True)
class _Place:
    """A turn of a trace."""

    number: int
    """Number of the trace."""
    trace: Trajectory
    index: int
    """Index of the turn in the trace."""

    @property
    def turn(self) -> Turn:
        return self.trace.turns[self.index]

    def context(self) -> list[int]:
        """Return the tokens of the trace before the completion."""
        spans = [self.trace.prompt]
        for turn in self.trace.turns[: self.index]:
            spans += (turn.completion, turn.observation)
        return [token for span in spans for token in span.token_ids]


@dataclass(frozen=True, slots=True)
class TrajectoryCheck:
    """Checks single trajectories.

    Args:
        renderer: Renderer with the run's tokenizer and config.
        limits: The `rollout` section of the run's config.
        findings: Where drifts are added.
    """

    renderer: Renderer
    limits: RolloutConfig
    findings: Findings

    def __call__(self, recorded: RecordedTrajectory, attempt: Attempt, replayed: Replayed) -> None:
        """Compare a trajectory with everything else that is known about its episode.

        Args:
            recorded: The trajectory.
            attempt: The ledger's record of the attempt that became the trajectory.
            replayed: The episode, replayed with the trajectory's actions.
        """
        trajectory, location = recorded.trajectory, recorded.location
        self.findings.count("trajectories")
        first = trajectory.conversation[0]
        self._prompt(first.prompt, attempt, replayed, location)
        turns, num_calls = trajectory.conversation_turns, len(attempt.calls)
        if not self._traces(trajectory, attempt, location) or not self.findings.expect(
            len(turns) == num_calls > 0,
            "trajectories",
            location,
            f"{len(turns)} turns, but the engine was called {num_calls} times: turns are missing, "
            "duplicated or invented",
        ):
            return
        places = [
            _Place(number, trace, index)
            for number, trace in enumerate(trajectory.conversation)
            for index in range(len(trace.turns))
        ]
        conversation = Conversation.about(replayed.prompt)
        for index, (place, call) in enumerate(zip(places, attempt.calls, strict=True)):
            here = location.at(turn=index)
            self._completion(place, call, here)
            after = places[index + 1] if index + 1 < len(places) else None
            conversation = self._answer(trajectory, conversation, place, after, call, here)
        self._masks(trajectory, location)
        self._versions_in_order(turns, location)
        self._replay(trajectory, attempt, replayed, location)

    def _traces(self, trajectory: Trajectory, attempt: Attempt, location: Location) -> bool:
        """Compare what the traces of a conversation have in common; False: they are none."""
        traces = trajectory.conversation
        uids = [trace_uid(attempt.uid, number) for number in range(len(traces))]
        common = {(each.task_id, each.group_id, each.terminated, each.truncated) for each in traces}
        return self.findings.expect(
            len(traces) == len(trajectory.sequences)
            and [each.sequence_uid for each in traces] == uids
            and all(each.turns for each in traces)
            and not any(each.is_forked for each in trajectory.branches)
            and len(common) == 1,
            "trajectories",
            location,
            f"{len(trajectory.sequences)} traces {[each.sequence_uid for each in traces]} are not "
            "those of one conversation, in order: task, group, flags or turns disagree",
        )

    def _prompt(
        self, prompt: TokenSpan, attempt: Attempt, replayed: Replayed, location: Location
    ) -> None:
        self.findings.expect(
            attempt.prompt == digest(replayed.prompt),
            "prompt tokens",
            location,
            "the environment returns another prompt for this task than it did in the run",
        )
        self._same_ids("prompt tokens", self.renderer.prompt(replayed.prompt), prompt, location)
        self._never_sampled("prompt tokens", prompt, location)

    def _completion(self, place: _Place, call: Call, location: Location) -> None:
        turn, context = place.turn, place.context()
        findings, completion = self.findings, turn.completion
        raw = call.completion
        sampled = self.renderer.cut(raw)
        findings.count("sampled tokens", len(completion))
        findings.expect(
            (call.trace, call.num_context, call.context)
            == (place.number, len(context), ids_digest(context)),
            "sampled tokens",
            location,
            f"the engine continued {call.num_context} tokens of trace {call.trace}; they are not "
            f"the {len(context)} tokens that precede this turn in trace {place.number}",
        )
        if (token := _first_difference(sampled.token_ids, completion.token_ids)) is not None:
            findings.drift(
                "sampled tokens",
                location.at(token=token),
                f"the trajectory has {_at(completion.token_ids, token)}, the engine sampled "
                f"{_at(sampled.token_ids, token)}",
            )
        logprobs = completion.rollout_logprobs
        if logprobs is None:
            findings.drift("logprobs", location, "the completion has no logprobs")
        else:
            findings.count("logprobs", len(logprobs))
            if (token := _first_difference(sampled.logprobs, logprobs)) is not None:
                findings.drift(
                    "logprobs",
                    location.at(token=token),
                    f"the trajectory has {_at(logprobs, token)}, the engine returned "
                    f"{_at(sampled.logprobs, token)}",
                )
            for token, logprob in enumerate(logprobs):
                if logprob > _ROUNDING:
                    findings.drift("logprobs", location.at(token=token), f"{logprob} is above 0")
        self._stop(turn, sampled.stop_reason, len(context), location)
        returned = (sampled.policy_version, sampled.version_spans)
        findings.count("versions", len(completion))
        findings.expect(
            (turn.policy_version, turn.version_spans) == returned,
            "versions",
            location,
            f"version {turn.policy_version} {list(turn.version_spans) or ''}, but the engine "
            f"returned {returned[0]} {list(returned[1]) or ''}",
        )

    def _stop(self, turn: Turn, returned: StopReason, num_context: int, location: Location) -> None:
        findings, ids = self.findings, turn.completion.token_ids
        findings.count("stop reasons")
        findings.expect(
            turn.stop_reason is returned,
            "stop reasons",
            location,
            f"the reason is {turn.stop_reason}, but what the engine sampled ends with {returned}",
        )
        ends = [index for index, token in enumerate(ids) if token in self.renderer.stop_token_ids]
        expected = [len(ids) - 1] if turn.stop_reason is StopReason.EOS else []
        if ends != expected:
            token = next(iter(set(ends) ^ set(expected)))
            findings.drift(
                "stop reasons",
                location.at(token=token),
                f"the reason is {turn.stop_reason}, and end tokens are at positions {ends}",
            )
        most = min(self.limits.max_turn_tokens, self.limits.max_context_tokens - num_context)
        is_full = len(ids) == most
        findings.expect(
            len(ids) <= most and (is_full or turn.stop_reason is not StopReason.LENGTH),
            "stop reasons",
            location,
            f"the reason is {turn.stop_reason} at {len(ids)} tokens; the limit is {most}",
        )
        if turn.stop_reason is StopReason.STOP:
            matches = self.renderer.stop_matcher()
            closes = [index for index, token in enumerate(ids) if matches(token)]
            findings.expect(
                closes[:1] == [len(ids) - 1], "stop reasons", location, "no tool call ends here"
            )

    def _answer(
        self,
        trajectory: Trajectory,
        conversation: Conversation,
        place: _Place,
        after: _Place | None,
        call: Call,
        location: Location,
    ) -> Conversation:
        """Check what a turn was answered, and what the policy read next; return the conversation.

        Args:
            trajectory: The trajectory.
            conversation: The conversation before the turn.
            place: The turn.
            after: The turn after it; None if there is none.
            call: The ledger's record of its call.
            location: Where the turn is recorded.
        """
        findings, turn = self.findings, place.turn
        text = turn.info.get("observation")
        if not isinstance(text, str):
            findings.drift("observation tokens", location, "the observation's text is not recorded")
            return conversation
        ids, stop = turn.completion.token_ids, turn.stop_reason
        found = Following(TokenSpan(()), begins=False)
        overflows = False
        if after is not None or not call.ended:
            try:
                conversation, found = following(
                    self.renderer, conversation, ids, stop, text, turn.info
                )
            except ValueError as error:
                findings.drift("observation tokens", location, str(error))
                return conversation
            num_tokens = len(place.context()) + len(ids)
            overflows = is_full(found, num_tokens, place.number + 1, self.limits)
        if holds_redacted(turn.info) or (found.begins and _holds_redacted(conversation)):
            # The tokens are those that the engine continued all the same.
            findings.note_once(_REDACTED)
            return conversation
        self._read_next(found, turn, place, after, location)
        ended = (trajectory.terminated, trajectory.truncated) if call.ended else (False, False)
        findings.expect(
            call.answer
            == answer_digest(
                self.renderer.action(ids),
                text,
                turn.reward,
                *(ended if after is None else (False, False)),
                turn.info,
            )
            and call.outcome == turn.outcome == turn.info.get("outcome", "ok"),
            "turns replayed",
            location,
            "observation, reward, flags, outcome or info are not those that the environment "
            "returned in the run",
        )
        if after is None:
            findings.expect(
                call.ended or (overflows and trajectory.truncated and not trajectory.terminated),
                "trajectories",
                location,
                "the episode ends here, but neither the environment nor the token limit ended it",
            )
        else:
            findings.expect(
                not call.ended and not overflows,
                "trajectories",
                location,
                "the episode continues, but the environment or the token limit ended it here",
            )
        return conversation

    def _read_next(
        self, found: Following, turn: Turn, place: _Place, after: _Place | None, location: Location
    ) -> None:
        """Compare what the policy reads next with the observation, or the prompt of a trace."""
        nothing = TokenSpan(())
        goes_on = after is not None and after.number == place.number
        begins = after is not None and not goes_on
        if after is not None:
            self.findings.expect(
                found.begins == begins,
                "observation tokens",
                location,
                "a new trace begins after this turn, but the history was not rewritten"
                if begins
                else "the trace goes on, but the history was rewritten",
            )
        shown = found.span if goes_on and not found.begins else nothing
        self._same_ids("observation tokens", shown, turn.observation, location)
        self._never_sampled("observation tokens", turn.observation, location)
        if begins:
            assert after is not None
            prompt = found.span if found.begins else nothing
            self._same_ids("prompt tokens", prompt, after.trace.prompt, location)
            self._never_sampled("prompt tokens", after.trace.prompt, location)

    def _masks(self, trajectory: Trajectory, location: Location) -> None:
        limits = self.limits
        for each in trajectory.conversation:
            self.findings.count("loss mask", sum(map(len, each.spans())))
        num_earlier = len(trajectory.conversation_turns) - len(trajectory.turns)
        for index, turn in enumerate(trajectory.conversation_turns):
            is_left_out = limits.trace_credit == "last" and index < num_earlier
            self.findings.expect(
                turn.completion.trainable
                == (_is_trainable(trajectory, index, limits) and not is_left_out),
                "loss mask",
                location.at(turn=index),
                f"trainable is {turn.completion.trainable}, which contradicts rollout.void_turns = "
                f"{limits.void_turns!r}, rollout.overlong = {limits.overlong!r} or "
                f"rollout.trace_credit = {limits.trace_credit!r}",
            )

    def _versions_in_order(self, turns: Sequence[Turn], location: Location) -> None:
        latest = 0
        for index, turn in enumerate(turns):
            for span in turn.versions:
                self.findings.expect(
                    span.version >= latest,
                    "versions",
                    location.at(turn=index, token=span.start),
                    f"version {span.version} follows version {latest}",
                )
                latest = max(latest, span.version)

    def _replay(
        self, trajectory: Trajectory, attempt: Attempt, replayed: Replayed, location: Location
    ) -> None:
        findings = self.findings
        turns = trajectory.conversation_turns
        for index, (turn, answer) in enumerate(zip(turns, replayed.answers, strict=False)):
            here = location.at(turn=index)
            findings.count("turns replayed")
            findings.expect(
                turn.reward == answer.reward,
                "turns replayed",
                here,
                f"the reward is {turn.reward}; replayed it is {answer.reward}",
            )
            recorded = {**answer.info, "observation": answer.text}
            for name in sorted((recorded.keys() | turn.info.keys()) - {_NOT_COMPARED}):
                now, then = recorded.get(name), turn.info.get(name)
                findings.expect(
                    now == then,
                    "turns replayed",
                    here,
                    f"{name} is {then!r:.80}; replayed it is {now!r:.80}",
                )
        if replayed.error or len(replayed.answers) < len(turns):
            here = location.at(turn=len(replayed.answers))
            findings.drift(
                "turns replayed", here, replayed.error or "the replayed episode ended before"
            )
            return
        last = replayed.answers[-1]
        by_limit = not attempt.calls[-1].ended and not last.terminated
        findings.expect(
            (trajectory.terminated, trajectory.truncated)
            == (last.terminated, last.truncated or by_limit),
            "turns replayed",
            location,
            f"terminated and truncated are {trajectory.terminated} and {trajectory.truncated}; "
            f"replayed they are {last.terminated} and {last.truncated or by_limit}",
        )

    def _same_ids(
        self, check: str, encoded: TokenSpan, span: TokenSpan, location: Location
    ) -> None:
        self.findings.count(check, len(span))
        if (token := _first_difference(encoded.token_ids, span.token_ids)) is not None:
            self.findings.drift(
                check,
                location.at(token=token),
                f"the trajectory has {_at(span.token_ids, token)}, the text encodes to "
                f"{_at(encoded.token_ids, token)}",
            )

    def _never_sampled(self, check: str, span: TokenSpan, location: Location) -> None:
        self.findings.expect(
            not span.is_sampled and span.trainable,
            check,
            location,
            "tokens that the policy did not write have logprobs or are marked as not trainable",
        )


def _is_trainable(trajectory: Trajectory, index: int, limits: RolloutConfig) -> bool:
    """Whether the config admits a turn to the loss."""
    turns = trajectory.conversation_turns
    cut = [turn.stop_reason is StopReason.LENGTH for turn in turns]
    void = [bool(turn.info.get("void", False)) for turn in turns]
    out = {
        "keep": False,
        "mask_turn": void[index],
        "mask_trajectory": any(void),
    }[limits.void_turns]
    overlong = {
        "mask_turn": cut[index],
        "mask_trajectory": trajectory.truncated or any(cut),
    }.get(limits.overlong, False)
    return not out and not overlong


def _first_difference(left: Sequence[float], right: Sequence[float]) -> int | None:
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return None if len(left) == len(right) else min(len(left), len(right))


def _at(values: Sequence[float], index: int) -> str:
    return str(values[index]) if index < len(values) else "nothing"


def _holds_redacted(conversation: Conversation) -> bool:
    """Whether a secret was redacted in what was said, which would be rendered differently."""
    said = [(turn.text, *turn.answers) for turn in conversation.turns]
    return holds_redacted([*conversation.opening, *said])
