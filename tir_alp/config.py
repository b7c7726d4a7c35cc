"""Every setting of a run, typed. Unknown keys are errors; a field exists only if it is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    model_validator,
)

from tir_alp.algorithm.advantage import OverlongConfig
from tir_alp.algorithm.guards import GuardsConfig
from tir_alp.algorithm.presets import (
    ALGORITHMS,
    NEGATIVE_LOG_LIKELIHOOD,
    AlgorithmConfig,
    resolve_algorithm,
)
from tir_alp.algorithm.section import Section


def _check_named(text: str) -> str:
    if not text.strip() or "\0" in text:
        raise ValueError(f"{text!r} names nothing")
    return text


Named = Annotated[str, AfterValidator(_check_named)]
"""The name, path or id of something that has to exist."""


class ModelConfig(Section):
    """The model that is trained."""

    path: Named = "tiny"
    """Folder or Hugging Face id of the model, or a GGUF file, which is converted once; `tiny` and
    `tiny-able` come with the package."""
    system: str = ""
    """System prompt; empty: none."""
    rewritten_history: Literal["fork", "append", "refuse"] = "fork"
    """What to do where the chat template rewrites earlier turns, e.g. drops thinking: begin a new
    trace with the tokens that it writes now; append to the history as it was sampled, which
    differs from what the template would write; or refuse the template. See docs/history.md."""


class EnvConfig(Section):
    """The environment, a `gymnasium.Env` whose observations and actions are texts."""

    id: Named = "tir_alp.envs:PythonMath-v0"
    """Id for `gymnasium.make`, such as `my_env:Mine-v0`; the module before the colon registers
    it."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the environment."""


def _expanded(path: Any) -> Any:
    """A path whose `~` is the home folder, as in a shell."""
    return Path(path).expanduser() if isinstance(path, str | Path) else path


SOURCES = {
    "arithmetic": "tir_alp.envs.tasks:ArithmeticTasks",
    "code": "tir_alp.envs.code_tasks:CodeTasks",
    "reasoning_gym": "tir_alp.envs.tasks:ReasoningGymTasks",
    "word_problems": "tir_alp.envs.word_problems:WordProblems",
}
"""Entry points of the task sources that come with the package; imported when one is opened."""
FILE_SOURCES = ("jsonl", "csv", "parquet", "hub")
_SOURCE_NAMES = (*SOURCES, *FILE_SOURCES, "env")
_ENTRY_POINT = re.compile(r"[^\W\d][\w.]*:[^\W\d][\w.]*")


class SourceConfig(Section):
    """Where tasks come from."""

    source: str = "arithmetic"
    """`arithmetic`, `word_problems` or `code` (generated), `reasoning_gym` (one of its data sets),
    `jsonl`, `csv` or `parquet` (a file), `hub` (a data set of the Hugging Face hub), `env` (the
    environment draws the tasks), or a source of your own by its entry point, `my_module:MyTasks`.
    """
    dataset: str | None = None
    """Name of a data set of reasoning-gym, e.g. "gcd"; id or folder of a data set of the hub;
    passed on to a source of your own."""
    subset: str | None = None
    """Name of the subset, for a data set of the hub that has several."""
    split: str = "train"
    """Name of the split to use, for a data set of the hub."""
    path: Annotated[Path | None, BeforeValidator(_expanded)] = None
    """A file with one JSON object per line, a CSV or a parquet file; see docs/data.md."""
    question_column: str = "question"
    """Column that holds the question, in files and data sets of the hub; dots lead into objects."""
    answer_column: str = "answer"
    """Column that holds the answer, likewise."""
    answer_pattern: str | None = None
    """Regular expression whose one group is the answer within the column's text, or `gsm8k` for
    columns that end with `#### 72`; None: the whole text, or what follows `####` on a last line."""
    broken_rows: Literal["fatal", "skip"] = "fatal"
    """What to do with a row that cannot be read: refuse the data, or leave the row out. Either way
    the row is named."""
    min_question_chars: int = Field(default=0, ge=0)
    """Leave out rows with a shorter question, in characters."""
    max_question_chars: int | None = Field(default=None, ge=1)
    """Leave out rows with a longer question, in characters; None: no limit."""
    seed: int = Field(default=0, ge=0)
    """Seed of the generated tasks. The order of tasks follows the seed of the run."""

    @model_validator(mode="after")
    def _check_source(self) -> SourceConfig:
        is_foreign = self.source not in _SOURCE_NAMES
        if is_foreign and not _ENTRY_POINT.fullmatch(self.source):
            raise ValueError(
                f"there is no source {self.source!r}: use one of "
                f"{', '.join(map(repr, _SOURCE_NAMES))}, or 'my_module:MyTasks' for your own"
            )
        needs = {"reasoning_gym": "dataset", "hub": "dataset"}
        needs |= {"jsonl": "path", "csv": "path", "parquet": "path"}
        needed = needs.get(self.source)
        for name in ("dataset", "path"):
            is_given = getattr(self, name) is not None
            if name == needed and not is_given:
                raise ValueError(f"the source {self.source!r} needs a {name}")
            is_taken = name == needed or (is_foreign and name == "dataset")
            if is_given and not is_taken:
                takers = " or ".join(map(repr, (key for key in needs if needs[key] == name)))
                raise ValueError(
                    f"the source {self.source!r} does not take a {name}: set source to {takers}"
                )
        of_rows = {"question_column", "answer_column", "answer_pattern", "broken_rows"}
        of_rows |= {"min_question_chars", "max_question_chars"}
        changed = _changed(self)
        foreign = set() if self.source == "hub" else changed & {"subset", "split"}
        if self.source not in FILE_SOURCES:
            foreign |= changed & of_rows
        if foreign:
            raise ValueError(f"the source {self.source!r} does not take a {sorted(foreign)[0]}")
        return self


class TrainingSource(SourceConfig):
    """Where tasks to train on come from. One question in eight is held out, by its hash, unless
    `eval.data` names data of its own.
    """

    num_tasks: int = Field(default=100_000, ge=1)
    """Tasks per epoch, for sources that generate tasks; files ignore it."""


class MixedSource(TrainingSource):
    """One source of a mixture."""

    weight: float = Field(default=1.0, gt=0.0)
    """Share of the tasks that come from this source, relative to the sum of all weights."""


class DataConfig(TrainingSource):
    """The tasks that a run trains on."""

    mix: tuple[MixedSource, ...] = ()
    """Several sources, mixed by weight, instead of a single one."""

    @property
    def sources(self) -> tuple[TrainingSource, ...]:
        """Its sources: those of the mixture, or itself."""
        return self.mix or (self,)

    @model_validator(mode="after")
    def _check_mix(self) -> DataConfig:
        beside = sorted(_changed(self) - {"mix"})
        if self.mix and beside:
            raise ValueError(f"{beside[0]} belongs into each source of mix, not beside it")
        return self


def _is_below(name: str) -> bool:
    """Whether a name is that of a folder below the one that it is relative to."""
    path = Path(name)
    is_name = bool(name.strip()) and "\0" not in name and bool(path.parts)
    return is_name and not path.is_absolute() and ".." not in path.parts


def _changed(section: Section) -> set[str]:
    """Keys with another value than their default: a saved config has every key in it."""
    fields = type(section).model_fields
    return {name for name, field in fields.items() if getattr(section, name) != field.default}


OnUpdate = Literal["wait", "keep", "drop"]
"""What new weights do to running completions; see `RolloutConfig.on_update`."""


class EpisodeConfig(Section):
    """Limits of one episode, and how its turns are sampled."""

    max_turn_tokens: int = Field(default=2048, ge=1)
    """Limit of one completion, in tokens."""
    max_observation_tokens: int = Field(default=512, ge=1)
    """Limit of a tool output, in tokens; a longer one is cut in its middle."""
    temperature: float = Field(default=1.0, gt=0.0)
    """Sampling temperature. The same distribution is trained."""
    generate_timeout_s: float = Field(default=600.0, gt=0.0)
    """Deadline of one completion in seconds, including the time in the queue."""
    env_timeout_s: float = Field(default=60.0, gt=0.0)
    """Deadline of one call of the environment, in seconds."""


class RolloutConfig(EpisodeConfig, OverlongConfig):
    """How trajectories are collected."""

    groups_per_step: int = Field(default=16, ge=1)
    """Number of tasks, and so of groups, per training step."""
    group_size: int = Field(default=8, ge=1)
    """Trajectories per task."""
    max_staleness: int = Field(default=0, ge=0)
    """Steps by which the weights of a trajectory may lag; 0 is exactly on-policy rollouts."""
    hold: bool = False
    """For studies of staleness: train only when every group in flight has ended, so that weights
    lag by exactly `max_staleness` steps (fewer in the first steps). Sampling and training then take
    turns."""
    on_update: OnUpdate = "wait"
    """What happens to running completions when new weights arrive: `wait` loads the weights after
    they have ended; `keep` lets them go on, each range of tokens with its own version and logprobs;
    `drop` starts them again."""
    void_turns: Literal["keep", "mask_turn", "mask_trajectory"] = "mask_trajectory"
    """What a turn with neither a complete call nor an answer takes out of the loss."""
    trace_credit: Literal["equal", "token", "last"] = "equal"
    """What the traces of an episode count for, all of which have its advantage: each as a sequence;
    all together as one sequence, in which each token weighs the same; or only the trace that ends
    the episode is trained on. The first two differ where sequences are averaged."""
    max_refills: int = Field(default=0, ge=0)
    """Number of groups without signal, e.g. with equal rewards, that a step may replace by new
    groups; 0: they are trained on, and teach nothing."""


class AgentsConfig(Section):
    """Whole agents as environments (`Agent-v0`), which speak to the gateway."""

    train_on: Literal["answer", "longest", "all"] = "answer"
    """Which traces of an episode are trained on: the one in which its last completion was sampled,
    the one with most sampled tokens, or all. They share the episode's advantage."""
    calls: Literal["template", "fenced"] = "template"
    """How the model writes calls of tools: as its chat template does, or as Python blocks between
    fences, which call the only tool of a request."""
    python: dict[str, Any] = Field(default_factory=dict)
    """Settings of the sandboxed Python that agents are offered: `sandbox`, `limits`,
    `max_output_chars` and `stateful`."""


# --------------------------------------------------------------------------- the engine
#
# Nothing outside an engine's own folder asks which kind of engine a run has. It asks the section:
# how many GPUs the engine takes, how far its logprobs may be off, whether it can repeat its draws.
# The defaults of `EngineSettings` promise as little as possible; a kind overrides what it does
# better.


LOGPROB_TOLERANCE = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.05, "int8": 0.1, "fp8": 0.3}
"""Mean |difference of logprobs| that an arithmetic explains, in nats per token."""

_NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_CPU_CACHE_TOKENS = 65536
_NOISE_TOLERANCE = 1.5  # nats per unit of noise on the logits


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """What an engine takes in one place, in bytes."""

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

    @property
    def num_processes(self) -> int:
        """Servers that one engine starts."""
        return 0

    def without_adapters(self, on_update: OnUpdate) -> str | None:
        """Say why it cannot sample with adapters beside its weights; None: it can.

        Args:
            on_update: What new weights do to running completions.
        """
        return f'engine.type = "{self.type}" does not take them'

    def memory_by_place(
        self, device: str, *, num_parameters: int, num_tokens: int, numbers_per_token: int
    ) -> dict[str, EngineMemory]:
        """Estimate what one engine takes: of this machine ("cpu") and of its GPUs ("gpu N").

        Args:
            device: Where the trainer computes: "cpu", or "cuda", which is the first GPU.
            num_parameters: Size of the model.
            num_tokens: Most tokens that running completions can need in its cache.
            numbers_per_token: Numbers that the cache keeps per token, over all layers.
        """
        return {}

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
    """Kind of the engine: `transformers`, `sglang`, `vllm` or `custom`."""
    max_cache_tokens: int = Field(default=131072, ge=1)
    """Bound of its cache of keys and values, in tokens; requests wait for room."""
    precision: Literal["float32", "bfloat16", "float16", "int8", "fp8"] = "float32"
    """`bfloat16`: all of the engine's arithmetic, in half the memory, and faster on GPUs and on
    CPUs with AMX or avx512_bf16. `float16`: likewise, for a trainer with the same `trainer.dtype`.
    For studies of mismatch: `int8` and `fp8` (e4m3) round the matrices of the decoder layers, with
    one scale per output row."""
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

    def without_adapters(self, on_update: OnUpdate) -> str | None:
        """It takes them."""
        return None

    @property
    def logprob_tolerance(self) -> float:
        """Of its precision, and of the noise on its logits."""
        return LOGPROB_TOLERANCE[self.precision] + _NOISE_TOLERANCE * self.logit_noise

    def memory_by_place(
        self, device: str, *, num_parameters: int, num_tokens: int, numbers_per_token: int
    ) -> dict[str, EngineMemory]:
        """It computes where the trainer does."""
        number = _NUMBER_BYTES["float32"]
        cached = min(self.max_cache_tokens, num_tokens)
        taken = EngineMemory(number * num_parameters, number * cached * numbers_per_token)
        return {"cpu" if device == "cpu" else "gpu 0": taken}


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
    """Bound of a server's cache of keys and values, in tokens; None: the free memory of its GPUs,
    or 65,536 tokens on a CPU, where a server would otherwise take the trainer's memory."""
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
    def cache_tokens(self) -> int | None:
        """Bound of a server's cache, in tokens; None: the free memory of its GPUs."""
        if self.max_cache_tokens is None and self.device == "cpu":
            return _CPU_CACHE_TOKENS
        return self.max_cache_tokens

    @property
    def gpus(self) -> range:
        """From `first_gpu` on, those of all servers that it starts."""
        count = self.tensor_parallel * self.num_processes if self.device == "cuda" else 0
        return range(self.first_gpu, self.first_gpu + count)

    @property
    def logprob_tolerance(self) -> float:
        """Of its dtype."""
        return LOGPROB_TOLERANCE[self.dtype]

    def memory_by_place(
        self, device: str, *, num_parameters: int, num_tokens: int, numbers_per_token: int
    ) -> dict[str, EngineMemory]:
        """That of its servers; nothing where they take turns with the trainer.

        Without a bound, a cache takes a share of what is free, and so always fits.
        """
        cached = 0 if self.cache_tokens is None else self.cache_tokens
        number = _NUMBER_BYTES[self.dtype]
        weights, cache = number * num_parameters, number * cached * numbers_per_token
        if self.returns_memory:
            return {}
        if self.device == "cpu":
            return {"cpu": EngineMemory(self.num_processes * weights, self.num_processes * cache)}
        share = EngineMemory(weights // self.tensor_parallel, cache // self.tensor_parallel)
        return {f"gpu {each}": share for each in self.gpus}


class SGLangConfig(ServersConfig):
    """SGLang servers: started by the run, or running already. A lost server is started again."""

    factory: ClassVar[str] = "tir_alp.engines.sglang.engine:open_sglang"

    type: Literal["sglang"]
    """Kind of the engine: `transformers`, `sglang`, `vllm` or `custom`."""
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

    def without_adapters(self, on_update: OnUpdate) -> str | None:
        """It takes them in servers that it starts, which keep their weights, between completions.

        A request names its adapter once, so that one which goes on would go on with the old one.
        """
        refusals = {
            "engine.urls names servers that run already": bool(self.urls),
            "engine.router is set, and a router does not pass an adapter on": self.router != "none",
            "engine.release_memory frees the weights that they extend": self.release_memory,
            f'rollout.on_update = "{on_update}" changes them in a completion': on_update != "wait",
        }
        return next((reason for reason, holds in refusals.items() if holds), None)

    @property
    def returns_memory(self) -> bool:
        """As `release_memory` says."""
        return self.release_memory


class VLLMConfig(ServersConfig):
    """A vLLM server, which the run starts with a Python of its own."""

    factory: ClassVar[str] = "tir_alp.engines.vllm.engine:open_vllm"

    type: Literal["vllm"]
    """Kind of the engine: `transformers`, `sglang`, `vllm` or `custom`."""
    python: Path
    """The Python that vLLM is installed for: vLLM needs other packages than the trainer."""

    def without_adapters(self, on_update: OnUpdate) -> str | None:
        """It takes them."""
        return None


class CustomEngineConfig(EngineSettings):
    """An engine from outside this package, which says here what it can do."""

    install_hint: ClassVar[str] = (
        "see that Python finds it, e.g. by PYTHONPATH, or correct engine.factory"
    )

    type: Literal["custom"]
    """Kind of the engine: `transformers`, `sglang`, `vllm` or `custom`."""
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
    takes_adapters: bool = False
    """Whether it samples with the adapters of LoRA beside its weights. Its context then has their
    rank and scale, and `load_weights` gets the adapters alone."""

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

    def without_adapters(self, on_update: OnUpdate) -> str | None:
        """As `takes_adapters` says."""
        return None if self.takes_adapters else "engine.takes_adapters is false"

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


# --------------------------------------------------------------------------- the trainer


class LoraConfig(Section):
    """Adapters of low rank on every linear layer except the head; nothing else is trained.

    At first they change nothing: one factor is random, the other is 0.
    """

    rank: int = Field(default=16, ge=1)
    """Rank of the matrices that are added."""
    alpha: float = Field(default=32.0, gt=0.0)
    """The added matrices are scaled by alpha / rank."""
    sync: Literal["auto", "adapter", "merged"] = "auto"
    """What the engine gets: the adapters, which it applies beside the weights that it started with,
    or weights into which they are merged, where an update that is small beside a weight is lost to
    rounding. `auto`: adapters if the engine takes them."""

    @property
    def wants_adapters(self) -> bool:
        """Whether an engine that takes adapters gets them."""
        return self.sync != "merged"


Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


_CHUNK_LOGITS = 1 << 26


class TrainerConfig(Section):
    """The optimizer, and the device, precision and memory of the training step."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the policy is trained and where the embedded engine samples: `cuda` is a GPU, `auto` is
    a GPU if there is one."""
    lr: float = Field(default=1e-6, gt=0.0)
    """Learning rate of the weights: the largest one, if `schedule` changes it."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How `lr` falls over `steps` after the warm-up: not at all, along a line, or along half a
    cosine. It is a function of the step and of `steps`: where a resumed run is given another
    `steps`, the rate goes on as if the run had had that many from its start, and so jumps."""
    warmup_steps: int = Field(default=0, ge=0)
    """Number of steps at the start over which the rate rises linearly up to `lr`."""
    min_lr_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of `lr` at which a `linear` or `cosine` schedule ends."""
    perturbation_lr: float = Field(default=5e-4, gt=0.0)
    """Learning rate of log sigma; constant, whatever `schedule` is."""
    weight_decay: float = Field(default=0.01, ge=0.0)
    """Weight decay of AdamW for the weights; log sigma has none."""
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    """The two decay rates of AdamW."""
    max_grad_norm: float = Field(default=1.0, gt=0.0)
    """Bound of the gradient norm of the weights, and, separately, of that of log sigma."""
    skip_grad_spike: float | None = Field(default=None, gt=1.0)
    """Skip an update whose gradient norm exceeds this multiple of the median of earlier norms;
    None: skip only updates that are not finite."""
    updates_per_step: int = Field(default=1, ge=1)
    """Optimizer updates per step; the groups of the step are divided evenly over them."""
    micro_batch_tokens: int = Field(default=16384, ge=1)
    """Tokens that a forward pass computes; a longer trajectory has a forward pass of its own."""
    share_prompts: bool = True
    """Compute what prompts of a group begin with alike once per micro-batch, instead of once per
    trajectory: its prompt, and what the traces of a rewritten history have in common. The result is
    the same."""
    logprob_chunk_tokens: int | None = Field(default=None, ge=1)
    """Number of tokens whose logits are in memory at the same time; None: as many as have 2**26
    logits, which take 256 MB, so that memory does not grow with the vocabulary."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""
    offload_activations: bool = False
    """Keep the inputs of recomputed layers in CPU memory until the backward pass, for sequences
    whose layers' inputs do not fit on the GPU; needs `gradient_checkpointing`."""
    sequence_parallel: int = Field(default=1, ge=1)
    """Number of ranks that divide the tokens of each forward pass, for sequences that do not fit on
    one; it divides the number of ranks (`cluster.trainer.count`) and that of attention heads. The
    update is the same."""
    replay_routing: bool = True
    """Let a mixture of experts compute each token with the experts that computed it in the engine,
    where the engine reports them. It weights them by its own scores, so routers are trained too."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the forward and backward pass. The trained weights, the sums of their gradients
    over ranks and micro-batches, sigma and the noise are always float32. `float16` rounds eight
    times as finely as `bfloat16` and overflows sooner: the loss is scaled for the backward pass,
    and an update whose gradient overflows is skipped and halves the scale."""
    offload: bool = False
    """Keep weights, gradients and optimizer state in CPU memory while they are not used."""
    lora: LoraConfig | None = None
    """Train adapters instead of the weights; None: train the weights."""
    rank_timeout_s: float = Field(default=600.0, gt=0.0)
    """Deadline of each collective operation in seconds: how long ranks wait for a late one."""

    @model_validator(mode="after")
    def _check_memory(self) -> TrainerConfig:
        if self.offload_activations and not self.gradient_checkpointing:
            raise ValueError(
                "trainer.offload_activations keeps the inputs of recomputed layers in CPU memory: "
                "set trainer.gradient_checkpointing = true as well"
            )
        return self

    def chunk_tokens(self, num_words: int) -> int:
        """Number of tokens whose logits over `num_words` words are in memory at the same time."""
        return self.logprob_chunk_tokens or max(1, _CHUNK_LOGITS // num_words)


DoctorCheck = Literal[
    "memory",
    "disk",
    "template",
    "sandbox",
    "tokenizer",
    "ids",
    "logprobs",
    "stop",
    "sync",
]
"""Names of the checks before a run starts; docs/audit.md describes them."""


_SET_NAME = r"[\w.-]+"


class EvalSource(SourceConfig):
    """Tasks to evaluate on. All rows of a file are used, and none of them is trained on; a source
    that generates tasks gives questions that no training source generates.
    """

    name: str = Field(default="", pattern=rf"^({_SET_NAME})?$")
    """Name of its metrics, `eval/<name>/accuracy` and others; empty: named after its source."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first so many tasks; None: all rows of a file, or `eval.num_tasks` of a source
    that generates them."""

    @property
    def label(self) -> str:
        """Its name, or else what it was read from."""
        if self.name:
            return self.name
        named = self.path.name.split(".")[0] if self.path is not None else None
        text = named or self.dataset or self.source
        return re.sub(rf"[^{_SET_NAME[1:-2]}]+", "-", text.rpartition("/")[2]) or self.source


class EvalConfig(Section):
    """Evaluation on held-out tasks, before and after training."""

    data: tuple[EvalSource, ...] = ()
    """Data to evaluate on; empty: one question in eight of the training data, which is then not
    trained on."""
    num_tasks: int = Field(default=256, ge=1)
    """Number of held-out tasks, where they are cut from the training data or generated."""
    samples: int = Field(default=1, ge=1)
    """Sampled trajectories per task: the k of avg@k and pass@k."""
    every: int = Field(default=0, ge=0)
    """Also evaluate after every this many steps; 0: only before and after training."""
    greedy: bool = True
    """Also play one greedy trajectory per task."""

    @model_validator(mode="after")
    def _check_names(self) -> EvalConfig:
        labels = [each.label for each in self.data]
        if twice := sorted({each for each in labels if labels.count(each) > 1}):
            raise ValueError(
                f"two sources of eval.data are named {twice[0]!r}: give each a name of its own"
            )
        return self


class MetricsConfig(Section):
    """What is measured besides what training needs anyway."""

    clean_every: int = Field(default=10, ge=0)
    """Steps between measurements of the policy without ALP's noise on all tokens of a step, by a
    forward without gradient (`ratio_clean/*`, `kl_clean/*`); methods without noise report the same
    metrics in the same steps, at no cost. 0: never."""


class RecordsConfig(Section):
    """What is recorded of a run for people to read; the audit needs none of it."""

    max_text_chars: int = Field(default=20_000, ge=0)
    """Longest text of a prompt, completion or observation in `trajectories/`, in characters; a
    longer one loses its middle. 0: token ids alone."""
    max_token_values: int = Field(default=1_000_000, ge=0)
    """Loss tokens of a step of which `tokens/` holds what the loss saw: logprobs, log ratio,
    entropy, clipping. Trajectories that do not fit any more are left out. 0: none is written."""


class CheckpointConfig(Section):
    """When checkpoints are written, and how many are kept."""

    every: int = Field(default=20, ge=0)
    """Steps between checkpoints; 0: only after the last step."""
    keep: int = Field(default=2, ge=1)
    """Number of newest checkpoints that are kept."""
    best: bool = True
    """Also keep the checkpoint with the best `eval/accuracy`, if there are evaluations between the
    first and the last step (`eval.every`)."""


class DoctorConfig(Section):
    """The checks at the start of a run."""

    ignore: tuple[DoctorCheck, ...] = ()
    """Checks that may fail: the run prints a warning and starts anyway."""


class ActorsConfig(Section):
    """Actors of one kind, all alike. Each is one process on one node."""

    count: int = Field(default=1, ge=0)
    """Number of actors."""
    cpus: float = Field(default=1.0, gt=0.0)
    """CPU cores that Ray reserves for each actor."""
    gpus: float = Field(default=0.0, ge=0.0)
    """GPUs of each actor. Two actors with half a GPU each share one, e.g. an engine and a rank."""
    image: str | None = None
    """Docker image that each actor runs in; None: what is installed on its node."""


class ClusterConfig(Section):
    """The processes over which a run is spread, and when one of them counts as lost."""

    address: str = "none"
    """`none`: one process, no cluster, and all other keys of this section are ignored. `local`: a
    Ray cluster on this machine, for this run. Else the address of a running cluster: `auto`, or
    `ray://HOST:10001`."""
    trainer: ActorsConfig = ActorsConfig()
    """Ranks of the trainer."""
    engines: ActorsConfig = ActorsConfig()
    """Engines, which sample."""
    environments: ActorsConfig = ActorsConfig()
    """Runners of environments and graders."""
    sandboxes: ActorsConfig = ActorsConfig(count=0)
    """Hosts of the sandbox that `env.kwargs.sandbox` describes; 0: each environment runner has its
    own."""
    spread: bool = False
    """Put actors on as many nodes as there are; else on as few as possible."""
    heartbeat_s: float = Field(default=5.0, gt=0.0)
    """Time between two health checks of an actor."""
    patience_s: float = Field(default=30.0, gt=0.0)
    """An actor that does not answer a health check within this time is killed and replaced."""
    start_timeout_s: float = Field(default=600.0, gt=0.0)
    """Deadline of an actor's start: placing the process, loading the model."""
    step_timeout_s: float = Field(default=3600.0, gt=0.0)
    """Deadline of a training step, and of taking new weights."""

    @property
    def is_used(self) -> bool:
        """Whether the run has processes other than its own."""
        return self.address != "none"

    @property
    def actors(self) -> dict[str, ActorsConfig]:
        """The actors by kind, in the order in which they are placed."""
        return {
            "trainer": self.trainer,
            "engines": self.engines,
            "environments": self.environments,
            "sandboxes": self.sandboxes,
        }

    @model_validator(mode="after")
    def _check_counts(self) -> ClusterConfig:
        for kind in ("trainer", "engines", "environments"):
            if self.actors[kind].count < 1:
                raise ValueError(f"cluster.{kind}.count is 0: a run needs at least one")
        return self


def _check_name(name: str | None) -> str | None:
    if name is not None and not _is_below(name):
        raise ValueError(f"{name!r} is not the name of a folder below runs/")
    return name


RunName = Annotated[str | None, AfterValidator(_check_name)]
"""The name of a folder below `runs/`."""

TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]


class Config(Section):
    """A whole run."""

    name: RunName = None
    """Name of the run's folder below `runs/`; None: made of algorithm, seed and time."""
    seed: int = Field(default=0, ge=0)
    """Root seed of sampling, of the noise and of the order of tasks."""
    steps: int = Field(default=100, ge=0)
    """Number of training steps. Each takes groups, updates, and gives the engine new weights."""
    deterministic: bool = False
    """Process work in logical order, not as it arrives, so that equal runs are equal bit for bit on
    a CPU."""
    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    """Where metrics go besides `metrics.jsonl`: `tensorboard`, `wandb`, `trackio`, `mlflow`; empty:
    nowhere. Each has a package of its own and environment variables for its settings."""
    algorithm: Annotated[AlgorithmConfig, BeforeValidator(resolve_algorithm)] = ALGORITHMS[
        "alp_sequence"
    ]
    """The name of a preset, or its values with some of them changed."""
    model: ModelConfig = ModelConfig()
    env: EnvConfig = EnvConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    agents: AgentsConfig = AgentsConfig()
    engine: EngineConfig = TransformersConfig()
    trainer: TrainerConfig = TrainerConfig()
    guards: GuardsConfig = GuardsConfig()
    metrics: MetricsConfig = MetricsConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    records: RecordsConfig = RecordsConfig()
    doctor: DoctorConfig = DoctorConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def adapters(self) -> LoraConfig | None:
        """The adapters that the engine gets in place of weights; None: it gets whole weights."""
        lora, reason = self.trainer.lora, self.engine.without_adapters(self.rollout.on_update)
        return lora if lora is not None and lora.wants_adapters and reason is None else None

    @property
    def num_kept_versions(self) -> int:
        """Versions of the trained weights that the trainer keeps besides the current ones."""
        algorithm = self.algorithm
        is_read = algorithm.needs_proximal and algorithm.proximal == "rollout_version"
        return self.rollout.max_staleness if is_read else 0

    @model_validator(mode="after")
    def _check(self) -> Config:
        rollout, trainer = self.rollout, self.trainer
        if rollout.max_turn_tokens >= rollout.max_context_tokens:
            raise ValueError(
                f"rollout.max_turn_tokens ({rollout.max_turn_tokens}) leaves no room for a prompt "
                f"in rollout.max_context_tokens ({rollout.max_context_tokens})"
            )
        if rollout.hold and not rollout.max_staleness:
            raise ValueError(
                "rollout.hold needs rollout.max_staleness > 0: without it nothing is held back"
            )
        self.engine.check(
            deterministic=self.deterministic,
            on_update=rollout.on_update,
            max_staleness=rollout.max_staleness,
        )
        lora, reason = trainer.lora, self.engine.without_adapters(rollout.on_update)
        if lora is not None and lora.sync == "adapter" and reason is not None:
            raise ValueError(
                f'trainer.lora.sync = "adapter" needs an engine that takes adapters, and {reason}: '
                'set it to "merged"'
            )
        if self.deterministic and rollout.max_staleness and not rollout.hold:
            raise ValueError(
                "deterministic needs rollout.max_staleness = 0 or rollout.hold = true: with "
                "rollouts ahead of the weights the order of work follows the clock"
            )
        if self.deterministic and rollout.max_refills:
            raise ValueError(
                "deterministic needs rollout.max_refills = 0: when a group turns out to have no "
                "signal, and so what its replacement is batched with, follows the clock"
            )
        if self.algorithm.acceptance is not None and rollout.max_staleness:
            raise ValueError(
                "algorithm.acceptance needs rollout.max_staleness = 0, and it is "
                f"{rollout.max_staleness}: updates are judged by what the engine samples with "
                "their weights, in the next step"
            )
        if rollout.hold and rollout.max_refills:
            raise ValueError(
                "rollout.hold needs rollout.max_refills = 0: replacements of groups are sampled "
                "with newer weights"
            )
        if rollout.overlong_buffer_tokens >= rollout.max_context_tokens:
            raise ValueError(
                f"rollout.overlong_buffer_tokens ({rollout.overlong_buffer_tokens}) is not less "
                f"than rollout.max_context_tokens ({rollout.max_context_tokens})"
            )
        count, team = self.cluster.trainer.count, trainer.sequence_parallel
        if self.cluster.is_used and count % team:
            raise ValueError(
                f"trainer.sequence_parallel ({team}) does not divide the number of ranks, "
                f"cluster.trainer.count ({count})"
            )
        if rollout.groups_per_step % trainer.updates_per_step:
            raise ValueError(
                f"rollout.groups_per_step ({rollout.groups_per_step}) cannot be divided evenly "
                f"over trainer.updates_per_step ({trainer.updates_per_step})"
            )
        return self


# --------------------------------------------------------------------------- supervised fine-tuning


class TranscriptsConfig(Section):
    """The conversations that supervised fine-tuning imitates; docs/sft.md has their forms."""

    source: Literal["jsonl", "parquet", "hub", "run"] = "jsonl"
    """A file, a data set of the Hugging Face hub, or the trajectories of a run or an evaluation."""
    path: Annotated[Path | None, BeforeValidator(_expanded)] = None
    """The file, or the folder of the run or evaluation."""
    dataset: str | None = None
    """Id or folder of a data set of the hub."""
    subset: str | None = None
    """Name of the subset, for a data set of the hub that has several."""
    split: str = "train"
    """Name of the split to use, for a data set of the hub."""
    column: str | None = None
    """Column that holds the messages; None: `messages` or `conversations`, whichever there is."""
    broken_rows: Literal["fatal", "skip"] = "fatal"
    """What to do with a row that cannot be read: refuse the data, or leave the row out. Either way
    the row is named."""
    min_reward: float = 1.0
    """For a run or an evaluation: leave out trajectories with a lower reward."""
    held_out: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of the conversations that is not trained on; the loss on it is reported. Which ones is
    decided by a hash of the first message, so that equal tasks stay together."""

    @model_validator(mode="after")
    def _check_source(self) -> TranscriptsConfig:
        needed = "dataset" if self.source == "hub" else "path"
        for name in ("path", "dataset"):
            is_given = getattr(self, name) is not None
            if is_given != (name == needed):
                verb = "needs a" if name == needed else "does not take a"
                raise ValueError(f"the source {self.source!r} {verb} {name}")
        return self


class SFTEpisodeConfig(EpisodeConfig):
    """Limits of a conversation; the others hold for the evaluation after training."""

    max_context_tokens: int = Field(default=16384, ge=2)
    """Conversations with more tokens are left out, and named."""


class SFTConfig(Section):
    """A run of supervised fine-tuning."""

    name: RunName = None
    """Name of the run's folder below `runs/`; None: made of seed and time."""
    seed: int = Field(default=0, ge=0)
    """Seed of the order of conversations."""
    epochs: float = Field(default=1.0, gt=0.0)
    """Passes over the conversations."""
    steps: int | None = Field(default=None, ge=0)
    """Number of updates, in place of `epochs`."""
    sequences_per_step: int = Field(default=16, ge=1)
    """Conversations per update."""
    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    """Where metrics go besides `metrics.jsonl`: `tensorboard`, `wandb`, `trackio`, `mlflow`; empty:
    nowhere. Each has a package of its own and environment variables for its settings."""
    model: ModelConfig = ModelConfig()
    env: EnvConfig = EnvConfig()
    data: TranscriptsConfig
    rollout: SFTEpisodeConfig = SFTEpisodeConfig()
    engine: EngineConfig = TransformersConfig()
    trainer: TrainerConfig = TrainerConfig(lr=1e-5)
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    records: RecordsConfig = RecordsConfig()
    doctor: DoctorConfig = DoctorConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _check(self) -> SFTConfig:
        updates = self.trainer.updates_per_step
        if self.sequences_per_step % updates:
            raise ValueError(
                f"sequences_per_step ({self.sequences_per_step}) cannot be divided evenly over "
                f"trainer.updates_per_step ({updates})"
            )
        try:
            self.as_run()
        except ValidationError as error:
            reasons = [each["msg"].removeprefix("Value error, ") for each in error.errors()]
            raise ValueError("; ".join(reasons)) from None
        return self

    def as_run(self) -> Config:
        """The settings that it shares with a run: model, environment, trainer, processes."""
        num_groups = RolloutConfig().groups_per_step  # played at a time, in evaluations
        num_groups += -num_groups % self.trainer.updates_per_step
        return Config(
            name=self.name,
            seed=self.seed,
            steps=self.steps or 0,
            algorithm=NEGATIVE_LOG_LIKELIHOOD,
            model=self.model,
            env=self.env,
            rollout=RolloutConfig(**self.rollout.model_dump(), groups_per_step=num_groups),
            engine=self.engine,
            trainer=self.trainer,
            metrics=MetricsConfig(clean_every=0),
            eval=self.eval,
            checkpoint=self.checkpoint,
            records=self.records,
            doctor=self.doctor,
            cluster=self.cluster,
        )
