"""How costs grow: each size is varied alone, and an exponent is fitted.

    python -m tests.benchmarks.bench_growth [--only NAME ...] [--rounds 3] [--rows FILE]

For each size it prints the seconds at every value, the exponent of growth over all values (the
slope of the logarithms by least squares), and the exponent of the last doubling. An exponent of 1
is proportional growth; below 1 a part of the cost does not depend on the size. What is measured:

- `update`: one update of a random model of 6 layers, against the size of a group, the number of
  turns, the tokens per turn, the vocabulary and the width;
- `rollout`: completions of the embedded engine, against their number;
- `programs`: calls of the sandbox, against the number of sessions that make them at once;
- `episodes`: episodes of `PythonMath-v0` with one program each, against the number at once in one
  process.

The values of a size take turns, and the fastest round counts, so that other load on the machine
disturbs the exponents little. `--rows` appends each measurement to a file of JSON lines.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import gymnasium
import numpy as np
import torch

import tir_alp.envs  # noqa: F401  # registers the environments
from tests.benchmarks.synthetic import Size, groups_of, make_model, make_trainer
from tir_alp.config import TrainerConfig
from tir_alp.engines.base import Sampling
from tir_alp.engines.transformers import TransformersEngine
from tir_alp.tools.sandbox import SandboxConfig, shared_sandbox

Work = Callable[[], None]

SMALL = Size(width=384, groups=1)
PROGRAM = "print(6 * 7)"
NUM_CALLS = 64
"""Calls, or episodes, of one round, however many are made at once."""


@dataclass(frozen=True, slots=True)
class Curve:
    """The cost of one kind of work against one size."""

    cost: str
    size: str
    values: tuple[int, ...]
    open: Callable[[int], Work]
    """Prepares the work at a value; what it returns is timed."""


def update_with(change: Callable[[int], Size]) -> Callable[[int], Work]:
    """Return what prepares an update of a size that depends on the value."""

    def prepare(value: int) -> Work:
        size = change(value)
        settings = TrainerConfig(lr=1e-6, micro_batch_tokens=8192)
        trainer = make_trainer(size, "alp_sequence", settings)
        groups, steps = groups_of(size), iter(range(1 << 20))
        return lambda: trainer.step(groups, next(steps)) and None

    return prepare


def rollout(count: int) -> Work:
    """Prepare completions of 32 tokens after prompts of 128, all at once."""
    size = replace(SMALL, group_size=count)
    prompts = [sample.trajectory.prompt.token_ids for sample in groups_of(size)[0]]
    model = make_model(size)

    async def generate() -> None:
        engine = TransformersEngine(model, max_cache_tokens=1 << 16)
        requests = (
            engine.generate(prompt, Sampling(max_tokens=32, sequence_uid=uid))
            for uid, prompt in enumerate(prompts)
        )
        await asyncio.gather(*requests)
        await engine.close()

    return lambda: asyncio.run(generate())


def programs(clients: int) -> Work:
    """Prepare calls of the sandbox, by so many sessions at once."""
    sandbox = shared_sandbox(SandboxConfig(preload=()))
    sessions = [sandbox.session() for _ in range(clients)]

    def calls(index: int) -> None:
        for _ in range(NUM_CALLS // clients):
            result = sessions[index].run(PROGRAM)
            if result.stdout != "42\n":
                raise RuntimeError(f"the program printed {result.stdout!r}")

    return in_threads(clients, calls, clients)


def episodes(at_once: int) -> Work:
    """Prepare episodes of two turns, so many at once in this process."""
    task = {"task_id": "t", "question": "What is 6*7?", "answer": "42"}

    def play(_: int) -> None:
        env = gymnasium.make("tir_alp.envs:PythonMath-v0", sandbox={"preload": []})
        try:
            env.reset(options={"task": task})
            env.step(f"```python\n{PROGRAM}\n```")
            if env.step(r"It is \boxed{42}.")[1] != 1.0:
                raise RuntimeError("the right answer has no reward")
        finally:
            env.close()

    return in_threads(at_once, play, NUM_CALLS)


def in_threads(at_once: int, call: Callable[[int], None], number: int) -> Work:
    """Return what makes a number of calls, so many at once."""

    def work() -> None:
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(call, range(number)))

    return work


CURVES = {
    curve.cost + "/" + curve.size.replace(" ", "_"): curve
    for curve in (
        Curve(
            "update",
            "group size",
            (1, 2, 4, 8, 16, 32),
            update_with(lambda value: replace(SMALL, group_size=value)),
        ),
        Curve(
            "update",
            "turns",
            (1, 2, 4, 8, 16),
            update_with(lambda value: replace(SMALL, turns=value, num_said=32, num_observed=32)),
        ),
        Curve(
            "update",
            "tokens per turn",
            (16, 32, 64, 128, 256, 512),
            update_with(lambda value: replace(SMALL, num_said=value)),
        ),
        Curve(
            "update",
            "vocabulary",
            (1024, 4096, 16384, 65536, 262144),
            update_with(lambda value: replace(SMALL, width=192, vocabulary=value)),
        ),
        Curve(
            "update",
            "width",
            (192, 384, 768, 1536),
            update_with(lambda value: replace(SMALL, width=value)),
        ),
        Curve("rollout", "completions", (1, 2, 4, 8, 16, 32), rollout),
        Curve("programs", "sessions", (1, 2, 4, 8, 16, 32), programs),
        Curve("episodes", "at once", (1, 2, 4, 8, 16, 32), episodes),
    )
}


def measure(curve: Curve, rounds: int) -> list[float]:
    """Return the seconds of the fastest round at each value."""
    works = [curve.open(value) for value in curve.values]
    for work in works:  # the first round also allocates
        work()
    seconds = [[] for _ in works]
    for _ in range(rounds):
        for times, work in zip(seconds, works, strict=True):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
    return [min(times) for times in seconds]


def exponent(values: Sequence[int], seconds: Sequence[float]) -> float:
    """Return the slope of the logarithm of the seconds over that of the values."""
    return float(np.polyfit(np.log(values), np.log(seconds), 1)[0])


def lines_of(curve: Curve, seconds: Sequence[float]) -> Iterator[str]:
    """Yield the table of a curve."""
    yield f"{curve.cost} against {curve.size}"
    yield "  " + "  ".join(f"{value:>8}" for value in curve.values)
    yield "  " + "  ".join(f"{each:8.3f}" for each in seconds)
    overall, last = exponent(curve.values, seconds), exponent(curve.values[-2:], seconds[-2:])
    yield f"  exponent {overall:.2f}, over the last two values {last:.2f}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=CURVES, default=[*CURVES])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.only:
        curve = CURVES[name]
        seconds = measure(curve, options.rounds)
        print("\n".join(lines_of(curve, seconds)), flush=True)
        if options.rows is not None:
            row = {"curve": name, "values": curve.values, "seconds": seconds}
            with open(options.rows, "a") as file:
                file.write(json.dumps(row | {"threads": options.threads}) + "\n")


if __name__ == "__main__":
    main()
