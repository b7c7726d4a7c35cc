"""One trajectory against the ledger's attempt, the renderer and the environment. Pure.

The environment is played by the caller, who hands in what it said: `Replayed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tir_alp.audit.findings import Findings, Place
from tir_alp.audit.records import Recorded
from tir_alp.config import RolloutConfig
from tir_alp.records.ledger_rows import Attempt, Call, answer_digest, digest, ids_digest
from tir_alp.rollouts.renderer import Renderer
from tir_alp.types import StopReason, TokenSpan, Trajectory, Turn

_OF_OTHERS = "library_info"  # in `info`: what a library says beside its answer, times for instance
_ROUNDING = 1e-5  # by which the logprob of a certain token may be above 0


@dataclass(frozen=True, slots=True)
class Answer:
    """What an environment answers to one action."""

    text: str
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Replayed:
    """An episode, played again with the recorded actions."""

    prompt: str
    answers: Sequence[Answer]
    error: str = ""
    """Why it ends early; empty if it does not."""


@dataclass(frozen=True, slots=True)
class TrajectoryCheck:
    """Looks at single trajectories.

    Args:
        renderer: Of the run's tokenizer and config.
        limits: Of the run's config.
        findings: Where to put what is found.
    """

    renderer: Renderer
    limits: RolloutConfig
    findings: Findings

    def __call__(self, recorded: Recorded, attempt: Attempt, replayed: Replayed) -> None:
        """Compare all that is said of one trajectory."""
        trajectory, place = recorded.trajectory, recorded.place
        self.findings.count("trajectories")
        self._prompt(trajectory.prompt, attempt, replayed, place)
        num_turns, num_calls = len(trajectory.turns), len(attempt.calls)
        if not self.findings.expect(
            num_turns == num_calls > 0,
            "trajectories",
            place,
            f"{num_turns} turns, but the engine was called {num_calls} times: turns are missing, "
            "doubled or made up",
        ):
            return
        context = list(trajectory.prompt.token_ids)
        for index, (turn, call) in enumerate(zip(trajectory.turns, attempt.calls, strict=True)):
            here = place.at(turn=index)
            self._completion(turn, call, context, here)
            context += turn.completion.token_ids
            self._observation(trajectory, index, call, len(context), here)
            context += turn.observation.token_ids
        self._masks(trajectory, place)
        self._versions_in_order(trajectory, place)
        self._replay(trajectory, attempt, replayed, place)

    def _prompt(
        self, prompt: TokenSpan, attempt: Attempt, replayed: Replayed, place: Place
    ) -> None:
        self.findings.expect(
            attempt.prompt == digest(replayed.prompt),
            "prompt tokens",
            place,
            "the environment now gives another prompt for this task than it did then",
        )
        self._same_ids("prompt tokens", self.renderer.prompt(replayed.prompt), prompt, place)
        self._never_sampled("prompt tokens", prompt, place)

    def _completion(self, turn: Turn, call: Call, context: Sequence[int], place: Place) -> None:
        findings, completion = self.findings, turn.completion
        raw = call.completion
        sampled = self.renderer.cut(raw)
        findings.count("sampled tokens", len(completion))
        findings.expect(
            (call.num_context, call.context) == (len(context), ids_digest(context)),
            "sampled tokens",
            place,
            f"the engine continued {call.num_context} tokens that are not the {len(context)} which "
            "stand before this turn",
        )
        if (token := _first_difference(sampled.token_ids, completion.token_ids)) is not None:
            findings.drift(
                "sampled tokens",
                place.at(token=token),
                f"the trajectory has {_at(completion.token_ids, token)}, the engine sampled "
                f"{_at(sampled.token_ids, token)}",
            )
        logprobs = completion.rollout_logprobs
        if logprobs is None:
            findings.drift("logprobs", place, "a completion without logprobs")
        else:
            findings.count("logprobs", len(logprobs))
            if (token := _first_difference(sampled.logprobs, logprobs)) is not None:
                findings.drift(
                    "logprobs",
                    place.at(token=token),
                    f"the trajectory has {_at(logprobs, token)}, the engine said "
                    f"{_at(sampled.logprobs, token)}",
                )
            for token, logprob in enumerate(logprobs):
                if logprob > _ROUNDING:
                    findings.drift(
                        "logprobs", place.at(token=token), f"{logprob} is above 0: no logprob"
                    )
        self._stop(turn, sampled.stop_reason, len(context), place)
        said = (sampled.policy_version, sampled.version_spans)
        findings.count("versions", len(completion))
        findings.expect(
            (turn.policy_version, turn.version_spans) == said,
            "versions",
            place,
            f"version {turn.policy_version} {list(turn.version_spans) or ''}, but the engine said "
            f"{said[0]} {list(said[1]) or ''}",
        )

    def _stop(self, turn: Turn, said: StopReason, num_context: int, place: Place) -> None:
        findings, ids = self.findings, turn.completion.token_ids
        findings.count("stop reasons")
        findings.expect(
            turn.stop_reason is said,
            "stop reasons",
            place,
            f"{turn.stop_reason}, but what the engine sampled ends by {said}",
        )
        ends = [index for index, token in enumerate(ids) if token in self.renderer.stop_token_ids]
        expected = [len(ids) - 1] if turn.stop_reason is StopReason.EOS else []
        if ends != expected:
            token = next(iter(set(ends) ^ set(expected)))
            findings.drift(
                "stop reasons",
                place.at(token=token),
                f"the reason is {turn.stop_reason}, and end tokens stand at {ends}",
            )
        most = min(self.limits.max_turn_tokens, self.limits.max_context_tokens - num_context)
        is_full = len(ids) == most
        findings.expect(
            len(ids) <= most and (is_full or turn.stop_reason is not StopReason.LENGTH),
            "stop reasons",
            place,
            f"the reason is {turn.stop_reason} at {len(ids)} tokens; the limit is {most}",
        )
        if turn.stop_reason is StopReason.STOP:
            matches = self.renderer.stop_matcher()
            closes = [index for index, token in enumerate(ids) if matches(token)]
            findings.expect(
                closes[:1] == [len(ids) - 1], "stop reasons", place, "no call ends here"
            )

    def _observation(
        self, trajectory: Trajectory, index: int, call: Call, num_tokens: int, place: Place
    ) -> None:
        findings, turn = self.findings, trajectory.turns[index]
        is_last = index == len(trajectory.turns) - 1
        text = turn.info.get("observation")
        if not findings.expect(
            isinstance(text, str), "observation tokens", place, "the text is not recorded"
        ):
            return
        assert isinstance(text, str)
        encoded = self.renderer.observation(text, turn.stop_reason)
        is_full = num_tokens + len(encoded) >= self.limits.max_context_tokens
        shown = TokenSpan(()) if is_last else encoded
        self._same_ids("observation tokens", shown, turn.observation, place)
        self._never_sampled("observation tokens", turn.observation, place)
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
            place,
            "the environment answered something else: observation, reward, flags, outcome or info "
            "are not those that it gave",
        )
        if is_last:
            findings.expect(
                call.ended or (is_full and trajectory.truncated and not trajectory.terminated),
                "trajectories",
                place,
                "it ends here, and neither the environment nor the limit of tokens ended it",
            )
        else:
            findings.expect(
                not call.ended and not is_full,
                "trajectories",
                place,
                "it goes on, although the environment or the limit of tokens ended it here",
            )

    def _masks(self, trajectory: Trajectory, place: Place) -> None:
        self.findings.count("loss mask", sum(map(len, trajectory.spans())))
        for index, turn in enumerate(trajectory.turns):
            self.findings.expect(
                turn.completion.trainable == _is_trainable(trajectory, index, self.limits),
                "loss mask",
                place.at(turn=index),
                f"trainable is {turn.completion.trainable}, against rollout.void_turns = "
                f"{self.limits.void_turns!r} and rollout.overlong = {self.limits.overlong!r}",
            )

    def _versions_in_order(self, trajectory: Trajectory, place: Place) -> None:
        latest = 0
        for index, turn in enumerate(trajectory.turns):
            for span in turn.versions:
                self.findings.expect(
                    span.version >= latest,
                    "versions",
                    place.at(turn=index, token=span.start),
                    f"version {span.version} behind version {latest}",
                )
                latest = max(latest, span.version)

    def _replay(
        self, trajectory: Trajectory, attempt: Attempt, replayed: Replayed, place: Place
    ) -> None:
        findings = self.findings
        for index, (turn, answer) in enumerate(
            zip(trajectory.turns, replayed.answers, strict=False)
        ):
            here = place.at(turn=index)
            findings.count("turns replayed")
            findings.expect(
                turn.reward == answer.reward,
                "turns replayed",
                here,
                f"the reward is {turn.reward}; graded again it is {answer.reward}",
            )
            recorded = {**answer.info, "observation": answer.text}
            for name in sorted((recorded.keys() | turn.info.keys()) - {_OF_OTHERS}):
                now, then = recorded.get(name), turn.info.get(name)
                findings.expect(
                    now == then,
                    "turns replayed",
                    here,
                    f"{name} is {then!r:.80}; played again it is {now!r:.80}",
                )
        if replayed.error or len(replayed.answers) < len(trajectory.turns):
            here = place.at(turn=len(replayed.answers))
            findings.drift("turns replayed", here, replayed.error or "the episode had ended")
            return
        last = replayed.answers[-1]
        by_limit = not attempt.calls[-1].ended and not last.terminated
        findings.expect(
            (trajectory.terminated, trajectory.truncated)
            == (last.terminated, last.truncated or by_limit),
            "turns replayed",
            place,
            f"terminated, truncated are {trajectory.terminated}, {trajectory.truncated}; played "
            f"again they are {last.terminated}, {last.truncated or by_limit}",
        )

    def _same_ids(self, check: str, encoded: TokenSpan, span: TokenSpan, place: Place) -> None:
        self.findings.count(check, len(span))
        if (token := _first_difference(encoded.token_ids, span.token_ids)) is not None:
            self.findings.drift(
                check,
                place.at(token=token),
                f"the trajectory has {_at(span.token_ids, token)}, the text is encoded as "
                f"{_at(encoded.token_ids, token)}",
            )

    def _never_sampled(self, check: str, span: TokenSpan, place: Place) -> None:
        self.findings.expect(
            not span.is_sampled and span.trainable,
            check,
            place,
            "tokens that the policy did not write have logprobs, or a mark of their own",
        )


def _is_trainable(trajectory: Trajectory, index: int, limits: RolloutConfig) -> bool:
    """Whether the config lets a turn into the loss."""
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
