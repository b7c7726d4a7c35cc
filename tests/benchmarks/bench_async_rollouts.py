"""Throughput of asynchronous and of turn-synchronous rollouts, with the same tasks and delays.

    python -m tests.benchmarks.bench_async_rollouts

Engine, environment, tasks and delays are the same. Turn-synchronous: no episode gets its next
completion before all have received their tool's answer (`Lockstep`, used by `deterministic`).
Asynchronous: an episode waits only for its own tool and completions; with a staleness above 0,
rollouts also continue during updates and weight syncs (`rollout.on_update = "keep"`).

`rollouts` takes groups without training on them; `end to end` trains and syncs the weights.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Sequence

from tir_alp.config import Config
from tir_alp.doctor.start import Doctor
from tir_alp.models.tiny import TRAIN_CONFIG
from tir_alp.run.command_line import load_config, read_toml
from tir_alp.run.local_placement import LocalPlacement
from tir_alp.run.open_run import open_run
from tir_alp.train import learn, publish

BARE = (
    *("--eval.num_tasks", "1", "--checkpoint.every", "0", "--rollout.on_update", "keep"),
    *("--doctor.ignore", "sandbox"),  # the environment runs no programs
)


def config_of(mode: str, staleness: int, arguments: argparse.Namespace) -> Config:
    delays = {"median_s": arguments.median_s, "sigma": arguments.sigma, "max_s": arguments.max_s}
    below = read_toml(TRAIN_CONFIG)
    below["env"] = {"id": "tests.benchmarks.slow_tool:SlowTool-v0", "kwargs": delays}
    below["rollout"] |= {"groups_per_step": arguments.groups, "group_size": arguments.group_size}
    below["rollout"] |= {"max_context_tokens": 512, "void_turns": "keep"}
    below |= {"steps": arguments.steps, "deterministic": mode == "turn-synchronous"}
    words = ("--name", f"{mode}-{staleness}", "--rollout.max_staleness", str(staleness))
    return load_config([*BARE, *words], below)


async def measure(config: Config, is_trained: bool) -> tuple[float, float, float, float]:
    """Return tokens per second, steps per minute, mean staleness, and the share of time in updates.

    The first steps, whose rollouts were started together, are not counted.
    """
    warm = config.rollout.max_staleness + 2
    num_steps = warm + config.steps
    async with open_run(config, LocalPlacement(config), Doctor()) as run:
        num_tokens, start, learning_s, ages = 0, 0.0, 0.0, []
        with run.console.training(0, num_steps):
            for step in range(num_steps):
                if step == warm:
                    start, num_tokens, learning_s, ages = time.monotonic(), 0, 0.0, []
                waiting = time.monotonic()
                groups = await run.rollouts.take()
                turns = [turn for g in groups for each in g.trajectories for turn in each.turns]
                num_tokens += sum(len(turn.completion) for turn in turns)
                taken = time.monotonic()
                if is_trained:
                    metrics = await learn(run, groups, step)
                    await publish(run, groups, step + 1, metrics, waiting)
                    ages += [step - turn.policy_version for turn in turns]
                else:
                    run.rollouts.release()
                learning_s += time.monotonic() - taken
        seconds = time.monotonic() - start
    age = sum(ages) / len(ages) if ages else 0.0
    return num_tokens / seconds, 60 * config.steps / seconds, age, learning_s / seconds


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2, help="number of measurements per mode")
    parser.add_argument("--median-s", type=float, default=1.0)
    parser.add_argument("--sigma", type=float, default=1.0)
    parser.add_argument("--max-s", type=float, default=20.0)
    parser.add_argument("--staleness", type=int, nargs="*", default=[0, 1, 2, 4])
    parser.add_argument("--what", nargs="*", default=["rollouts", "end to end"])
    arguments = parser.parse_args(words)
    modes = [("turn-synchronous", 0), *(("asynchronous", each) for each in arguments.staleness)]
    os.environ["PYTHONPATH"] = os.getcwd()
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; {vars(arguments)}")
    columns = ("what", "mode", "max_staleness", "tokens/s", "over turn-synchronous", "steps/min")
    print(f"| {' | '.join((*columns, 'age', 'learning'))} |\n|{'---|' * 8}")
    for what in arguments.what:
        results: dict[tuple[str, int], list[tuple[float, ...]]] = {}
        for _ in range(arguments.rounds):  # modes alternate, so that other load affects all of them
            for mode in modes:
                with tempfile.TemporaryDirectory() as folder:
                    here = os.getcwd()
                    os.chdir(folder)
                    try:
                        found = asyncio.run(
                            measure(config_of(mode[0], mode[1], arguments), what != "rollouts")
                        )
                    finally:
                        os.chdir(here)
                results.setdefault(mode, []).append(found)
        means = {
            mode: [sum(each) / len(each) for each in zip(*found, strict=True)]
            for mode, found in results.items()
        }
        for mode, (tokens, steps, age, learning) in means.items():
            factor = tokens / means[modes[0]][0]
            name = f"{what} | {mode[0]} | {mode[1]}"
            rest = f"{steps:.1f} | {age:.2f} | {learning:.0%}"
            print(f"| {name} | {tokens:.0f} | {factor:.2f} | {rest} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
