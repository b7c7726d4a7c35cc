"""Opens a run, trains, and goes on from the last checkpoint where the trainer was lost."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from tir_alp.config import Config
from tir_alp.engines.base import EngineFailed
from tir_alp.records.folder import RunFolder
from tir_alp.records.provenance import note_end
from tir_alp.roles import Placement, RoleLost
from tir_alp.rollouts.queue import RolloutsFailed
from tir_alp.run.console import RunConsole
from tir_alp.run.describe import describe_stop
from tir_alp.run.interrupt import Interrupt, Interrupted
from tir_alp.run.open_run import Examined
from tir_alp.run.placement import OpenCluster, open_placement
from tir_alp.tools.sandbox import SandboxRefused
from tir_alp.training import checkpoint_folder
from tir_alp.training.checkpoint_folder import CheckpointError

_MOST_LOSSES = 3  # from one checkpoint; after them the cause does not go away by itself


class OpenedRun(Protocol):
    """What the supervisor uses of a run."""

    @property
    def folder(self) -> RunFolder:
        """The run's folder."""
        ...

    @property
    def console(self) -> RunConsole:
        """Where it prints."""
        ...

    @property
    def examined(self) -> Examined:
        """The outcome of the checks at its start."""
        ...


R = TypeVar("R", bound=OpenedRun)


@dataclass(frozen=True, slots=True)
class Services(Generic[R]):
    """What a run uses of the layers above it, and what kind of run it is."""

    open: Callable[
        [Config, Placement, Path | None, Interrupt, Examined | None],
        AbstractAsyncContextManager[R],
    ]
    """Opens the run; see `open_run`."""
    train: Callable[[R], Awaitable[None]]
    """The loop."""
    describe_start: Callable[[R], str]
    """What is printed before the first step."""
    describe_end: Callable[[R], str]
    """What is printed after the last step."""
    open_cluster: OpenCluster
    draw_report: Callable[[Path], Path]
    """Draws the report of the run in a folder; returns the page."""
    command: str
    """Name of the command, by which the run can be resumed."""


class CannotStart(Exception):
    """The user has to fix something before a run can begin."""


class RunLost(Exception):
    """A run that can only go on from its newest checkpoint.

    Args:
        path: Folder of the run.
        reason: What was lost.
        examined: See `open_run`; None: the run was not open yet.
    """

    def __init__(self, path: Path, reason: str, examined: Examined | None = None) -> None:
        super().__init__(reason)
        self.path, self.examined = path, examined


async def train_from(config: Config, resume: Path | None, services: Services[R]) -> None:
    """Train a new run, or go on with the one in `resume`, where the config places it.

    Raises:
        CannotStart: For what a user can fix.
        RunLost: The trainer was lost too often, or before there was a checkpoint.
    """
    async with AsyncExitStack() as stack:
        try:
            placement = await stack.enter_async_context(
                open_placement(config, services.open_cluster)
            )
        except (ValueError, SandboxRefused, RoleLost) as error:
            raise CannotStart(str(error)) from error
        await train_stubbornly(placement, config, resume, services)


async def train_stubbornly(
    placement: Placement, config: Config, resume: Path | None, services: Services
) -> None:
    """Train in an open placement; where the trainer is lost, go on from the last checkpoint.

    Raises:
        RunLost: If that does not help.
    """
    interrupt = Interrupt(lambda line: print(line, file=sys.stderr, flush=True))
    losses: Counter[int] = Counter()
    examined: Examined | None = None
    with interrupt.listening():
        while True:
            try:
                return await train_once(placement, config, resume, services, interrupt, examined)
            except RunLost as lost:
                step = newest_step(lost.path)
                losses[-1 if step is None else step] += 1
                if step is None or losses[step] > _MOST_LOSSES:
                    raise
                print(f"{lost}; the run goes on from step {step}", file=sys.stderr)
                resume, examined = lost.path, lost.examined or examined


async def train_once(
    placement: Placement,
    config: Config,
    resume: Path | None,
    services: Services[R],
    interrupt: Interrupt,
    examined: Examined | None,
) -> None:
    """Open a run, describe it, train, and print what to do next; see `open_run`.

    Raises:
        CannotStart: For what a user can fix.
        RunLost: If the run lost its trainer, or all of its engines.
    """
    async with AsyncExitStack() as stack:
        try:
            run = await stack.enter_async_context(
                services.open(config, placement, resume, interrupt, examined)
            )
        except (ValueError, SandboxRefused) as error:
            raise CannotStart(str(error)) from error
        except RoleLost as error:
            if resume is None:
                raise CannotStart(str(error)) from error
            raise RunLost(resume, str(error)) from error
        path = run.folder.path
        run.console.print(services.describe_start(run))
        is_lost = False
        try:
            await services.train(run)
            run.console.print(services.describe_end(run))
        except RoleLost as error:
            is_lost = True
            raise RunLost(path, str(error), run.examined) from error
        except (Interrupted, RolloutsFailed, EngineFailed, OSError):
            run.console.print(describe_stop(path, newest_step(path), services.command))
            raise
        finally:
            if not is_lost:
                draw(run, services.draw_report)


def draw(run: OpenedRun, draw_report: Callable[[Path], Path]) -> None:
    """Draw the report of a run. A failure is printed and takes nothing else down.

    The report can be drawn again at any time: everything it needs is in the run's folder.
    """
    path = run.folder.path
    try:
        note_end(path)  # the report says how long the run took and what it used
        run.console.print(f"report: {draw_report(path)}")
    except Exception as error:  # a picture is not worth a run's end
        run.console.print(
            f"the report could not be drawn ({type(error).__name__}: {error}); nothing else needs "
            f"it. Draw it later: python -m tir_alp.report {path}"
        )


def newest_step(path: Path) -> int | None:
    """The step of a run's newest whole checkpoint; None if it has none."""
    try:
        return checkpoint_folder.newest(path / "checkpoints")[1].step
    except CheckpointError:
        return None
