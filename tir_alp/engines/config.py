"""The engine section of a config, and what the rest of the program may ask of it.

Nothing outside an engine's own folder asks which kind of engine a run has. It asks the section: how
many GPUs the engine takes, how far its logprobs may be off, whether it can repeat its draws. The
defaults of `EngineSettings` promise as little as possible; a kind overrides what it does better.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from tir_alp.algorithm.presets import Section

OnUpdate = Literal["wait", "keep", "drop"]
"""What new weights do to running completions; see `RolloutConfig.on_update`."""

LOGPROB_TOLERANCE = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.05, "int8": 0.1, "fp8": 0.3}
"""Mean |difference of logprobs| that an arithmetic explains, in nats per token."""

_NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_NOISE_TOLERANCE = 1.5  # nats per unit of noise on the logits


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """What engines take of the memory that the trainer computes in, in bytes."""

    weights: int = 0
    cache: int = 0


class EngineSettings(Section):
    """What every kind of engine can be asked. The answers here hold for an unknown engine."""

    type: str
    """Kind of the engine."""

    install_hint: ClassVar[str] = "install it as docs/engines.md says"
    """What to do when a package that the engine imports is missing."""

    @property
    def is_reproducible(self) -> bool:
        """Whether its draws are a function of the run's seed, the sequence and the position."""
        return False

    @property
    def on_update_modes(self) -> tuple[OnUpdate, ...]:
        """The values of `rollout.on_update` that it supports."""
        return ("wait",)

    @property
    def returns_memory(self) -> bool:
        """Whether `lend_memory` frees its memory for a trainer on the same device."""
        return False

    @property
    def needs_probe(self) -> bool:
        """Whether new weights are verified by the trainer's logprobs of a probe sequence."""
        return True

    @property
    def gpus(self) -> range:
        """Indices of the GPUs that one engine takes; empty if it claims none."""
        return range(0)

    @property
    def logprob_tolerance(self) -> float:
        """Mean |difference| that its arithmetic explains between its logprobs and the trainer's.

        In nats per token.
        """
        return LOGPROB_TOLERANCE["float32"]

    def memory_beside_trainer(
        self, device: str, *, num_parameters: int, num_tokens: int, numbers_per_token: int
    ) -> EngineMemory:
        """Estimate what it takes of the memory that the trainer computes in.

        Args:
            device: "cpu" or "cuda": the memory of this machine, or of the first GPU.
            num_parameters: Size of the model.
            num_tokens: Most tokens that running completions can need in its cache.
            numbers_per_token: Numbers that the cache keeps per token, over all layers.
        """
        return EngineMemory()

    def check(self, *, deterministic: bool, on_update: OnUpdate, max_staleness: int) -> None:
        """See that a run with these settings can use it. Raises ValueError.

        Args:
            deterministic: Whether equal runs have to be equal bit for bit.
            on_update: What new weights do to running completions.
            max_staleness: Steps by which rollouts may be ahead of the trainer.
        """
        if deterministic and not self.is_reproducible:
            raise ValueError(
                'deterministic needs engine.type = "transformers": what an engine of the type '
                f'"{self.type}" draws is not a function of the run\'s seed'
            )
        if on_update not in self.on_update_modes:
            modes = " or ".join(f'"{mode}"' for mode in self.on_update_modes)
            raise ValueError(
                f'engine.type = "{self.type}" does not support rollout.on_update = "{on_update}": '
                f"set it to {modes}"
            )
        if self.returns_memory and max_staleness:
            raise ValueError(
                "engine.release_memory needs rollout.max_staleness = 0: servers without memory "
                f"cannot sample while the trainer computes, and it is {max_staleness}"
            )


class TransformersConfig(EngineSettings):
    """The embedded engine, in the process of the run."""

    factory: ClassVar[str] = "tir_alp.engines.transformers:open_transformers"

    type: Literal["transformers"] = "transformers"
    max_cache_tokens: int = Field(default=131072, ge=1)
    """Bound of its cache of keys and values, in tokens; requests wait for room."""
    precision: Literal["float32", "bfloat16", "int8", "fp8"] = "float32"
    """For studies of mismatch: `bfloat16` is all of the engine's arithmetic; `int8` and `fp8`
    (e4m3) round the matrices of the decoder layers, with one scale per output row."""
    logit_noise: float = Field(default=0.0, ge=0.0)
    """For studies of mismatch: standard deviation of noise on the logits that are sampled from,
    in evaluations too. The noise is a function of run seed, sequence and position."""

    @property
    def is_reproducible(self) -> bool:
        """True: each draw is keyed by seed, sequence and position."""
        return True

    @property
    def on_update_modes(self) -> tuple[OnUpdate, ...]:
        """All of them."""
        return ("wait", "keep", "drop")

    @property
    def needs_probe(self) -> bool:
        """False: it compares every tensor that it was given."""
        return False

    @property
    def logprob_tolerance(self) -> float:
        """Of its precision, and of the noise on its logits."""
        return LOGPROB_TOLERANCE[self.precision] + _NOISE_TOLERANCE * self.logit_noise

    def memory_beside_trainer(
        self, device: str, *, num_parameters: int, num_tokens: int, numbers_per_token: int
    ) -> EngineMemory:
        """All of its memory: it computes where the trainer does."""
        number = _NUMBER_BYTES["float32"]
        cached = min(self.max_cache_tokens, num_tokens)
        return EngineMemory(number * num_parameters, number * cached * numbers_per_token)


class ServersConfig(EngineSettings):
    """Settings that every kind of server has."""

    device: Literal["cpu", "cuda"] = "cuda"
    """Where the servers compute."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of the servers' arithmetic."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs that one server is spread over."""
    first_gpu: int = Field(default=0, ge=0)
    """Index of the first GPU that the servers take; the others follow it."""
    max_running: int = Field(default=64, ge=1)
    """Completions that one server samples at a time; more of them wait in the trainer."""
    max_cache_tokens: int | None = Field(default=None, ge=1)
    """Bound of a server's cache of keys and values, in tokens; None: all memory that is free."""
    start_timeout_s: float = Field(default=600.0, gt=0.0)
    """Deadline of a server's start, the loading of the model included."""
    load_timeout_s: float = Field(default=300.0, gt=0.0)
    """Deadline of each call that moves weights."""
    stall_timeout_s: float = Field(default=120.0, gt=0.0)
    """A server that is silent for this long, in a completion or when asked for its health, counts
    as lost."""
    arguments: tuple[str, ...] = ()
    """More arguments for the servers' command line."""

    @property
    def num_processes(self) -> int:
        """Servers that one engine starts."""
        return 1

    @property
    def gpus(self) -> range:
        """From `first_gpu` on, those of all servers that it starts."""
        count = self.tensor_parallel * self.num_processes if self.device == "cuda" else 0
        return range(self.first_gpu, self.first_gpu + count)

    @property
    def logprob_tolerance(self) -> float:
        """Of its dtype."""
        return LOGPROB_TOLERANCE[self.dtype]

    def memory_beside_trainer(
        self, device: str, *, num_parameters: int, num_tokens: int, numbers_per_token: int
    ) -> EngineMemory:
        """That of the servers on the trainer's device, unless they take turns with the trainer."""
        if self.device != device or self.returns_memory:
            return EngineMemory()
        num_here = self.num_processes
        if self.device == "cuda" and self.first_gpu:
            num_here = 0
        elif self.device == "cuda":  # each server has GPUs of its own; one shares the first
            num_here = min(num_here, 1)
        # Without a bound the cache takes a share of what is free, and so always fits.
        cached = 0 if self.max_cache_tokens is None else min(self.max_cache_tokens, num_tokens)
        number = num_here * _NUMBER_BYTES[self.dtype]
        return EngineMemory(number * num_parameters, number * cached * numbers_per_token)


class SGLangConfig(ServersConfig):
    """SGLang servers: started by the run, or running already. A lost server is started again."""

    factory: ClassVar[str] = "tir_alp.engines.sglang.engine:open_sglang"

    type: Literal["sglang"]
    urls: tuple[str, ...] = ()
    """Addresses of servers that run already; empty: the run starts its own. The key that they ask
    for is read from the environment variable TIR_ALP_SGLANG_KEY."""
    router: str = "none"
    """SGLang's own router, for completions alone. `none`: the run itself divides them over the
    servers. `local`: one that the run starts. Else the address of one that runs already, which asks
    for the same key as the servers do."""
    num_servers: int = Field(default=1, ge=1)
    """Servers that the run starts."""
    weights: Literal["disk", "tensor", "distributed"] = "disk"
    """How new weights get into the servers: through a folder that both sides see, as tensors in the
    request, or by a broadcast, with NCCL between GPUs and gloo between CPUs."""
    weights_folder: Path | None = None
    """For `disk`: a folder that the servers see, too; None: one in the system's folder for
    temporary files."""
    release_memory: bool = False
    """Free the servers' memory, weights and cache, while the trainer computes on the same GPUs."""

    @model_validator(mode="after")
    def _check_servers(self) -> SGLangConfig:
        if self.urls and self.num_servers != 1:
            raise ValueError(
                f"engine.num_servers ({self.num_servers}) is for servers that the run starts, and "
                "engine.urls names some that run already: leave one of them out"
            )
        if self.router not in ("none", "local") and not self.urls:
            raise ValueError(
                f"engine.router = {self.router!r} runs already, and knows nothing of servers that "
                'the run starts: name servers with engine.urls, or set router = "local"'
            )
        return self

    @property
    def num_processes(self) -> int:
        """Servers that it starts; none if they run already."""
        return 0 if self.urls else self.num_servers

    @property
    def on_update_modes(self) -> tuple[OnUpdate, ...]:
        """Not "drop": what SGLang draws the second time is something else."""
        return ("wait", "keep")

    @property
    def returns_memory(self) -> bool:
        """As `release_memory` says."""
        return self.release_memory


class VLLMConfig(ServersConfig):
    """A vLLM server, which the run starts with a Python of its own."""

    factory: ClassVar[str] = "tir_alp.engines.vllm.engine:open_vllm"

    type: Literal["vllm"]
    python: Path
    """The Python that vLLM is installed for: vLLM needs other packages than the trainer."""


class CustomEngineConfig(EngineSettings):
    """An engine from outside this package, which says here what it can do."""

    install_hint: ClassVar[str] = (
        "see that Python finds it, e.g. by PYTHONPATH, or correct engine.factory"
    )

    type: Literal["custom"]
    factory: str = Field(pattern=r"^[\w.]+:\w+$")
    """What opens the engine, as `module:function`. The function takes this section and an
    `EngineContext`, and returns an asynchronous context manager of an `Engine`."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """For the factory, which reads them from this section."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of its arithmetic, from which follows how far its logprobs may be off."""
    num_gpus: int = Field(default=0, ge=0)
    """GPUs that one engine takes, from the first one on."""
    reproducible: bool = False
    """Whether its draws are a function of run seed, sequence and position."""
    supports_on_update: tuple[OnUpdate, ...] = ("wait",)
    """The values of rollout.on_update that it supports."""

    @model_validator(mode="after")
    def _check_kwargs(self) -> CustomEngineConfig:
        if wrong := [name for name in self.kwargs if not name.isidentifier()]:
            raise ValueError(f"engine.kwargs: {wrong[0]!r} cannot be the name of an argument")
        return self

    @property
    def is_reproducible(self) -> bool:
        """As `reproducible` says."""
        return self.reproducible

    @property
    def on_update_modes(self) -> tuple[OnUpdate, ...]:
        """As `supports_on_update` says."""
        return self.supports_on_update

    @property
    def gpus(self) -> range:
        """The first `num_gpus`."""
        return range(self.num_gpus)

    @property
    def logprob_tolerance(self) -> float:
        """Of its dtype."""
        return LOGPROB_TOLERANCE[self.dtype]


def _with_default_type(value: Any) -> Any:
    """The embedded engine is meant where no type is given."""
    return {"type": "transformers", **value} if isinstance(value, Mapping) else value


EngineConfig = Annotated[
    Annotated[
        TransformersConfig | SGLangConfig | VLLMConfig | CustomEngineConfig,
        Field(discriminator="type"),
    ],
    BeforeValidator(_with_default_type),
]
"""The engine section of any kind; `type` says which one."""
