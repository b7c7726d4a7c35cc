"""Trains a tool-using agent: `python -m tir_alp.train [--config FILE] [--dotted.key VALUE ...]`.

The loop is `train`, and reads as the algorithm: take groups, update, give the engine the new
weights, go on.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from transformers.utils.logging import disable_progress_bar

from tir_alp.algorithm.advantage import group_advantages
from tir_alp.algorithm.guards import Tripped, faint_noise, out_of_bounds
from tir_alp.algorithm.metrics import rollout_metrics
from tir_alp.config import Config, load_config, read_toml
from tir_alp.evaluate import evaluate
from tir_alp.models.tiny import TRAIN_CONFIG
from tir_alp.records.folder import read_run_config
from tir_alp.records.trajectories import state_to_record
from tir_alp.roles import RoleLost
from tir_alp.rollouts.queue import RolloutsFailed
from tir_alp.rollouts.renderer import PromptTooLong
from tir_alp.run.interrupt import Interrupted
from tir_alp.run.open_run import Run
from tir_alp.run.supervise import CannotStart, RunLost, train_from
from tir_alp.training import checkpoint
from tir_alp.training.batch import Sample
from tir_alp.training.checkpoint import Position
from tir_alp.types import TrajectoryGroup

CHANGEABLE = ("steps", "eval", "checkpoint", "guards", "doctor", "cluster")
"""What may differ when a run is resumed."""

T = TypeVar("T")


async def train(run: Run) -> None:
    """Train from the run's position to its last step, evaluating before and after.

    Raises:
        Interrupted: If somebody asked for an end; a checkpoint is there then.
    """
    config, step = run.config, run.position.step
    with run.console.training(step, config.steps):
        try:
            if step == 0:
                if config.guards.on_trip == "roll_back" or config.cluster.is_used:
                    await save(run, 0)
                await run.interrupt.interruptible(measure(run, step=0))
            while step < config.steps:
                began = time.monotonic()
                groups = await run.interrupt.interruptible(run.rollouts.take())
                await learn(run, groups, step, began)
                step += 1
                if due(step, config.eval.every) and step < config.steps:
                    await run.interrupt.interruptible(measure(run, step))
                if due(step, config.checkpoint.every) or step == config.steps:
                    await save(run, step)
            await run.interrupt.interruptible(measure(run, step))
        except Interrupted:
            with contextlib.suppress(RoleLost):  # then the checkpoint before it has to do
                await save(run, step)
            raise


async def learn(run: Run, groups: Sequence[TrajectoryGroup], step: int, began: float) -> None:
    """Update on the groups of a step, give the engine the new weights, and free the slots.

    Trainer and engine can take turns with the memory of a GPU: the engine's is free in between.

    Args:
        run: Of which.
        groups: Of the step.
        step: Its number.
        began: When it began to wait for them, by `time.monotonic`.
    """
    rolled_out = time.monotonic()
    await run.engine.lend_memory()
    metrics = await update(run, groups, step)
    trained = time.monotonic()
    metrics |= rollout_metrics(groups, step, run.rollouts.replaced)
    record(run, groups, step)
    await check_health(run, metrics, step)
    recorded = time.monotonic()
    weights = await with_trainer(run, run.trainer.weights)
    await run.engine.load_weights(weights, version=step + 1)
    run.rollouts.release()

    ended = time.monotonic()
    metrics |= {f"engine/{name}": value for name, value in run.engine.health().items()}
    metrics["time/rollout"] = rolled_out - began
    metrics["time/train"] = trained - rolled_out
    metrics["time/weights"] = ended - recorded
    metrics["tokens/per_second"] = metrics["tokens/generated"] / (ended - began)
    run.folder.log(step + 1, metrics)
    run.console.step(step + 1, metrics)


async def update(run: Run, groups: Sequence[TrajectoryGroup], step: int) -> dict[str, float]:
    """Let the trainer learn from groups, in a thread, so that rollouts go on meanwhile."""
    samples = with_advantages(groups, run.config)
    metrics, packed = await with_trainer(run, run.trainer.step, samples, step)
    run.ledger.updated(packed)
    return metrics


async def with_trainer(run: Run, call: Callable[..., T], *arguments: Any) -> T:
    """Ask the trainer, in its thread: what it answers may take long, or never come."""
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(run.trainer_thread, call, *arguments)


def with_advantages(groups: Sequence[TrajectoryGroup], config: Config) -> list[list[Sample]]:
    """Give each trajectory of each group its advantage."""
    samples = []
    for group in groups:
        advantages = group_advantages(group, config.algorithm, config.rollout)
        samples.append([Sample(*pair) for pair in zip(group.trajectories, advantages, strict=True)])
    return samples


def record(run: Run, groups: Sequence[TrajectoryGroup], step: int) -> None:
    """Write down what a step trained on, and who says so."""
    replaced, lost = run.rollouts.replaced, run.rollouts.lost
    run.folder.record(step + 1, groups, replaced, run.ledger.take(groups, replaced, lost))


async def check_health(run: Run, metrics: Mapping[str, float], step: int) -> None:
    """Stop or roll back a run whose update went out of bounds, before the engine gets its weights.

    Raises:
        Tripped: If it cannot, or shall not, go on.
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
    folder.log_event(step + 1, "roll_back", reason)
    run.console.print(f"step {step + 1}: {reason}")


def roll_back(run: Run) -> Position:
    """Give the trainer the newest checkpoint's weights and state; returns where that run stood.

    It reads and checks the whole checkpoint, so it belongs in the trainer's thread.
    """
    path, position, _ = checkpoint.newest(run.folder.checkpoints)
    run.trainer.load(path)
    return position


async def measure(run: Run, step: int) -> None:
    """Evaluate on held-out tasks, and log it."""
    settings = run.config.eval
    metrics = await evaluate(
        run.evaluation, run.held_out, samples=settings.samples, greedy=settings.greedy
    )
    run.folder.log(step, metrics)
    greedy = metrics.get("eval/greedy_accuracy")
    run.console.print(
        f"step {step}: accuracy {metrics['eval/accuracy']:.1%} sampled"
        + (f", {greedy:.1%} greedy" if greedy is not None else "")
        + f", {metrics['eval/tool_calls']:.2f} tool calls a trajectory"
        + f" ({len(run.held_out)} held-out tasks)"
    )


async def save(run: Run, step: int) -> None:
    """Write a checkpoint of where the run stands behind `step` steps."""
    state = run.rollouts.state
    rollouts = {"queue": state_to_record(state), "attempts": run.ledger.snapshot(state.finished)}
    position = Position(step=step, group=state.position, policy_version=step)
    folder, keep = run.folder.checkpoints, run.config.checkpoint.keep
    await with_trainer(run, run.trainer.save, folder, position, rollouts, keep)


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps, or never (0), happens after `step`."""
    return every > 0 and step % every == 0


def parse_command_line(arguments: Sequence[str]) -> tuple[Config, Path | None]:
    """Build the config of a new run, or of one to resume with `--resume FOLDER`."""
    parser = argparse.ArgumentParser("tir_alp.train", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--resume", type=Path)
    options, words = parser.parse_known_args(arguments)
    if options.resume is None:
        return load_config(words, read_toml(options.config or TRAIN_CONFIG)), None
    if options.config is not None:
        raise ValueError("--resume goes on with the run's own config: leave --config out")
    saved = read_run_config(options.resume)
    config = load_config(words, saved)
    changed = [
        name
        for name, value in load_config([], saved)
        if name not in CHANGEABLE and getattr(config, name) != value
    ]
    if changed:
        raise ValueError(
            f"{changed[0]} cannot change in the middle of a run; with --resume only "
            f"{', '.join(CHANGEABLE)} can"
        )
    return config, options.resume


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code: 2 for what the user has to mend, 3 for a guard."""
    disable_progress_bar()  # the library's own, for every file it reads or writes
    try:
        try:
            config, resume = parse_command_line(arguments)
        except ValueError as error:
            raise CannotStart(str(error)) from error
        asyncio.run(train_from(config, resume, train))
    except (CannotStart, PromptTooLong, RolloutsFailed, RunLost) as error:
        print(f"tir_alp.train: {error}", file=sys.stderr)
        return 2
    except Tripped as error:
        print(f"tir_alp.train: {error}", file=sys.stderr)
        return 3
    except (Interrupted, KeyboardInterrupt):
        print("tir_alp.train: interrupted; --resume goes on from the last checkpoint")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
