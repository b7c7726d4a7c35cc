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
from tir_alp.rollouts.outputs import outputs_of
from tir_alp.rollouts.renderer import Renderer
from tir_alp.types import StopReason, TokenSpan, Trajectory, Turn

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
        self._prompt(trajectory.prompt, attempt, replayed, location)
        num_turns, num_calls = len(trajectory.turns), len(attempt.calls)
        if not self.findings.expect(
            num_turns == num_calls > 0,
            "trajectories",
            location,
            f"{num_turns} turns, but the engine was called {num_calls} times: turns are missing, "
            "duplicated or invented",
        ):
            return
        context = list(trajectory.prompt.token_ids)
        for index, (turn, call) in enumerate(zip(trajectory.turns, attempt.calls, strict=True)):
            here = location.at(turn=index)
            self._completion(turn, call, context, here)
            context += turn.completion.token_ids
            self._observation(trajectory, index, call, len(context), here)
            context += turn.observation.token_ids
        self._masks(trajectory, location)
        self._versions_in_order(trajectory, location)
        self._replay(trajectory, attempt, replayed, location)

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

    def _completion(
        self, turn: Turn, call: Call, context: Sequence[int], location: Location
    ) -> None:
        findings, completion = self.findings, turn.completion
        raw = call.completion
        sampled = self.renderer.cut(raw)
        findings.count("sampled tokens", len(completion))
        findings.expect(
            (call.num_context, call.context) == (len(context), ids_digest(context)),
            "sampled tokens",
            location,
            f"the engine continued {call.num_context} tokens; they are not the {len(context)} "
            "tokens that precede this turn",
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

    def _observation(
        self, trajectory: Trajectory, index: int, call: Call, num_tokens: int, location: Location
    ) -> None:
        findings, turn = self.findings, trajectory.turns[index]
        is_last = index == len(trajectory.turns) - 1
        text = turn.info.get("observation")
        if not findings.expect(
            isinstance(text, str),
            "observation tokens",
            location,
            "the observation's text is not recorded",
        ):
            return
        assert isinstance(text, str)
        if holds_redacted(turn.info):  # the tokens are those that the engine continued all the same
            findings.note_once(_REDACTED)
            return
        encoded = self.renderer.observation(
            outputs_of(text, turn.info), turn.stop_reason, turn.completion.token_ids
        )
        is_full = num_tokens + len(encoded) >= self.limits.max_context_tokens
        shown = TokenSpan(()) if is_last else encoded
        self._same_ids("observation tokens", shown, turn.observation, location)
        self._never_sampled("observation tokens", turn.observation, location)
        ended = (trajectory.terminated, trajectory.truncated) if call.ended else (False, False)
        findings.expect(
            call.answer
            == answer_digest(
                self.renderer.action(turn.completion.token_ids),
                text,
                turn.reward,
                *(ended if is_last else (False, False)),
                turn.info,
            )
            and call.outcome == turn.outcome == turn.info.get("outcome", "ok"),
            "turns replayed",
            location,
            "observation, reward, flags, outcome or info are not those that the environment "
            "returned in the run",
        )
        if is_last:
            findings.expect(
                call.ended or (is_full and trajectory.truncated and not trajectory.terminated),
                "trajectories",
                location,
                "the episode ends here, but neither the environment nor the token limit ended it",
            )
        else:
            findings.expect(
                not call.ended and not is_full,
                "trajectories",
                location,
                "the episode continues, but the environment or the token limit ended it here",
            )

    def _masks(self, trajectory: Trajectory, location: Location) -> None:
        self.findings.count("loss mask", sum(map(len, trajectory.spans())))
        for index, turn in enumerate(trajectory.turns):
            self.findings.expect(
                turn.completion.trainable == _is_trainable(trajectory, index, self.limits),
                "loss mask",
                location.at(turn=index),
                f"trainable is {turn.completion.trainable}, which contradicts rollout.void_turns = "
                f"{self.limits.void_turns!r} and rollout.overlong = {self.limits.overlong!r}",
            )

    def _versions_in_order(self, trajectory: Trajectory, location: Location) -> None:
        latest = 0
        for index, turn in enumerate(trajectory.turns):
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
        for index, (turn, answer) in enumerate(
            zip(trajectory.turns, replayed.answers, strict=False)
        ):
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
        if replayed.error or len(replayed.answers) < len(trajectory.turns):
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
    turns = trajectory.turns
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
