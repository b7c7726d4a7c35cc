"""Adds up the memory that all processes of a run take, by machine and GPU. Pure.

`needs` is what the doctor compares with this machine; `table` is for people who choose a machine.
The figures are estimates from the model's shape: weights, gradients, moments and caches are exact,
what is kept for the backward pass is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tir_alp.config import Config
from tir_alp.doctor.check_result import CheckResult
from tir_alp.roles import Node

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
    num_heads: int
    """Attention heads of a layer, over which `trainer.sequence_parallel` divides it."""


@dataclass(frozen=True, slots=True)
class Need:
    """Memory that one part of a run takes in one place."""

    place: str
    """`MACHINE`, "gpu N", or the name of a node of a cluster."""
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
    actors = {kind: each.count for kind, each in cluster.actors.items()}
    if not cluster.is_used:
        actors = {"trainer": 1, "engines": 1, "environments": 1}
    found = []
    for rank in range(actors["trainer"]):
        gpu = f"gpu {rank}"
        found += trainer_needs(
            config, shape, MACHINE if device == "cpu" else gpu, actors["trainer"]
        )
    if device == "cuda":
        found += _beside_gpus(config, shape, MACHINE, actors["trainer"])
    found += _engine_needs(config, shape, device, actors["engines"])
    found += _process_needs(config, MACHINE, actors, num_cpus)
    return [each for each in found if each.num_bytes]


def node_needs(config: Config, shape: Shape, device: str, node: Node) -> list[Need]:
    """Return what the actors of a run take of the memory of one node of a cluster.

    What they take of GPUs is left out: Ray does not know the memory of those.

    Args:
        config: Config of the run.
        shape: Shape of the run's model.
        device: Device type of the trainer, "cpu" or "cuda".
        node: The node, with the number of actors of each kind.
    """
    actors = {kind: node.actors.get(kind, 0) for kind in config.cluster.actors}
    found = []
    for _ in range(actors["trainer"]):
        if device == "cpu":
            found += trainer_needs(config, shape, node.name, config.cluster.trainer.count)
        else:
            found += _beside_gpus(config, shape, node.name, 1)
    engines = _engine_needs(config, shape, device, actors["engines"])
    found += [replace(each, place=node.name) for each in engines if each.place == MACHINE]
    found += _process_needs(config, node.name, actors, node.num_cpus)
    return [each for each in found if each.num_bytes]


def _beside_gpus(config: Config, shape: Shape, place: str, num_ranks: int) -> list[Need]:
    """What ranks of a trainer that compute on GPUs take of their machine."""
    whole = _FLOAT * shape.num_parameters
    moved = 4 * whole if config.trainer.offload else 0
    return [
        Need(place, "weights of a checkpoint", whole, "model.path"),
        Need(place, "offloaded optimizer", moved, "trainer.offload"),
        Need(place, "weights of versions", _versions(config, whole), "algorithm.proximal"),
        Need(place, "accepted state", _accepted(config, whole), "algorithm.acceptance"),
        Need(
            place,
            "offloaded activations",
            num_ranks * _kept_for_backward(config, shape, "gpu")[1],
            "trainer.offload_activations",
        ),
    ]


def _versions(config: Config, weights: int) -> int:
    """Bytes of the weights of earlier versions, and of the current ones while those are used."""
    if config.trainer.lora is not None or not config.num_kept_versions:
        return 0
    return (config.num_kept_versions + 1) * weights


def _accepted(config: Config, weights: int) -> int:
    """Bytes of the weights and both moments to which a trainer may have to go back."""
    is_kept = config.algorithm.acceptance is not None and config.trainer.lora is None
    return 3 * weights if is_kept else 0


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
    chunk = min(trainer.chunk_tokens(shape.vocabulary), _packed_tokens(config))
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
            "weights of versions",
            _versions(config, weights // num_ranks) if place == MACHINE else 0,
            "algorithm.proximal",
        ),
        Need(
            place,
            "accepted state",
            _accepted(config, weights // num_ranks) if place == MACHINE else 0,
            "algorithm.acceptance",
        ),
        Need(
            place,
            "activations",
            _kept_for_backward(config, shape, place)[0],
            "trainer.micro_batch_tokens, trainer.gradient_checkpointing, "
            "trainer.offload_activations or trainer.sequence_parallel",
        ),
        Need(place, "logits", logits, "trainer.logprob_chunk_tokens"),
    ]


def _packed_tokens(config: Config) -> int:
    """The most tokens of a forward pass."""
    most = max(config.trainer.micro_batch_tokens, config.rollout.max_context_tokens)
    return min(most, _num_episodes(config) * config.rollout.max_context_tokens)


def _kept_for_backward(config: Config, shape: Shape, place: str) -> tuple[int, int]:
    """Bytes that one rank keeps for the backward pass: where it computes, and in CPU memory."""
    trainer = config.trainer
    of_hidden, of_inner = _KEPT_PER_LAYER
    inside, inputs = of_hidden * shape.hidden + of_inner * shape.inner, shape.hidden
    number = _FLOAT if trainer.dtype == "float32" else _FLOAT // 2
    # Packed tokens are those of a team, of which a rank has its share, also inside of attention.
    each = number * -(-_packed_tokens(config) // trainer.sequence_parallel)
    if not trainer.gradient_checkpointing:
        return each * inside * shape.num_layers, 0
    if trainer.offload_activations and place != MACHINE:
        return each * (inside + 2 * inputs), each * inputs * shape.num_layers
    return each * (inside + inputs * shape.num_layers), 0


def _engine_needs(config: Config, shape: Shape, device: str, num_engines: int) -> list[Need]:
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


def _process_needs(
    config: Config, place: str, actors: Mapping[str, int], num_cpus: int
) -> list[Need]:
    """Processes beside that of the run: servers, actors, graders and the sandbox's interpreters.

    Args:
        config: Config of the run.
        place: The machine.
        actors: Number of actors there, by kind; without a cluster, they are the run's own process.
        num_cpus: Processors of the machine.
    """
    cluster = config.cluster
    num_processes = config.engine.num_processes
    if cluster.is_used:
        num_processes = max(1, num_processes) * actors["engines"]
        num_processes += sum(actors.values()) - actors["engines"]
    graders = actors["environments"] * min(_MOST_GRADERS, num_cpus) * _GRADER
    hosts = "sandboxes" if cluster.is_used and cluster.sandboxes.count else "environments"
    num_hosts = cluster.actors[hosts].count if cluster.is_used else 1
    return [
        Need(place, "servers and actors", num_processes * _PROCESS, "engine.num_servers"),
        Need(place, "graders", graders, "cluster.environments.count"),
        Need(
            place,
            "the sandbox",
            actors[hosts] * _sandbox(config, num_hosts),
            "env.kwargs.sandbox.memory_budget_mb or rollout.groups_per_step",
        ),
    ]


def _sandbox(config: Config, num_hosts: int) -> int:
    """Bytes that one of the sandboxes takes over which all episodes are spread."""
    sandbox = config.env.kwargs.get("sandbox")
    budget = sandbox.get("memory_budget_mb") if isinstance(sandbox, Mapping) else None
    if isinstance(budget, int):
        return budget << 20
    return _num_episodes(config) * _SESSION // num_hosts


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
        "; ".join(figures) or "how much memory there is, is not known",
        f"change what takes most: {fix}; or use a smaller model",
    )


def gigabytes(number: int) -> str:
    """Return a number of bytes for people."""
    return f"{number / 1e9:.3g} GB"


SHAPES = {
    "0.1 B": Shape(134_515_008, 30, 576, 1536, 49_152, 384, 9),
    "0.5 B": Shape(494_032_768, 24, 896, 4864, 151_936, 256, 14),
    "1.5 B": Shape(1_543_714_304, 28, 1536, 8960, 151_936, 512, 12),
    "3 B": Shape(3_085_938_688, 36, 2048, 11_008, 151_936, 512, 16),
    "7 B": Shape(7_615_616_512, 28, 3584, 18_944, 152_064, 1024, 28),
    "14 B": Shape(14_770_033_664, 48, 5120, 13_824, 152_064, 2048, 40),
    "32 B": Shape(32_763_876_352, 64, 5120, 27_648, 152_064, 2048, 40),
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
