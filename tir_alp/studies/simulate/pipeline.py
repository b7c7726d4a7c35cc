"""The pipeline as discrete events: episodes, engines, tools, one trainer, weight updates.

The simulation follows the program. A group holds its slot from the start of its episodes until the
weights that were trained on it are live. In each step an engine generates one token per running
request, and requests join at any step with a prefill. A trainer takes whole steps. Costs and
results are in seconds; no clock is read, and equal seeds give equal results. Recorded groups are
played in their recorded order, so a few long episodes have the same weight for every seed.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, Literal

import simpy


@dataclass(frozen=True, slots=True)
class TurnCost:
    """One turn of an episode."""

    context_tokens: int
    """Number of tokens before the completion."""
    new_tokens: int
    """Number of these that follow the previous turn's completion."""
    completion_tokens: int
    """Number of tokens that the policy writes."""
    tool_s: float
    """Seconds until the environment answers."""


@dataclass(frozen=True, slots=True)
class EpisodeCost:
    """One episode."""

    prepare_s: float
    """Seconds to make and reset the environment."""
    turns: tuple[TurnCost, ...]

    @property
    def num_completion_tokens(self) -> int:
        """Number of tokens that the policy writes in the episode."""
        return sum(turn.completion_tokens for turn in self.turns)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the trained sequence: the last context and its completion."""
        return self.turns[-1].context_tokens + self.turns[-1].completion_tokens


@dataclass(frozen=True, slots=True)
class GroupCost:
    """The episodes of one task, which is equally hard for all of them."""

    episodes: tuple[EpisodeCost, ...]
    has_signal: bool = True
    """If not, a step takes another group in its place; see `rollout.max_refills`."""


@dataclass(frozen=True, slots=True)
class EngineCost:
    """Costs of one engine: a decoding step of b requests lasts `step_s + b * request_s`."""

    step_s: float
    request_s: float
    prefill_token_s: float

    def prefill_s(self, turn: TurnCost) -> float:
        """Return the seconds to prefill a turn's new tokens; engines cache earlier turns."""
        return self.prefill_token_s * turn.new_tokens


@dataclass(frozen=True, slots=True)
class TrainerCost:
    """Costs of one trainer rank: a training step lasts `step_s + tokens * token_s`."""

    step_s: float
    token_s: float


@dataclass(frozen=True, slots=True)
class Costs:
    """Everything that a simulation knows about a workload and a type of machine."""

    groups: tuple[GroupCost, ...]
    """Groups, which are played in this order and cyclically."""
    engine: EngineCost
    trainer: TrainerCost
    sync_s: float
    """Seconds of a weight update, during which engines do not decode."""
    slowdown: float = 1.0
    """Factor by which engine and trainer slow each other down while both run; at least 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineLayout:
    """The numbers of engines, trainer ranks and slots, and the settings of the rollouts."""

    groups_per_step: int
    group_size: int
    max_staleness: int = 0
    engines: int = 1
    trainers: int = 1
    engine_slots: int | None = None
    """Concurrent requests per engine; None means no limit."""
    tool_slots: int | None = None
    """Concurrent tool calls; None means no limit."""
    on_update: Literal["wait", "keep", "drop"] = "wait"
    """As `rollout.on_update`: a running completion ends before the update; or it continues after
    the update, which prefills it again; or it starts over after the update."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Results over the steps after the warm-up."""

    seconds_per_step: float
    tokens_per_s: float
    """Generated tokens per second, of the groups that were trained on."""
    staleness: float
    """Steps between the weights that a group starts with and those it trains, mean over groups."""
    max_staleness: int
    engine_idle: float
    """Share of the time in which an engine is idle, mean over engines."""
    trainer_idle: float
    """Share of the time in which the trainer is idle."""


@dataclass(eq=False, slots=True)
class _Request:
    turn: TurnCost
    remaining: int
    done: simpy.Event


@dataclass(slots=True)
class _Gauge:
    """Measures how long something was busy since the last reset."""

    busy_s: float = 0.0
    is_busy: bool = False


_SLICE_S = 0.02  # after so much of a training step, the trainer's slowdown is determined again


@dataclass(eq=False)
class _Engine:
    """One engine with continuous batching, simulated step by step."""

    env: simpy.Environment
    costs: Costs
    layout: PipelineLayout
    trainer: _Gauge
    gauge: _Gauge = field(default_factory=_Gauge)
    waiting: list[_Request] = field(default_factory=list)
    running: list[_Request] = field(default_factory=list)
    loaded: simpy.Event | None = None
    """The event of a weight update that is pending; None if there is none."""

    def __post_init__(self) -> None:
        self.wake = self.env.event()
        self.env.process(self.run())

    def generate(self, turn: TurnCost) -> simpy.Event:
        """Queue a completion; return the event of its last token."""
        request = _Request(turn, turn.completion_tokens, self.env.event())
        self.waiting.append(request)
        self._notify()
        return request.done

    def load_weights(self) -> simpy.Event:
        """Queue a weight update; return the event at which the new weights are live."""
        self.loaded = self.env.event()
        self._notify()
        return self.loaded

    @property
    def load(self) -> int:
        """Number of requests that wait or run."""
        return len(self.waiting) + len(self.running)

    def _notify(self) -> None:
        if not self.wake.triggered:
            self.wake.succeed()

    def run(self) -> Generator[simpy.Event, Any, None]:
        cost, slots = self.costs.engine, self.layout.engine_slots
        while True:
            if self.loaded is not None and (self.layout.on_update != "wait" or not self.running):
                yield from self._busy(self.costs.sync_s)
                self.loaded.succeed()
                self.loaded = None
                yield from self._busy(sum(map(self._renew, self.running)))
            joining: list[_Request] = []
            while (
                self.waiting
                and self.loaded is None
                and (slots is None or len(self.running) < slots)
            ):
                joining.append(self.waiting.pop(0))
                self.running.append(joining[-1])
            if not self.running:
                self.wake = self.env.event()
                if self.loaded is None and not self.waiting:
                    yield self.wake
                continue
            prefill_s = sum(cost.prefill_s(request.turn) for request in joining)
            yield from self._busy(prefill_s + cost.step_s + cost.request_s * len(self.running))
            for request in self.running:
                request.remaining -= 1
                if request.remaining <= 0:
                    request.done.succeed()
            self.running = [request for request in self.running if request.remaining > 0]

    def _renew(self, request: _Request) -> float:
        """Return the seconds to prefill a running completion again, with new weights."""
        if self.layout.on_update == "drop":
            request.remaining = request.turn.completion_tokens
        written = request.turn.completion_tokens - request.remaining
        return self.costs.engine.prefill_token_s * (request.turn.context_tokens + written)

    def _busy(self, seconds: float) -> Generator[simpy.Event, Any, None]:
        seconds *= self.costs.slowdown if self.trainer.is_busy else 1.0
        self.gauge.is_busy = True
        yield self.env.timeout(seconds)
        self.gauge.is_busy = False
        self.gauge.busy_s += seconds


class _Pipeline:
    """Engines, tools and one trainer that share the clock of a simpy environment."""

    def __init__(self, costs: Costs, layout: PipelineLayout, seed: int) -> None:
        self.env = simpy.Environment()
        self._costs, self._layout = costs, layout
        self._draw = random.Random(seed)
        self._trainer = _Gauge()
        self._engines = [
            _Engine(self.env, costs, layout, self._trainer) for _ in range(layout.engines)
        ]
        self._tools = simpy.Resource(self.env, layout.tool_slots) if layout.tool_slots else None
        capacity = (layout.max_staleness + 1) * layout.groups_per_step
        self._slots = simpy.Container(self.env, capacity, init=capacity)
        self._in_flight = simpy.Store(self.env)
        self._version = 0
        self.reset()

    def reset(self) -> None:
        """Start to measure: forget everything that was measured before."""
        self._start = self.env.now
        self._num_tokens = 0
        self._ages: Counter[int] = Counter()
        for gauge in (self._trainer, *(engine.gauge for engine in self._engines)):
            gauge.busy_s = 0.0

    def forecast(self, steps: int) -> Forecast:
        """Return what was measured since the last reset, in which `steps` steps were made."""
        seconds, ages = self.env.now - self._start, self._ages
        engine_busy_s = sum(each.gauge.busy_s for each in self._engines) / len(self._engines)
        return Forecast(
            seconds_per_step=seconds / steps,
            tokens_per_s=self._num_tokens / seconds,
            staleness=sum(age * count for age, count in ages.items()) / ages.total(),
            max_staleness=max(ages),
            engine_idle=max(0.0, 1 - engine_busy_s / seconds),
            trainer_idle=max(0.0, 1 - self._trainer.busy_s / seconds),
        )

    def feed(self) -> Generator[simpy.Event, Any, None]:
        """Start a group whenever a slot is free."""
        for recorded in itertools.cycle(self._costs.groups):
            yield self._slots.get(1)
            yield self._in_flight.put(self._start_group(recorded))

    def _start_group(self, recorded: GroupCost) -> tuple[int, GroupCost, simpy.Event]:
        """Start a group's episodes; return the version they start with, the group, and its end."""
        members = recorded.episodes
        if len(members) != self._layout.group_size:
            members = tuple(self._draw.choice(members) for _ in range(self._layout.group_size))
        ended = self.env.all_of([self.env.process(self._episode(each)) for each in members])
        return self._version, GroupCost(members, recorded.has_signal), ended

    def _episode(self, cost: EpisodeCost) -> Generator[simpy.Event, Any, None]:
        yield self.env.timeout(cost.prepare_s)
        engine = min(self._engines, key=lambda each: each.load)
        for turn in cost.turns:
            yield engine.generate(turn)
            if self._tools is None:
                yield self.env.timeout(turn.tool_s)
                continue
            with self._tools.request() as slot:
                yield slot
                yield self.env.timeout(turn.tool_s)

    def train(self, warm_up: int, steps: int) -> Generator[simpy.Event, Any, None]:
        """Make `warm_up + steps` training steps, and measure the last `steps`."""
        layout, cost = self._layout, self._costs.trainer
        for step in range(warm_up + steps):
            if step == warm_up:
                self.reset()
            episodes: list[EpisodeCost] = []
            num_taken = 0
            while num_taken < layout.groups_per_step:
                version, taken, ended = yield self._in_flight.get()
                yield ended
                if not taken.has_signal:
                    yield self._slots.put(1)
                    continue
                num_taken += 1
                self._ages[self._version - version] += 1
                episodes += taken.episodes
            num_tokens = sum(episode.num_tokens for episode in episodes)
            yield from self._update(cost.step_s + cost.token_s * num_tokens / layout.trainers)
            yield self.env.all_of([engine.load_weights() for engine in self._engines])
            self._version += 1
            self._num_tokens += sum(each.num_completion_tokens for each in episodes)
            yield self._slots.put(layout.groups_per_step)

    def _update(self, work_s: float) -> Generator[simpy.Event, Any, None]:
        """Keep the trainer busy with work that takes so many seconds without a slowdown."""
        self._trainer.is_busy = True
        while work_s > 0:
            is_slow = any(engine.gauge.is_busy for engine in self._engines)
            slowdown = self._costs.slowdown if is_slow else 1.0
            slice_s = min(_SLICE_S, work_s * slowdown)
            yield self.env.timeout(slice_s)
            self._trainer.busy_s += slice_s
            work_s -= slice_s / slowdown
        self._trainer.is_busy = False


def simulate(
    costs: Costs, layout: PipelineLayout, *, steps: int, warm_up: int = 3, seed: int = 0
) -> Forecast:
    """Simulate `warm_up + steps` training steps and describe the last `steps` of them.

    Args:
        costs: Costs of the workload and the machines.
        layout: What to simulate.
        steps: Number of steps to measure.
        warm_up: Number of steps before them.
        seed: Seed of the choice of episodes where the group size differs from the recorded one.

    Raises:
        ValueError: If there is nothing to train on or no step to measure.
    """
    num_groups = sum(group.has_signal for group in costs.groups)
    if not num_groups or steps < 1:
        raise ValueError(f"nothing to simulate: {num_groups} groups with signal, {steps} steps")
    pipeline = _Pipeline(costs, layout, seed)
    env = pipeline.env
    env.process(pipeline.feed())
    env.run(until=env.process(pipeline.train(warm_up, steps)))
    return pipeline.forecast(steps)
