"""Metrics of a step: pure functions from what happened to numbers named `area/name`.

Ratios here are always those of the policy that is trained (under ALP, the perturbed one) over the
policy that sampled, whatever the denominator of the loss, so that methods with different
denominators can be compared. `docs/metrics.md` defines each name.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor

from tir_alp.algorithm.levels import clamped_exp
from tir_alp.algorithm.ratio_summary import MAX_TURNS, RatioSummary, TokenSlice, quantiles
from tir_alp.tools.outcome import Outcome
from tir_alp.types import Trajectory, TrajectoryGroup

PERCENTILES = (2, 5, 25, 50, 75, 95, 98)
"""Percentiles of ratios that are reported at each level."""

_ENVELOPE = (2, 50, 98)  # percentiles of ratios that are reported for a slice of the tokens
_MOST_STALE = 8  # this age and all higher ones, in steps, are one class


def ratio_metrics(summary: RatioSummary) -> dict[str, float]:
    """Describe the ratios of a step: by sequence, by turn, by token, and by slices of the tokens.

    `ratio/p<n>` are percentiles of the sequence ratios, `ratio/turn_p<n>` of the turn ratios and
    `ratio/token_p<n>` of the token ratios. The slices are `turn_<n>` for the turns that occur,
    `positive` and `negative` by advantage, and `after_tool_positive` and `after_tool_negative` for
    those among the first tokens after an observation.

    Returns:
        The metrics; empty if there were no tokens.
    """
    tokens = summary.tokens()
    if not tokens.num_tokens:
        return {}
    slices = {
        **{f"turn_{turn}": summary.tokens(turn=turn) for turn in range(MAX_TURNS)},
        **{sign: summary.tokens(sign=sign) for sign in ("positive", "negative")},
        **{
            f"after_tool_{sign}": summary.tokens(sign=sign, is_first=True)
            for sign in ("positive", "negative")
        },
    }
    perplexities = (-summary.sequence_logprobs).exp().mean(0).tolist()
    metrics = {
        **ratio_quantiles(summary.sequence_log_ratios),
        **ratio_quantiles(summary.turn_log_ratios, "ratio/turn_p"),
        **_token_quantiles(tokens, PERCENTILES, "ratio/token_p"),
        "ratio/token_chi2": _chi2(tokens),
        "ratio/token_ess": _ess(tokens),
        "ratio/sequence_chi2": _exact_chi2(summary.sequence_log_ratios),
        "ratio/sequence_ess": _exact_ess(summary.sequence_log_ratios),
        "kl/rollout": -tokens.mean("log_ratio"),
        "kl/rollout_k3": tokens.mean("k3"),
        "perplexity/policy": perplexities[0],
        "perplexity/rollout": perplexities[1],
        "entropy/mean": tokens.mean("entropy"),
    }
    for name, chosen in slices.items():
        if chosen.num_tokens:
            metrics |= {f"{name}/{key}": value for key, value in _slice_metrics(chosen).items()}
    return metrics


def mismatch_metrics(summary: RatioSummary) -> dict[str, float]:
    """Describe the distance of the proximal policy from the rollout policy.

    With d = proximal - rollout logprob of a token and w = e^d: `mismatch/kl` = mean(-d),
    `mismatch/k3` = mean(w - d - 1), `mismatch/chi2` = mean(w^2) - 1, and the effective sample size
    `mismatch/ess` = mean(w)^2 / mean(w^2), a share. A perplexity is e^(-mean logprob) of a
    sequence, averaged over sequences.

    With stale rollouts the weights of the two policies differ, so this distance is the mismatch of
    trainer and engine only where the staleness is 0.

    Args:
        summary: The ratios of the proximal over the rollout policy.

    Returns:
        The metrics; empty if there were no tokens.
    """
    tokens = summary.tokens()
    if not tokens.num_tokens:
        return {}
    proximal, rollout = (-summary.sequence_logprobs).exp().mean(0).tolist()
    return {
        "mismatch/kl": -tokens.mean("log_ratio"),
        "mismatch/k3": tokens.mean("k3"),
        "mismatch/chi2": _chi2(tokens),
        "mismatch/ess": _ess(tokens),
        "mismatch/sequence_chi2": _exact_chi2(summary.sequence_log_ratios),
        "mismatch/sequence_ess": _exact_ess(summary.sequence_log_ratios),
        "mismatch/proximal_perplexity": proximal,
        "mismatch/rollout_perplexity": rollout,
        **ratio_quantiles(summary.sequence_log_ratios, "mismatch/p"),
        **_token_quantiles(tokens, PERCENTILES, "mismatch/token_p"),
    }


def ratio_quantiles(log_ratios: Tensor, prefix: str = "ratio/p") -> dict[str, float]:
    """Return exact percentiles of ratios: P2, P98 and those between.

    Args:
        log_ratios: [S] log ratios, at least one, e.g. summed over each sequence.
        prefix: What precedes the percentile in each name.
    """
    ratios = _ratios(log_ratios).numpy()
    found = np.quantile(ratios, [percent / 100 for percent in PERCENTILES]).tolist()
    return {f"{prefix}{each}": value for each, value in zip(PERCENTILES, found, strict=True)}


def _slice_metrics(tokens: TokenSlice) -> dict[str, float]:
    return {
        "tokens": tokens.num_tokens,
        "kl": -tokens.mean("log_ratio"),
        "k3": tokens.mean("k3"),
        "chi2": _chi2(tokens),
        "ess": _ess(tokens),
        "log_perplexity": -tokens.mean("logprob"),
        "rollout_log_perplexity": -tokens.mean("rollout_logprob"),
        "entropy": tokens.mean("entropy"),
        **tokens.clipped(),
        **_token_quantiles(tokens, _ENVELOPE, "ratio_p"),
    }


def _token_quantiles(
    tokens: TokenSlice, percentiles: Sequence[int], prefix: str
) -> dict[str, float]:
    found = quantiles(tokens.histogram, [percent / 100 for percent in percentiles])
    return {f"{prefix}{p}": math.exp(value) for p, value in zip(percentiles, found, strict=True)}


def _chi2(tokens: TokenSlice) -> float:
    return tokens.mean("ratio_squared") - 1


def _ess(tokens: TokenSlice) -> float:
    return tokens.mean("ratio") ** 2 / tokens.mean("ratio_squared")


def _exact_chi2(log_ratios: Tensor) -> float:
    return float(_ratios(log_ratios).square().mean() - 1)


def _exact_ess(log_ratios: Tensor) -> float:
    ratios = _ratios(log_ratios)
    return float(ratios.mean().square() / ratios.square().mean())


def _ratios(log_ratios: Tensor) -> Tensor:
    return clamped_exp(log_ratios.double())


def rollout_metrics(
    groups: Sequence[TrajectoryGroup], step: int, replaced: Sequence[TrajectoryGroup] = ()
) -> dict[str, float]:
    """Describe the trajectories of one step.

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
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    outcomes = Counter(turn.outcome for turn in turns)
    return {
        "rollout/reward": _mean(trajectory.reward for trajectory in trajectories),
        **reward_part_metrics(trajectories),
        "rollout/turns": len(turns) / len(trajectories),
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
        **staleness_metrics([each for group in groups for each in group.trajectories], step),
        **{f"outcome/{outcome}": outcomes[outcome] for outcome in Outcome},
    }


def reward_part_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Return `reward/<component>`, the mean of each reward component that environments report."""
    components: dict[str, list[float]] = {}
    for trajectory in trajectories:
        for turn in trajectory.turns:
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
        `eval/pass_at_k` is the share of tasks with at least one correct trajectory.
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
    """Whether the last turn's `info["correct"]` is true; if it is missing, whether reward > 0."""
    verdict = trajectory.turns[-1].info.get("correct") if trajectory.turns else None
    return bool(verdict) if verdict is not None else trajectory.reward > 0


def tool_calls(trajectory: Trajectory) -> int:
    """Return the number of tool calls in all turns."""
    return sum(turn.info.get("tool_calls", 0) for turn in trajectory.turns)


def _seconds(trajectories: Iterable[Trajectory], activity: str) -> float:
    return _mean(sum(turn.timing[activity] for turn in each.turns) for each in trajectories)


def _mean(values: Iterable[float]) -> float:
    numbers = [float(value) for value in values]
    return float(np.mean(numbers)) if numbers else 0.0
