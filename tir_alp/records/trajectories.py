"""Trajectories as rows of JSON, the format of `trajectories/*.jsonl`, and back. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tir_alp.rollouts.queue import QueueState
from tir_alp.tools.outcome import Outcome
from tir_alp.types import StopReason, TokenSpan, Trajectory, TrajectoryGroup, Turn, VersionSpan


def to_row(trajectory: Trajectory) -> dict[str, Any]:
    """What `json.dumps` takes; names are those of the dataclasses."""
    return {
        "task_id": trajectory.task_id,
        "group_id": trajectory.group_id,
        "prompt": _span_row(trajectory.prompt),
        "turns": [_turn_row(turn) for turn in trajectory.turns],
        "terminated": trajectory.terminated,
        "truncated": trajectory.truncated,
        "sequence_uid": trajectory.sequence_uid,
    }


def from_row(row: Mapping[str, Any]) -> Trajectory:
    """The trajectory of a row.

    Raises:
        ValueError: If it is none: a key is missing or unknown, or a value of another type.
    """
    fields = _fields(
        row,
        "a trajectory",
        task_id=str,
        group_id=int,
        prompt=dict,
        turns=list,
        terminated=bool,
        truncated=bool,
        sequence_uid=int,
    )
    turns = []
    for index, turn in enumerate(fields["turns"]):
        try:
            turns.append(_turn(turn))
        except ValueError as error:
            raise ValueError(f"turn {index}: {error}") from None
    return Trajectory(**fields | {"prompt": _span(fields["prompt"]), "turns": tuple(turns)})


def _span_row(span: TokenSpan) -> dict[str, Any]:
    return {
        "token_ids": span.token_ids,
        "rollout_logprobs": span.rollout_logprobs,
        "trainable": span.trainable,
    }


def _turn_row(turn: Turn) -> dict[str, Any]:
    return {
        "completion": _span_row(turn.completion),
        "observation": _span_row(turn.observation),
        "policy_version": turn.policy_version,
        "stop_reason": turn.stop_reason.value,
        "outcome": turn.outcome.value,
        "reward": turn.reward,
        "info": dict(turn.info),
        "timing": dict(turn.timing),
        "version_spans": [
            {"version": span.version, "start": span.start, "stop": span.stop}
            for span in turn.version_spans
        ],
    }


def _span(row: Any) -> TokenSpan:
    fields = _fields(
        row, "a span", token_ids=list, rollout_logprobs=(list, type(None)), trainable=bool
    )
    if not all(type(token) is int and 0 <= token < 2**31 for token in fields["token_ids"]):
        raise ValueError("token ids are numbers from 0")
    logprobs = fields["rollout_logprobs"]
    if logprobs is not None:
        if not all(type(each) in (int, float) and math.isfinite(each) for each in logprobs):
            raise ValueError("logprobs are finite numbers")
        logprobs = tuple(map(float, logprobs))
    return TokenSpan(tuple(fields["token_ids"]), logprobs, fields["trainable"])


def _turn(row: Any) -> Turn:
    fields = _fields(
        row,
        "a turn",
        completion=dict,
        observation=dict,
        policy_version=int,
        stop_reason=str,
        outcome=str,
        reward=(float, int),
        info=dict,
        timing=dict,
        version_spans=list,
    )
    if not all(isinstance(seconds, float | int) for seconds in fields["timing"].values()):
        raise ValueError(f"timing is in seconds, not {fields['timing']!r:.60}")
    spans = [
        VersionSpan(**_fields(span, "a version span", version=int, start=int, stop=int))
        for span in fields["version_spans"]
    ]
    parts = {
        "completion": _span(fields["completion"]),
        "observation": _span(fields["observation"]),
        "stop_reason": StopReason(fields["stop_reason"]),
        "outcome": Outcome(fields["outcome"]),
        "reward": float(fields["reward"]),
        "version_spans": tuple(spans),
    }
    return Turn(**fields | parts)


def _fields(row: Any, what: str, **types: type | tuple[type, ...]) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise ValueError(f"{what} is an object, not {row!r:.60}")
    if row.keys() != types.keys():
        missing, unknown = sorted(types.keys() - row.keys()), sorted(row.keys() - types.keys())
        raise ValueError(f"{what} lacks {missing} and has unknown {unknown}")
    for name, kind in types.items():
        value = row[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{name} of {what} cannot be {value!r:.60}")
    return dict(row)


def state_to_row(state: QueueState) -> dict[str, Any]:
    """What `json.dumps` takes."""
    finished = [_group_row(group) for group in state.finished.values()]
    return {"next_group": state.next_group, "pending": [*state.pending], "finished": finished}


def state_from_row(row: Mapping[str, Any]) -> QueueState:
    """The state of a row. Raises KeyError, TypeError or ValueError if it is none."""
    groups = map(_group, row["finished"])
    finished = {group.group_id: group for group in groups}
    return QueueState(row["next_group"], tuple(row["pending"]), finished)


def _group_row(group: TrajectoryGroup) -> dict[str, Any]:
    return {
        "task_id": group.task_id,
        "group_id": group.group_id,
        "trajectories": [to_row(each) for each in group.trajectories],
        "num_failed": group.num_failed,
    }


def _group(row: Mapping[str, Any]) -> TrajectoryGroup:
    return TrajectoryGroup(**{**row, "trajectories": tuple(map(from_row, row["trajectories"]))})
