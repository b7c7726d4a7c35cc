"""Metrics of the calls that models write: a pure function of trajectories."""

from __future__ import annotations

from collections.abc import Sequence

from tir_alp.types import TrajectoryGroup


def call_metrics(
    groups: Sequence[TrajectoryGroup], replaced: Sequence[TrajectoryGroup] = ()
) -> dict[str, float]:
    """Describe the calls of a step; `docs/metrics.md` defines the names.

    Args:
        groups: The groups that are trained on.
        replaced: Groups without signal that other groups replaced.
    """
    trajectories = [each for group in (*groups, *replaced) for each in group.trajectories]
    bad = sum(
        turn.info.get("bad_calls", 0) for each in trajectories for turn in each.conversation_turns
    )
    return {"rollout/bad_calls": bad / max(len(trajectories), 1)}
