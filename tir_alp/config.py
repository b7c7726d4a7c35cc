"""Every setting of a run, typed. Unknown keys are errors; a field exists only if it is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from tir_alp.algorithm.advantage import OverlongConfig
from tir_alp.algorithm.guards import GuardsConfig
from tir_alp.algorithm.presets import ALGORITHMS, AlgorithmConfig, resolve_algorithm
from tir_alp.algorithm.section import Section


class ModelConfig(Section):
    """The policy."""

    path: str = "tiny"
    """A Hugging Face folder or id; `tiny` and `tiny-able` come with the package."""
    system: str = ""
    """System prompt; empty for none."""
    rewritten_history: Literal["refuse", "append"] = "refuse"
    """What to do with a chat template that rewrites what was said, e.g. drops thinking: refuse it,
    or append all the same, so that the history is what was sampled."""


class EnvConfig(Section):
    """The environment, a `gymnasium.Env` whose observations and actions are texts."""

    id: str = "tir_alp.envs:PythonMath-v0"
    """What `gymnasium.make` takes: `module:Name-vN`; the module registers it."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to the environment."""


SOURCES = {
    "arithmetic": "tir_alp.envs.tasks:ArithmeticTasks",
    "code": "tir_alp.envs.code_tasks:CodeTasks",
    "reasoning_gym": "tir_alp.envs.tasks:ReasoningGymTasks",
}
"""Entry points of the task sources that come with the package; imported when one is opened."""
FILE_SOURCES = ("jsonl", "parquet", "hub")
_SOURCE_NAMES = (*SOURCES, *FILE_SOURCES, "env")
_ENTRY_POINT = re.compile(r"[^\W\d][\w.]*:[^\W\d][\w.]*")


class SourceConfig(Section):
    """Where tasks come from. One question in eight is held out, by its hash."""

    source: str = "arithmetic"
    """`arithmetic` or `code` (generated), `reasoning_gym` (one of its data sets), `jsonl` or
    `parquet` (a file), `hub` (a data set of the Hugging Face hub), `env` (the environment draws the
    tasks), or a source of your own by its entry point, `my_module:MyTasks`."""
    dataset: str | None = None
    """Name of a data set of reasoning-gym, e.g. "gcd"; id or folder of a data set of the hub;
    passed on to a source of your own."""
    subset: str | None = None
    """Of a data set of the hub that has several."""
    split: str = "train"
    """Of a data set of the hub: what to take of it."""
    path: Path | None = None
    """A file with one JSON object a line, or a parquet file; see `tir_alp.rollouts.data_files`."""
    question_column: str = "question"
    """Of a file's or the hub's rows; dots lead into objects."""
    answer_column: str = "answer"
    """The same for the answer."""
    broken_rows: Literal["fatal", "skip"] = "fatal"
    """What becomes of a row that cannot be read: it is named either way."""
    min_question_chars: int = Field(default=0, ge=0)
    """Rows with a shorter question are left out."""
    max_question_chars: int | None = Field(default=None, ge=1)
    """Rows with a longer question are left out; None: none are."""
    num_tasks: int = Field(default=100_000, ge=1)
    """Tasks in an epoch, where they are generated; a file has as many as it has."""
    seed: int = Field(default=0, ge=0)
    """Which tasks are generated. Their order follows the seed of the run."""

    @model_validator(mode="after")
    def _check_source(self) -> SourceConfig:
        is_foreign = self.source not in _SOURCE_NAMES
        if is_foreign and not _ENTRY_POINT.fullmatch(self.source):
            raise ValueError(
                f"there is no source {self.source!r}: use one of "
                f"{', '.join(map(repr, _SOURCE_NAMES))}, or 'my_module:MyTasks' for your own"
            )
        needs = {"reasoning_gym": "dataset", "hub": "dataset", "jsonl": "path", "parquet": "path"}
        needed = needs.get(self.source)
        for name in ("dataset", "path"):
            is_given = getattr(self, name) is not None
            if name == needed and not is_given:
                raise ValueError(f"the source {self.source!r} needs a {name}")
            is_taken = name == needed or (is_foreign and name == "dataset")
            if is_given and not is_taken:
                raise ValueError(f"the source {self.source!r} does not take a {name}")
        of_rows = {"question_column", "answer_column", "broken_rows"}
        of_rows |= {"min_question_chars", "max_question_chars"}
        changed = _changed(self)
        foreign = set() if self.source == "hub" else changed & {"subset", "split"}
        if self.source not in FILE_SOURCES:
            foreign |= changed & of_rows
        if foreign:
            raise ValueError(f"the source {self.source!r} does not take a {sorted(foreign)[0]}")
        return self


class MixedSource(SourceConfig):
    """One source of a mixture."""

    weight: float = Field(default=1.0, gt=0.0)
    """Its share of the tasks, over the sum of all weights."""


class DataConfig(SourceConfig):
    """Which tasks a run trains on."""

    mix: tuple[MixedSource, ...] = ()
    """Several sources, mixed by weight; instead of the settings of one."""

    @model_validator(mode="after")
    def _check_mix(self) -> DataConfig:
        beside = sorted(_changed(self) - {"mix"})
        if self.mix and beside:
            raise ValueError(f"{beside[0]} belongs into each source of mix, not beside it")
        return self


def _changed(section: Section) -> set[str]:
    """Keys with another value than their default: a saved config has every key in it."""
    fields = type(section).model_fields
    return {name for name, field in fields.items() if getattr(section, name) != field.default}


class RolloutConfig(OverlongConfig):
    """How trajectories are collected."""

    groups_per_step: int = Field(default=16, ge=1)
    """Tasks of a training step."""
    group_size: int = Field(default=8, ge=1)
    """Trajectories a task."""
    max_staleness: int = Field(default=0, ge=0)
    """Steps by which the weights behind a trajectory may lag; 0 is exactly on-policy rollouts."""
    hold: bool = False
    """For studies of staleness: train only when every group in flight has ended, so that weights
    lag by exactly `max_staleness` steps, fewer in the first. Sampling and training take turns."""
    on_update: Literal["wait", "keep", "drop"] = "wait"
    """What new weights do to completions that are being sampled: they wait until those have ended,
    let them go on, each token range with its own version and logprobs, or make them begin again."""
    max_turn_tokens: int = Field(default=2048, ge=1)
    """Limit of one completion."""
    max_observation_tokens: int = Field(default=512, ge=1)
    """A longer tool output loses tokens in its middle."""
    temperature: float = Field(default=1.0, gt=0.0)
    """Of the sampled distribution, which is also the one that is trained."""
    void_turns: Literal["keep", "mask_turn", "mask_trajectory"] = "mask_trajectory"
    """What a turn with neither a code block nor an answer takes out of the loss (spec 3)."""
    max_refills: int = Field(default=0, ge=0)
    """Groups without signal, e.g. with equal rewards, that a step may replace by others; 0: they
    are trained on, and teach nothing."""
    generate_timeout_s: float = Field(default=600.0, gt=0.0)
    """Deadline of one completion, queueing included."""
    env_timeout_s: float = Field(default=60.0, gt=0.0)
    """Deadline of one call of the environment."""


class TransformersConfig(Section):
    """The embedded engine."""

    type: Literal["transformers"] = "transformers"
    max_cache_tokens: int = Field(default=131072, ge=1)
    """Bound of its cache of keys and values, in tokens; requests wait for room."""
    precision: Literal["float32", "bfloat16", "int8", "fp8"] = "float32"
    """For studies of mismatch: `bfloat16` is all of the engine's arithmetic; `int8` and `fp8`
    (e4m3) round the matrices of the decoder layers, one scale an output row."""
    logit_noise: float = Field(default=0.0, ge=0.0)
    """For studies of mismatch: standard deviation of noise on the logits that are sampled from, at
    evaluation too. It is a function of run seed, sequence and position."""


class ServersConfig(Section):
    """What servers of any kind have."""

    device: Literal["cpu", "cuda"] = "cuda"
    """Where the servers compute."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the servers' arithmetic."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs that a server is spread over."""
    first_gpu: int = Field(default=0, ge=0)
    """The servers take the GPUs from this one on."""
    max_running: int = Field(default=64, ge=1)
    """Completions that a server samples at a time; more wait in the trainer."""
    max_cache_tokens: int | None = Field(default=None, ge=1)
    """Bound of a server's cache of keys and values, in tokens; None: what memory there is."""
    start_timeout_s: float = Field(default=600.0, gt=0.0)
    """Deadline of a server's start, the loading of the model included."""
    load_timeout_s: float = Field(default=300.0, gt=0.0)
    """Deadline of each call that moves weights."""
    stall_timeout_s: float = Field(default=120.0, gt=0.0)
    """A server that is silent for so long, in a completion or when asked for its health, is taken
    for lost."""
    arguments: tuple[str, ...] = ()
    """More words of the servers' command line."""


class SGLangConfig(ServersConfig):
    """SGLang servers: started by the run, or there already. One that is lost is started again."""

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
    """How new weights get into the servers: a folder that both sides see, tensors in the request,
    or a broadcast, by NCCL between GPUs and gloo between CPUs."""
    weights_folder: Path | None = None
    """For `disk`: a folder that the servers see, too; None: one below the system's own for
    temporary files."""
    release_memory: bool = False
    """Free the servers' memory, weights and cache, while the trainer computes on the same GPUs."""

    @model_validator(mode="after")
    def _check(self) -> SGLangConfig:
        if self.urls and self.num_servers != 1:
            raise ValueError(
                f"engine.num_servers ({self.num_servers}) is for servers that the run starts, and "
                "engine.urls names some that run already: leave one of them out"
            )
        if self.router not in ("none", "local") and not self.urls:
            raise ValueError(
                f"engine.router = {self.router!r} runs already, and knows nothing of servers that "
                'the run starts: name servers with engine.urls, or take router = "local"'
            )
        return self


class VLLMConfig(ServersConfig):
    """A vLLM server, which the run starts with a Python of its own."""

    type: Literal["vllm"]
    python: Path
    """The Python that vLLM is installed for: it needs other packages than the trainer has."""


def _with_engine_type(value: Any) -> Any:
    """The embedded engine is meant where none is named."""
    return {"type": "transformers", **value} if isinstance(value, Mapping) else value


EngineConfig = Annotated[
    Annotated[TransformersConfig | SGLangConfig | VLLMConfig, Field(discriminator="type")],
    BeforeValidator(_with_engine_type),
]


class LoraConfig(Section):
    """Adapters of low rank on every linear layer but the head; nothing else is trained.

    They begin as no change at all: one factor random, the other 0.
    """

    rank: int = Field(default=16, ge=1)
    """Rank of what is added to a matrix."""
    alpha: float = Field(default=32.0, gt=0.0)
    """What is added is scaled by alpha / rank."""


class TrainerConfig(Section):
    """The optimizer, and where and in what memory it works."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the policy is trained, and where the embedded engine samples: "cuda" is a GPU, "auto" a
    GPU where there is one."""
    lr: float = Field(default=1e-6, gt=0.0)
    """Learning rate of the weights, constant."""
    perturbation_lr: float = Field(default=5e-4, gt=0.0)
    """Learning rate of log sigma."""
    weight_decay: float = Field(default=0.01, ge=0.0)
    """Of the weights; log sigma has none."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Of AdamW."""
    max_grad_norm: float = Field(default=1.0, gt=0.0)
    """The gradient of the weights is scaled down to it; log sigma's has the same bound alone."""
    skip_grad_spike: float | None = Field(default=None, gt=1.0)
    """Skip an update whose gradient norm is more than this many times the median of those before;
    None: skip none but those that are not finite."""
    updates_per_step: int = Field(default=1, ge=1)
    """Optimizer updates that the groups of a step are divided over."""
    micro_batch_tokens: int = Field(default=16384, ge=1)
    """Tokens of one forward; a longer trajectory has one of its own."""
    logprob_chunk_tokens: int = Field(default=2048, ge=1)
    """Tokens whose logits stand in memory at a time."""
    gradient_checkpointing: bool = False
    """Compute each layer a second time in the backward pass instead of keeping what it made."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the forward and backward pass. What is trained, its gradients' sums over ranks and over
    micro-batches, sigma and the noise are float32 in any case."""
    offload: bool = False
    """Keep weights, gradients and optimizer in the memory of the CPU between their uses."""
    lora: LoraConfig | None = None
    """Train adapters instead of the weights; None: the weights."""
    rank_timeout_s: float = Field(default=600.0, gt=0.0)
    """Deadline of what the ranks do together: so long they wait for one that is late."""


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
"""What is checked before a run starts; `docs/audit.md` says how."""


class EvalConfig(Section):
    """Evaluation on held-out tasks, before and after training."""

    num_tasks: int = Field(default=256, ge=1)
    """Held-out tasks."""
    samples: int = Field(default=1, ge=1)
    """Trajectories a task: k of avg@k and pass@k."""
    every: int = Field(default=0, ge=0)
    """Also after every so many steps; 0: not."""
    greedy: bool = True
    """Also take one greedy trajectory a task."""


class CheckpointConfig(Section):
    """What is saved."""

    every: int = Field(default=20, ge=0)
    """Steps between checkpoints; 0: only the last."""
    keep: int = Field(default=2, ge=1)
    """So many newest checkpoints stay."""


class DoctorConfig(Section):
    """The checks at the start of a run."""

    ignore: tuple[DoctorCheck, ...] = ()
    """Those that may fail; the run says so and starts all the same."""


class ActorsConfig(Section):
    """Equal parts of one kind; each is a process that is placed as a whole."""

    count: int = Field(default=1, ge=0)
    """How many of them."""
    cpus: float = Field(default=1.0, gt=0.0)
    """Cores that each is given, of those that the cluster says it has."""
    gpus: float = Field(default=0.0, ge=0.0)
    """GPUs of each. Two actors with half a GPU each share one, such as an engine and a rank."""
    image: str | None = None
    """Docker image that each runs in; None: what its node has installed."""


class ClusterConfig(Section):
    """Which processes a run is spread over, and when one of them counts as lost."""

    address: str = "none"
    """`none`: one process, no cluster, and nothing else here counts. `local`: a Ray cluster on this
    machine, for this run. Else the address of a running one: `auto`, or `ray://HOST:10001`."""
    trainer: ActorsConfig = ActorsConfig()
    """Ranks of the trainer."""
    engines: ActorsConfig = ActorsConfig()
    """What samples."""
    environments: ActorsConfig = ActorsConfig()
    """Where environments and graders run."""
    sandboxes: ActorsConfig = ActorsConfig(count=0)
    """Hosts of the sandbox that `env.kwargs.sandbox` describes; 0: each environment runner has its
    own."""
    spread: bool = False
    """Put parts on as many nodes as there are; else on as few."""
    heartbeat_s: float = Field(default=5.0, gt=0.0)
    """Time between two questions to a part whether it is well."""
    patience_s: float = Field(default=30.0, gt=0.0)
    """A part that has not answered for so long is ended and replaced."""
    start_timeout_s: float = Field(default=600.0, gt=0.0)
    """Deadline of a start: placing the process, loading the model."""
    step_timeout_s: float = Field(default=3600.0, gt=0.0)
    """Deadline of a training step, and of taking new weights."""

    @property
    def is_used(self) -> bool:
        """Whether a run has parts outside its own process."""
        return self.address != "none"

    @model_validator(mode="after")
    def _check_counts(self) -> ClusterConfig:
        for name in ("trainer", "engines", "environments"):
            if getattr(self, name).count < 1:
                raise ValueError(f"cluster.{name}.count is 0: a run needs one at least")
        return self


class Config(Section):
    """A whole run."""

    name: str | None = None
    """Folder of the run below `runs/`; None: made of algorithm, seed and time."""
    seed: int = Field(default=0, ge=0)
    """Root of sampling, noise and order of tasks."""
    steps: int = Field(default=100, ge=0)
    """Training steps: each takes groups, updates, and gives the engine new weights."""
    deterministic: bool = False
    """Admit work in logical order, not as it arrives: equal runs are equal bit for bit on a CPU."""
    algorithm: Annotated[AlgorithmConfig, BeforeValidator(resolve_algorithm)] = ALGORITHMS[
        "alp_sequence"
    ]
    """A preset by name, with any of its values changed."""
    model: ModelConfig = ModelConfig()
    env: EnvConfig = EnvConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    engine: EngineConfig = TransformersConfig()
    trainer: TrainerConfig = TrainerConfig()
    guards: GuardsConfig = GuardsConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    doctor: DoctorConfig = DoctorConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        rollout, trainer = self.rollout, self.trainer
        if rollout.max_turn_tokens >= rollout.max_context_tokens:
            raise ValueError(
                f"rollout.max_turn_tokens ({rollout.max_turn_tokens}) leaves no room for a prompt "
                f"in rollout.max_context_tokens ({rollout.max_context_tokens})"
            )
        if rollout.hold and not rollout.max_staleness:
            raise ValueError("rollout.hold needs a rollout.max_staleness to hold rollouts back for")
        if self.deterministic and isinstance(self.engine, ServersConfig):
            raise ValueError(
                'deterministic needs engine.type = "transformers": what servers draw is not a '
                "function of the run's seed"
            )
        if rollout.on_update != "wait" and isinstance(self.engine, VLLMConfig):
            raise ValueError(
                f'engine.type = "vllm" waits for what runs: leave rollout.on_update = "wait", not '
                f'"{rollout.on_update}"'
            )
        if rollout.on_update == "drop" and isinstance(self.engine, SGLangConfig):
            raise ValueError(
                'rollout.on_update = "drop" needs engine.type = "transformers": what SGLang draws '
                'the second time is something else; take "keep" or "wait"'
            )
        if (
            isinstance(self.engine, SGLangConfig)
            and self.engine.release_memory
            and rollout.max_staleness
        ):
            raise ValueError(
                "engine.release_memory needs rollout.max_staleness = 0: servers without memory "
                f"cannot sample while the trainer computes, and it is {rollout.max_staleness}"
            )
        if self.deterministic and rollout.max_staleness and not rollout.hold:
            raise ValueError(
                "deterministic needs rollout.max_staleness = 0 or rollout.hold = true: with "
                "rollouts ahead of the weights the order of work follows the clock"
            )
        if self.deterministic and rollout.max_refills:
            raise ValueError(
                "deterministic needs rollout.max_refills = 0: when a group turns out to be without "
                "signal, and so what the one in its place shares a forward with, follows the clock"
            )
        if rollout.hold and rollout.max_refills:
            raise ValueError(
                "rollout.hold needs rollout.max_refills = 0: groups in the place of others are "
                "sampled with younger weights"
            )
        if rollout.overlong_buffer_tokens >= rollout.max_context_tokens:
            raise ValueError(
                f"rollout.overlong_buffer_tokens ({rollout.overlong_buffer_tokens}) is not less "
                f"than rollout.max_context_tokens ({rollout.max_context_tokens})"
            )
        if rollout.groups_per_step % trainer.updates_per_step:
            raise ValueError(
                f"rollout.groups_per_step ({rollout.groups_per_step}) cannot be divided evenly "
                f"over trainer.updates_per_step ({trainer.updates_per_step})"
            )
        return self
