"""Compares the forecasts of `tir_alp.studies.simulate` with real runs.

    python -m tests.benchmarks.validate_simulator

A run with `max_staleness = 0` is recorded. The throughput of other layouts is forecast from its
costs, and then measured with the same tasks on the same machine, which must have no other load.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tir_alp.records.folder import read_records
from tir_alp.studies.simulate.costs import read_costs
from tir_alp.studies.simulate.pipeline import PipelineLayout, simulate

SLOW_TOOL = (
    *("--env.id", "tests.benchmarks.slow_tool:SlowTool-v0"),
    *("--env.kwargs", '{"median_s": 0.25, "sigma": 1.0, "max_s": 5.0}'),
    *("--rollout.max_context_tokens", "512", "--rollout.void_turns", "keep"),
    *("--doctor.ignore", "sandbox"),  # the environment runs no programs
)
ACTORS = ("--cluster", "local", "--cluster.patience_s", "60")
BARE = ("--eval.num_tasks", "1", "--checkpoint.every", "0")


@dataclass(frozen=True)
class Setting:
    """The run that is recorded, and the layouts that are forecast and run."""

    name: str
    words: tuple[str, ...]
    recorded: Mapping[str, int | str]
    layouts: Sequence[Mapping[str, int | str]]
    slowdown: float = 2.0
    """Engine and trainer each use both cores, so while both work, each has one."""


SETTINGS = (
    Setting(
        "embedded engine, slow tool",
        SLOW_TOOL,
        {"groups_per_step": 8, "group_size": 4},
        (
            {"groups_per_step": 8, "group_size": 4, "max_staleness": 0},
            {"groups_per_step": 8, "group_size": 4, "max_staleness": 2, "on_update": "keep"},
            {"groups_per_step": 4, "group_size": 8, "max_staleness": 1, "on_update": "wait"},
        ),
    ),
    Setting(
        "engines in actors, slow tool",
        (*SLOW_TOOL, *ACTORS),
        {"groups_per_step": 8, "group_size": 4, "engines": 1},
        (
            {
                **{"groups_per_step": 8, "group_size": 4, "engines": 2},
                **{"max_staleness": 1, "on_update": "keep"},
            },
        ),
        slowdown=1.5,  # actors use one core each, and three of them share two
    ),
    Setting(
        "embedded engine, Python sandbox",
        (),
        {"groups_per_step": 16, "group_size": 4},
        (
            {"groups_per_step": 16, "group_size": 4, "max_staleness": 1, "on_update": "keep"},
            {"groups_per_step": 8, "group_size": 8, "max_staleness": 0},
        ),
    ),
)


def run(folder: Path, name: str, words: Sequence[str], steps: int) -> Path:
    """Train in a separate process; return the run folder."""
    command = [sys.executable, "-m", "tir_alp.train", *BARE, *words, "--steps", str(steps)]
    environment = {**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH") or os.getcwd()}
    done = subprocess.run(
        [*command, "--name", name], cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return folder / "runs" / name


def measured(path: Path, warm_up: int) -> tuple[float, float]:
    """Return generated tokens per second, and seconds per step, after `warm_up` steps."""
    records, _ = read_records(path / "metrics.jsonl")
    steps = [each for each in records if "time/train" in each][warm_up:]
    tokens = sum(each["tokens/generated"] for each in steps)
    seconds = sum(each["tokens/generated"] / each["tokens/per_second"] for each in steps)
    return tokens / seconds, seconds / len(steps)


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=24, help="number of measured steps per run")
    parser.add_argument("--only", type=int, nargs="*", help="indices of the settings to measure")
    parser.add_argument("--keep", type=Path, help="folder to keep the runs in")
    options = parser.parse_args(words)
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; {options.steps} steps")
    print("| setting | layout | tokens/s measured | forecast | off | s per step | forecast | off |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        for number, setting in enumerate(SETTINGS):
            if options.only and number not in options.only:
                continue
            layout = rollout_words(setting.recorded)
            recorded = run(
                folder, f"recorded-{number}", [*setting.words, *layout], options.steps + 1
            )
            costs = read_costs(recorded, slowdown=setting.slowdown)
            for index, wanted in enumerate(setting.layouts):
                staleness = int(wanted.get("max_staleness", 0))
                forecast = simulate(costs, PipelineLayout(**wanted), steps=200)  # type: ignore[arg-type]
                path = run(
                    folder,
                    f"run-{number}-{index}",
                    [*setting.words, *rollout_words(wanted)],
                    options.steps + staleness + 2,
                )
                rate, step_s = measured(path, staleness + 2)
                print(
                    f"| {setting.name} | {', '.join(f'{k} {v}' for k, v in wanted.items())} | "
                    f"{rate:.0f} | {forecast.tokens_per_s:.0f} | "
                    f"{forecast.tokens_per_s / rate - 1:+.1%} | {step_s:.2f} | "
                    f"{forecast.seconds_per_step:.2f} | "
                    f"{forecast.seconds_per_step / step_s - 1:+.1%} |",
                    flush=True,
                )
    return 0


def rollout_words(layout: Mapping[str, int | str]) -> list[str]:
    """Return a layout as command-line arguments."""
    names = {"engines": "--cluster.engines.count"}
    return [
        word
        for key, value in layout.items()
        for word in (names.get(key, f"--rollout.{key}"), str(value))
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
