"""The protocol between rollouts and whatever samples tokens."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


from tir_alp.config import LoraConfig
from tir_alp.types import StopReason, VersionSpan, check_version_spans, written_out


class EngineFailed(RuntimeError):
    """The engine could not do what it was asked to do; the request's result is lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one completion is sampled.

    In the embedded engine the draw at each position of a sequence is a function of (`seed`,
    `sequence_uid`, position), so a completion does not depend on what else is in the batch. Servers
    draw from their own generators; there `sequence_uid` identifies the sequence whose prefix a
    request continues.
    """

    max_tokens: int
    """Limit of the completion, in tokens."""
    temperature: float = 1.0
    """Temperature of the distribution; 0 is greedy."""
    top_p: float = 1.0
    """Only the most probable tokens that together reach this probability can be sampled."""
    stop_token_ids: frozenset[int] = frozenset()
    """Tokens that end the completion; the one that does is its last token."""
    stop_matcher: Callable[[], Callable[[int], bool]] | None = None
    """Makes a matcher that is fed token by token and returns True at the last token to keep."""
    seed: int = 0
    """Root of the run's draws."""
    sequence_uid: int = 0
    """Identity of the sequence within the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What one `generate` call sampled.

    Example: `Completion(token_ids=(17, 4, 2), logprobs=(-0.1, -1.7, -0.02),
    stop_reason=StopReason.EOS, policy_version=3)`.
    """

    token_ids: tuple[int, ...]
    """Ids as they were sampled, the stop token included."""
    logprobs: tuple[float, ...]
    """Logprob of each token under the distribution actually sampled from, i.e. after temperature
    and truncation, in nats."""
    stop_reason: StopReason
    policy_version: int
    """Number of training steps that produced the weights that sampled the first token."""
    version_spans: tuple[VersionSpan, ...] = ()
    """Which weights sampled which tokens; empty: those of `policy_version` sampled all of them."""
    routing: NDArray | None = field(default=None, repr=False, compare=False)
    """[K, L, E] int16, the E experts that computed each of the first K tokens of the sequence in
    each of the L layers, -1 in layers without experts; K is the number of tokens that were read, at
    least all but the last. None: the engine does not report it."""
    queue_s: float = field(default=0.0, compare=False)
    """Seconds that the request waited before the engine read it; 0 where no engine tells."""

    def __post_init__(self) -> None:
        if len(self.logprobs) != len(self.token_ids):
            raise ValueError(
                f"a completion of {len(self.token_ids)} tokens has {len(self.logprobs)} logprobs"
            )
        check_version_spans(self.version_spans, len(self.token_ids), self.policy_version)

    @property
    def versions(self) -> tuple[VersionSpan, ...]:
        """The version spans, written out even if one version sampled every token."""
        return written_out(self.version_spans, len(self.token_ids), self.policy_version)


@dataclass(frozen=True, slots=True)
class Probe:
    """A sequence and its logprobs by the trainer's forward, at temperature 1."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Logprob of each token but the first, given those before it, in nats."""


AskTrainer = Callable[[tuple[int, ...]], Awaitable[Probe | None]]
"""Asks the trainer for the logprobs of a sequence, with which an engine's own are compared. Where
the trainer cannot be reached, the answer is a probe of another sequence that was made before, or
None."""

Log = Callable[[str], None]
"""Takes one line for the person who watches the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineContext:
    """What an engine needs to know of the run that opens it, besides its own settings."""

    path: str
    """Folder or Hugging Face id of the model whose weights it starts with."""
    version: int = 0
    """Policy version of those weights."""
    seed: int = 0
    """Seed of the run."""
    device: str = "auto"
    """The run's `trainer.device`: "auto", "cpu" or "cuda". Only the embedded engine computes
    there."""
    on_update: str = "wait"
    """What new weights do to running completions: "wait", "keep" or "drop"."""
    adapters: LoraConfig | None = None
    """Rank and scale of the adapters that `load_weights` gets in place of weights; None: it gets
    whole weights."""
    ask_trainer: AskTrainer | None = None
    """Asks the trainer for the logprobs that the engine's are compared with; None: nobody can."""
    log: Log = print
    """Receives starts, losses and recoveries."""


def check_request(token_ids: tuple[int, ...], sampling: Sampling) -> None:
    """Refuse what no engine can sample. Raises ValueError."""
    if not token_ids:
        raise ValueError("there is nothing to continue: the sequence has no tokens")
    if sampling.max_tokens < 1:
        raise ValueError(f"max_tokens is {sampling.max_tokens}; it must be at least 1")


def check_vocabulary(token_ids: tuple[int, ...], vocab_size: int) -> None:
    """Refuse ids that the model has no row for, which can crash a server. Raises ValueError."""
    if not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        raise ValueError(
            f"the sequence has a token that is not in the vocabulary: ids go from 0 to "
            f"{vocab_size - 1}, and it has {min(token_ids)} to {max(token_ids)}"
        )


def check_fit(own: Mapping[str, Tensor], new: Mapping[str, Tensor], version: int) -> None:
    """Refuse weights with other names or shapes than an engine has. Raises ValueError."""
    wrong = sorted(
        name
        for name in own.keys() | new.keys()
        if name not in own or name not in new or own[name].shape != new[name].shape
    )
    if wrong:
        raise ValueError(
            f"the weights of version {version} do not fit the engine's model: {len(wrong)} "
            f"tensors are missing, unknown or of another shape, the first is {wrong[0]!r}"
        )


class Engine(Protocol):
    """Samples completions of token sequences with the newest weights that it was given."""

    async def generate(self, token_ids: tuple[int, ...], sampling: Sampling) -> Completion:
        """Continue a sequence. Raises ValueError for what can never fit into the engine."""
        ...

    async def load_weights(self, source: Mapping[str, Tensor] | Path, version: int) -> None:
        """Take new weights; completions that begin after the call carry `version`.

        Where the context has adapters, these are the adapters alone, named `MODULE.lora_A.weight`
        [rank, in] and `MODULE.lora_B.weight` [out, rank]; of a folder they are in `adapters/`.
        """
        ...

    async def lend_memory(self) -> None:
        """Free memory for a trainer on the same device, if configured, until `load_weights`.

        No completion may run, and none may be requested before the weights are loaded.
        """
        ...

    async def abort(self, sequence_uid: int | None = None) -> None:
        """End the completions of one sequence, or all; each returns the tokens that it has.

        Their stop reason is `StopReason.ABORT`.
        """
        ...

    def health(self) -> Mapping[str, float]:
        """Figures for people: requests running and waiting, cache tokens in use, tokens made."""
        ...

    async def close(self) -> None:
        """End what runs and free what is held."""
        ...


EngineFactory = Callable[[Any, EngineContext], AbstractAsyncContextManager[Engine]]
"""Opens an engine, given its section of the config. Each section names its factory. Raises
ValueError on entry if the engine cannot start."""


class LogprobSource(Protocol):
    """Computes logprobs by the trainer's forward: a `Trainer`, or one in another process."""

    def completion_logprobs(
        self, prompt: Sequence[int], completion: Sequence[int], temperature: float, top_p: float
    ) -> Sequence[float]:
        """Compute the logprob of each token of a completion, in one forward."""
        ...

    def perturb_weights(self, scale: float) -> None:
        """Change some weights a little; 0 restores them bit for bit."""
        ...


Generate = Callable[[tuple[int, ...], Sampling], Awaitable[Completion]]
"""All that an episode sees of the engine: `Engine.generate`."""
