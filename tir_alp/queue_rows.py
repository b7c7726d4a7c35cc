"""What a rollout queue holds as rows of JSON, and back: `rollouts.json` of a checkpoint. Pure.

Numbers come back as they were, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tir_alp.rollout_queue import QueueState
from tir_alp.trajectory_rows import from_row, to_row
from tir_alp.types import TrajectoryGroup


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
        "num_dropped": group.num_dropped,
    }


def _group(row: Mapping[str, Any]) -> TrajectoryGroup:
    return TrajectoryGroup(**{**row, "trajectories": tuple(map(from_row, row["trajectories"]))})
