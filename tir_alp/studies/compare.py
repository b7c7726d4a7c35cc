"""Trains the able tiny model with every method under the same mismatch, and compares the runs.

    python -m tir_alp.studies.compare [--algorithms grpo alp_sequence] [--seeds 3]
        [-- --steps 20 ...]

Arguments after `--` are passed to every run. Completed runs are kept, so an interrupted comparison
continues where it stopped. The table and the pictures are those of `tir_alp.report`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tir_alp.algorithm.presets import ALGORITHMS
from tir_alp.process import run_command
from tir_alp.run.command_line import load_config, read_toml

COMPARE_CONFIG = Path(__file__).with_name("compare.toml")
"""The config of every run, which is also `configs/tiny_mismatch.toml`."""

_COMPLETED = "ended"  # marker file in the folder of a run that need not be repeated


def train(folder: str, algorithm: str, seed: int, words: Sequence[str], threads: int) -> Path:
    """Train one run, unless it has completed before; return its folder.

    A run that a guard stopped counts as completed.

    Args:
        folder: Folder below `runs/` that holds all runs of the comparison.
        algorithm: Name of the algorithm.
        seed: Seed of the run.
        words: Additional command-line arguments for `tir_alp.train`.
        threads: Number of CPU threads that the run may use.

    Raises:
        RuntimeError: If the run failed; the message has its output.
    """
    name = f"{folder}/{algorithm}-seed{seed}"
    path = Path("runs") / name
    if (path / _COMPLETED).exists():
        return path
    shutil.rmtree(path, ignore_errors=True)
    command = [sys.executable, "-m", "tir_alp.train", "--config", str(COMPARE_CONFIG)]
    command += ["--name", name, "--algorithm", algorithm, "--seed", str(seed), *words]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    result = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if result.returncode not in (0, 3):
        raise RuntimeError(f"{name} failed with status {result.returncode}:\n{result.stdout}")
    (path / _COMPLETED).touch()
    print(f"{name}: {_last_news(result.stdout)}")
    return path


def _last_news(printed: str) -> str:
    """The last line about a step, which is the final evaluation or what a guard stopped."""
    lines = printed.splitlines()
    return next((line for line in reversed(lines) if "step " in line), lines[-1])


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser("python -m tir_alp.studies.compare", description=__doc__)
    found.add_argument("--algorithms", nargs="+", choices=[*ALGORITHMS], default=[*ALGORITHMS])
    found.add_argument("--seeds", type=int, default=3, help="number of runs per method")
    found.add_argument("--jobs", type=int, default=os.cpu_count(), help="number of concurrent runs")
    found.add_argument("--name", default="compare", help="folder below runs/")
    return found


def main(arguments: Sequence[str]) -> int:
    """Train every method with every seed, then draw the report; return the report's exit code."""
    words: Sequence[str] = ()
    if "--" in arguments:
        end = arguments.index("--")
        arguments, words = arguments[:end], arguments[end + 1 :]
    options = parser().parse_args(arguments)
    if options.seeds < 1 or options.jobs < 1:
        parser().error(f"--seeds ({options.seeds}) and --jobs ({options.jobs}) must be at least 1")
    try:
        load_config(words, read_toml(COMPARE_CONFIG))
    except ValueError as error:
        print(f"tir_alp.studies.compare: {error}", file=sys.stderr)
        return 2
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = [
            pool.submit(train, options.name, algorithm, seed, words, threads)
            for seed in range(options.seeds)
            for algorithm in options.algorithms
        ]
        try:
            paths = [run.result() for run in runs]
        except RuntimeError as error:
            pool.shutdown(cancel_futures=True)
            print(f"tir_alp.studies.compare: {error}", file=sys.stderr)
            return 1
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    out = Path("runs") / options.name / "report"
    report = [sys.executable, "-m", "tir_alp.report", *map(str, paths), "--out", str(out)]
    return subprocess.run(report).returncode


if __name__ == "__main__":
    sys.exit(run_command(main))
