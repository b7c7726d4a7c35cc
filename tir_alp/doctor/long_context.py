"""What one rank of the trainer takes for long trajectories, and what to switch on. Pure.

The estimates are those of `memory.trainer_needs`, for a trajectory that has a forward of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import lcm
from typing import Any

from tir_alp.config import Config
from tir_alp.doctor.memory import MACHINE, SHAPES, Shape, by_place, gigabytes, needs, trainer_needs

LENGTHS = (8192, 32_768, 131_072)
"""Tokens of the trajectories for which estimates are made."""

_MOST_RANKS = 16


@dataclass(frozen=True, slots=True)
class Plan:
    """The memory that a rank takes for a trajectory of some length, with some settings."""

    length: int
    """Tokens of the trajectory."""
    num_bytes: int
    changes: Mapping[str, Any]
    """Settings that differ from those of the run, by key."""
    fits: bool
    """Whether so much is free; if not, this is the plan that takes least."""

    def __str__(self) -> str:
        """The plan for people to read."""
        words = [f"{key} = {str(value).lower()}" for key, value in self.changes.items()]
        how = f" with {', '.join(words)}" if words else " as it is set"
        but = "" if self.fits else ", which is more than is free"
        return f"{self.length:,} tokens: {gigabytes(self.num_bytes)}{how}{but}"


def plans(
    config: Config, shape: Shape, place: str, free: int, num_ranks: int = 1
) -> tuple[Plan, ...]:
    """Return for each length the first plan that fits, of those that cost more and more time.

    Layers are recomputed first, then the inputs of layers are offloaded if the trainer is on a GPU,
    and then a forward is divided over more and more ranks.

    Args:
        config: Settings of the run.
        shape: Shape of the run's model.
        place: Where the rank computes: `MACHINE`, or a GPU.
        free: Free bytes there, for the trainer.
        num_ranks: Number of ranks of the trainer.
    """
    return tuple(_first_that_fits(config, shape, place, free, num_ranks, each) for each in LENGTHS)


def _first_that_fits(
    config: Config, shape: Shape, place: str, free: int, num_ranks: int, length: int
) -> Plan:
    found = []
    for changes in _changes(config, shape, place, num_ranks):
        own = {key.removeprefix("trainer."): value for key, value in changes.items()}
        count = own.pop("cluster.trainer.count", num_ranks)
        settings = _of_length(config, length, own)
        total = sum(each.num_bytes for each in trainer_needs(settings, shape, place, count))
        found.append(Plan(length, total, changes, total <= free))
        if total <= free:
            return found[-1]
    return min(found, key=lambda plan: plan.num_bytes)


def _changes(
    config: Config, shape: Shape, place: str, num_ranks: int
) -> Iterator[Mapping[str, Any]]:
    """Yield settings that take less and less memory of a rank, beginning with none."""
    trainer, changes = config.trainer, {}
    yield changes
    steps = {"trainer.gradient_checkpointing": trainer.gradient_checkpointing}
    if place != MACHINE:
        steps["trainer.offload_activations"] = trainer.offload_activations
    for key in (key for key, is_on in steps.items() if not is_on):
        changes = changes | {key: True}
        yield changes
    sizes = range(trainer.sequence_parallel + 1, _MOST_RANKS + 1)
    teams = [(lcm(num_ranks, size), size) for size in sizes if shape.num_heads % size == 0]
    for count, size in sorted(teams):  # first those that need no more ranks
        more = {} if count == num_ranks else {"cluster.trainer.count": count}
        yield changes | {"trainer.sequence_parallel": size} | more


def _of_length(config: Config, length: int, changes: Mapping[str, Any]) -> Config:
    """Return the settings of a run whose longest trajectory has a forward of its own."""
    trainer = config.trainer.model_copy(update={"micro_batch_tokens": length, **changes})
    rollout = config.rollout.model_copy(update={"max_context_tokens": length})
    return config.model_copy(update={"trainer": trainer, "rollout": rollout})


def advice(
    config: Config, shape: Shape, device: str, available: Mapping[str, int], num_cpus: int
) -> str:
    """Return a sentence on long trajectories, for a run whose processes are on this machine.

    Args:
        config: Settings of the run.
        shape: Shape of the run's model.
        device: Device type of the trainer, "cpu" or "cuda".
        available: Free bytes by place.
        num_cpus: Processors of the machine.

    Returns:
        An empty string if nothing is known of the place.
    """
    place = MACHINE if device == "cpu" else "gpu 0"
    if place not in available:
        return ""
    count = config.cluster.trainer.count if config.cluster.is_used else 1
    own = sum(each.num_bytes for each in trainer_needs(config, shape, place, count))
    here = count if place == MACHINE else 1
    others = by_place(needs(config, shape, device, num_cpus))[place] - here * own
    free = (available[place] - others) // here
    found = plans(config, shape, place, free, count)
    return f"a rank of the trainer, by trajectory of {'; '.join(map(str, found))}"


def markdown(config: Config, num_gpus: int = 8, gpu_bytes: int = 80 * 10**9) -> str:
    """Return the plans for models of usual sizes as a table in Markdown, in GB per GPU.

    Args:
        config: Settings of the run; its model and its engine do not count.
        num_gpus: Number of GPUs over which the trainer is spread.
        gpu_bytes: Memory of a GPU.
    """
    heads = ["model", *(f"a trajectory of {length:,} tokens" for length in LENGTHS)]
    lines = [f"GB per GPU of a trainer on {num_gpus} GPUs of {gigabytes(gpu_bytes)}:", ""]
    lines += [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for size, shape in SHAPES.items():
        found = plans(config, shape, "gpu 0", gpu_bytes, num_gpus)
        lines.append(f"| {' | '.join([size, *map(_cell, found)])} |")
    return "\n".join(lines)


def _cell(plan: Plan) -> str:
    words = [_short(key, value) for key, value in plan.changes.items()]
    figure = gigabytes(plan.num_bytes).removesuffix(" GB")
    return ", ".join([figure, *words]) if plan.fits else "does not fit"


def _short(key: str, value: Any) -> str:
    name = key.rpartition(".")[2] if key.startswith("trainer.") else key
    return f"`{name}`" if value is True else f"`{name} = {value}`"
