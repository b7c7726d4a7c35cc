"""Trajectories as JSON and back: what a run's folder and its checkpoints hold of them.

Numbers come back as they were, bit for bit: a float is written with as many digits as it needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tir_alp.rollout_queue import QueueState
from tir_alp.tools.outcome import Outcome
from tir_alp.types import StopReason, TokenSpan, Trajectory, TrajectoryGroup, Turn, VersionSpan


def queue_to_json(state: QueueState) -> dict[str, Any]:
    """Return what a queue holds as what `json.dumps` takes."""
    finished = [group_to_json(group) for group in state.finished.values()]
    return {"next_group": state.next_group, "pending": state.pending, "finished": finished}


def queue_from_json(row: Mapping[str, Any]) -> QueueState:
    """Undo `queue_to_json`. Raises KeyError or TypeError for what it did not write."""
    groups = map(group_from_json, row["finished"])
    finished = {group.group_id: group for group in groups}
    return QueueState(row["next_group"], tuple(row["pending"]), finished)


def group_to_json(group: TrajectoryGroup) -> dict[str, Any]:
    """Return a group as what `json.dumps` takes."""
    return asdict(group)


def group_from_json(row: Mapping[str, Any]) -> TrajectoryGroup:
    """Undo `group_to_json`. Raises KeyError or TypeError for what it did not write."""
    trajectories = tuple(map(trajectory_from_json, row["trajectories"]))
    return TrajectoryGroup(**{**row, "trajectories": trajectories})


def trajectory_from_json(row: Mapping[str, Any]) -> Trajectory:
    """Read one line of a run's `trajectories/`. Raises KeyError or TypeError for any other."""
    turns = tuple(map(_turn, row["turns"]))
    return Trajectory(**{**row, "prompt": _span(row["prompt"]), "turns": turns})


def _turn(row: Mapping[str, Any]) -> Turn:
    return Turn(
        **{
            **row,
            "completion": _span(row["completion"]),
            "observation": _span(row["observation"]),
            "stop_reason": StopReason(row["stop_reason"]),
            "outcome": Outcome(row["outcome"]),
            "version_spans": tuple(VersionSpan(**span) for span in row["version_spans"]),
        }
    )


def _span(row: Mapping[str, Any]) -> TokenSpan:
    logprobs = row["rollout_logprobs"]
    return TokenSpan(
        token_ids=tuple(row["token_ids"]),
        rollout_logprobs=None if logprobs is None else tuple(logprobs),
        trainable=row["trainable"],
    )
