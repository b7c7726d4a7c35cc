"""Trains a tool-using agent: `python -m tir_alp.train [--config FILE] [--dotted.key VALUE ...]`.

The loop is `train`, and reads as the algorithm: take groups, update, give the engine the new
weights, go on. It holds handles and never a tensor, so nothing in this module needs torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tir_alp.algorithm.advantage import step_advantages, turn_advantages
from tir_alp.algorithm.guards import Tripped, faint_noise, out_of_bounds
from tir_alp.algorithm.metrics import rollout_metrics
from tir_alp.algorithm.presets import ALGORITHMS
from tir_alp.config import Config
from tir_alp.engines.base import EngineFailed
from tir_alp.models.tiny import TRAIN_CONFIG
from tir_alp.process import run_command, torch_imports
from tir_alp.records.folder import RunFolder, read_run_config
from tir_alp.records.trajectories import state_to_record
from tir_alp.roles import RoleLost
from tir_alp.rollouts.call_metrics import call_metrics
from tir_alp.rollouts.evaluation import play_sets, summary
from tir_alp.rollouts.queue import RolloutsFailed
from tir_alp.rollouts.renderer import PromptTooLong
from tir_alp.run.command_line import Command, overlay, read_config
from tir_alp.run.describe import describe_end, describe_evaluation, describe_start
from tir_alp.run.interrupt import Interrupted
from tir_alp.run.loop import due, keep_if_best, with_trainer
from tir_alp.training import checkpoint_folder
from tir_alp.training.checkpoint_folder import Position
from tir_alp.training.samples import samples_of
from tir_alp.types import Sample, TrajectoryGroup

if TYPE_CHECKING:
    from tir_alp.run.open_run import Run
    from tir_alp.run.supervise import Services

CHANGEABLE = (
    *("steps", "trackers", "metrics", "eval", "checkpoint", "records", "guards", "doctor"),
    "cluster",
)
"""Sections that may differ when a run is resumed."""

_COMMAND = Command(
    """\
usage: python -m tir_alp.train [--config FILE] [--algorithm NAME] [--dotted.key VALUE ...]
       python -m tir_alp.train --resume RUN [--steps N]

Train a model that reasons over several turns with tools. Without arguments: a tiny model on this
machine's CPU, which takes minutes and downloads nothing.""",
    {
        "config FILE": "TOML file with settings (default: the embedded tiny model)",
        "resume RUN": f"go on with the run in this folder; may change {', '.join(CHANGEABLE)}",
        "algorithm NAME": f"a preset: {', '.join(ALGORITHMS)}",
        "cluster ADDRESS": "where processes live: none, local, auto or ray://HOST:PORT",
    },
)

ENDS = (Interrupted, RolloutsFailed, EngineFailed)
"""The ends of a run before its last step after which it can go on."""


async def train(run: Run) -> None:
    """Train from the run's position to its last step, evaluating before and after.

    Raises:
        Interrupted, RolloutsFailed, EngineFailed: The run ended early. It was saved, unless it
            ended in the middle of an update.
    """
    config, step, in_update = run.config, run.position.step, False
    with run.console.training(step, config.steps):
        try:
            if step == 0:
                if config.guards.on_trip == "roll_back" or config.cluster.is_used:
                    await save(run, 0)
                await run.interrupt.interruptible(measure(run, step=0))
            while step < config.steps:
                began = time.monotonic()
                groups = await run.interrupt.interruptible(run.rollouts.take())
                rolled_out, in_update = time.monotonic(), True
                metrics = await learn(run, groups, step)
                step, in_update = step + 1, False
                metrics["time/rollout"] = rolled_out - began
                await publish(run, groups, step, metrics, began)
                if due(step, config.eval.every) and step < config.steps:
                    await run.interrupt.interruptible(measure(run, step))
                if due(step, config.checkpoint.every) or step == config.steps:
                    await save(run, step)
            if step > 0:
                await run.interrupt.interruptible(measure(run, step))
        except ENDS:
            if not in_update:
                with contextlib.suppress(RoleLost):  # then the checkpoint before it has to do
                    await save(run, step)
            raise


async def learn(run: Run, groups: Sequence[TrajectoryGroup], step: int) -> dict[str, float]:
    """Update on the groups of a step, and record it; returns its metrics.

    Trainer and engine can take turns with the memory of a GPU: the engine's is free meanwhile.

    Args:
        run: The run.
        groups: The groups that the step trains on.
        step: Number of the step, from 0.
    """
    began = time.monotonic()
    await run.engine.lend_memory()
    metrics = await update(run, groups, step)
    metrics["time/train"] = time.monotonic() - began
    metrics |= rollout_metrics(groups, step, run.rollouts.replaced)
    metrics |= call_metrics(groups, run.rollouts.replaced)
    record(run, groups, step)
    await check_health(run, metrics, step)
    return metrics


async def publish(
    run: Run,
    groups: Sequence[TrajectoryGroup],
    step: int,
    metrics: dict[str, float],
    began: float,
) -> None:
    """Give the engine the weights after `step` steps, free the slots, and log the step.

    Args:
        run: The run.
        groups: The groups that the step trained on.
        step: Number of steps made, which is the version of the weights.
        metrics: Those of the step; times are added.
        began: `time.monotonic` when the wait for the groups began.
    """
    trained = time.monotonic()
    weights = await with_trainer(run, run.trainer.weights)
    try:
        await run.engine.load_weights(weights, version=step)
    except EngineFailed:  # the step is made all the same
        run.folder.log(step, metrics)
        raise
    if run.config.steps - step > run.config.rollout.max_staleness:  # else no step would take them
        run.rollouts.release()
    ended = time.monotonic()
    metrics |= {f"engine/{name}": value for name, value in run.engine.health().items()}
    metrics["time/weights"] = ended - trained
    metrics["tokens/per_second"] = metrics["tokens/generated"] / (ended - began)
    run.folder.log(step, metrics)
    run.console.step(step, metrics)
    for sentence in run.advice.of_step(step, groups, metrics):
        run.console.print(f"step {step}: {sentence}")
        run.folder.note_advice(step, sentence)


async def update(run: Run, groups: Sequence[TrajectoryGroup], step: int) -> dict[str, float]:
    """Let the trainer learn from groups, in a thread, so that rollouts go on meanwhile."""
    samples = with_advantages(groups, run.config)
    report = await with_trainer(run, run.trainer.step, samples, step)
    run.ledger.updated(report.updates)
    run.folder.record_values(step + 1, report.values)
    return report.metrics


def with_advantages(groups: Sequence[TrajectoryGroup], config: Config) -> list[list[Sample]]:
    """Give each trajectory of each group, and its branches, its advantage."""
    found = step_advantages(groups, config.algorithm, config.rollout)
    samples = []
    for group, advantages in zip(groups, found, strict=True):
        by_turn = turn_advantages(group, config.algorithm) or [None] * len(advantages)
        columns = zip(group.trajectories, advantages, by_turn, strict=True)
        samples.append(
            [
                sample
                for trajectory, advantage, of_turns in columns
                for sample in samples_of(
                    trajectory, advantage, of_turns, config.rollout.trace_credit
                )
            ]
        )
    return samples


def record(run: Run, groups: Sequence[TrajectoryGroup], step: int) -> None:
    """Record what a step trained on, in the trajectories and in the ledger."""
    replaced, lost = run.rollouts.replaced, run.rollouts.lost
    run.folder.record(step + 1, groups, replaced, run.ledger.take(groups, replaced, lost))


async def check_health(run: Run, metrics: Mapping[str, float], step: int) -> None:
    """Stop or roll back a run whose update went out of bounds, before the engine gets its weights.

    Raises:
        Tripped: The run must stop.
    """
    guards, folder = run.config.guards, run.folder
    if step == run.position.step and (warning := faint_noise(metrics)):
        run.console.print(f"warning: {warning}")
    if not (reason := out_of_bounds(metrics, guards)):
        return
    if guards.on_trip == "stop" or len(folder.events("roll_back")) == guards.max_roll_backs:
        folder.log(step + 1, metrics)
        folder.log_event(step + 1, "stop", reason)
        raise Tripped(f"stopped in step {step + 1}: {reason}")
    good = await with_trainer(run, roll_back, run)
    reason = f"{reason}; back to the weights of step {good.step}"
    folder.log_event(step + 1, "roll_back", reason, weights_of_step=good.step)
    run.console.print(f"step {step + 1}: {reason}")


def roll_back(run: Run) -> Position:
    """Load weights and state of the newest checkpoint into the trainer; returns its position.

    It reads and verifies the whole checkpoint, so it belongs in the trainer's thread.
    """
    path, position, _ = checkpoint_folder.newest(run.folder.checkpoints)
    run.trainer.load(path)
    return position


async def measure(run: Run, step: int) -> None:
    """Evaluate on held-out tasks, log it, and save the weights if they are the best so far."""
    settings, sets = run.config.eval, run.eval_sets
    num_tasks = sum(len(each.tasks) for each in sets)
    run.console.print(f"step {step}: evaluating {num_tasks} held-out tasks")
    played = await play_sets(run.evaluation, sets, samples=settings.samples, greedy=settings.greedy)
    metrics = summary(played)
    run.folder.log(step, metrics)
    for line in describe_evaluation(metrics, {each.name: len(each.tasks) for each in sets}):
        run.console.print(f"step {step}: {line}")
    score = metrics.get("eval/accuracy")
    if score is not None and run.config.checkpoint.best:
        await keep_if_best(run.folder.checkpoints, step, score, lambda: save(run, step))


async def save(run: Run, step: int) -> None:
    """Write a checkpoint of the run after `step` steps."""
    state = run.rollouts.state
    rollouts = {"queue": state_to_record(state), "attempts": run.ledger.snapshot(state.finished)}
    position = Position(step=step, group=state.position)
    folder, keep = run.folder.checkpoints, run.config.checkpoint.keep
    ends = run.evaluation.renderer.stop_token_ids
    await with_trainer(run, run.trainer.save, folder, position, rollouts, keep, ends)


def read_arguments(arguments: Sequence[str]) -> tuple[Config, Path | None]:
    """Build the config of a new run, or of one to go on with by `--resume FOLDER`.

    Raises:
        ValueError: With one line for each mistake.
    """
    words = _COMMAND.read(arguments)
    if "resume" not in words.options:
        return read_config(words, TRAIN_CONFIG), None
    if "config" in words.options:
        raise ValueError("--resume goes on with the run's own config: leave --config out")
    folder = Path(words.options["resume"])
    saved = read_run_config(folder)
    before, config = overlay({}, saved), overlay(words.values, saved)
    changed = [
        name for name, value in before if name not in CHANGEABLE and getattr(config, name) != value
    ]
    if changed:
        raise ValueError(
            f"{changed[0]} cannot change in the middle of a run; with --resume only "
            f"{', '.join(CHANGEABLE)} can"
        )
    return config, folder


def services() -> Services[Run]:
    """What a run uses of the layers above it. Imported when a run starts, since it needs torch."""
    from tir_alp.cluster import open_cluster
    from tir_alp.doctor.start import Doctor
    from tir_alp.run.open_run import open_run
    from tir_alp.run.supervise import Services

    return Services(
        open=lambda config, placement, resume, interrupt, examined: open_run(
            config, placement, Doctor(), resume=resume, interrupt=interrupt, examined=examined
        ),
        train=train,
        describe_start=lambda run: describe_start(
            run.config, run.examined.environment_report, run.folder.path
        ),
        describe_end=_end_of,
        open_cluster=open_cluster,
        draw_report=draw_report,
        command="train",
    )


def draw_report(path: Path) -> Path:
    """Draw the report of a run; returns the page."""
    # Imported here because it needs matplotlib, for which no run has to wait at its start.
    from tir_alp.report import write_run_report

    return write_run_report(path)


def _end_of(run: Run) -> str:
    path, has_tensorboard = run.folder.path, "tensorboard" in run.config.trackers
    lines = (describe_end(path, run.config.steps, has_tensorboard), run.advice.at_end())
    return "\n".join(filter(None, lines))


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code: 2 for what the user has to fix, 3 for a guard."""
    try:
        config, resume = read_arguments(arguments)
        if resume is None and config.name is not None:
            RunFolder(Path("runs") / config.name).check_is_new()
    except ValueError as error:
        print(f"tir_alp.train: {error}", file=sys.stderr)
        return 2
    # Imported here because it needs torch, and a mistake in the command line is answered at once.
    with torch_imports():
        from tir_alp.run.ahead import start_tools

        start_tools(config)
        from tir_alp.run.finish import finish
        from tir_alp.run.supervise import train_from

        used = services()
    return finish(
        "train",
        lambda: asyncio.run(train_from(config, resume, used)),
        mistake=PromptTooLong,
    )


if __name__ == "__main__":
    sys.exit(run_command(main, imports=True))
