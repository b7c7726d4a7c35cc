"""Episodes per second of the environment layer alone, and of GEM and SkyRL-Gym on the same tasks.

    python tests/benchmarks/bench_environments.py [--seconds 5] [--threads 8]

A scripted policy plays, so no model is involved. There are two tasks: one turn that answers, and
two turns, of which the first runs a small program with the library's own Python tool. This
project's tool runs in the sandbox, those of the others in a new process that is not confined. Each
contestant runs in its own process, one after the other; a library that is not installed is skipped.

GEM and SkyRL-Gym are measured directly, in their own interpreter, and through this project's pipe.
Rates need an idle machine. The processor time per episode does not, but excludes the processes that
a contestant starts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

Play = Callable[[int], float]
"""Plays the episode with a given number and returns the reward."""

_NUM_TIMED, _TIMED_S = 50, 0.3  # minimum number of episodes, and of processor seconds
PROGRAM = "```python\nprint(6*7)\n```"
WRONG = r"It is \boxed{41}."
EXTRAS = {"reward_spec": {"ground_truth": "42"}, "extra_info": {}}


def ours(env_id: str, *actions: str, **kwargs: Any) -> Play:
    """Make a new environment for each episode, as in training."""
    import gymnasium

    import tir_alp.envs  # noqa: F401

    def play(number: int) -> float:
        env = gymnasium.make(f"tir_alp.envs:{env_id}", disable_env_checker=True, **kwargs)
        task = {"task_id": str(number), "question": "What is 6*7?", "answer": "42"}
        env.reset(options={"task": task})
        reward = sum(float(env.step(action)[1]) for action in actions)
        env.close()
        return reward

    return play


def our_answer() -> Play:
    """One turn that is graded."""
    return ours("PythonMath-v0", WRONG)


def our_program() -> Play:
    """A program in the sandbox, then the answer."""
    return ours("PythonMath-v0", PROGRAM, WRONG, sandbox={"preload": []})


def gem_piped() -> Play:
    """GEM in its own process, as in training."""
    return ours("Gem-v0", WRONG, name="rg:gcd")


def skyrl_piped() -> Play:
    """SkyRL-Gym in its own process, as in training."""
    return ours("SkyRLGym-v0", "#### 41", name="gsm8k")


def gem_answer() -> Play:
    """GEM, directly: one turn that is graded."""
    import gem  # type: ignore[import-not-found]

    def play(number: int) -> float:
        env = gem.make("rg:gcd")
        env.reset(seed=number)
        return float(env.step(WRONG)[1])

    return play


def gem_program() -> Play:
    """GEM, directly: a program in a new process without a sandbox, its default, then the answer."""
    import gem  # type: ignore[import-not-found]
    from gem.tools.python_code_tool import PythonCodeTool  # type: ignore[import-not-found]
    from gem.tools.tool_env_wrapper import ToolEnvWrapper  # type: ignore[import-not-found]

    def play(number: int) -> float:
        env = ToolEnvWrapper(gem.make("rg:gcd"), tools=[PythonCodeTool(timeout=60)])
        env.reset(seed=number)
        assert "42" in env.step(PROGRAM)[0]
        return float(env.step(WRONG)[1])

    return play


def skyrl_answer() -> Play:
    """SkyRL-Gym, directly: one turn that is graded by a regular expression."""
    import skyrl_gym  # type: ignore[import-not-found]

    def play(number: int) -> float:
        env = skyrl_gym.make("gsm8k", env_config=None, extras=EXTRAS)
        env.init([{"role": "user", "content": "What is 6*7?"}])
        return float(env.step("#### 41")["reward"])

    return play


def skyrl_program() -> Play:
    """SkyRL-Gym, directly: its Python tool, a new process without a sandbox, then the answer.

    None of its environments has this tool, so it is called as they call their tools.
    """
    import skyrl_gym  # type: ignore[import-not-found]
    from skyrl_gym.tools import PythonCodeExecutorToolGroup  # type: ignore[import-not-found]

    def play(number: int) -> float:
        env = skyrl_gym.make("gsm8k", env_config=None, extras=EXTRAS)
        env.init_tool_groups([PythonCodeExecutorToolGroup(timeout=60)])
        env.init([{"role": "user", "content": "What is 6*7?"}])
        answer = env._execute_tool("PythonCodeExecutorToolGroup", "python", ["print(6*7)"])
        assert answer == "42", answer
        return float(env.step("#### 41")["reward"])

    return play


CONTESTANTS: dict[str, tuple[str, str, Callable[[], Play]]] = {
    "our_answer": ("answer", "", our_answer),
    "gem_answer": ("answer", "gem", gem_answer),
    "gem_piped": ("answer", "", gem_piped),
    "skyrl_answer": ("answer", "skyrl-gym", skyrl_answer),
    "skyrl_piped": ("answer", "", skyrl_piped),
    "our_program": ("program, answer", "", our_program),
    "gem_program": ("program, answer", "gem", gem_program),
    "skyrl_program": ("program, answer", "skyrl-gym", skyrl_program),
}
"""Name -> task, library whose interpreter runs it (empty: this one), maker of its player."""


def episodes_per_second(play: Play, seconds: float, threads: int) -> float:
    """Play in several threads until the time is over; return episodes per second."""
    start = time.monotonic()

    def work(thread: int) -> int:
        count = 0
        while time.monotonic() < start + seconds:
            play(thread + threads * count)
            count += 1
        return count

    with ThreadPoolExecutor(threads) as pool:
        total = sum(pool.map(work, range(threads)))
    return total / (time.monotonic() - start)


def cpu_ms(play: Play) -> float:
    """Return the milliseconds of this process's own processor time per episode."""
    start, number = time.process_time(), 0
    while number < _NUM_TIMED or time.process_time() < start + _TIMED_S:
        play(number)
        number += 1
    return 1000 * (time.process_time() - start) / number


def main() -> None:
    """Measure everything that is installed here, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--one", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        play = CONTESTANTS[options.one][2]()
        play(0)  # so that one-time start-up is not measured
        rates = [episodes_per_second(play, options.seconds, n) for n in (1, options.threads)]
        print(json.dumps([cpu_ms(play), *rates]), flush=True)
        os._exit(0)  # skips the libraries' exit handlers
    from tir_alp.envs.interop.libraries import find_python

    print(f"{'':16}{'task':18}{'cpu ms':>10}{'1 thread':>12}{f'{options.threads} threads':>12}")
    for name, (task, library, _) in CONTESTANTS.items():
        try:
            python = find_python(library) if library else sys.executable
        except ValueError:
            print(f"{name:16}{task:18} {library} is not installed")
            continue
        command = [python, __file__, "--one", name, "--seconds", str(options.seconds)]
        command += ["--threads", str(options.threads)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=600)
        if done.returncode:
            print(f"{name:16}{task:18} failed")
            continue
        cpu, single, many = json.loads(done.stdout.splitlines()[-1])
        print(f"{name:16}{task:18}{cpu:10.3f}{single:12.1f}{many:12.1f}", flush=True)


if __name__ == "__main__":
    main()
