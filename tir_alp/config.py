"""Every setting of a run, typed. Unknown keys are errors; a field exists only if it is read."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

from tir_alp.algorithm.presets import (
    ALGORITHMS,
    AlgorithmConfig,
    Section,
    merge,
    resolve_algorithm,
)
from tir_alp.cluster.config import ClusterConfig
from tir_alp.engines.config import EngineConfig, OnUpdate, TransformersConfig


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


class SourceConfig(Section):
    """Where tasks come from. One question in eight is held out, by its hash."""

    source: Literal["arithmetic", "code", "reasoning_gym", "jsonl", "parquet", "hub", "env"] = (
        "arithmetic"
    )
    """Our own arithmetic or small functions to write, a data set of reasoning-gym, a file, a data
    set of the Hugging Face hub, or what the environment draws itself."""
    dataset: str | None = None
    """Name of the data set of reasoning-gym, e.g. "gcd"; id or folder of the one of the hub."""
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
        needs = {"reasoning_gym": "dataset", "hub": "dataset", "jsonl": "path", "parquet": "path"}
        needed = needs.get(self.source)
        for name in ("dataset", "path"):
            if (getattr(self, name) is None) == (name == needed):
                verb = "needs" if name == needed else "does not take"
                raise ValueError(f"the source {self.source!r} {verb} a {name}")
        of_rows = {"question_column", "answer_column", "broken_rows"}
        of_rows |= {"min_question_chars", "max_question_chars"}
        changed = _changed(self)
        foreign = set() if self.source == "hub" else changed & {"subset", "split"}
        if self.source not in ("jsonl", "parquet", "hub"):
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


class RolloutConfig(Section):
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
    on_update: OnUpdate = "wait"
    """What new weights do to completions that are being sampled: they wait until those have ended,
    let them go on, each token range with its own version and logprobs, or make them begin again."""
    max_turn_tokens: int = Field(default=2048, ge=1)
    """Limit of one completion."""
    max_context_tokens: int = Field(default=16384, ge=2)
    """Limit of a whole trajectory; one that reaches it is truncated."""
    max_observation_tokens: int = Field(default=512, ge=1)
    """A longer tool output loses tokens in its middle."""
    temperature: float = Field(default=1.0, gt=0.0)
    """Of the sampled distribution, which is also the one that is trained."""
    void_turns: Literal["keep", "mask_turn", "mask_trajectory"] = "mask_trajectory"
    """What a turn with neither a code block nor an answer takes out of the loss (spec 3)."""
    overlong: Literal["keep", "mask_turn", "mask_trajectory", "zero_advantage"] = "keep"
    """What a limit takes out of the loss: the completion that it cut, or the whole trajectory that
    it cut or ended; `zero_advantage` lets that count in the loss's denominator."""
    overlong_buffer_tokens: int = Field(default=0, ge=0)
    """Over the last so many tokens before max_context_tokens, the reward that counts in advantages
    falls by up to 1; 0: not."""
    max_refills: int = Field(default=0, ge=0)
    """Groups without signal, e.g. with equal rewards, that a step may replace by others; 0: they
    are trained on, and teach nothing."""
    generate_timeout_s: float = Field(default=600.0, gt=0.0)
    """Deadline of one completion, queueing included."""
    env_timeout_s: float = Field(default=60.0, gt=0.0)
    """Deadline of one call of the environment."""


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
    "config",
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


class GuardsConfig(Section):
    """Bounds that a healthy run keeps. All are off unless set."""

    max_kl: float | None = Field(default=None, gt=0.0)
    """Bound of |kl/rollout|, in nats a token."""
    max_ratio_spread: float | None = Field(default=None, gt=1.0)
    """Bound of P98 over P2 of the sequence ratios."""
    on_trip: Literal["stop", "roll_back"] = "stop"
    """End the run, or take up the weights, optimizer and sigma of the newest checkpoint and go on
    with new groups. `events.jsonl` in the run's folder says when and why."""
    max_roll_backs: int = Field(default=3, ge=1)
    """So many times; the next stops the run."""


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


class Config(BaseSettings):
    """A whole run."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

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

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: Any, **_: Any
    ) -> tuple[Any, ...]:
        """Take values from the caller alone: nothing comes from environment variables."""
        return (init_settings,)

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
        self.engine.check(
            deterministic=self.deterministic,
            on_update=rollout.on_update,
            max_staleness=rollout.max_staleness,
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


def read_toml(file: Path) -> dict[str, Any]:
    """Read a config file. Raises ValueError if it is not there or not TOML."""
    try:
        return tomllib.loads(file.read_text())
    except OSError as error:
        raise ValueError(f"cannot read the config {str(file)!r}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file} is not valid TOML: {error}") from error


def load_config(arguments: Sequence[str], below: Mapping[str, Any]) -> Config:
    """Build a run's config: defaults, then `below`, then `--dotted.key value` arguments.

    Where the arguments name another environment than `below`, its `env.kwargs` are left out.

    Args:
        arguments: Words of a command line.
        below: What a file says.

    Raises:
        ValueError: With one line for each key that is unknown or has a wrong value.
    """
    # `--algorithm grpo` names a preset; as an option of its own it would hide `--algorithm.*`.
    short = {"--algorithm": "--algorithm.name", "--cluster": "--cluster.address"}
    words = [word.partition("=") for word in arguments]
    spelled = ["".join((short.get(name, name), *rest)) for name, *rest in words]
    try:
        source = CliSettingsSource(Config, cli_parse_args=spelled, cli_exit_on_error=False)
        from_command_line = source()
    except SettingsError as error:
        raise ValueError(str(error).removeprefix("error parsing CLI: ")) from error
    below = {"algorithm": Config.model_fields["algorithm"].default.name, **below}
    if isinstance(below["algorithm"], str):
        below["algorithm"] = {"name": below["algorithm"]}
    named = from_command_line.get("env", {}).get("id")
    if named is not None and named != below.get("env", {}).get("id"):
        below["env"] = {}  # what it says there is about another environment
    return parse_config(merge(below, from_command_line))


def parse_config(values: Mapping[str, Any]) -> Config:
    """Validate a config that is given as nested mappings. Raises ValueError, a line a mistake."""
    try:
        return Config(**values)
    except ValidationError as error:
        lines = []
        for mistake in error.errors():
            place = mistake["loc"]
            if place[:1] == ("engine",):  # behind it stands which of the engines was meant
                place = (place[0], *place[2:])
            key = ".".join(map(str, place)) or "config"
            if mistake["type"] == "extra_forbidden":
                lines.append(f"{key}: there is no such key")
            else:
                lines.append(f"{key}: {mistake['msg']} (it is {mistake['input']!r:.100})")
        raise ValueError("\n".join(lines)) from error
