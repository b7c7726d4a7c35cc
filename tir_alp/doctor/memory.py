"""Adds up the memory that all processes of a run take, by machine and GPU. Pure.

`needs` is what the doctor compares with this machine; `table` is for people who choose a machine.
The figures are estimates from the model's shape: weights, gradients, moments and caches are exact,
what is kept for the backward pass is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tir_alp.config import Config
from tir_alp.doctor.check_result import CheckResult

MACHINE = "this machine"
_FLOAT = 4  # bytes: weights, gradients and both moments of AdamW are float32
_KEPT_PER_LAYER = (16, 4)  # hidden and inner vectors kept per token and layer for backward
_LOGIT_COPIES = 3  # logits, their log-softmax, and its gradient
_PROCESS = 800 << 20  # of Python with torch and transformers; that of the run is here already
_GRADER = 70 << 20  # a process that grades, with sympy
_SESSION = 6 << 20  # an idle interpreter of the sandbox, which shares most of its pages
_MOST_GRADERS = 8


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers that determine a model's memory."""

    num_parameters: int
    num_layers: int
    hidden: int
    inner: int
    vocabulary: int
    cache_width: int
    """Numbers per token in the cache of one layer: keys and values of all key-value heads."""


@dataclass(frozen=True, slots=True)
class Need:
    """Memory that one part of a run takes in one place."""

    place: str
    """`MACHINE`, or "gpu N"."""
    what: str
    num_bytes: int
    key: str
    """The setting that makes it less."""


def needs(config: Config, shape: Shape, device: str, num_cpus: int) -> list[Need]:
    """Return what the processes of a run take that all are on one machine.

    Args:
        config: Config of the run.
        shape: Shape of the run's model.
        device: Device type of the trainer, "cpu" or "cuda"; the latter means the first GPU.
        num_cpus: Processors of the machine, which bound the number of graders.
    """
    cluster = config.cluster
    num_ranks = cluster.trainer.count if cluster.is_used else 1
    found = []
    for rank in range(num_ranks):
        place = MACHINE if device == "cpu" else f"gpu {rank}"
        found += trainer_needs(config, shape, place, num_ranks)
    if device == "cuda":
        whole = _FLOAT * shape.num_parameters
        found.append(Need(MACHINE, "weights of a checkpoint", whole, "model.path"))
        if config.trainer.offload:
            moved = 4 * whole
            found.append(Need(MACHINE, "offloaded optimizer", moved, "trainer.offload"))
    found += _engine_needs(config, shape, device)
    found += _process_needs(config, num_cpus)
    return [each for each in found if each.num_bytes]


def trainer_needs(config: Config, shape: Shape, place: str, num_ranks: int) -> list[Need]:
    """Return what one rank of a trainer takes at its peak.

    Args:
        config: Config of the run.
        shape: Shape of the run's model.
        place: Where the rank computes.
        num_ranks: Ranks that share weights, gradients and moments.
    """
    trainer = config.trainer
    weights = _FLOAT * shape.num_parameters
    state = 4 * weights
    if trainer.lora is not None:
        state = weights if trainer.dtype == "float32" else weights // 2
    is_offloaded = trainer.offload and place != MACHINE
    number = _FLOAT if trainer.dtype == "float32" else _FLOAT // 2
    gathered = 0
    if num_ranks > 1 or is_offloaded:  # embeddings and head for a whole pass, a layer at a time
        ends = 2 * shape.vocabulary * shape.hidden
        gathered = number * (ends + shape.num_parameters // shape.num_layers)
    most = max(trainer.micro_batch_tokens, config.rollout.max_context_tokens)
    packed = min(most, _num_episodes(config) * config.rollout.max_context_tokens)
    of_hidden, of_inner = _KEPT_PER_LAYER
    per_layer = of_hidden * shape.hidden + of_inner * shape.inner
    kept = per_layer * shape.num_layers
    if trainer.gradient_checkpointing:
        kept = per_layer + shape.hidden * shape.num_layers
    chunk = min(trainer.logprob_chunk_tokens, packed)
    logits = _FLOAT * _LOGIT_COPIES * chunk * shape.vocabulary
    is_reference = config.algorithm.needs_reference
    return [
        Need(
            place,
            "weights, gradients, optimizer",
            0 if is_offloaded else state // num_ranks,
            "trainer.lora, trainer.offload or cluster.trainer.count",
        ),
        Need(place, "gathered layers", gathered, "model.path"),
        Need(
            place,
            "reference weights",
            weights // num_ranks if is_reference else 0,
            "algorithm.kl",
        ),
        Need(
            place,
            "activations",
            number * packed * kept,
            "trainer.micro_batch_tokens or trainer.gradient_checkpointing",
        ),
        Need(place, "logits", logits, "trainer.logprob_chunk_tokens"),
    ]


def _engine_needs(config: Config, shape: Shape, device: str) -> list[Need]:
    num_engines = config.cluster.engines.count if config.cluster.is_used else 1
    by_place = config.engine.memory_by_place(
        device,
        num_parameters=shape.num_parameters,
        num_tokens=_num_episodes(config) * config.rollout.max_context_tokens,
        numbers_per_token=shape.cache_width * shape.num_layers,
    )
    found = []
    for place, memory in by_place.items():
        where = MACHINE if place == "cpu" else place
        number = num_engines if place == "cpu" else 1  # in a cluster each has GPUs of its own
        found += [
            Need(where, "the engine's weights", number * memory.weights, "engine.dtype"),
            Need(where, "cache", number * memory.cache, "engine.max_cache_tokens"),
        ]
    return found


def _process_needs(config: Config, num_cpus: int) -> list[Need]:
    """Processes beside that of the run: servers, actors, graders and the sandbox's interpreters."""
    cluster = config.cluster
    num_processes = config.engine.num_processes
    num_runners = 1
    if cluster.is_used:
        actors = cluster.actors.values()
        num_processes = max(1, num_processes) * cluster.engines.count
        num_processes += sum(each.count for each in actors) - cluster.engines.count
        num_runners = cluster.environments.count
    sandbox = config.env.kwargs.get("sandbox")
    budget = sandbox.get("memory_budget_mb") if isinstance(sandbox, Mapping) else None
    sessions = _num_episodes(config) * _SESSION
    if isinstance(budget, int):
        sessions = budget << 20
    graders = num_runners * min(_MOST_GRADERS, num_cpus) * _GRADER
    return [
        Need(MACHINE, "servers and actors", num_processes * _PROCESS, "engine.num_servers"),
        Need(MACHINE, "graders", graders, "cluster.environments.count"),
        Need(
            MACHINE,
            "the sandbox",
            sessions,
            "env.kwargs.sandbox.memory_budget_mb or rollout.groups_per_step",
        ),
    ]


def _num_episodes(config: Config) -> int:
    rollout = config.rollout
    return (rollout.max_staleness + 1) * rollout.groups_per_step * rollout.group_size


def by_place(found: Sequence[Need]) -> dict[str, int]:
    """Return the sum of what is needed in each place, in bytes."""
    sums: dict[str, int] = {}
    for each in found:
        sums[each.place] = sums.get(each.place, 0) + each.num_bytes
    return sums


def check_memory(found: Sequence[Need], available: Mapping[str, int]) -> CheckResult:
    """Compare the needed memory with the available memory, place by place.

    Args:
        found: See `needs`.
        available: Free bytes by place; a place that is not in it is not checked.
    """
    figures, keys, holds = [], [], True
    for place, total in by_place(found).items():
        if place not in available:
            continue
        here = sorted((e for e in found if e.place == place), key=lambda e: -e.num_bytes)
        largest = ", ".join(f"{each.what} {gigabytes(each.num_bytes)}" for each in here[:3])
        free = available[place]
        figures.append(f"{place}: needs {gigabytes(total)} ({largest}), {gigabytes(free)} are free")
        if total > free:
            holds = False
            keys += [f"{each.what}: {each.key}" for each in here[:3]]
    fix = "; ".join(dict.fromkeys(keys))
    return CheckResult(
        "memory",
        holds,
        "; ".join(figures),
        f"change what takes most: {fix}; or use a smaller model",
    )


def gigabytes(number: int) -> str:
    """Return a number of bytes for people."""
    return f"{number / 1e9:.3g} GB"


SHAPES = {
    "0.1 B": Shape(134_515_008, 30, 576, 1536, 49_152, 384),
    "0.5 B": Shape(494_032_768, 24, 896, 4864, 151_936, 256),
    "1.5 B": Shape(1_543_714_304, 28, 1536, 8960, 151_936, 512),
    "3 B": Shape(3_085_938_688, 36, 2048, 11_008, 151_936, 512),
    "7 B": Shape(7_615_616_512, 28, 3584, 18_944, 152_064, 1024),
    "14 B": Shape(14_770_033_664, 48, 5120, 13_824, 152_064, 2048),
    "32 B": Shape(32_763_876_352, 64, 5120, 27_648, 152_064, 2048),
}
"""Shapes of published models of usual sizes: SmolLM2, and Qwen2.5 from 0.5 B on."""


@dataclass(frozen=True, slots=True)
class Row:
    """The memory for a model of one size."""

    size: str
    trainer: tuple[int, ...]
    """Bytes per GPU of the trainer, for each number of GPUs."""
    lora: int
    """Bytes of a trainer of adapters in bfloat16, on one GPU."""
    engine: int
    """Bytes of an engine's weights in bfloat16, without its cache."""
    cache: int
    """Bytes of an engine's cache in bfloat16, per 1,000 tokens."""
    machine: int
    """Bytes of the machine's own memory, besides those that programs in the sandbox take."""


def table(config: Config, num_gpus: Sequence[int] = (1, 2, 4, 8)) -> list[Row]:
    """Return the memory of models of usual sizes on GPUs, with the settings of a run.

    Args:
        config: Settings of the run; its model and its engine do not count.
        num_gpus: Numbers of GPUs over which the trainer is spread.
    """
    trainer = config.trainer.model_dump()
    adapters = config.model_copy(
        update={
            "trainer": type(config.trainer)(**trainer | {"lora": {}, "dtype": "bfloat16"}),
        }
    )
    rows = []
    for size, shape in SHAPES.items():

        def total(settings: Config, number: int, shape: Shape = shape) -> int:
            return sum(each.num_bytes for each in trainer_needs(settings, shape, "gpu 0", number))

        rows.append(
            Row(
                size,
                tuple(total(config, number) for number in num_gpus),
                total(adapters, 1),
                2 * shape.num_parameters,
                2 * 1000 * shape.cache_width * shape.num_layers,
                _PROCESS + _FLOAT * shape.num_parameters,
            )
        )
    return rows


def markdown(config: Config, num_gpus: Sequence[int] = (1, 2, 4, 8)) -> str:
    """Return `table` as a table in Markdown, in GB, after the settings that it holds for."""
    trainer = config.trainer
    assumed = {
        "trainer.dtype": trainer.dtype,
        "trainer.gradient_checkpointing": str(trainer.gradient_checkpointing).lower(),
        "trainer.micro_batch_tokens": trainer.micro_batch_tokens,
        "rollout.max_context_tokens": config.rollout.max_context_tokens,
    }
    trainers = [f"trainer, {number} GPU{'s' * (number > 1)}" for number in num_gpus]
    heads = ["model", *trainers, "adapters, 1 GPU", "engine", "cache of 1,000 tokens", "machine"]
    lines = [f"GB, with {', '.join(f'{key} = {value}' for key, value in assumed.items())}:", ""]
    lines += [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    for row in table(config, num_gpus):
        numbers = (*row.trainer, row.lora, row.engine, row.cache, row.machine)
        lines.append(f"| {row.size} | {' | '.join(_gigabytes(each) for each in numbers)} |")
    return "\n".join(lines)


def _gigabytes(num_bytes: int) -> str:
    """Three digits, without an exponent."""
    number = num_bytes / 1e9
    return f"{number:.3g}" if number < 999.5 else f"{number:,.0f}"
