"""The table of the pictures of a report; `tir_alp.records.meanings` has the meaning of each metric.

A picture, a panel or a line is drawn if the run has at least one of its metrics.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

PERCENTILES = (2, 5, 25, 50, 75, 95, 98)
"""Percentiles of ratios that are drawn if the run has them; 2 and 98 are the envelope."""


@dataclass(frozen=True, slots=True)
class Line:
    """One metric in a panel. A name that ends in `*` means one line per layer or age of tokens."""

    metric: str
    label: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes; the horizontal axis is the step."""

    title: str
    unit: str
    """Unit of the vertical axis; "%" converts shares to per cent."""
    lines: tuple[Line, ...]
    kind: Literal["lines", "stack", "shares", "envelope"] = "lines"
    """`stack` stacks its lines, `shares` stacks them divided by their sum, and `envelope` draws
    percentiles of a ratio on a log axis; its only line has the prefix of the metrics' names."""
    scale: Literal["linear", "log", "auto"] = "linear"
    """`auto` is a log axis if the values differ by orders of magnitude."""
    compared: int = 1
    """How many of its first lines are drawn, each in its own panel, when runs are compared."""


@dataclass(frozen=True, slots=True)
class Picture:
    """One figure, and the file that it is saved in."""

    name: str
    """Name of the file, without its suffix."""
    title: str
    caption: str
    """How to read the picture."""
    panels: tuple[Panel, ...]


PICTURES = (
    Picture(
        "reward",
        "Reward and accuracy",
        "Reward is the mean over the trajectories of a step, on training tasks. Accuracy is on "
        "held-out tasks, for trajectories sampled as in training and for greedy ones.",
        (
            Panel("Reward", "reward", (Line("rollout/reward", "mean of the step"),)),
            Panel(
                "Held-out accuracy",
                "%",
                (
                    Line("eval/accuracy", "sampled"),
                    Line("eval/greedy_accuracy", "greedy"),
                ),
            ),
        ),
    ),
    Picture(
        "ratio",
        "Ratio of the trained policy to the rollout policy",
        "Percentiles over the sequences (turns, tokens) of a step; the outer band is P2 to P98. A "
        "widening band is an early warning: it comes before the reward falls. Under ALP the "
        "trained policy is the perturbed one, so its ratios contain the noise. Dotted lines: the "
        "clip bounds, if the loss clips this ratio.",
        (
            Panel("Sequences", "ratio", (Line("ratio/p", ""),), "envelope"),
            Panel("Turns", "ratio", (Line("ratio/turn_p", ""),), "envelope"),
            Panel("Tokens", "ratio", (Line("ratio/token_p", ""),), "envelope"),
        ),
    ),
    Picture(
        "clean",
        "The policy without noise",
        "The same percentiles, KL and clip fraction of the policy without noise, measured every "
        "metrics.clean_every steps over all tokens of the step. Methods with and without noise "
        "are compared by these.",
        (
            Panel("Sequences", "ratio", (Line("ratio_clean/p", ""),), "envelope"),
            Panel(
                "KL to the rollout policy",
                "nats per token",
                (Line("kl_clean/rollout", "k1"), Line("kl_clean/rollout_k3", "k3")),
                scale="auto",
            ),
            Panel("Clipped tokens", "%", (Line("loss_clean/clip_fraction", "all"),)),
        ),
    ),
    Picture(
        "kl",
        "KL, and trainer against engine",
        "Means over the loss tokens. k1 is log rollout - log policy and may be negative; k3 never "
        'is. "Trainer against engine" compares the trainer\'s forward, before any update of the '
        "step, with the logprobs that the engine sampled with. At equal weights this is the "
        "mismatch; with staleness it also contains the difference between the two versions.",
        (
            Panel(
                "KL to the rollout policy",
                "nats per token",
                (Line("kl/rollout", "k1"), Line("kl/rollout_k3", "k3")),
                scale="auto",
            ),
            Panel(
                "Trainer against engine",
                "nats per token",
                (
                    Line("mismatch/k3", "k3"),
                    Line("mismatch/kl", "k1"),
                    Line("mismatch/probe_mean", "|difference| of a sample"),
                    Line("mismatch/probe_kl", "k1 of a sample"),
                ),
                scale="auto",
            ),
            Panel(
                "KL to the reference",
                "nats per token",
                (Line("kl/reference", "to the initial model"),),
                scale="auto",
            ),
        ),
    ),
    Picture(
        "clip",
        "Clip fraction and rejection",
        "Share of the loss tokens that have no gradient because their ratio is outside the clip "
        "window: below it, above it, or beyond the bound for negative advantages (dual).",
        (
            Panel(
                "Clipped tokens",
                "%",
                (
                    Line("loss/clip_fraction", "all"),
                    Line("loss/clip_fraction_low", "low"),
                    Line("loss/clip_fraction_high", "high"),
                    Line("loss/clip_fraction_dual", "dual"),
                ),
            ),
            Panel("Correction weight", "weight", (Line("loss/correction_mean", "mean"),)),
            Panel(
                "Rejected tokens", "tokens per step", (Line("loss/rejected_tokens", "weight 0"),)
            ),
        ),
    ),
    Picture(
        "entropy",
        "Entropy and loss",
        "Entropy of the trained policy at the loss tokens; exploration ends when it falls to 0. "
        "The value of the loss is not a measure of success.",
        (
            Panel("Entropy", "nats per token", (Line("entropy/mean", "mean"),)),
            Panel(
                "Loss",
                "loss",
                (
                    Line("loss/value", "mean over updates"),
                    Line("eval/loss", "held-out conversations"),
                ),
            ),
        ),
    ),
    Picture(
        "sigma",
        "Noise of ALP, by layer",
        "Sigma is the standard deviation of the noise added to the input of a layer; noise on the "
        "logits has its own sigma.",
        (
            Panel(
                "Sigma",
                "standard deviation",
                (Line("alp/sigma_mean", "mean"), Line("alp/sigma_*", "layer")),
                scale="auto",
            ),
        ),
    ),
    Picture(
        "perturbation",
        "Effective perturbation",
        "What the noise does in the compute dtype: the share of hidden elements that it changes, "
        "its size relative to the hidden state, and how far it moves a token's logprob. A share "
        "far below 100 % means that rounding removes the noise.",
        (
            Panel("Hidden elements changed", "%", (Line("alp/effective", "mean over layers"),)),
            Panel(
                "RMS(h' - h) / RMS(h)",
                "ratio",
                (Line("alp/relative_rms", "mean"), Line("alp/relative_rms_*", "layer")),
                scale="auto",
            ),
            Panel(
                "Change of logprob",
                "nats per token",
                (Line("alp/logprob_shift", "mean absolute change"),),
            ),
        ),
    ),
    Picture(
        "gradients",
        "Gradient norms",
        "Gradient norm before clipping, mean over the updates of a step. Dotted lines: the norm "
        "to which larger gradients are scaled down. Skipped updates had a gradient that was not "
        "finite or that was a spike.",
        (
            Panel("Weights", "norm", (Line("grad_norm/policy", "policy"),), scale="log"),
            Panel("Log sigma", "norm", (Line("grad_norm/log_sigma", "log sigma"),), scale="log"),
            Panel("Learning rate", "learning rate", (Line("train/lr", "weights"),)),
            Panel("Skipped updates", "updates", (Line("train/skipped_updates", "skipped"),)),
        ),
    ),
    Picture(
        "time",
        "Where the time goes",
        "Wall-clock seconds per step, and the seconds that a trajectory waits for tokens and for "
        "tools, on average; trajectories run concurrently. In the pictures, the legend shows the "
        "shares over the whole run.",
        (
            Panel(
                "Per step",
                "seconds",
                (
                    Line("time/rollout", "rollouts"),
                    Line("time/train", "training"),
                    Line("time/weights", "weight sync to the engine"),
                ),
                "stack",
                compared=2,
            ),
            Panel(
                "Per trajectory",
                "seconds",
                (Line("time/generate", "generate"), Line("time/tool", "tool")),
                "stack",
                compared=2,
            ),
        ),
    ),
    Picture(
        "outcomes",
        "Outcomes of turns",
        "How the turns of a step ended. The second panel omits ok. infra_error, grader_error and "
        "cancelled are failures of the infrastructure and never become a reward.",
        (
            Panel(
                "All turns",
                "%",
                (
                    Line("outcome/ok", "ok"),
                    Line("outcome/tool_error", "tool_error"),
                    Line("outcome/tool_timeout", "tool_timeout"),
                    Line("outcome/resource_limit", "resource_limit"),
                    Line("outcome/infra_error", "infra_error"),
                    Line("outcome/grader_error", "grader_error"),
                    Line("outcome/cancelled", "cancelled"),
                ),
                "shares",
            ),
            Panel(
                "Turns that were not ok",
                "turns per step",
                (
                    Line("outcome/tool_error", "tool_error"),
                    Line("outcome/tool_timeout", "tool_timeout"),
                    Line("outcome/resource_limit", "resource_limit"),
                    Line("outcome/infra_error", "infra_error"),
                    Line("outcome/grader_error", "grader_error"),
                    Line("outcome/cancelled", "cancelled"),
                ),
                compared=0,
            ),
        ),
    ),
    Picture(
        "rollouts",
        "Trajectories",
        "Turns, traces and tool calls per trajectory. Void turns have neither a complete code "
        "block nor an answer. A group without signal has equal rewards, so nothing can be learned "
        "from it.",
        (
            Panel(
                "Per trajectory",
                "number",
                (
                    Line("rollout/tool_calls", "tool calls"),
                    Line("rollout/bad_calls", "calls that cannot be read"),
                    Line("rollout/turns", "turns"),
                    Line("rollout/traces", "traces"),
                ),
            ),
            Panel(
                "Void or truncated",
                "%",
                (
                    Line("rollout/void_turns", "void turns"),
                    Line("rollout/truncated", "truncated trajectories"),
                ),
                compared=2,
            ),
            Panel(
                "Groups without signal, lost trajectories",
                "number per step",
                (
                    Line("rollout/zero_signal_groups", "groups without signal"),
                    Line("rollout/failed", "lost trajectories"),
                ),
            ),
        ),
    ),
    Picture(
        "tokens",
        "Tokens",
        "Tokens that the policy wrote in a step, and those of them that entered the loss.",
        (
            Panel(
                "Tokens",
                "tokens per step",
                (Line("tokens/generated", "generated"), Line("tokens/loss", "in the loss")),
            ),
            Panel("Throughput", "tokens per second", (Line("tokens/per_second", "generated"),)),
        ),
    ),
    Picture(
        "staleness",
        "Staleness",
        "Number of training steps between the weights that sampled a turn and those trained on it.",
        (
            Panel(
                "Age of turns",
                "steps",
                (Line("staleness/mean", "mean"), Line("staleness/max", "oldest")),
            ),
            Panel(
                "Tokens by age", "%", (Line("staleness/share_*", "steps"),), "shares", compared=0
            ),
        ),
    ),
    Picture(
        "overlap",
        "Effective sample size and chi2",
        "How well the rollouts represent the policy that is trained on them. For equal policies "
        "the effective sample size is 100 % and chi2 is 0.",
        (
            Panel(
                "Effective sample size",
                "%",
                (
                    Line("ratio/sequence_ess", "sequences"),
                    Line("ratio/token_ess", "tokens"),
                    Line("mismatch/ess", "tokens, before updates"),
                ),
            ),
            Panel(
                "Chi2",
                "chi2",
                (
                    Line("ratio/sequence_chi2", "sequences"),
                    Line("ratio/token_chi2", "tokens"),
                    Line("mismatch/chi2", "tokens, before updates"),
                ),
                scale="auto",
            ),
            Panel(
                "Perplexity",
                "perplexity",
                (
                    Line("perplexity/policy", "policy"),
                    Line("perplexity/rollout", "rollout"),
                    Line("mismatch/proximal_perplexity", "trainer, before updates"),
                    Line("mismatch/rollout_perplexity", "engine"),
                ),
            ),
        ),
    ),
)


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the metrics that a line draws.

    These are the metric of that name, or, for a pattern that ends in `*`, all that have a layer or
    an age in its place, in order.
    """
    prefix, star, _ = pattern.partition("*")
    if not star:
        return [pattern] if pattern in names else []
    rests = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    numbers = sorted(int(rest) for rest in rests if rest.isascii() and rest.isdigit())
    others = sorted(rest for rest in rests if rest == "logits")
    return [f"{prefix}{rest}" for rest in (*numbers, *others)]
