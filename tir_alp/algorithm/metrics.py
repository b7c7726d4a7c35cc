"""Metrics of rollouts and evaluations: pure functions from trajectories to `area/name` numbers.

`docs/metrics.md` defines each name. The ratios are in `ratio_metrics`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from tir_alp.tools.outcome import Outcome
from tir_alp.types import Trajectory, TrajectoryGroup, Turn

_MOST_STALE = 8  # this age and all higher ones, in steps, are one class


def rollout_metrics(
    groups: Sequence[TrajectoryGroup], step: int, replaced: Sequence[TrajectoryGroup] = ()
) -> dict[str, float]:
    """Describe the trajectories of one step.

    What was said in other traces of an episode counts as turns of the episode.

    `time/generate` and `time/tool` are means over trajectories, in seconds. `staleness/*` are in
    steps, over the sampled tokens that are trained on. `outcome/<name>` count turns.

    Args:
        groups: The groups that are trained on.
        step: Number of the step, from 0.
        replaced: Groups without signal that other groups replaced. Since they were sampled, all
            metrics except the staleness include them: otherwise the reward would be biased.
    """
    sampled = [*groups, *replaced]
    trajectories = [each for group in sampled for each in group.trajectories]
    turns = [turn for trajectory in trajectories for turn in _turns(trajectory)]
    outcomes = Counter(turn.outcome for turn in turns)
    return {
        "rollout/reward": _mean(trajectory.reward for trajectory in trajectories),
        **reward_part_metrics(trajectories),
        "rollout/turns": len(turns) / len(trajectories),
        "rollout/traces": _mean(len(each.sequences) for each in trajectories),
        "rollout/tool_calls": _mean(map(tool_calls, trajectories)),
        "rollout/void_turns": _mean(turn.is_void for turn in turns),
        "rollout/truncated": _mean(trajectory.truncated for trajectory in trajectories),
        "rollout/overlong": _mean(trajectory.is_overlong for trajectory in trajectories),
        "rollout/zero_signal_groups": sum(len(set(group.rewards)) == 1 for group in sampled),
        "rollout/refills": len(replaced),
        **difficulty_metrics(sampled),
        "rollout/failed": sum(group.num_failed for group in sampled),
        "tokens/generated": sum(len(turn.completion) for turn in turns),
        "time/generate": _seconds(trajectories, "generate"),
        "time/tool": _seconds(trajectories, "tool"),
        **staleness_metrics(
            [s for group in groups for each in group.trajectories for s in each.sequences], step
        ),
        **{f"outcome/{outcome}": outcomes[outcome] for outcome in Outcome},
    }


def reward_part_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Return `reward/<component>`, the mean of each reward component that environments report."""
    components: dict[str, list[float]] = {}
    for trajectory in trajectories:
        for turn in trajectory.conversation_turns:
            for name, value in turn.info.get("rewards", {}).items():
                components.setdefault(name, []).append(value)
    num = len(trajectories)
    return {f"reward/{name}": sum(values) / num for name, values in components.items()}


def difficulty_metrics(groups: Sequence[TrajectoryGroup]) -> dict[str, float]:
    """Describe how hard the tasks of a step were.

    `difficulty/none`, `difficulty/some` and `difficulty/all` are the shares of groups in which no,
    some or all answers are correct; `difficulty/solved` is the mean share of correct answers.
    """
    shares = [_mean(map(is_correct, group.trajectories)) for group in groups]
    return {
        "difficulty/none": _mean(share == 0 for share in shares),
        "difficulty/some": _mean(0 < share < 1 for share in shares),
        "difficulty/all": _mean(share == 1 for share in shares),
        "difficulty/solved": _mean(shares),
    }


def staleness_metrics(trajectories: Sequence[Trajectory], step: int) -> dict[str, float]:
    """Describe the age of the weights that sampled the tokens, in steps.

    `staleness/share_<n>` is the share of tokens that are n steps old, for each n up to 7 that
    occurs; `share_8` is that of all older tokens. `staleness/versions` counts policy versions.
    `staleness/mixed` is the share of trajectories that more than one version sampled, and
    `staleness/mixed_turns` that of turns, during which new weights were loaded.
    """
    turns = [[turn.versions for turn in each.turns] for each in trajectories]
    versions_of = [{span.version for spans in each for span in spans} for each in turns]
    ages: Counter[int] = Counter()
    for span in (span for each in turns for spans in each for span in spans):
        ages[step - span.version] += span.stop - span.start
    shares: Counter[int] = Counter()
    for age, count in ages.items():
        shares[min(age, _MOST_STALE)] += count
    num_tokens = max(ages.total(), 1)
    return {
        "staleness/mean": sum(age * count for age, count in ages.items()) / num_tokens,
        "staleness/max": max(ages, default=0),
        "staleness/versions": len(set().union(*versions_of)),
        "staleness/mixed": _mean(len(versions) > 1 for versions in versions_of),
        "staleness/mixed_turns": _mean(len(spans) > 1 for each in turns for spans in each),
        **{f"staleness/share_{age}": shares[age] / num_tokens for age in sorted(shares)},
    }


def evaluation_metrics(
    samples: Sequence[Sequence[Trajectory]], greedy: Sequence[Trajectory]
) -> dict[str, float]:
    """Describe an evaluation.

    Args:
        samples: [tasks][k] sampled trajectories; failed ones are left out.
        greedy: One greedily decoded trajectory per task; empty if there were none.

    Returns:
        `eval/accuracy` is avg@k, the mean over tasks of the share of correct trajectories;
        `eval/pass_at_k` is the share of tasks with at least one correct trajectory. Where every
        episode failed there is no accuracy, which is not an accuracy of 0.
    """
    tasks = [[is_correct(trajectory) for trajectory in task] for task in samples if task]
    if not tasks:
        return {"eval/tasks": 0}
    metrics = {
        "eval/accuracy": _mean(_mean(task) for task in tasks),
        "eval/pass_at_k": _mean(any(task) for task in tasks),
        "eval/tool_calls": _mean(tool_calls(each) for task in samples for each in task),
        "eval/tasks": len(tasks),
    }
    if greedy:
        metrics["eval/greedy_accuracy"] = _mean(map(is_correct, greedy))
    return metrics


def is_correct(trajectory: Trajectory) -> bool:
    """Whether the last turn's `info["correct"]` is true; if it is missing, whether reward > 0."""
    verdict = trajectory.turns[-1].info.get("correct") if trajectory.turns else None
    return bool(verdict) if verdict is not None else trajectory.reward > 0


def tool_calls(trajectory: Trajectory) -> int:
    """Return the number of tool calls in all turns of an episode."""
    return sum(turn.info.get("tool_calls", 0) for turn in _turns(trajectory))


def _turns(trajectory: Trajectory) -> list[Turn]:
    """The turns of all sequences of an episode."""
    return [turn for sequence in trajectory.sequences for turn in sequence.turns]


def _seconds(trajectories: Iterable[Trajectory], activity: str) -> float:
    return _mean(sum(turn.timing[activity] for turn in _turns(each)) for each in trajectories)


def _mean(values: Iterable[float]) -> float:
    numbers = [float(value) for value in values]
    return float(np.mean(numbers)) if numbers else 0.0
