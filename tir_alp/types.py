"""The data that travels between modules: read this file first.

Spans make turns, turns make trajectories, trajectories make groups, groups make a batch. All are
frozen. One invariant is kept here: *whether a token may enter the loss is derived from who wrote
it*, so that mask, token ids and logprobs cannot disagree.

Axis letters in comments: B sequences, T tokens of the longest sequence, N tokens of all sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from torch import Tensor

from tir_alp.tools.outcome import Outcome


class StopReason(StrEnum):
    """Why a completion ended."""

    EOS = "eos"
    """The policy sampled an end-of-turn token, which is the completion's last token."""
    STOP = "stop"
    """The stop rule held, e.g. the closing fence of a code block is complete."""
    LENGTH = "length"
    """The limit of tokens was reached: of this turn, or of the context."""
    ABORT = "abort"
    """The request was taken back while it ran."""


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """Consecutive tokens with one author.

    The policy's tokens carry the logprob that each had when it was sampled; prompt and tool tokens
    have none. That difference, with `trainable`, *is* the loss mask.

    Example, a tool's answer, a completion, and a completion that is void:

        TokenSpan((7, 8))                                 loss_mask = (False, False)
        TokenSpan((4, 5, 9), (-0.1, -2.3, -0.7))          loss_mask = (True, True, True)
        TokenSpan((4, 9), (-0.1, -1.2), trainable=False)  loss_mask = (False, False)
    """

    token_ids: tuple[int, ...]
    """Ids exactly as they were encoded or sampled."""
    rollout_logprobs: tuple[float, ...] | None = None
    """Logprob of each token under the distribution it was sampled from; None: not sampled."""
    trainable: bool = True
    """False: the policy wrote it, but it stays out of the loss (a void turn)."""

    def __post_init__(self) -> None:
        if self.rollout_logprobs is not None and len(self.rollout_logprobs) != len(self.token_ids):
            raise ValueError(
                f"a span of {len(self.token_ids)} tokens has {len(self.rollout_logprobs)} logprobs"
            )

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def is_sampled(self) -> bool:
        """True where the policy wrote the span."""
        return self.rollout_logprobs is not None

    @property
    def loss_mask(self) -> tuple[bool, ...]:
        """One bool a token: may it enter the loss?"""
        return (self.is_sampled and self.trainable,) * len(self.token_ids)


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Tokens [start, stop) of one completion, which the same weights sampled.

    Example, new weights were loaded when two of five tokens had been sampled:

        (VersionSpan(version=3, start=0, stop=2), VersionSpan(version=4, start=2, stop=5))
    """

    version: int
    """Training steps behind the weights."""
    start: int
    stop: int


def check_version_spans(spans: Sequence[VersionSpan], num_tokens: int, policy_version: int) -> None:
    """See that spans cover a completion without gaps, with versions that only grow.

    No spans mean that `policy_version` sampled all tokens.

    Args:
        spans: Of the completion.
        num_tokens: Of the completion.
        policy_version: Version of its first token.

    Raises:
        ValueError: If they do not.
    """
    if not spans:
        return
    starts = [0, *(span.stop for span in spans[:-1])]
    are_whole = (
        [span.start for span in spans] == starts
        and all(span.start < span.stop for span in spans)
        and spans[-1].stop == num_tokens
    )
    if not are_whole:
        raise ValueError(f"version spans do not cover the {num_tokens} tokens once each: {spans}")
    versions = [span.version for span in spans]
    if versions[0] != policy_version:
        raise ValueError(f"the first token has version {versions[0]}, not {policy_version}")
    if versions != sorted(set(versions)):
        raise ValueError(f"versions must grow from span to span; they are {versions}")


def written_out(
    spans: tuple[VersionSpan, ...], num_tokens: int, policy_version: int
) -> tuple[VersionSpan, ...]:
    """Version spans of a completion, also where one version sampled all; none without tokens."""
    return spans or ((VersionSpan(policy_version, 0, num_tokens),) if num_tokens else ())


def cut_version_spans(spans: Sequence[VersionSpan], num_tokens: int) -> tuple[VersionSpan, ...]:
    """The spans of the first `num_tokens` tokens."""
    return tuple(
        VersionSpan(span.version, span.start, min(span.stop, num_tokens))
        for span in spans
        if span.start < num_tokens
    )


@dataclass(frozen=True, slots=True)
class Turn:
    """The policy writes a completion, the environment answers with an observation.

    Example, a turn that calls the tool, with letters for tokens:

        Turn(completion=TokenSpan("```py ... ```"), observation=TokenSpan("<tool> 42 ..."),
             policy_version=3, stop_reason=StopReason.STOP, outcome=Outcome.OK, reward=0.0,
             info={"tool_calls": 1}, timing={"generate": 0.8, "tool": 0.01})
    """

    completion: TokenSpan
    observation: TokenSpan
    """What the environment answered; empty after the last turn."""
    policy_version: int
    """Training steps behind the weights that sampled the completion's first token."""
    stop_reason: StopReason
    outcome: Outcome
    """What became of the turn's tool call or grading; `OK` where there was none."""
    reward: float
    info: Mapping[str, Any] = field(default_factory=dict)
    """What the environment reports beside the reward, e.g. `tool_calls`, `void`, `answer`."""
    timing: Mapping[str, float] = field(default_factory=dict)
    """Seconds by part: `generate` (queueing included), `tool`, and in the first turn `prepare`, the
    environment's making and reset; `begin` is when `generate` began, on the host's own clock."""
    version_spans: tuple[VersionSpan, ...] = ()
    """Which weights sampled which tokens; empty: those of `policy_version` sampled all."""

    def __post_init__(self) -> None:
        check_version_spans(self.version_spans, len(self.completion), self.policy_version)

    @property
    def versions(self) -> tuple[VersionSpan, ...]:
        """The version spans, written out also where one version sampled all."""
        return written_out(self.version_spans, len(self.completion), self.policy_version)

    @property
    def is_cut(self) -> bool:
        """True where a limit of tokens ended the completion."""
        return self.stop_reason is StopReason.LENGTH

    @property
    def is_void(self) -> bool:
        """True where the completion held neither a complete code block nor an answer."""
        return bool(self.info.get("void", False))


@dataclass(frozen=True, slots=True)
class Trajectory:
    """The record of one episode, as the policy saw it.

    Example, prompt P, completion C0, observation O0, completion C1:

        token_ids        = P + C0 + O0 + C1
        loss_mask        = 0 + 1  + 0  + 1
        rollout_logprobs = 0 + l0 + 0  + l1     (0.0 where nothing was sampled; never read there)
        turn_ids         = -1 + 0 + -1 + 1      (-1: no turn of the policy's)
    """

    task_id: str
    group_id: int
    prompt: TokenSpan
    turns: tuple[Turn, ...]
    terminated: bool
    """The environment ended the episode."""
    truncated: bool
    """A limit ended it: turns, or tokens of context."""
    sequence_uid: int = 0
    """Identity of this sample within the run; keys its sampling and its noise."""

    def spans(self) -> Iterator[TokenSpan]:
        """All spans in order: their concatenation is what the policy saw and wrote."""
        yield self.prompt
        for turn in self.turns:
            yield turn.completion
            yield turn.observation

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All tokens of the episode."""
        return tuple(token for span in self.spans() for token in span.token_ids)

    @property
    def loss_mask(self) -> tuple[bool, ...]:
        """One bool a token, derived from the spans."""
        return tuple(bit for span in self.spans() for bit in span.loss_mask)

    @property
    def rollout_logprobs(self) -> tuple[float, ...]:
        """One number a token; 0.0 for tokens that were not sampled."""
        return tuple(
            logprob
            for span in self.spans()
            for logprob in (span.rollout_logprobs or (0.0,) * len(span))
        )

    @property
    def turn_ids(self) -> tuple[int, ...]:
        """Index of the turn whose completion a token belongs to; -1 for all other tokens."""
        ids = [-1] * len(self.prompt)
        for index, turn in enumerate(self.turns):
            ids += [index] * len(turn.completion) + [-1] * len(turn.observation)
        return tuple(ids)

    @property
    def is_overlong(self) -> bool:
        """True where a limit ended the trajectory or cut one of its completions."""
        return self.truncated or any(turn.is_cut for turn in self.turns)

    @property
    def reward(self) -> float:
        """Sum of the rewards of the turns."""
        return sum(turn.reward for turn in self.turns)


@dataclass(frozen=True, slots=True)
class TrajectoryGroup:
    """Trajectories sampled from the same task: the unit of advantage and of staleness."""

    task_id: str
    group_id: int
    trajectories: tuple[Trajectory, ...]
    num_failed: int = 0
    """Episodes that infrastructure failures took out of the group."""

    @property
    def rewards(self) -> tuple[float, ...]:
        """Reward of each trajectory."""
        return tuple(trajectory.reward for trajectory in self.trajectories)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one optimizer step, or one micro-batch of it, trains on.

    Tokens are packed: those of all sequences behind one another, without padding. What the loss
    needs is kept a row a sequence. Position t of a row is *about* token t of that sequence: its
    logprob is the one of token t given the tokens before it. `tir_alp.training.batch`
    decides that, once.

    Example, two sequences of 3 and 2 tokens:

        token_ids  = [5 6 7 8 9]   position_ids = [0 1 2 0 1]   lengths = (3, 2)
        loss_mask  = [[0 0 1]      advantages = [0.7, -0.7]
                      [0 1 0]]
    """

    token_ids: Tensor
    """[N] int64, packed."""
    position_ids: Tensor
    """[N] int64, starting again at 0 with every sequence."""
    lengths: tuple[int, ...]
    """[B] tokens of each sequence; they add up to N."""
    sequence_uids: tuple[int, ...]
    """[B] keys of the noise."""
    loss_mask: Tensor
    """[B, T] bool; False in the padding."""
    rollout_logprobs: Tensor
    """[B, T] float32; 0 where the mask is False."""
    turn_ids: Tensor
    """[B, T] int64; -1 where no turn of the policy's."""
    advantages: Tensor
    """[B] float32."""
    proximal_logprobs: Tensor | None = None
    """[B, T] float32, of the trainer's own forward at the start of the step; None: not needed."""
    reference_logprobs: Tensor | None = None
    """[B, T] float32, of the frozen initial policy; None: not needed."""

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that enter the loss."""
        return int(self.loss_mask.sum())
