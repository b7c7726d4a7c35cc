"""Opens a run, trains, and goes on from the last checkpoint where the trainer was lost."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from tir_alp.algorithm.formula import formula
from tir_alp.config import Config
from tir_alp.report import write_run_report
from tir_alp.roles import Placement, RoleLost
from tir_alp.run.interrupt import Interrupt
from tir_alp.run.open_run import Run, open_run
from tir_alp.run.placement import open_placement
from tir_alp.tools.sandbox import SandboxRefused
from tir_alp.training import checkpoint

Loop = Callable[[Run], Awaitable[None]]
"""Trains an open run to its end."""

_MOST_LOSSES = 3  # from one checkpoint; after them, what is wrong does not pass by itself


class CannotStart(Exception):
    """What the user has to mend before a run can begin."""


class RunLost(Exception):
    """A run that can go on only from its newest checkpoint.

    Args:
        path: Its folder.
        reason: What it lost.
        environment: See `Run`; None: it was not open yet.
    """

    def __init__(self, path: Path, reason: str, environment: dict[str, Any] | None = None) -> None:
        super().__init__(reason)
        self.path, self.environment = path, environment
        self.step = checkpoint.newest(path / "checkpoints")[1].step


async def train_from(config: Config, resume: Path | None, train: Loop) -> None:
    """Train a new run, or go on with one, where the config says."""
    async with AsyncExitStack() as stack:
        try:
            parts = await stack.enter_async_context(open_placement(config))
        except (ValueError, SandboxRefused, RoleLost) as error:
            raise CannotStart(str(error)) from error
        await train_stubbornly(parts, config, resume, train)


async def train_stubbornly(
    parts: Placement, config: Config, resume: Path | None, train: Loop
) -> None:
    """Train in parts that are there; where the trainer is lost, go on from the last checkpoint.

    Raises:
        RunLost: If that does not help.
    """
    interrupt = Interrupt()
    losses: Counter[int] = Counter()
    environment: dict[str, Any] | None = None
    with interrupt.listening():
        while True:
            try:
                return await train_with(parts, config, resume, train, interrupt, environment)
            except RunLost as lost:
                losses[lost.step] += 1
                if losses[lost.step] > _MOST_LOSSES:
                    raise
                print(f"{lost}; the run goes on from step {lost.step}", file=sys.stderr)
                resume, environment = lost.path, lost.environment or environment


async def train_with(
    parts: Placement,
    config: Config,
    resume: Path | None,
    train: Loop,
    interrupt: Interrupt,
    environment: dict[str, Any] | None,
) -> None:
    """Open a run, say what it is, train, and say what to do next; see `open_run`.

    Raises:
        RunLost: If the run lost its trainer, or all of its engines.
    """
    async with AsyncExitStack() as stack:
        try:
            run = await stack.enter_async_context(
                open_run(config, resume, parts, interrupt, environment)
            )
        except (ValueError, SandboxRefused) as error:
            raise CannotStart(str(error)) from error
        except RoleLost as error:
            if resume is None:
                raise CannotStart(str(error)) from error
            raise RunLost(resume, str(error)) from error
        path = run.folder.path
        run.console.print(
            f"config {config.model_dump_json()}\n{formula(config.algorithm)}\n"
            + f"environment {json.dumps(run.environment_report)}\n"
            + "".join(
                f"warning: {warning}\n" for warning in run.environment_report.get("warnings", ())
            )
            + f"run {path}"
        )
        is_lost = False
        try:
            await train(run)
            run.console.print(
                f"the model is in {path}/checkpoints/step_{config.steps}, metrics in "
                f"{path}/metrics.jsonl\n"
                f"next: tensorboard --logdir {path}  |  go on: python -m tir_alp.train "
                f"--resume {path} --steps {config.steps * 2}"
            )
        except RoleLost as error:
            is_lost = True
            raise RunLost(path, str(error), run.environment_report) from error
        finally:
            if not is_lost:
                draw(run)


def draw(run: Run) -> None:
    """Write the report of a run. One that cannot be drawn is said so, and takes nothing else down.

    It can be drawn again at any time: all that it needs is in the run's folder.
    """
    path = run.folder.path
    try:
        run.console.print(f"report: {write_run_report(path)}")
    except Exception as error:  # a picture is not worth a run's end
        run.console.print(
            f"the report could not be drawn ({type(error).__name__}: {error}); the run itself is "
            f"whole. Draw it, and see where it fails: python -m tir_alp.report {path}"
        )
