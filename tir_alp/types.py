"""The data that travels between modules: read this file first.

Spans form turns, turns form trajectories, trajectories form groups, and groups form a batch. All
are frozen. One invariant holds here: *whether a token may enter the loss follows from who wrote
it*, so that mask, token ids and logprobs cannot disagree.

Axis letters in comments: B sequences, T tokens of the longest sequence, N tokens of all sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


from tir_alp.tools.outcome import Outcome


class StopReason(StrEnum):
    """Why a completion ended."""

    EOS = "eos"
    """The policy sampled an end-of-turn token; it is the last token of the completion."""
    STOP = "stop"
    """The stop rule matched, e.g. on the closing fence of a code block."""
    LENGTH = "length"
    """The token limit of the turn or of the context was reached."""
    ABORT = "abort"
    """The request was cancelled while it ran."""


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """Consecutive tokens with one author.

    The policy's tokens carry the logprob that each had when it was sampled; prompt and tool tokens
    have none. That difference, with `trainable`, *is* the loss mask.

    Example: the output of a tool, a completion, and a void completion:

        TokenSpan((7, 8))                                 loss_mask = (False, False)
        TokenSpan((4, 5, 9), (-0.1, -2.3, -0.7))          loss_mask = (True, True, True)
        TokenSpan((4, 9), (-0.1, -1.2), trainable=False)  loss_mask = (False, False)
    """

    token_ids: tuple[int, ...]
    """Token ids, exactly as they were encoded or sampled."""
    rollout_logprobs: tuple[float, ...] | None = None
    """Logprob of each token under the distribution it was sampled from; None: not sampled."""
    trainable: bool = True
    """False: the policy wrote the span, but it stays out of the loss (e.g. a void turn)."""

    def __post_init__(self) -> None:
        if self.rollout_logprobs is not None and len(self.rollout_logprobs) != len(self.token_ids):
            raise ValueError(
                f"a span of {len(self.token_ids)} tokens has {len(self.rollout_logprobs)} logprobs"
            )

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def is_sampled(self) -> bool:
        """Whether the policy wrote the span."""
        return self.rollout_logprobs is not None

    @property
    def loss_mask(self) -> tuple[bool, ...]:
        """One bool per token: whether it may enter the loss."""
        return (self.is_sampled and self.trainable,) * len(self.token_ids)


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Tokens [start, stop) of one completion that the same weights sampled.

    Example: new weights were loaded when two of five tokens had been sampled:

        (VersionSpan(version=3, start=0, stop=2), VersionSpan(version=4, start=2, stop=5))
    """

    version: int
    """Number of training steps that produced the weights."""
    start: int
    stop: int


def check_version_spans(spans: Sequence[VersionSpan], num_tokens: int, policy_version: int) -> None:
    """Check that spans cover a completion without gaps, with versions that only grow.

    An empty sequence is valid: it means that `policy_version` sampled all tokens.

    Args:
        spans: The version spans of the completion.
        num_tokens: Number of tokens in the completion.
        policy_version: Version of the weights that sampled the first token.

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
    """Return the version spans, explicitly even where one version sampled all tokens."""
    return spans or ((VersionSpan(policy_version, 0, num_tokens),) if num_tokens else ())


def cut_version_spans(spans: Sequence[VersionSpan], num_tokens: int) -> tuple[VersionSpan, ...]:
    """Return the version spans of the first `num_tokens` tokens."""
    return tuple(
        VersionSpan(span.version, span.start, min(span.stop, num_tokens))
        for span in spans
        if span.start < num_tokens
    )


@dataclass(frozen=True, slots=True)
class Turn:
    """A completion by the policy, and the observation with which the environment answers.

    Example: a turn that calls the tool, with text in place of token ids:

        Turn(completion=TokenSpan("```py ... ```"), observation=TokenSpan("<tool> 42 ..."),
             policy_version=3, stop_reason=StopReason.STOP, outcome=Outcome.OK, reward=0.0,
             info={"tool_calls": 1}, timing={"generate": 0.8, "tool": 0.01})
    """

    completion: TokenSpan
    observation: TokenSpan
    """The environment's answer; empty after the last turn."""
    policy_version: int
    """Version of the weights that sampled the first token: the number of training steps that the
    run had made when the engine got them. After a roll-back these are weights of an earlier step
    under a new number; the run's events say which."""
    stop_reason: StopReason
    outcome: Outcome
    """How the turn's tool call or grading ended; `OK` where there was none."""
    reward: float
    info: Mapping[str, Any] = field(default_factory=dict)
    """What the environment reports besides the reward, e.g. `tool_calls`, `void`, `answer`."""
    timing: Mapping[str, float] = field(default_factory=dict)
    """Durations in seconds: `generate` from the request to its completion, `queue` the part of it
    before the engine read the request (0 where it does not tell), `tool`, and in the first turn
    `prepare` (creation and reset of the environment). `begin` is when `generate` began, on the
    host's clock."""
    version_spans: tuple[VersionSpan, ...] = ()
    """Which weights sampled which tokens; empty: `policy_version` sampled all of them."""
    routing: NDArray | None = field(default=None, repr=False, compare=False)
    """[K, L, E] int16, the E experts that computed each of K tokens in each of the L layers of the
    engine's model, -1 in layers without experts. They are the tokens of the trace from where the
    turn before ended. None: not known."""

    def __post_init__(self) -> None:
        check_version_spans(self.version_spans, len(self.completion), self.policy_version)

    @property
    def versions(self) -> tuple[VersionSpan, ...]:
        """The version spans, explicit even where one version sampled all tokens."""
        return written_out(self.version_spans, len(self.completion), self.policy_version)

    @property
    def is_cut(self) -> bool:
        """Whether a token limit ended the completion."""
        return self.stop_reason is StopReason.LENGTH

    @property
    def is_void(self) -> bool:
        """Whether the completion contains neither a complete code block nor an answer."""
        return bool(self.info.get("void", False))


class _Columns(NamedTuple):
    """The tokens of a trajectory, one entry per token in each column."""

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    rollout_logprobs: tuple[float, ...]
    turn_ids: tuple[int, ...]


REPORT = "report"
"""Key of the last turn's `info` in an agent's episode: what the agent left, which was graded."""

MAX_TRACES = 500
"""Traces that one episode can have."""

_UIDS_PER_TRACE = 1 << 54  # more than a run or an evaluation has


def trace_uid(sequence_uid: int, trace: int) -> int:
    """Return the uid of one of the traces of an episode: sequences of tokens with own draws.

    Args:
        sequence_uid: Uid of the episode's sequence; also that of its trace 0.
        trace: Number of the trace, below 512.
    """
    return sequence_uid + trace * _UIDS_PER_TRACE


def split_uid(uid: int) -> tuple[int, int]:
    """Return the uid of the episode's sequence, and the number of the trace: see `trace_uid`."""
    trace, sequence_uid = divmod(uid, _UIDS_PER_TRACE)
    return sequence_uid, trace


@dataclass(frozen=True, slots=True)
class Trajectory:
    """The record of one episode, as the policy saw it.

    Example: prompt P, completion C0, observation O0, completion C1:

        token_ids        = P + C0 + O0 + C1
        loss_mask        = 0 + 1  + 0  + 1
        rollout_logprobs = 0 + l0 + 0  + l1     (0.0 where nothing was sampled; never read there)
        turn_ids         = -1 + 0 + -1 + 1      (-1: not in a completion)

    These four tuples are computed from the spans on first use, and kept.
    """

    task_id: str
    group_id: int
    prompt: TokenSpan
    turns: tuple[Turn, ...]
    terminated: bool
    """Whether the environment ended the episode."""
    truncated: bool
    """Whether a limit ended the episode: of turns, or of context tokens."""
    sequence_uid: int = 0
    """Identity of this sample within the run; its sampling and its noise are keyed by it."""
    branches: tuple[Trajectory, ...] = ()
    """The other traces of the same episode: sequences of tokens that share its reward and its
    advantage, and have no branches of their own. They are those in which the conversation went on
    before it was rewritten, or further conversations of an agent."""
    is_forked: bool = False
    """Whether the branches are the earlier traces of the same conversation, in order. A branch is
    never forked itself."""
    _kept: _Columns | None = field(default=None, init=False, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what the trajectory is made of, not what is computed from it."""
        return Trajectory, tuple(getattr(self, each.name) for each in fields(self) if each.init)

    @property
    def episode_uid(self) -> int:
        """Uid of the episode, which all its sequences have in common; see `trace_uid`."""
        return split_uid(self.sequence_uid)[0]

    @property
    def sequences(self) -> tuple[Trajectory, ...]:
        """The trajectory itself and its branches: what the episode gives to train on."""
        return self, *self.branches

    @property
    def conversation(self) -> tuple[Trajectory, ...]:
        """The traces of the conversation that the trajectory ends, in order.

        It is the trajectory itself, unless the history was rewritten. An agent's further
        conversations are not among them.
        """
        return (*self.branches, self) if self.is_forked else (self,)

    @property
    def conversation_turns(self) -> tuple[Turn, ...]:
        """All turns of the conversation, in order."""
        return tuple(turn for each in self.conversation for turn in each.turns)

    def spans(self) -> Iterator[TokenSpan]:
        """Iterate over all spans in order: together they are what the policy saw and wrote."""
        yield self.prompt
        for turn in self.turns:
            yield turn.completion
            yield turn.observation

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All tokens of the episode."""
        return self._columns().token_ids

    @property
    def loss_mask(self) -> tuple[bool, ...]:
        """One bool per token: whether it may enter the loss."""
        return self._columns().loss_mask

    @property
    def rollout_logprobs(self) -> tuple[float, ...]:
        """One logprob per token; 0.0 for tokens that were not sampled."""
        return self._columns().rollout_logprobs

    @property
    def turn_ids(self) -> tuple[int, ...]:
        """One index per token: of the turn whose completion it belongs to, or -1."""
        return self._columns().turn_ids

    @property
    def routing(self) -> tuple[NDArray, ...]:
        """Pieces [K, L, E] of the routing of the first tokens, as far as the engine reported it."""
        found: list[NDArray] = []
        for turn in self.turns:
            if turn.routing is None:
                break
            found.append(turn.routing)
        return tuple(found)

    def _columns(self) -> _Columns:
        if self._kept is None:
            object.__setattr__(self, "_kept", self._join_spans())
        assert self._kept is not None
        return self._kept

    def _join_spans(self) -> _Columns:
        spans = [*self.spans()]
        turn_ids = [-1] * len(self.prompt)
        for index, turn in enumerate(self.turns):
            turn_ids += [index] * len(turn.completion) + [-1] * len(turn.observation)
        return _Columns(
            token_ids=tuple(token for span in spans for token in span.token_ids),
            loss_mask=tuple(bit for span in spans for bit in span.loss_mask),
            rollout_logprobs=tuple(
                logprob
                for span in spans
                for logprob in (span.rollout_logprobs or (0.0,) * len(span))
            ),
            turn_ids=tuple(turn_ids),
        )

    @property
    def is_overlong(self) -> bool:
        """Whether a limit ended the trajectory or cut one of its completions."""
        return self.truncated or any(turn.is_cut for turn in self.conversation_turns)

    @property
    def reward(self) -> float:
        """The sum of the rewards of the turns, in all traces of the conversation."""
        return sum(turn.reward for turn in self.conversation_turns)


@dataclass(frozen=True, slots=True)
class TrajectoryGroup:
    """Trajectories sampled from the same task: the unit of advantage and of staleness."""

    task_id: str
    group_id: int
    trajectories: tuple[Trajectory, ...]
    num_failed: int = 0
    """Number of episodes that the group lost to infrastructure failures."""

    @property
    def rewards(self) -> tuple[float, ...]:
        """The reward of each trajectory."""
        return tuple(trajectory.reward for trajectory in self.trajectories)


@dataclass(frozen=True, slots=True)
class Sample:
    """One trajectory with its advantage."""

    trajectory: Trajectory
    advantage: float
    turn_advantages: tuple[float, ...] | None = None
    """What is added to the advantage in each turn; None: nothing."""
    weight: float = 1.0
    """Weight of the sequence where sequences are averaged; see `RolloutConfig.trace_credit`."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of the sequences of a batch, and what of them is computed once.

    A sequence can share the beginning of its prompt with an earlier one of the batch, which may
    share a part of that with another one in turn.
    """

    uids: tuple[int, ...]
    """[B] identities, by which the noise in a prompt is keyed: those of the groups."""
    lengths: tuple[int, ...]
    """[B] number of tokens of each prompt."""
    rows: tuple[int, ...]
    """[B] the sequence in whose forward the beginning of each is computed: one before it in the
    batch, or itself if it shares nothing."""
    shared: tuple[int, ...]
    """[B] number of tokens that it shares with that sequence, at most those of either's prompt."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The sequences of one optimizer step, or of one micro-batch of it.

    Tokens are packed: the sequences follow one another without padding. What the loss needs has one
    row per sequence. Position t of a row is *about* token t of that sequence: its logprob is that
    of token t given the tokens before it. `tir_alp.training.batch` decides this, once.

    Example: two sequences of 3 and 2 tokens:

        token_ids  = [5 6 7 8 9]   position_ids = [0 1 2 0 1]   lengths = (3, 2)
        loss_mask  = [[0 0 1]      advantages = [0.7, -0.7]
                      [0 1 0]]
    """

    token_ids: Tensor
    """[N] int64, packed."""
    position_ids: Tensor
    """[N] int64, from 0 in every sequence."""
    lengths: tuple[int, ...]
    """[B] number of tokens of each sequence; they add up to N."""
    sequence_uids: tuple[int, ...]
    """[B] identities of the sequences, by which their noise is keyed."""
    loss_mask: Tensor
    """[B, T] bool; False in the padding."""
    rollout_logprobs: Tensor
    """[B, T] float32; 0 where the mask is False."""
    turn_ids: Tensor
    """[B, T] int64; -1 for tokens that are not in a completion."""
    advantages: Tensor
    """[B] float32."""
    loss_positions: Tensor | None = None
    """[M] int64, positions of the loss tokens among the packed tokens, in order, as the mask has
    them; None: they are found in the mask when they are needed, for which a GPU is waited for."""
    weights: Tensor | None = None
    """[B] float32, weights of the sequences where sequences are averaged; None: all are 1."""
    prompts: Prompts | None = None
    """The prompts with which the sequences begin; None: they are like other tokens."""
    proximal_logprobs: Tensor | None = None
    """[B, T] float32, under the trainer's policy at the start of the step; None: not needed."""
    reference_logprobs: Tensor | None = None
    """[B, T] float32, under the frozen initial policy; None: not needed."""
    token_advantages: Tensor | None = None
    """[B, T] float32, where the advantage differs within a sequence; None: it is `advantages`."""
    selected: Tensor | None = None
    """[B, T] bool, the tokens that the method has selected in the update; None: not needed."""
    versions: Tensor | None = None
    """[B, T] int64, policy version that sampled each token, -1 elsewhere; None: not needed."""
    interpolation: Tensor | None = None
    """[B, T] float32, share of the current policy in interpolated proximal logprobs; None: they are
    not interpolated."""
    routing: Tensor | None = None
    """[N, L, E] int16, the experts that computed each packed token in each of the
    L layers in the engine; -1 where that is not known. None: nowhere."""

    @property
    def num_loss_tokens(self) -> int:
        """Number of tokens that enter the loss."""
        return int(self.loss_mask.sum())


@dataclass(frozen=True, slots=True)
class Origin:
    """What the prompts and completions of a run depend on besides its config."""

    created: datetime
    """Local time at which the run was created. Chat templates that write the date write this one,
    however much later the run is resumed or audited."""
    end_token_ids: tuple[int, ...] = ()
    """Tokens at which the initial model's own config ends a sequence."""
