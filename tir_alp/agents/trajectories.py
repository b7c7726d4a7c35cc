"""Captures as trajectories, and back. Pure.

Every trace of an episode is in its trajectory, trained on or not: the one that the config names is
the trajectory itself, and the others are its branches. The `info` of each turn has what the client
sent and got, so that the capture can be made again from the record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tir_alp.agents.capture import Capture, Exchange, Trace, answer_trace, longest_trace
from tir_alp.agents.messages import from_record, to_record
from tir_alp.engines.base import Completion
from tir_alp.tools.outcome import Outcome
from tir_alp.types import REPORT, TokenSpan, Trajectory, Turn, split_uid, trace_uid

EXCHANGE, TRACE = "exchange", "trace"
"""Keys of `info`: in every turn, and in the first one of a trace."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the environment returned for the agent's report."""

    report: str
    observation: str
    reward: float
    terminated: bool
    truncated: bool
    info: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ExchangeRecord:
    """An exchange as its turn has it; the tokens are in the turn's spans."""

    number: int
    asked: Sequence[Mapping[str, Any]]
    reply: Mapping[str, Any]
    reads_calls: bool
    """Whether calls in the text were read as calls."""
    forced: str
    one_call: bool
    stops: Sequence[str]


def choose(capture: Capture, train_on: str) -> tuple[Trace, frozenset[int]]:
    """Return the main trace of an episode with completions, and the numbers of those to train on.

    Args:
        capture: The episode.
        train_on: See `AgentsConfig.train_on`.
    """
    main = longest_trace(capture) if train_on == "longest" else answer_trace(capture)
    assert main is not None
    numbers = {each.number for each in capture.traces} if train_on == "all" else {main.number}
    return main, frozenset(numbers)


def to_trajectory(
    capture: Capture,
    verdict: Verdict,
    *,
    task_id: str,
    group_id: int,
    sequence_uid: int,
    train_on: str,
    timing: Mapping[int, Mapping[str, float]],
) -> Trajectory:
    """Return the trajectory of an episode with at least one completion.

    Args:
        capture: The episode.
        verdict: How it was graded.
        task_id: Id of its task.
        group_id: Id of its group.
        sequence_uid: Uid of its sequence.
        train_on: See `AgentsConfig.train_on`.
        timing: Durations of each completion, by its number; see `Turn.timing`.
    """
    main, trained = choose(capture, train_on)

    def sequence(trace: Trace, branches: tuple[Trajectory, ...] = ()) -> Trajectory:
        turns = _turns(trace, trace.number in trained, timing)
        if trace.number == main.number:
            turns = (*turns[:-1], _last(turns[-1], verdict))
        return Trajectory(
            task_id=task_id,
            group_id=group_id,
            prompt=TokenSpan(trace.inherited_ids + trace.exchanges[0].shown),
            turns=turns,
            terminated=verdict.terminated,
            truncated=verdict.truncated,
            sequence_uid=trace_uid(sequence_uid, trace.number),
            branches=branches,
        )

    others = [each for each in capture.traces if each.exchanges and each.number != main.number]
    return sequence(main, tuple(map(sequence, others)))


def _turns(
    trace: Trace, is_trained: bool, timing: Mapping[int, Mapping[str, float]]
) -> tuple[Turn, ...]:
    shown = [*(each.shown for each in trace.exchanges[1:]), ()]
    turns = []
    for index, (exchange, following) in enumerate(zip(trace.exchanges, shown, strict=True)):
        completion = exchange.completion
        info: dict[str, Any] = {
            "outcome": Outcome.OK.value,
            "tool_calls": len(exchange.reply.calls),
            EXCHANGE: asdict(_record_of(exchange)),
        }
        if index == 0:
            info[TRACE] = {
                "parent": None if trace.parent is None else [*trace.parent],
                "tools": trace.tools,
                "reason": trace.reason,
            }
        turns.append(
            Turn(
                completion=TokenSpan(completion.token_ids, completion.logprobs, is_trained),
                observation=TokenSpan(following),
                policy_version=completion.policy_version,
                stop_reason=completion.stop_reason,
                outcome=Outcome.OK,
                reward=0.0,
                info=info,
                timing={
                    "queue": completion.queue_s,
                    "generate": 0.0,
                    "tool": 0.0,
                    **timing.get(exchange.number, {}),
                },
                version_spans=completion.version_spans,
            )
        )
    return tuple(turns)


def _last(turn: Turn, verdict: Verdict) -> Turn:
    info = {
        **verdict.info,
        "observation": verdict.observation,
        EXCHANGE: turn.info[EXCHANGE],
        REPORT: verdict.report,
    }
    if TRACE in turn.info:
        info[TRACE] = turn.info[TRACE]
    outcome = Outcome(verdict.info.get("outcome", Outcome.OK))
    return replace(turn, info=info, reward=verdict.reward, outcome=outcome)


def _record_of(exchange: Exchange) -> ExchangeRecord:
    rule = exchange.rule
    return ExchangeRecord(
        number=exchange.number,
        asked=[*map(to_record, exchange.asked)],
        reply=to_record(exchange.reply),
        reads_calls=rule.style is not None,
        forced=rule.forced,
        one_call=rule.one_call,
        stops=[*rule.stops],
    )


def exchange_record(turn: Turn) -> ExchangeRecord:
    """Return the record of the exchange of a turn.

    Raises:
        ValueError: It has none, or one that cannot be read.
    """
    try:
        record = ExchangeRecord(**turn.info[EXCHANGE])
        for each in (*record.asked, record.reply):
            from_record(each)
    except (KeyError, TypeError) as error:
        raise ValueError(f"the turn has no record of its exchange ({error!r})") from None
    if not isinstance(record.number, int) or not isinstance(record.forced, str):
        raise ValueError("the record of the exchange has fields of other types")
    return record


def trace_record(turn: Turn) -> tuple[tuple[int, int] | None, str, str]:
    """Return parent, tools and reason of the trace whose first turn is given.

    Raises:
        ValueError: The turn has no such record.
    """
    try:
        record = turn.info[TRACE]
        parent, tools, reason = record["parent"], record["tools"], record["reason"]
        if parent is not None:
            one, other = parent
            parent = int(one), int(other)
        if not isinstance(tools, str) or not isinstance(reason, str):
            raise ValueError("the record of the trace has fields of other types")
        return parent, tools, reason
    except (KeyError, TypeError) as error:
        raise ValueError(f"the turn has no record of its trace ({error!r})") from None


def verdict_info(turn: Turn) -> dict[str, Any]:
    """Return the part of the last turn's `info` that the environment returned."""
    ours = (EXCHANGE, TRACE, REPORT, "observation")
    return {name: value for name, value in turn.info.items() if name not in ours}


def completion_of(turn: Turn) -> Completion:
    """Return the completion of a turn. Raises ValueError if it has no logprobs."""
    if turn.completion.rollout_logprobs is None:
        raise ValueError("the completion has no logprobs")
    return Completion(
        token_ids=turn.completion.token_ids,
        logprobs=turn.completion.rollout_logprobs,
        stop_reason=turn.stop_reason,
        policy_version=turn.policy_version,
        version_spans=turn.version_spans,
    )


def by_trace(trajectory: Trajectory) -> dict[int, Trajectory]:
    """Return the sequences of an episode by the number of their trace, in order.

    Raises:
        ValueError: Two have the same number, or one belongs to another episode.
    """
    uid, _ = split_uid(trajectory.sequence_uid)
    found: dict[int, Trajectory] = {}
    for each in trajectory.sequences:
        of, number = split_uid(each.sequence_uid)
        if of != uid or number in found:
            raise ValueError(f"sequence {each.sequence_uid} is doubled or of another episode")
        found[number] = each
    return dict(sorted(found.items()))
