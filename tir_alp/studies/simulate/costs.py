"""Measures the costs of a recorded run.

The trajectories record when each turn started to generate and how long it took. So the number of
requests in the engine is known at any time, and the cost of a decoding step follows by linear
regression.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tir_alp.records.folder import read_run_config, step_file
from tir_alp.studies.simulate.pipeline import (
    Costs,
    EngineCost,
    EpisodeCost,
    GroupCost,
    TrainerCost,
    TurnCost,
)

_ROUNDS = 10  # iterations of fitting an engine, whose step times depend on the fit itself
_WARM_UP = 1  # steps to skip at the start, while caches fill and threads start


@dataclass(frozen=True, slots=True)
class TimedTurn:
    """When a completion was in the engine, and how many tokens it had."""

    begin_s: float
    end_s: float
    prefill_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """One training step as recorded in a run folder."""

    groups: tuple[GroupCost, ...]
    """All groups, including those without signal, in the order in which they were started."""
    turns: tuple[TimedTurn, ...]
    train_s: float
    rest_s: float
    """Seconds of the step other than rollouts and training: the weight update."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the trained sequences, including those of prompts and tools."""
        trained = [group for group in self.groups if group.has_signal]
        return sum(episode.num_tokens for group in trained for episode in group.episodes)


def read_costs(run: Path, *, slowdown: float = 1.0) -> Costs:
    """Measure a recorded run of one engine and one trainer rank.

    Args:
        run: The run folder. The run must have alternated between rollouts and training
            (`rollout.max_staleness = 0`); otherwise engine and trainer slowed each other down.
        slowdown: Factor by which engine and trainer slow each other down; see `Costs`.

    Raises:
        ValueError: If this is not such a run, or if it is too short.
    """
    if staleness := read_run_config(run)["rollout"]["max_staleness"]:
        raise ValueError(
            f"{run} had rollout.max_staleness = {staleness}: engine and trainer ran at the same "
            "time, so their times cannot be separated; measure a run with 0"
        )
    steps = [*read_steps(run)][_WARM_UP:]
    if len(steps) < 2:
        raise ValueError(f"{run} has {len(steps)} steps after the first; at least 2 are needed")
    step_s, request_s, prefill_token_s = fit_engine([turn for step in steps for turn in step.turns])
    return Costs(
        groups=tuple(group for step in steps for group in step.groups),
        engine=EngineCost(step_s, request_s, prefill_token_s),
        trainer=fit_trainer([s.num_tokens for s in steps], [s.train_s for s in steps]),
        sync_s=float(np.median([step.rest_s for step in steps])),
        slowdown=slowdown,
    )


def read_steps(run: Path) -> Iterator[RecordedStep]:
    """Yield the steps of a run.

    Raises:
        ValueError: If a file is not what a run writes; the message names the file.
    """
    for record in _records(run / "metrics.jsonl"):
        if "time/train" not in record:
            continue  # the record of an evaluation
        groups: dict[int, GroupCost] = {}
        turns: list[TimedTurn] = []
        for folder in ("trajectories", "replaced"):
            file = run / folder / step_file(record["step"])
            if folder == "trajectories" or file.exists():
                episodes, more = read_groups(file)
                has_signal = folder == "trajectories"
                groups |= {i: GroupCost(tuple(each), has_signal) for i, each in episodes.items()}
                turns += more
        try:
            step_s = record["tokens/generated"] / record["tokens/per_second"]
            rest_s = step_s - record["time/rollout"] - record["time/train"]
        except KeyError as error:
            raise ValueError(
                f"{run}/metrics.jsonl: step {record['step']} has no {error}"
            ) from error
        ordered = tuple(groups[index] for index in sorted(groups))
        yield RecordedStep(ordered, tuple(turns), record["time/train"], max(rest_s, 0.0))


def read_groups(file: Path) -> tuple[dict[int, list[EpisodeCost]], list[TimedTurn]]:
    """Read a file of trajectories: the costs of its episodes by group, and its timed turns.

    Raises:
        ValueError: If a line of the file is not a trajectory.
    """
    groups: dict[int, list[EpisodeCost]] = defaultdict(list)
    turns: list[TimedTurn] = []
    for trajectory in _records(file):
        try:
            episode = read_episode(trajectory)
            groups[trajectory["group_id"]].append(episode)
            turns_of = [turn for trace in _conversation(trajectory) for turn in trace["turns"]]
            for turn, cost in zip(turns_of, episode.turns, strict=True):
                begin, seconds = turn["timing"]["begin"], turn["timing"]["generate"]
                turns.append(
                    TimedTurn(begin, begin + seconds, cost.new_tokens, cost.completion_tokens)
                )
        except KeyError as error:
            raise ValueError(f"{file}: a trajectory has no {error}") from error
    return groups, turns


def read_episode(trajectory: Mapping[str, Any]) -> EpisodeCost:
    """Return the costs of one recorded trajectory; the prompt of a trace is read as a whole."""
    turns = []
    traces = _conversation(trajectory)
    for trace in traces:
        context = new = len(trace["prompt"]["token_ids"])
        for turn in trace["turns"]:
            completion = len(turn["completion"]["token_ids"])
            turns.append(TurnCost(context, new, completion, turn["timing"]["tool"]))
            new = len(turn["observation"]["token_ids"])
            context += completion + new
    return EpisodeCost(traces[0]["turns"][0]["timing"]["prepare"], tuple(turns))


def _conversation(trajectory: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the traces of a recorded conversation, in order."""
    earlier = trajectory["branches"] if trajectory.get("is_forked") else []
    return [*earlier, trajectory]


def fit_engine(turns: Sequence[TimedTurn]) -> tuple[float, float, float]:
    """Fit the seconds of a decoding step, of a request in it, and of a prefill token.

    A completion of n tokens takes n steps. The duration of a step grows with the number of
    concurrent requests, and a completion also waits for the prefills of others. Least squares.
    """
    begins = np.array([turn.begin_s for turn in turns])
    ends = np.array([turn.end_s for turn in turns])
    tokens = np.array([turn.completion_tokens for turn in turns], float)
    times = np.concatenate([begins, ends])
    order = np.argsort(times, kind="stable")
    times = times[order]
    running = np.cumsum(np.concatenate([np.ones(len(turns)), -np.ones(len(turns))])[order])[:-1]

    def within(rate: np.ndarray) -> np.ndarray:
        """Integrate a rate, constant between consecutive `times`, over each completion."""
        integral = np.concatenate([[0.0], np.cumsum(rate * np.diff(times))])
        return np.interp(ends, times, integral) - np.interp(begins, times, integral)

    by_begin = np.argsort(begins, kind="stable")
    read = np.cumsum([0, *(turns[index].prefill_tokens for index in by_begin)])
    first, last = (np.searchsorted(begins[by_begin], each, side="left") for each in (begins, ends))
    prefill = (read[last] - read[first]).astype(float)
    fit = [1.0, 0.0, 0.0]
    for _ in range(_ROUNDS):
        # Concurrent requests are averaged over steps, not over seconds: crowded steps last longer.
        steps_per_second = 1 / (fit[0] + fit[1] * np.maximum(running, 1))
        beside = within(running * steps_per_second) / np.maximum(within(steps_per_second), 1e-12)
        fit = _nonnegative(np.stack([tokens, tokens * beside, prefill], axis=1), ends - begins)
        if fit[0] + fit[1] == 0:
            raise ValueError("the recorded completions took no time, so they cannot be measured")
    return fit[0], fit[1], fit[2]


def fit_trainer(num_tokens: Sequence[int], seconds: Sequence[float]) -> TrainerCost:
    """Fit the seconds of a training step and of a token in it, by least squares.

    Args:
        num_tokens: Number of tokens of each step.
        seconds: Duration of each step.
    """
    columns = np.stack([np.ones(len(num_tokens)), np.array(num_tokens, float)], axis=1)
    return TrainerCost(*_nonnegative(columns, np.array(seconds)))


def _nonnegative(columns: np.ndarray, values: np.ndarray) -> list[float]:
    """Least squares with costs as coefficients: those that would be negative are set to 0."""
    kept = [*range(columns.shape[1])]
    while True:
        solution = np.linalg.lstsq(columns[:, kept], values, rcond=None)[0]
        if (solution >= 0).all() or len(kept) == 1:
            break
        kept.pop(int(np.argmin(solution)))
    result = [0.0] * columns.shape[1]
    for index, value in zip(kept, solution, strict=True):
        result[index] = max(float(value), 0.0)
    return result


def _records(file: Path) -> Iterator[Mapping[str, Any]]:
    try:
        with file.open() as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{file}, line {number}: {error}") from error
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from error
