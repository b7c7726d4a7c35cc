"""Compares one episode of an agent with the ledger, the template and the environment. Pure.

The episode is made again from its record, without the agent: each request's messages are encoded
again, each completion is read again as the reply that the client was sent, and the agent's report
is graded again. The engine's own record of every call stands against all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from tir_alp.agents import capture as captures
from tir_alp.agents.capture import Capture, Exchange, Trace
from tir_alp.agents.dialogue_encoder import DialogueEncoder, Unsuitable
from tir_alp.agents.messages import Dialogue, from_record
from tir_alp.agents.replies import ReplyRule
from tir_alp.agents.trajectories import (
    by_trace,
    choose,
    completion_of,
    exchange_record,
    trace_record,
    verdict_info,
)
from tir_alp.audit.findings import Findings, Location
from tir_alp.audit.records import RecordedTrajectory
from tir_alp.audit.trajectory import Replayed
from tir_alp.config import AgentsConfig, RolloutConfig
from tir_alp.records.ledger_rows import Attempt, Call, answer_digest, digest, ids_digest
from tir_alp.records.readable import holds_redacted
from tir_alp.rollouts.stop_rule import cut_at, token_watcher
from tir_alp.types import REPORT, StopReason, Trajectory, Turn

T = TypeVar("T")

_REDACTED = (
    "in some episodes of agents a secret was redacted: that their messages encode to the recorded "
    "tokens, and what their verdicts are, cannot be proved"
)
_ROUNDING = 1e-5  # a logprob may exceed 0 by this much


@dataclass(frozen=True, slots=True)
class AgentEpisodeCheck:
    """Checks single episodes of agents.

    Args:
        encoder: Encoder with the run's tokenizer and config.
        limits: The `rollout` section of the run's config.
        agents: The `agents` section.
        findings: Where drifts are added.
    """

    encoder: DialogueEncoder
    limits: RolloutConfig
    agents: AgentsConfig
    findings: Findings

    def __call__(self, recorded: RecordedTrajectory, attempt: Attempt, replayed: Replayed) -> None:
        """Compare an episode with everything else that is known about it.

        Args:
            recorded: The trajectory, with its branches.
            attempt: The ledger's record of the attempt that became the trajectory.
            replayed: The report, graded again.
        """
        trajectory, location = recorded.trajectory, recorded.location
        self.findings.count("trajectories")
        is_whole = not any(
            holds_redacted(turn.info) for each in trajectory.sequences for turn in each.turns
        )
        try:
            capture = self._capture(trajectory, is_whole, location)
        except ValueError as error:
            self.findings.drift("captures", location, str(error))
            return
        if not is_whole:  # the tokens are those that the engine continued all the same
            self.findings.note_once(_REDACTED)
        for fault in captures.check(capture) if is_whole else ():
            self.findings.drift("captures", location, fault)
        self._calls(trajectory, capture, attempt, location)
        self._masks(trajectory, capture, location)
        self._verdict(trajectory, attempt, replayed, is_whole, location)

    # ---------------------------------------------------------------- the capture, made again

    def _capture(self, trajectory: Trajectory, is_whole: bool, location: Location) -> Capture:
        """Make the capture again from the record. Raises ValueError where that is impossible.

        Args:
            trajectory: The trajectory.
            is_whole: Whether no message of the record has a secret left out.
            location: Where the trajectory is recorded.
        """
        traces: dict[int, Trace] = {}
        for number, sequence in by_trace(trajectory).items():
            if not sequence.turns:
                raise ValueError(f"trace {number} has no turns")
            parent, tools, reason = trace_record(sequence.turns[0])
            trace = Trace(number, tools, reason=reason)
            if parent is not None:
                if parent[0] not in traces:
                    raise ValueError(f"trace {number} inherits from trace {parent[0]}: missing")
                kept = traces[parent[0]].first(parent[1])
                trace = replace(
                    trace,
                    parent=parent,
                    inherited=kept.messages,
                    inherited_ids=kept.token_ids,
                    inherited_stop=kept.last_stop,
                )
            traces[number] = self._trace(trace, sequence, is_whole, location)
        last = max(traces)
        empty = {number: Trace(number, "") for number in range(last + 1)}  # requests that failed
        return Capture(tuple((empty | traces).values()))

    def _trace(
        self, trace: Trace, sequence: Trajectory, is_whole: bool, location: Location
    ) -> Trace:
        for index, turn in enumerate(sequence.turns):
            here = location.at(turn=index)
            record = exchange_record(turn)
            asked = tuple(map(from_record, record.asked))
            dialogue = Dialogue((*trace.messages, *asked), trace.tools)
            rule = ReplyRule(
                _allowed(lambda d=dialogue: self.encoder.style(d)) if record.reads_calls else None,
                record.forced,
                record.one_call,
                tuple(record.stops),
            )
            shown = self._shown(trace, sequence, index)
            if is_whole:
                self._messages(trace, dialogue, rule, shown, here)
            reply = from_record(record.reply)
            text = self.encoder.text(turn.completion.token_ids)
            self.findings.count("captures")
            self.findings.expect(
                not is_whole
                or self.encoder.reply(
                    dialogue, turn.completion.token_ids, rule, f"{trace.number}/{index}"
                )
                == reply,
                "captures",
                here,
                f"the client was sent {reply.content!r:.60}, and the tokens say {text!r:.60}",
            )
            exchange = Exchange(asked, shown, completion_of(turn), reply, rule, record.number)
            self._stop(exchange, len(trace.token_ids) + len(shown), here)
            trace = replace(trace, exchanges=(*trace.exchanges, exchange))
        self.findings.expect(
            not sequence.turns[-1].observation.token_ids,
            "observation tokens",
            location,
            f"trace {trace.number} has tokens after its last completion",
        )
        return trace

    def _shown(self, trace: Trace, sequence: Trajectory, index: int) -> tuple[int, ...]:
        """Return the tokens before a completion that the trace did not have, as recorded."""
        if index:
            return sequence.turns[index - 1].observation.token_ids
        num = len(trace.inherited_ids)
        if sequence.prompt.token_ids[:num] != trace.inherited_ids:
            raise ValueError(
                f"trace {trace.number} does not begin with the tokens that it inherits"
            )
        return sequence.prompt.token_ids[num:]

    def _messages(
        self,
        trace: Trace,
        dialogue: Dialogue,
        rule: ReplyRule,
        shown: tuple[int, ...],
        location: Location,
    ) -> None:
        """Encode the messages of a request again, and compare."""
        num_known = len(trace.messages)
        check = "observation tokens" if num_known else "prompt tokens"
        self.findings.count(check, len(shown))
        if num_known:
            encoded = _allowed(
                lambda: self.encoder.extension(dialogue, num_known, trace.last_stop, rule.forced)
            )
        else:
            encoded = _allowed(lambda: self.encoder.opening(dialogue, rule.forced))
        self.findings.expect(
            encoded == shown,
            check,
            location,
            "the messages of the request encode to other tokens than those that precede the "
            f"completion ({0 if encoded is None else len(encoded)} and {len(shown)} tokens)",
        )

    def _stop(self, exchange: Exchange, num_context: int, location: Location) -> None:
        findings, completion = self.findings, exchange.completion
        ids = completion.token_ids
        findings.count("stop reasons")
        ends = [index for index, token in enumerate(ids) if token in self.encoder.stop_token_ids]
        expected = [len(ids) - 1] if completion.stop_reason is StopReason.EOS else []
        findings.expect(
            ends == expected,
            "stop reasons",
            location,
            f"the reason is {completion.stop_reason}, and end tokens are at positions {ends}",
        )
        most = min(self.limits.max_turn_tokens, self.limits.max_context_tokens - num_context)
        findings.expect(
            0 < len(ids) <= most,
            "stop reasons",
            location,
            f"the completion has {len(ids)} tokens; the limit is {most}",
        )
        watch = exchange.rule.watch()
        if watch is None:
            closes = []
        else:
            matches = token_watcher(self.encoder.tokenizer, watch)
            closes = [index for index, token in enumerate(ids) if matches(token)][:1]
        expected = [len(ids) - 1] if completion.stop_reason is StopReason.STOP else []
        findings.expect(
            closes == expected or (closes == [len(ids) - 1] and bool(ends)),
            "stop reasons",
            location,
            f"the reason is {completion.stop_reason}, and the rule of the request matches at "
            f"{closes}",
        )

    # ------------------------------------------------------------------------- against the engine

    def _calls(
        self, trajectory: Trajectory, capture: Capture, attempt: Attempt, location: Location
    ) -> None:
        found: list[tuple[int, Trace, int]] = []
        for trace in capture.traces:
            found += [(each.number, trace, i) for i, each in enumerate(trace.exchanges)]
        found.sort(key=lambda each: each[0])
        if not self.findings.expect(
            len(found) == len(attempt.calls),
            "trajectories",
            location,
            f"the episode has {len(found)} completions, but the engine was called "
            f"{len(attempt.calls)} times: completions are missing, duplicated or invented",
        ):
            return
        sequences = by_trace(trajectory)
        latest = dict.fromkeys(sequences, 0)
        for (_, trace, index), call in zip(found, attempt.calls, strict=True):
            turn = sequences[trace.number].turns[index]
            here = location.at(turn=index)
            self._call(trace, index, turn, call, here)
            for span in turn.versions:
                self.findings.expect(
                    span.version >= latest[trace.number],
                    "versions",
                    here,
                    f"version {span.version} follows version {latest[trace.number]}",
                )
                latest[trace.number] = max(latest[trace.number], span.version)

    def _call(self, trace: Trace, index: int, turn: Turn, call: Call, location: Location) -> None:
        findings, exchange = self.findings, trace.exchanges[index]
        context = trace.first(index).token_ids + exchange.shown
        findings.count("sampled tokens", len(turn.completion))
        findings.expect(
            (call.trace, call.num_context, call.context)
            == (trace.number, len(context), ids_digest(context)),
            "sampled tokens",
            location,
            f"the engine continued {call.num_context} tokens of trace {call.trace}; they are not "
            f"the {len(context)} tokens that precede this completion in trace {trace.number}",
        )
        sampled = call.completion
        if (watch := exchange.rule.watch()) is not None:
            sampled = cut_at(sampled, token_watcher(self.encoder.tokenizer, watch))
        findings.expect(
            sampled.token_ids == turn.completion.token_ids,
            "sampled tokens",
            location,
            "the trajectory has other tokens than the engine sampled",
        )
        findings.count("logprobs", len(turn.completion))
        findings.expect(
            sampled.logprobs == turn.completion.rollout_logprobs
            and all(each <= _ROUNDING for each in sampled.logprobs),
            "logprobs",
            location,
            "the trajectory has other logprobs than the engine returned, or one is above 0",
        )
        findings.expect(
            sampled.stop_reason is turn.stop_reason,
            "stop reasons",
            location,
            f"the reason is {turn.stop_reason}, but what the engine sampled ends with "
            f"{sampled.stop_reason}",
        )
        findings.count("versions", len(turn.completion))
        findings.expect(
            (turn.policy_version, turn.version_spans)
            == (sampled.policy_version, sampled.version_spans),
            "versions",
            location,
            f"version {turn.policy_version}, but the engine returned {sampled.policy_version}",
        )

    # ----------------------------------------------------------------------------- what is trained

    def _masks(self, trajectory: Trajectory, capture: Capture, location: Location) -> None:
        main, trained = choose(capture, self.agents.train_on)
        sequences = by_trace(trajectory)
        self.findings.expect(
            sequences[main.number] is trajectory,
            "trajectories",
            location,
            f"the trajectory itself is to be trace {main.number} with agents.train_on = "
            f"{self.agents.train_on!r}",
        )
        for number, sequence in sequences.items():
            self.findings.count("loss mask", sum(map(len, sequence.spans())))
            texts = [sequence.prompt, *(turn.observation for turn in sequence.turns)]
            self.findings.expect(
                not any(each.is_sampled or not each.trainable for each in texts),
                "loss mask",
                location,
                "tokens that the policy did not write have logprobs or are marked",
            )
            cut = [turn.is_cut for turn in sequence.turns]
            for index, turn in enumerate(sequence.turns):
                is_out = {
                    "mask_turn": cut[index],
                    "mask_trajectory": sequence.truncated or any(cut),
                }.get(self.limits.overlong, False)
                self.findings.expect(
                    turn.completion.trainable == (number in trained and not is_out),
                    "loss mask",
                    location.at(turn=index),
                    f"trainable is {turn.completion.trainable} in trace {number}, which "
                    f"contradicts agents.train_on = {self.agents.train_on!r} or rollout.overlong = "
                    f"{self.limits.overlong!r}",
                )

    # ------------------------------------------------------------------------------- the verdict

    def _verdict(
        self,
        trajectory: Trajectory,
        attempt: Attempt,
        replayed: Replayed,
        is_whole: bool,
        location: Location,
    ) -> None:
        findings, last = self.findings, trajectory.turns[-1]
        flags = trajectory.terminated, trajectory.truncated
        findings.count("turns replayed")
        findings.expect(
            attempt.prompt == digest(replayed.prompt),
            "prompt tokens",
            location,
            "the environment returns another task than it did in the run",
        )
        rest: Sequence[Turn] = [
            turn for each in trajectory.sequences for turn in each.turns if turn is not last
        ]
        findings.expect(
            not any(turn.reward for turn in rest)
            and all((each.terminated, each.truncated) == flags for each in trajectory.sequences)
            and all(each.group_id == trajectory.group_id for each in trajectory.sequences)
            and all(each.task_id == trajectory.task_id for each in trajectory.sequences)
            and not any(each.is_forked for each in trajectory.sequences),
            "trajectories",
            location,
            "only the last turn has a reward, and all sequences end as the episode does",
        )
        if not is_whole:
            return
        info = verdict_info(last)
        text, report = last.info.get("observation"), last.info.get(REPORT)
        call = attempt.calls[-1] if attempt.calls else None
        if not isinstance(text, str) or not isinstance(report, str) or call is None:
            findings.drift("turns replayed", location, "the report of the agent is not recorded")
            return
        findings.expect(
            call.ended
            and call.answer == answer_digest(report, text, last.reward, *flags, info)
            and call.outcome == last.outcome == info.get("outcome", "ok"),
            "turns replayed",
            location,
            "report, reward, flags, outcome or info are not those of the run",
        )
        if replayed.error or len(replayed.answers) != 1:
            findings.drift("turns replayed", location, replayed.error or "nothing was graded")
            return
        (answer,) = replayed.answers
        findings.expect(
            (answer.text, answer.reward, answer.terminated, answer.truncated, answer.info)
            == (text, last.reward, *flags, info),
            "turns replayed",
            location,
            f"the reward is {last.reward}; graded again it is {answer.reward} "
            f"({answer.info.get('outcome')})",
        )


def _allowed(call: Callable[[], T]) -> T:
    try:
        return call()
    except Unsuitable as error:
        raise ValueError(f"the messages of a request cannot be encoded: {error}") from None
