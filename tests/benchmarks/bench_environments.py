"""How many episodes a second does the environment layer play, when the policy costs nothing?

    python -m tests.benchmarks.bench_environments [--episodes 200] [--threads 1 8]

A canned policy calls the tool once and then gives the right answer. `RIVALS` has the same task in
other libraries: a function that prepares, and returns one that plays the episode of an index.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gymnasium

PlayEpisode = Callable[[int], float]
"""Plays the episode of an index; returns its reward."""

CALLS = {
    "PythonMath-v0": "```python\nprint({expression})\n```",
    "MultiTool-v0": (
        '<tool_call>{{"name": "calculator", '
        '"arguments": {{"expression": "{expression}"}}}}</tool_call>'
    ),
    "SingleTurnMath-v0": None,
    "PythonCode-v0": "```python\nprint(6*7)\n```",
    "ReasoningGym-v0": "```python\nprint(6*7)\n```",
}
"""What the canned policy says before its answer."""

RIVALS: dict[str, Callable[[], PlayEpisode]] = {}
"""Other libraries by name, e.g. `"gem": prepare_gem`."""


def ours(id: str) -> PlayEpisode:
    """The episodes of one of our environments, a fresh instance each, as a rollout makes them."""
    more: dict[str, Any] = {}
    if id != "SingleTurnMath-v0":
        more["sandbox"] = {"preload": []}

    def play(index: int) -> float:
        env = gymnasium.make(f"tir_alp.envs:{id}", disable_env_checker=True, **more)
        _, info = env.reset(seed=index)
        task, call = info["task"], CALLS[id]
        if call is not None:
            expression = task["question"].removeprefix("What is ").removesuffix("?")
            env.step(call.format(expression=expression))
        answer = env.get_wrapper_attr("gold_action")(task)
        reward = float(env.step(answer)[1])
        env.close()
        return reward

    return play


def episodes_per_second(play: PlayEpisode, num_episodes: int, num_threads: int) -> float:
    """Play episodes in threads, after a few to warm up.

    Raises:
        RuntimeError: One of them did not get its reward, so that the figure would mean nothing.
    """
    with ThreadPoolExecutor(num_threads) as threads:
        list(threads.map(play, range(num_threads)))
        began = time.perf_counter()
        rewards = list(threads.map(play, range(num_episodes)))
        took = time.perf_counter() - began
    if rewards != [1.0] * num_episodes:
        raise RuntimeError(f"{rewards.count(1.0)} of {num_episodes} episodes were rewarded")
    return num_episodes / took


def main() -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--only", nargs="+", default=[*CALLS, *RIVALS])
    options = parser.parse_args()
    print("| environment | threads | episodes/s |\n|---|---|---|")
    for name in options.only:
        play = ours(name) if name in CALLS else RIVALS[name]()
        for num_threads in options.threads:
            rate = episodes_per_second(play, options.episodes, num_threads)
            print(f"| {name} | {num_threads} | {rate:.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
