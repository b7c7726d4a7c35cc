"""What a step is described by: pure functions from what happened to `area/name` numbers.

Ratios here are always those of the policy that is trained (under ALP: the perturbed one) over the
policy that sampled, a product over the loss's tokens of a whole sequence: so that methods with
different denominators can be compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from tir_alp.loss import MAX_LOG_RATIO
from tir_alp.tools.outcome import Outcome
from tir_alp.types import Trajectory, TrajectoryGroup

_MOST_STALE = 8  # ages from here on are one class
_QUANTILES = {"ratio/p2": 0.02, "ratio/p50": 0.5, "ratio/p98": 0.98}


def ratio_quantiles(log_ratios: Tensor) -> dict[str, float]:
    """The P2-P98 envelope of the sequence ratios.

    Args:
        log_ratios: [B] summed over each sequence.
    """
    ratios = log_ratios.double().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return {name: float(torch.quantile(ratios, q)) for name, q in _QUANTILES.items()}


def mismatch_metrics(rows: Sequence[tuple[Tensor, Tensor, Tensor]]) -> dict[str, float]:
    """How far the trainer's own forward is from the engine's (spec 1.9).

    With d = proximal - rollout logprob of a token and w = e^d: `mismatch/kl` = mean(-d),
    `mismatch/k3` = mean(w - d - 1), `mismatch/chi2` = mean(w^2) - 1, and the effective sample size
    `mismatch/ess` = mean(w)^2 / mean(w^2), a share. A perplexity is e^(-mean logprob) of a
    sequence, averaged over sequences.

    Args:
        rows: Of each micro-batch, proximal logprobs, rollout logprobs and loss mask, [B, T] each.
            The mask may be empty in a row, but not in all.
    """
    pairs = [(proximal[mask], rollout[mask]) for proximal, rollout, mask in rows]
    proximal, rollout = (torch.cat(parts).double() for parts in zip(*pairs, strict=True))
    difference = proximal - rollout
    weights = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    second_moment = weights.square().mean()
    return {
        "mismatch/kl": float(-difference.mean()),
        "mismatch/k3": float((weights - difference - 1).mean()),
        "mismatch/chi2": float(second_moment - 1),
        "mismatch/ess": float(weights.mean().square() / second_moment),
        "mismatch/proximal_perplexity": _perplexity([(row[0], row[2]) for row in rows]),
        "mismatch/rollout_perplexity": _perplexity([(row[1], row[2]) for row in rows]),
    }


def _perplexity(rows: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Mean over sequences with loss tokens of e^(-mean logprob)."""
    values = [
        float((-logprobs[mask].double().mean()).exp())
        for batch, masks in rows
        for logprobs, mask in zip(batch, masks, strict=True)
        if mask.any()
    ]
    return _mean(values)


def rollout_metrics(
    groups: Sequence[TrajectoryGroup], step: int, dropped: Sequence[TrajectoryGroup] = ()
) -> dict[str, float]:
    """Describe the trajectories of one step.

    `time/generate` and `time/tool` are seconds a trajectory, on average, spent in either.
    `staleness/*` are in steps, over the turns that are trained on. `outcome/<name>` count turns.

    Args:
        groups: Those that are trained on.
        step: Number of the step, from 0.
        dropped: Groups without signal that others took the place of. They were sampled, so all but
            the staleness is about them too: without them the reward would look too good or bad.
    """
    sampled = [*groups, *dropped]
    trajectories = [each for group in sampled for each in group.trajectories]
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    outcomes = Counter(turn.outcome for turn in turns)
    return {
        "rollout/reward": _mean(trajectory.reward for trajectory in trajectories),
        "rollout/turns": len(turns) / len(trajectories),
        "rollout/tool_calls": _mean(map(tool_calls, trajectories)),
        "rollout/void_turns": _mean(turn.is_void for turn in turns),
        "rollout/truncated": _mean(trajectory.truncated for trajectory in trajectories),
        "rollout/overlong": _mean(trajectory.is_overlong for trajectory in trajectories),
        "rollout/zero_signal_groups": sum(len(set(group.rewards)) == 1 for group in sampled),
        "rollout/refills": len(dropped),
        "rollout/dropped": sum(group.num_dropped for group in sampled),
        "tokens/generated": sum(len(turn.completion) for turn in turns),
        "time/generate": _seconds(trajectories, "generate"),
        "time/tool": _seconds(trajectories, "tool"),
        **staleness_metrics([each for group in groups for each in group.trajectories], step),
        **{f"outcome/{outcome}": outcomes[outcome] for outcome in Outcome},
    }


def staleness_metrics(trajectories: Sequence[Trajectory], step: int) -> dict[str, float]:
    """How old the weights behind the turns are, in steps, and how they mix.

    `staleness/share_<n>` is the share of turns that are n steps old, for each n that occurs up to
    7; `share_8` is that of all older ones. `staleness/versions` counts weights, and
    `staleness/mixed` is the share of trajectories with turns by more than one.
    """
    versions = [{turn.policy_version for turn in each.turns} for each in trajectories]
    ages = [step - turn.policy_version for each in trajectories for turn in each.turns]
    shares = Counter(min(age, _MOST_STALE) for age in ages)
    return {
        "staleness/mean": _mean(ages),
        "staleness/max": max(ages, default=0),
        "staleness/versions": len(set().union(*versions)),
        "staleness/mixed": _mean(len(each) > 1 for each in versions),
        **{f"staleness/share_{age}": shares[age] / len(ages) for age in sorted(shares)},
    }


def evaluation_metrics(
    samples: Sequence[Sequence[Trajectory]], greedy: Sequence[Trajectory]
) -> dict[str, float]:
    """Describe an evaluation.

    Args:
        samples: [tasks][k] trajectories that were sampled; failed ones are missing.
        greedy: One greedy trajectory a task; empty if there were none.

    Returns:
        `eval/accuracy` is avg@k: the mean over tasks of the share of trajectories that are correct.
        `eval/pass_at_k` is the share of tasks with at least one that is.
    """
    tasks = [[is_correct(trajectory) for trajectory in task] for task in samples if task]
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
    """Whether the environment said so at the end; one that says nothing is asked by its reward."""
    verdict = trajectory.turns[-1].info.get("correct")
    return bool(verdict) if verdict is not None else trajectory.reward > 0


def tool_calls(trajectory: Trajectory) -> int:
    """Tool calls of all turns."""
    return sum(turn.info.get("tool_calls", 0) for turn in trajectory.turns)


def _seconds(trajectories: Iterable[Trajectory], part: str) -> float:
    return _mean(sum(turn.timing[part] for turn in each.turns) for each in trajectories)


def _mean(values: Iterable[float]) -> float:
    numbers = [float(value) for value in values]
    return float(np.mean(numbers)) if numbers else 0.0
