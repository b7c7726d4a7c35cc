"""Trajectories and the queue's state as JSON records, and back. Pure.

`trajectories/*.jsonl` holds one trajectory per line; a checkpoint holds the state of the queue with
its finished groups.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tir_alp.records.readable import Reading
from tir_alp.rollouts.queue import QueueState
from tir_alp.tools.outcome import Outcome
from tir_alp.types import StopReason, TokenSpan, Trajectory, TrajectoryGroup, Turn, VersionSpan

# --------------------------------------------------------------------------------- trajectories


def to_record(trajectory: Trajectory, reading: Reading | None = None) -> dict[str, Any]:
    """Return a trajectory as `json.dumps` takes it; keys are the field names of the dataclasses.

    Args:
        trajectory: The trajectory.
        reading: What adds the text of each span as `text`, for people, and takes secrets out of
            `info`; None: the record is exact, with the routing of tokens, and has no text.
    """
    record = {
        "task_id": trajectory.task_id,
        "group_id": trajectory.group_id,
        "prompt": _span_to_record(trajectory.prompt, reading),
        "turns": [_turn_to_record(turn, reading) for turn in trajectory.turns],
        "terminated": trajectory.terminated,
        "truncated": trajectory.truncated,
        "sequence_uid": trajectory.sequence_uid,
    }
    if trajectory.branches:
        record["branches"] = [to_record(each, reading) for each in trajectory.branches]
    if trajectory.is_forked:
        record["is_forked"] = True
    return record


def from_record(record: Mapping[str, Any]) -> Trajectory:
    """Return the trajectory that a record describes.

    Raises:
        ValueError: If the record is not a trajectory: a key is missing or unknown, or a value has
            the wrong type.
    """
    branches: list[Trajectory] = []
    is_forked = False
    if isinstance(record, Mapping):
        if "branches" in record:
            branches = _branches(record["branches"])
        is_forked = record.get("is_forked", False)
        if not isinstance(is_forked, bool) or (is_forked and not branches):
            raise ValueError(f"is_forked cannot be {is_forked!r:.60} with {len(branches)} branches")
        extra = ("branches", "is_forked")
        record = {name: value for name, value in record.items() if name not in extra}
    fields = _fields(
        record,
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
            turns.append(_turn_from_record(turn))
        except ValueError as error:
            raise ValueError(f"turn {index}: {error}") from None
    prompt = _span_from_record(fields["prompt"])
    made = {"prompt": prompt, "turns": tuple(turns), "branches": tuple(branches)}
    made["is_forked"] = is_forked
    return Trajectory(**fields | made)


def _branches(records: Any) -> list[Trajectory]:
    if not isinstance(records, list) or not records:
        raise ValueError(f"branches are a list of trajectories, not {records!r:.60}")
    branches = []
    for index, each in enumerate(records):
        try:
            branches.append(from_record(each))
        except ValueError as error:
            raise ValueError(f"branch {index}: {error}") from None
        if branches[-1].branches:
            raise ValueError(f"branch {index} has branches of its own")
    return branches


def _turn_to_record(turn: Turn, reading: Reading | None) -> dict[str, Any]:
    routing = {}
    if reading is None and turn.routing is not None:
        data = base64.b64encode(turn.routing.astype("<i2").tobytes()).decode()
        routing["routing"] = {"shape": turn.routing.shape, "experts": data}
    return routing | {
        "completion": _span_to_record(turn.completion, reading),
        "observation": _span_to_record(turn.observation, reading),
        "policy_version": turn.policy_version,
        "stop_reason": turn.stop_reason.value,
        "outcome": turn.outcome.value,
        "reward": turn.reward,
        "info": dict(turn.info) if reading is None else reading.info(turn.info),
        "timing": dict(turn.timing),
        "version_spans": [
            {"version": span.version, "start": span.start, "stop": span.stop}
            for span in turn.version_spans
        ],
    }


def _turn_from_record(record: Any) -> Turn:
    routing = None
    if isinstance(record, Mapping) and "routing" in record:
        routing = _routing_from_record(record["routing"])
        record = {name: value for name, value in record.items() if name != "routing"}
    fields = _fields(
        record,
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
    converted = {
        "completion": _span_from_record(fields["completion"]),
        "observation": _span_from_record(fields["observation"]),
        "stop_reason": StopReason(fields["stop_reason"]),
        "outcome": Outcome(fields["outcome"]),
        "reward": float(fields["reward"]),
        "version_spans": tuple(spans),
        "routing": routing,
    }
    return Turn(**fields | converted)


def _routing_from_record(record: Any) -> NDArray:
    fields = _fields(record, "a routing", shape=list, experts=str)
    data = base64.b64decode(fields["experts"], validate=True)
    return np.frombuffer(data, "<i2").reshape(fields["shape"]).astype(np.int16)


def _span_to_record(span: TokenSpan, reading: Reading | None) -> dict[str, Any]:
    text = {} if reading is None or not reading.max_chars else {"text": reading.text(span)}
    return text | {
        "token_ids": span.token_ids,
        "rollout_logprobs": span.rollout_logprobs,
        "trainable": span.trainable,
    }


def texts_of(record: Mapping[str, Any]) -> list[str | None]:
    """Return the text of each span of a trajectory's record, in order; None where there is none.

    Args:
        record: A record from which `from_record` makes a trajectory.
    """
    turns = record["turns"]
    spans = [record["prompt"], *(turn[name] for turn in turns for name in _SPANS)]
    return [span.get("text") for span in spans]


_SPANS = ("completion", "observation")  # of a turn, in order


def _span_from_record(record: Any) -> TokenSpan:
    if isinstance(record, Mapping) and isinstance(record.get("text"), str):
        record = {name: value for name, value in record.items() if name != "text"}
    fields = _fields(
        record, "a span", token_ids=list, rollout_logprobs=(list, type(None)), trainable=bool
    )
    if not all(type(token) is int and 0 <= token < 2**31 for token in fields["token_ids"]):
        raise ValueError("token ids must be integers from 0 to 2**31 - 1")
    logprobs = fields["rollout_logprobs"]
    if logprobs is not None:
        if not all(type(each) in (int, float) and math.isfinite(each) for each in logprobs):
            raise ValueError("logprobs must be finite numbers")
        logprobs = tuple(map(float, logprobs))
    return TokenSpan(tuple(fields["token_ids"]), logprobs, fields["trainable"])


def _fields(record: Any, what: str, **types: type | tuple[type, ...]) -> dict[str, Any]:
    """Check that a record has exactly these keys, with values of these types; return a copy."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{what} is an object, not {record!r:.60}")
    if record.keys() != types.keys():
        missing = sorted(types.keys() - record.keys())
        unknown = sorted(record.keys() - types.keys())
        raise ValueError(f"{what} lacks {missing} and has unknown {unknown}")
    for name, kind in types.items():
        value = record[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{name} of {what} cannot be {value!r:.60}")
    return dict(record)


# -------------------------------------------------------------------------- groups and the queue


def state_to_record(state: QueueState) -> dict[str, Any]:
    """Return the state of a queue as `json.dumps` takes it."""
    finished = [_group_to_record(group) for group in state.finished.values()]
    return {"next_group": state.next_group, "pending": [*state.pending], "finished": finished}


def state_from_record(record: Mapping[str, Any]) -> QueueState:
    """Return the state of a queue that a record describes.

    Raises:
        KeyError, TypeError, ValueError: If the record is not the state of a queue.
    """
    groups = map(_group_from_record, record["finished"])
    finished = {group.group_id: group for group in groups}
    return QueueState(record["next_group"], tuple(record["pending"]), finished)


def _group_to_record(group: TrajectoryGroup) -> dict[str, Any]:
    return {
        "task_id": group.task_id,
        "group_id": group.group_id,
        "trajectories": [to_record(each) for each in group.trajectories],
        "num_failed": group.num_failed,
    }


def _group_from_record(record: Mapping[str, Any]) -> TrajectoryGroup:
    trajectories = tuple(map(from_record, record["trajectories"]))
    return TrajectoryGroup(**{**record, "trajectories": trajectories})
