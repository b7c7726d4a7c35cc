"""The cost of a run's records: processor time that a training run in one process spends on them.

    python -m tests.benchmarks.bench_ledger [--steps 10]

Trains the tiny agent and adds up the processor time of everything that writes records: the ledger's
wrappers around engine and environments, its digests of what was packed, and the files of each step.
It is processor time, so other load on the machine does not matter.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from tir_alp.doctor.start import Doctor
from tir_alp.models.tiny import TRAIN_CONFIG
from tir_alp.records import folder as run_folder
from tir_alp.records import ledger
from tir_alp.run.command_line import load_config, read_toml
from tir_alp.run.local_placement import LocalPlacement
from tir_alp.run.open_run import open_run
from tir_alp.train import train

SPENT: defaultdict[str, float] = defaultdict(float)


def timed(owner: Any, name: str) -> None:
    """Replace a function by one that counts the processor time of the calling thread."""
    function: Callable[..., Any] = getattr(owner, name)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        start = time.thread_time()
        try:
            return function(*arguments, **named)
        finally:
            SPENT[name] += time.thread_time() - start

    setattr(owner, name, wrapped)


def main() -> None:
    """Train, and print the share of each function."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    steps = parser.parse_args().steps
    timed(ledger, "ids_digest")
    timed(ledger, "answer_digest")
    timed(ledger.Ledger, "updated")
    timed(ledger.Ledger, "take")
    timed(run_folder.RunFolder, "record")
    words = ("--steps", str(steps), "--eval.num_tasks", "1", "--name", "records")

    async def run() -> float:
        config = load_config(words, read_toml(TRAIN_CONFIG))
        async with open_run(config, LocalPlacement(config), Doctor()) as opened:
            start = time.process_time()
            await train(opened)
            return time.process_time() - start

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        total = asyncio.run(run())
        os.chdir("/")
    for name, spent in SPENT.items():
        print(f"{name:>14}: {1000 * spent / steps:7.2f} ms per step, {spent / total:.2%}")
    print(f"{'training':>14}: {1000 * total / steps:7.2f} ms per step of processor time")


if __name__ == "__main__":
    main()
