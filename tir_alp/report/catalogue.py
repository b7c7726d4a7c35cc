"""What there is to draw, and what each metric means: tables, nothing else.

A picture is drawn if a metric of it is there; so are a panel of it and a line of a panel.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

PERCENTILES = (2, 5, 25, 50, 75, 95, 98)
"""Of ratios, where they are there; 2 and 98 are the envelope."""


@dataclass(frozen=True, slots=True)
class Line:
    """One metric in a panel, or with a `*` at its end one a layer or age; see `matching`."""

    metric: str
    label: str


@dataclass(frozen=True, slots=True)
class Panel:
    """A pair of axes, whose horizontal one is the step."""

    title: str
    unit: str
    """Of the vertical axis; "%" shows shares in per cent."""
    lines: tuple[Line, ...]
    kind: Literal["lines", "stack", "shares", "envelope"] = "lines"
    """`stack` adds its lines up, `shares` makes them parts of their sum, `envelope` has percentiles
    of a ratio, on a log axis: its only line is the prefix of their names."""
    scale: Literal["linear", "log", "auto"] = "linear"
    """`auto` is a log axis where values differ by orders of magnitude."""
    compared: int = 1
    """So many of its first lines are drawn, one by one, where runs are compared."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure and a file."""

    name: str
    """The file, without its suffix."""
    title: str
    caption: str
    """How to read it."""
    panels: tuple[Panel, ...]


PICTURES = (
    Picture(
        "reward",
        "Reward and accuracy",
        "Reward is the mean over the trajectories of a step, sampled from the tasks of training. "
        "Accuracy is on held-out tasks: trajectories sampled as in training, and greedy ones.",
        (
            Panel("Reward", "reward", (Line("rollout/reward", "mean of a step"),)),
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
        "Ratio of the trained policy over the rollout policy",
        "Percentiles over the sequences (turns, tokens) of a step; the outer band is P2 to P98. A "
        "band that widens warns before reward falls. Dotted: where the loss clips, if it clips "
        "this ratio.",
        (
            Panel("Sequences", "ratio", (Line("ratio/p", ""),), "envelope"),
            Panel("Turns", "ratio", (Line("ratio/turn_p", ""),), "envelope"),
            Panel("Tokens", "ratio", (Line("ratio/token_p", ""),), "envelope"),
        ),
    ),
    Picture(
        "kl",
        "KL and mismatch",
        "Means over the tokens of the loss. k1 is log rollout - log policy and may be negative; "
        "k3 never is. Mismatch compares the trainer's own forward with the engine's at equal or "
        "stale weights, before any update of the step.",
        (
            Panel(
                "KL to the rollout policy",
                "nats a token",
                (Line("kl/rollout", "k1"), Line("kl/rollout_k3", "k3")),
                scale="auto",
            ),
            Panel(
                "Mismatch",
                "nats a token",
                (
                    Line("mismatch/k3", "k3"),
                    Line("mismatch/kl", "k1"),
                    Line("mismatch/probe_mean", "|difference|"),
                    Line("mismatch/probe_kl", "k1 of some tokens"),
                ),
                scale="auto",
            ),
            Panel(
                "KL to the reference",
                "nats a token",
                (Line("kl/reference", "to the first model"),),
                scale="auto",
            ),
        ),
    ),
    Picture(
        "clip",
        "Clip fraction and rejection",
        "Share of the tokens of the loss that have no gradient since their ratio left the window: "
        "below it, above it, or beyond the bound for negative advantages (dual).",
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
            Panel("Rejected tokens", "tokens a step", (Line("loss/rejected_tokens", "weight 0"),)),
        ),
    ),
    Picture(
        "entropy",
        "Entropy and loss",
        "Entropy of the trained policy on the tokens of the loss; one that falls to 0 ends "
        "exploration. The value of the loss is no measure of success.",
        (
            Panel("Entropy", "nats a token", (Line("entropy/mean", "mean"),)),
            Panel("Loss", "loss", (Line("loss/value", "mean of the updates"),)),
        ),
    ),
    Picture(
        "sigma",
        "Noise of ALP, by layer",
        "Sigma is the standard deviation of the noise on the state that enters a layer; noise on "
        "the logits has one of its own.",
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
        "how large it is beside the hidden state, and by how much it moves a token's logprob. "
        "Elements far below 100 % mean that rounding swallows sigma.",
        (
            Panel("Hidden elements changed", "%", (Line("alp/effective", "mean of the layers"),)),
            Panel(
                "RMS(h' - h) / RMS(h)",
                "ratio",
                (Line("alp/relative_rms", "mean"), Line("alp/relative_rms_*", "layer")),
                scale="auto",
            ),
            Panel(
                "Change of logprob",
                "nats a token",
                (Line("alp/logprob_shift", "mean, either sign"),),
            ),
        ),
    ),
    Picture(
        "gradients",
        "Gradient norms",
        "Before clipping, mean of the updates of a step. Dotted: the norm that one is scaled "
        "down to. Skipped updates were not finite, or spikes.",
        (
            Panel("Weights", "norm", (Line("grad_norm/policy", "policy"),), scale="log"),
            Panel("Log sigma", "norm", (Line("grad_norm/log_sigma", "log sigma"),), scale="log"),
            Panel("Skipped updates", "updates", (Line("train/skipped_updates", "skipped"),)),
        ),
    ),
    Picture(
        "time",
        "Where the time goes",
        "Left: the seconds of a step on the clock. Right: the seconds that a trajectory spends, on "
        "average, waiting for tokens and for tools; trajectories run side by side. The legend has "
        "shares of the whole run.",
        (
            Panel(
                "A step",
                "seconds",
                (
                    Line("time/rollout", "rollouts"),
                    Line("time/train", "training"),
                    Line("time/weights", "weights into the engine"),
                ),
                "stack",
                compared=2,
            ),
            Panel(
                "A trajectory",
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
        "How the turns of a step ended. The right panel has the same without ok. infra_error, "
        "grader_error and cancelled are ours to mend, and never become a reward.",
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
                "turns a step",
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
        "Turns and tool calls of a trajectory; void turns have neither a complete code block nor "
        "an answer; a group without signal has equal rewards and teaches nothing.",
        (
            Panel(
                "A trajectory",
                "number",
                (Line("rollout/tool_calls", "tool calls"), Line("rollout/turns", "turns")),
            ),
            Panel(
                "Void or cut short",
                "%",
                (
                    Line("rollout/void_turns", "void turns"),
                    Line("rollout/truncated", "truncated trajectories"),
                ),
                compared=2,
            ),
            Panel(
                "Groups and trajectories lost",
                "number a step",
                (
                    Line("rollout/zero_signal_groups", "groups without signal"),
                    Line("rollout/failed", "dropped trajectories"),
                ),
            ),
        ),
    ),
    Picture(
        "tokens",
        "Tokens",
        "Tokens that the policy wrote in a step, and those of them that the loss takes in.",
        (
            Panel(
                "Tokens",
                "tokens a step",
                (Line("tokens/generated", "generated"), Line("tokens/loss", "in the loss")),
            ),
            Panel("Throughput", "tokens a second", (Line("tokens/per_second", "generated"),)),
        ),
    ),
    Picture(
        "staleness",
        "Staleness",
        "Steps by which the weights that wrote a turn lag behind those that learn from it.",
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
        "How well rollouts stand for the policy that learns from them: an effective sample size of "
        "100 % and a chi2 of 0 are equal policies.",
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

_MEANINGS = {  # metric -> meaning, unit; the first that fits
    "rollout/reward": ("reward of a trajectory, mean", "reward"),
    "rollout/turns": ("turns of a trajectory, mean", "turns"),
    "rollout/tool_calls": ("tool calls of a trajectory, mean", "calls"),
    "rollout/void_turns": ("turns with neither a complete code block nor an answer", "share"),
    "rollout/truncated": ("trajectories that a limit cut short", "share"),
    "rollout/zero_signal_groups": ("groups whose rewards are all equal", "groups"),
    "rollout/failed": ("trajectories lost to failures of ours", "trajectories"),
    "eval/accuracy": ("held-out accuracy of sampled trajectories (avg@k)", "share"),
    "eval/greedy_accuracy": ("held-out accuracy of greedy trajectories", "share"),
    "eval/pass_at_k": ("held-out tasks solved at least once", "share"),
    "eval/tool_calls": ("tool calls of a held-out trajectory, mean", "calls"),
    "eval/tasks": ("held-out tasks", "tasks"),
    "eval/failed": ("held-out trajectories lost to failures of ours", "trajectories"),
    "ratio/p*": ("percentile of the sequence ratios, policy over rollout policy", "ratio"),
    "ratio/turn_p*": ("percentile of the turn ratios", "ratio"),
    "ratio/token_p*": ("percentile of the token ratios", "ratio"),
    "mismatch/p*": ("percentile of the sequence ratios, trainer over engine", "ratio"),
    "mismatch/token_p*": ("percentile of the token ratios, trainer over engine", "ratio"),
    "mismatch/probe_mean": ("|logprob of trainer - engine| of some tokens, mean", "nats a token"),
    "mismatch/probe_kl": ("KL of trainer and engine on some tokens, k1", "nats a token"),
    "mismatch/probe_max": ("|logprob of trainer - engine| of some tokens, largest", "nats"),
    "mismatch/kl": ("KL of trainer and engine, k1", "nats a token"),
    "mismatch/k3": ("KL of trainer and engine, k3", "nats a token"),
    "mismatch/proximal_perplexity": ("perplexity, trainer before the updates", "perplexity"),
    "mismatch/rollout_perplexity": ("perplexity, engine", "perplexity"),
    "perplexity/*": ("perplexity of a sequence, mean", "perplexity"),
    "kl/rollout": ("KL of policy and rollout policy, k1", "nats a token"),
    "kl/rollout_k3": ("KL of policy and rollout policy, k3", "nats a token"),
    "kl/reference": ("KL to the frozen first model", "nats a token"),
    "loss/value": ("value of the loss, mean of the updates", "loss"),
    "loss/clip_fraction": ("tokens outside the ratio's window, on any side", "share"),
    "loss/clip_fraction_low": ("tokens below the window", "share"),
    "loss/clip_fraction_high": ("tokens above the window", "share"),
    "loss/clip_fraction_dual": ("tokens beyond the bound for negative advantages", "share"),
    "loss/clamped_fraction": ("tokens whose log ratio met the numeric bound", "share"),
    "loss/correction_mean": ("correction weight, mean", "weight"),
    "loss/rejected_tokens": ("tokens with a correction weight of 0", "tokens"),
    "entropy/mean": ("entropy of the policy, mean", "nats a token"),
    "alp/sigma_mean": ("sigma of the noise, mean of the layers", "standard deviation"),
    "alp/sigma_*": ("sigma of the noise of one layer", "standard deviation"),
    "alp/effective": ("hidden elements that the noise changes", "share"),
    "alp/relative_rms": ("size of the noise beside the hidden state, mean of the layers", "ratio"),
    "alp/relative_rms_*": ("size of the noise beside one layer's hidden state", "ratio"),
    "alp/logprob_shift": ("change of a token's logprob by the noise, mean", "nats a token"),
    "grad_norm/policy": ("gradient norm of the weights before clipping", "norm"),
    "grad_norm/log_sigma": ("gradient norm of log sigma before clipping", "norm"),
    "train/skipped_updates": ("updates not made: not finite, or a spike", "updates"),
    "staleness/mean": ("steps that weights behind a token lag, mean", "steps"),
    "staleness/max": ("the most steps that weights behind a token lag", "steps"),
    "staleness/versions": ("versions of the weights in one batch", "versions"),
    "staleness/mixed": ("trajectories by more than one version", "share"),
    "staleness/mixed_turns": ("completions by more than one version", "share"),
    "staleness/share_*": ("tokens of this age; the last class takes in all older", "share"),
    "time/rollout": ("waiting for the rollouts of a step", "s"),
    "time/train": ("training of a step", "s"),
    "time/weights": ("giving the engine its new weights, and verifying them", "s"),
    "time/generate": ("a trajectory waiting for tokens, mean", "s"),
    "time/tool": ("a trajectory waiting for tools, mean", "s"),
    "tokens/generated": ("tokens that the policy wrote", "tokens"),
    "tokens/loss": ("tokens of the loss", "tokens"),
    "engine/*": ("a figure of the engine, behind the sync", ""),
    "tokens/per_second": ("tokens written, by the clock", "tokens/s"),
    "outcome/*": ("turns that ended so", "turns"),
    "*chi2": ("chi2 divergence: mean squared ratio - 1", "chi2"),
    "*ess": ("effective sample size", "share"),
}


def meaning(metric: str) -> tuple[str, str]:
    """What a metric means and its unit; two empty texts for one that this table does not have."""
    for pattern, found in _MEANINGS.items():
        if fnmatchcase(metric, pattern):
            return found
    return "", ""


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The metrics that a line stands for: its own, or those whose rest is the number of a layer."""
    prefix, star, _ = pattern.partition("*")
    if not star:
        return [pattern] if pattern in names else []
    rests = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    numbers = sorted(int(rest) for rest in rests if rest.isascii() and rest.isdigit())
    others = sorted(rest for rest in rests if rest == "logits")
    return [f"{prefix}{rest}" for rest in (*numbers, *others)]
