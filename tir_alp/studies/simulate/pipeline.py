"""The pipeline as discrete events: episodes, engines, tools, one trainer, weight updates.

The model is that of the code. A group holds its slot from its first episode until the weights that
were trained on it are live. An engine makes one token a running request and step, and requests join
at any step with a prefill. A trainer takes whole steps. Seconds in, seconds out: nothing here looks
at a clock, and equal seeds play equally. Recorded groups are played in their order: a few long
episodes weigh as much as they did, no matter the seed.
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
    """Tokens before the completion."""
    new_tokens: int
    """Those of them that were not there at the end of the turn before."""
    completion_tokens: int
    """Tokens that the policy writes."""
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
        """Tokens that the policy writes in it."""
        return sum(turn.completion_tokens for turn in self.turns)

    @property
    def num_tokens(self) -> int:
        """Tokens that the trainer gets: the last context and what was written behind it."""
        return self.turns[-1].context_tokens + self.turns[-1].completion_tokens


@dataclass(frozen=True, slots=True)
class GroupCost:
    """The episodes of one task, which is as hard for all of them."""

    episodes: tuple[EpisodeCost, ...]
    has_signal: bool = True
    """Else a step takes another group in its place; see `rollout.max_refills`."""


@dataclass(frozen=True, slots=True)
class EngineCost:
    """What one engine takes: a decoding step of b requests lasts `step_s + b * request_s`."""

    step_s: float
    request_s: float
    prefill_token_s: float

    def prefill_s(self, turn: TurnCost) -> float:
        """Seconds to read what is new before a completion: engines keep the turns before."""
        return self.prefill_token_s * turn.new_tokens


@dataclass(frozen=True, slots=True)
class TrainerCost:
    """What a training step takes on one trainer rank: `step_s + tokens * token_s`."""

    step_s: float
    token_s: float


@dataclass(frozen=True, slots=True)
class Costs:
    """Everything that a simulation knows of a workload and a kind of machine."""

    groups: tuple[GroupCost, ...]
    """They are played in this order, again and again."""
    engine: EngineCost
    trainer: TrainerCost
    sync_s: float
    """Seconds of a weight update, during which engines do not decode."""
    slowdown: float = 1.0
    """By how much engine and trainer stretch each other while both run; 1: not at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What is being sized."""

    groups_per_step: int
    group_size: int
    max_staleness: int = 0
    engines: int = 1
    trainers: int = 1
    engine_slots: int | None = None
    """Requests that an engine runs at a time; None: all."""
    tool_slots: int | None = None
    """Tool calls that run at a time; None: all."""
    on_update: Literal["wait", "keep", "drop"] = "wait"
    """As `rollout.on_update`: completions that run end before the update, or are read anew behind
    it and go on, or begin again."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What came out, over the steps behind the warm-up."""

    seconds_per_step: float
    tokens_per_s: float
    """Generated tokens of the groups that were trained on."""
    staleness: float
    """Mean over groups: steps between the weights a group began with and those it trains."""
    max_staleness: int
    engine_idle: float
    """Share of the time in which an engine does nothing, mean over engines."""
    trainer_idle: float
    """Share of the time in which the trainer does nothing."""


@dataclass(eq=False, slots=True)
class _Request:
    turn: TurnCost
    remaining: int
    done: simpy.Event


@dataclass(slots=True)
class _Gauge:
    """How long something was busy since the last reset."""

    busy_s: float = 0.0
    is_busy: bool = False


_SLICE_S = 0.02  # of a training step: after it the trainer looks whether an engine slows it down


@dataclass(eq=False)
class _Engine:
    """One engine: continuous batching, a step at a time."""

    env: simpy.Environment
    costs: Costs
    layout: Layout
    trainer: _Gauge
    gauge: _Gauge = field(default_factory=_Gauge)
    waiting: list[_Request] = field(default_factory=list)
    running: list[_Request] = field(default_factory=list)
    loaded: simpy.Event | None = None
    """Set while new weights wait to be taken."""

    def __post_init__(self) -> None:
        self.wake = self.env.event()
        self.env.process(self.run())

    def generate(self, turn: TurnCost) -> simpy.Event:
        """Queue a completion; the event comes at its last token."""
        request = _Request(turn, turn.completion_tokens, self.env.event())
        self.waiting.append(request)
        self._notify()
        return request.done

    def load_weights(self) -> simpy.Event:
        """Queue a weight update; the event comes when it is live."""
        self.loaded = self.env.event()
        self._notify()
        return self.loaded

    @property
    def load(self) -> int:
        """Requests in it."""
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
        """Seconds to read a completion that runs, with new weights."""
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


def simulate(
    costs: Costs, layout: Layout, *, steps: int, warm_up: int = 3, seed: int = 0
) -> Forecast:
    """Play `warm_up + steps` training steps and describe the last `steps` of them.

    Raises:
        ValueError: If there is nothing to train on, or a number makes no sense.
    """
    num_groups = sum(group.has_signal for group in costs.groups)
    if not num_groups or steps < 1:
        raise ValueError(f"nothing to simulate: {num_groups} groups with signal, {steps} steps")
    env = simpy.Environment()
    draw = random.Random(seed)
    trainer = _Gauge()
    engines = [_Engine(env, costs, layout, trainer) for _ in range(layout.engines)]
    tools = simpy.Resource(env, layout.tool_slots) if layout.tool_slots else None
    capacity = (layout.max_staleness + 1) * layout.groups_per_step
    slots = simpy.Container(env, capacity, init=capacity)
    version, ages = 0, Counter[int]()
    num_tokens, began = 0, 0.0

    def episode(cost: EpisodeCost) -> Generator[simpy.Event, Any, None]:
        yield env.timeout(cost.prepare_s)
        engine = min(engines, key=lambda each: each.load)
        for turn in cost.turns:
            yield engine.generate(turn)
            if tools is None:
                yield env.timeout(turn.tool_s)
                continue
            with tools.request() as slot:
                yield slot
                yield env.timeout(turn.tool_s)

    def group(recorded: GroupCost) -> tuple[int, GroupCost, simpy.Event]:
        members = recorded.episodes
        if len(members) != layout.group_size:
            members = tuple(draw.choice(members) for _ in range(layout.group_size))
        ended = env.all_of([env.process(episode(each)) for each in members])
        return version, GroupCost(members, recorded.has_signal), ended

    in_flight = simpy.Store(env)

    def feed() -> Generator[simpy.Event, Any, None]:
        for recorded in itertools.cycle(costs.groups):
            yield slots.get(1)
            yield in_flight.put(group(recorded))

    def train() -> Generator[simpy.Event, Any, None]:
        nonlocal version, num_tokens, began
        for step in itertools.count():
            if step == warm_up:
                began, num_tokens, trainer.busy_s = env.now, 0, 0.0
                ages.clear()
                for engine in engines:
                    engine.gauge.busy_s = 0.0
            if step == warm_up + steps:
                return
            episodes: list[EpisodeCost] = []
            num_taken = 0
            while num_taken < layout.groups_per_step:
                born, taken, ended = yield in_flight.get()
                yield ended
                if not taken.has_signal:
                    yield slots.put(1)
                    continue
                num_taken += 1
                ages[step - born] += 1
                episodes += taken.episodes
            work_s = costs.trainer.step_s
            work_s += costs.trainer.token_s * sum(e.num_tokens for e in episodes) / layout.trainers
            yield from busy(work_s)
            yield env.all_of([engine.load_weights() for engine in engines])
            version += 1
            num_tokens += sum(each.num_completion_tokens for each in episodes)
            yield slots.put(layout.groups_per_step)

    def busy(work_s: float) -> Generator[simpy.Event, Any, None]:
        trainer.is_busy = True
        while work_s > 0:
            is_slow = any(engine.gauge.is_busy for engine in engines)
            slowdown = costs.slowdown if is_slow else 1.0
            part_s = min(_SLICE_S, work_s * slowdown)
            yield env.timeout(part_s)
            trainer.busy_s += part_s
            work_s -= part_s / slowdown
        trainer.is_busy = False

    env.process(feed())
    env.run(until=env.process(train()))
    seconds = env.now - began
    engine_busy_s = sum(engine.gauge.busy_s for engine in engines) / len(engines)
    return Forecast(
        seconds_per_step=seconds / steps,
        tokens_per_s=num_tokens / seconds,
        staleness=sum(age * count for age, count in ages.items()) / ages.total(),
        max_staleness=max(ages),
        engine_idle=max(0.0, 1 - engine_busy_s / seconds),
        trainer_idle=max(0.0, 1 - trainer.busy_s / seconds),
    )
