"""What each metric means, and its unit: one table for all names and patterns. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

_MEANINGS = {  # metric -> meaning, unit; names go before patterns, and patterns in this order
    "rollout/reward": ("mean reward of a trajectory", "reward"),
    "rollout/turns": ("mean number of turns per trajectory", "turns"),
    "rollout/traces": ("mean number of traces per trajectory: 1 if nothing is rewritten", "traces"),
    "rollout/tool_calls": ("mean number of tool calls per trajectory", "calls"),
    "rollout/bad_calls": ("mean number of calls per trajectory that could not be read", "calls"),
    "rollout/void_turns": ("turns with neither a complete code block nor an answer", "share"),
    "rollout/truncated": ("trajectories that a limit truncated", "share"),
    "rollout/overlong": ("trajectories that a limit of turns, context or tokens cut", "share"),
    "rollout/refills": ("groups without signal that others replaced", "groups"),
    "rollout/zero_signal_groups": ("groups whose rewards are all equal", "groups"),
    "rollout/failed": ("trajectories lost to infrastructure failures", "trajectories"),
    "reward/*": ("one component of the reward, mean per trajectory", "reward"),
    "difficulty/none": ("groups without a right answer", "share"),
    "difficulty/some": ("groups with right and wrong answers", "share"),
    "difficulty/all": ("groups with right answers only", "share"),
    "difficulty/solved": ("right answers, mean over groups", "share"),
    "eval/accuracy": ("held-out accuracy of sampled trajectories (avg@k)", "share"),
    "eval/greedy_accuracy": ("held-out accuracy of greedy trajectories", "share"),
    "eval/pass_at_k": ("held-out tasks solved at least once", "share"),
    "eval/tool_calls": ("mean number of tool calls per held-out trajectory", "calls"),
    "eval/loss": ("loss on held-out conversations", "nats per token"),
    "eval/*/accuracy": ("accuracy of sampled trajectories, of one set of tasks", "share"),
    "eval/*/greedy_accuracy": ("accuracy of greedy trajectories, of one set of tasks", "share"),
    "eval/*/pass_at_k": ("tasks solved at least once, of one set", "share"),
    "eval/*/tool_calls": ("mean number of tool calls per trajectory, of one set", "calls"),
    "eval/*/tasks": ("tasks of one set", "tasks"),
    "eval/*/failed": ("trajectories of one set lost to infrastructure failures", "trajectories"),
    "epoch": ("passes over the conversations", "epochs"),
    "time/read": ("reading and encoding the conversations of a step", "s"),
    "eval/tasks": ("held-out tasks", "tasks"),
    "eval/failed": ("held-out trajectories lost to infrastructure failures", "trajectories"),
    "ratio/p[0-9]*": ("percentile of the sequence ratios, policy over rollout policy", "ratio"),
    "ratio/turn_p[0-9]*": ("percentile of the turn ratios", "ratio"),
    "ratio/token_p[0-9]*": ("percentile of the token ratios", "ratio"),
    "ratio_clean/p[0-9]*": ("percentile of the sequence ratios, without noise", "ratio"),
    "ratio_clean/turn_p[0-9]*": ("percentile of the turn ratios, without noise", "ratio"),
    "ratio_clean/token_p[0-9]*": ("percentile of the token ratios, without noise", "ratio"),
    "kl_clean/rollout": ("KL of policy and rollout policy, without noise, k1", "nats per token"),
    "kl_clean/rollout_k3": ("KL of policy and rollout policy, without noise, k3", "nats per token"),
    "entropy_clean/mean": ("mean entropy of the policy, without noise", "nats per token"),
    "loss_clean/clip_fraction": ("tokens outside the clip window, without noise", "share"),
    "loss_clean/clip_fraction_*": ("tokens clipped on this side, without noise", "share"),
    "time/clean": ("measuring the policy without noise, part of time/train", "s"),
    "mismatch/p[0-9]*": ("percentile of the sequence ratios, trainer over engine", "ratio"),
    "mismatch/token_p[0-9]*": ("percentile of the token ratios, trainer over engine", "ratio"),
    "mismatch/probe_mean": ("mean |logprob of trainer - engine| of a sample", "nats per token"),
    "mismatch/probe_kl": ("KL of trainer and engine on a sample, k1", "nats per token"),
    "mismatch/probe_max": ("largest |logprob of trainer - engine| of a sample", "nats"),
    "mismatch/kl": ("KL of trainer and engine before the updates, k1", "nats per token"),
    "mismatch/k3": ("KL of trainer and engine before the updates, k3", "nats per token"),
    "mismatch/proximal_perplexity": ("perplexity by the trainer before the updates", "perplexity"),
    "mismatch/rollout_perplexity": ("perplexity by the engine", "perplexity"),
    "perplexity/*": ("mean perplexity of a sequence", "perplexity"),
    "kl/rollout": ("KL of policy and rollout policy, k1", "nats per token"),
    "kl/rollout_k3": ("KL of policy and rollout policy, k3", "nats per token"),
    "kl/reference": ("KL to the frozen initial model", "nats per token"),
    "loss/value": ("value of the loss, mean over updates", "loss"),
    "loss/clip_fraction": ("tokens outside the clip window, on any side", "share"),
    "loss/clip_fraction_low": ("tokens below the clip window", "share"),
    "loss/clip_fraction_high": ("tokens above the clip window", "share"),
    "loss/clip_fraction_dual": ("tokens beyond the bound for negative advantages", "share"),
    "loss/clamped_fraction": ("tokens whose log ratio exceeds the numeric bound", "share"),
    "loss/correction_mean": ("mean correction weight", "weight"),
    "loss/rejected_tokens": ("tokens with a correction weight of 0", "tokens"),
    "entropy/mean": ("mean entropy of the policy", "nats per token"),
    "alp/sigma_mean": ("sigma of the noise, mean over layers", "standard deviation"),
    "alp/sigma_*": ("sigma of the noise at one layer", "standard deviation"),
    "alp/effective": ("hidden elements that the noise changes", "share"),
    "alp/relative_rms": ("size of noise relative to the hidden state, mean over layers", "ratio"),
    "alp/relative_rms_*": ("size of noise relative to the hidden state of one layer", "ratio"),
    "router/entropy": (
        "evenness of the load of experts, mean over layers: 1 if all are equal",
        "share",
    ),
    "router/largest_share": ("tokens of the busiest expert, mean over layers", "share"),
    "router/agreement": ("choices of experts by the trainer that the engine had made", "share"),
    "alp/logprob_shift": ("mean |change of a token's logprob| by the noise", "nats per token"),
    "grad_norm/policy": ("gradient norm of the weights before clipping", "norm"),
    "grad_norm/log_sigma": ("gradient norm of log sigma before clipping", "norm"),
    "loss/selected_fraction": ("tokens that the method has selected", "share"),
    "train/step_scale": ("factor of the learning rate, by the effective sample size", "factor"),
    "acceptance/gap": ("advantage of the engine's over the trainer's policy", "advantage"),
    "acceptance/rejected": ("steps whose predecessor's updates were undone", "share"),
    "lag/kl": (
        "KL of the policy and the version that sampled, by the trainer",
        "nats per token",
    ),
    "lag/k3": ("the same, k3", "nats per token"),
    "lag/ess": ("effective sample size of the version that sampled", "share"),
    "train/lr": ("learning rate of the weights", "learning rate"),
    "train/shared_tokens": ("tokens not computed: the prompt is that of the group", "share"),
    "train/loss_scale": ("factor of the loss in the backward pass, in float16", "factor"),
    "train/skipped_updates": ("updates skipped: no tokens, not finite, or a spike", "updates"),
    "staleness/mean": ("mean age of the weights that sampled a token", "steps"),
    "staleness/max": ("largest age of the weights that sampled a token", "steps"),
    "staleness/versions": ("policy versions in the batch of a step", "versions"),
    "staleness/mixed": ("trajectories sampled by more than one version", "share"),
    "staleness/mixed_turns": ("completions sampled by more than one version", "share"),
    "staleness/share_*": ("tokens of this age; the last class includes all older ones", "share"),
    "time/rollout": ("wait for the rollouts of a step", "s"),
    "time/train": ("updates of a step", "s"),
    "time/weights": ("weight sync to the engine, with its verification", "s"),
    "time/generate": ("mean time that a trajectory waits for tokens", "s"),
    "time/tool": ("mean time that a trajectory waits for tools", "s"),
    "tokens/generated": ("tokens that the policy wrote", "tokens"),
    "tokens/loss": ("tokens that entered the loss", "tokens"),
    "engine/running": ("requests running in the engine, after the sync", "requests"),
    "engine/waiting": ("requests waiting in the engine, after the sync", "requests"),
    "engine/tokens_generated": ("tokens generated since the engine started", "tokens"),
    "engine/cache_tokens": ("tokens in the engine's cache", "tokens"),
    "engine/parked_tokens": ("cached tokens of sequences that may continue", "tokens"),
    "engine/servers": ("servers that are serving", "servers"),
    "engine/tensors_compared": ("tensors verified by each engine after the sync", "tensors"),
    "engine/probe_difference": ("mean |difference of logprobs| after the sync", "nats"),
    "engine/*": ("reported by the engine after the sync", ""),
    "tokens/per_second": ("tokens that the policy wrote, over wall-clock time", "tokens/s"),
    "outcome/*": ("turns that ended with this outcome", "turns"),
    "*chi2": ("chi2 divergence: mean squared ratio - 1", "chi2"),
    "*ess": ("effective sample size", "share"),
}

_SLICES = {
    "turn_[0-9]*": "tokens of one turn",
    "positive": "tokens with a positive advantage",
    "negative": "tokens with a negative advantage",
    "after_tool_positive": "first tokens after a tool, positive advantage",
    "after_tool_negative": "first tokens after a tool, negative advantage",
}
"""Areas whose metrics are those of `_OF_A_SLICE`, over some of the tokens."""

_OF_A_SLICE = {
    "tokens": ("their number", "tokens"),
    "kl": ("KL of policy and rollout policy, k1", "nats per token"),
    "k3": ("KL of policy and rollout policy, k3", "nats per token"),
    "chi2": ("chi2 divergence: mean squared ratio - 1", "chi2"),
    "ess": ("effective sample size", "share"),
    "ratio_p[0-9]*": ("percentile of the ratios", "ratio"),
    "log_perplexity": ("-mean logprob by the policy", "nats per token"),
    "rollout_log_perplexity": ("-mean logprob as sampled", "nats per token"),
    "entropy": ("mean entropy of the policy", "nats per token"),
    "clip_*": ("share outside the clip window, on this side", "share"),
}


def meaning(metric: str) -> tuple[str, str]:
    """Return the meaning and the unit of a metric; two empty strings if it is unknown."""
    area, _, key = metric.partition("/")
    for pattern, tokens in _SLICES.items():
        if fnmatchcase(area, pattern):
            what, unit = _first_match(key, _OF_A_SLICE)
            return (f"{tokens}: {what}", unit) if what else ("", "")
    return _first_match(metric, _MEANINGS)


def _first_match(name: str, table: Mapping[str, tuple[str, str]]) -> tuple[str, str]:
    """The entry of a name, else that of the first pattern that matches it."""
    if name in table:
        return table[name]
    return next((found for each, found in table.items() if fnmatchcase(name, each)), ("", ""))
