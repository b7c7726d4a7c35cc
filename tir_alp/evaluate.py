"""Measures a model: `python -m tir_alp.evaluate --run RUN | --model PATH [--data NAME] [--k K]`.

Each task is sampled k times, through the same episodes as in training. What is reported are means
over tasks with 95 % intervals (bootstrap over tasks): avg@k, the share of right samples; pass@k,
the probability that one of k samples is right; maj@k, whether the most frequent answer is right.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tir_alp.algorithm.estimates import (
    Estimate,
    majority_is_correct,
    over_tasks,
    paired_difference,
    pass_at_k,
)
from tir_alp.algorithm.metrics import is_correct, tool_calls
from tir_alp.algorithm.section import merge
from tir_alp.config import Config
from tir_alp.process import run_command, torch_imports
from tir_alp.records.evaluation_folder import RESULT, read_result, write_result
from tir_alp.rollouts.benchmarks import OF_FILES, WITHOUT_TOOLS, environment_of, source_of
from tir_alp.rollouts.evaluation import PlayedTask
from tir_alp.run.command_line import Command, Words, overlay
from tir_alp.run.interrupt import Interrupt
from tir_alp.run.model_choice import MODEL_OPTIONS, Model, choose_model, settings_of
from tir_alp.types import Trajectory

_COMMAND = Command(
    """\
usage: python -m tir_alp.evaluate --model PATH [--data NAME,...] [--k 4] [--dotted.key VALUE ...]
       python -m tir_alp.evaluate --run RUN [--checkpoint best|last|N] [--against OTHER] ...

Measure a model, or a checkpoint of a run, on tasks: accuracy with intervals, pass@k, maj@k, and
what an episode costs. An evaluation that was interrupted goes on when the command is repeated.""",
    {
        **MODEL_OPTIONS,
        "data NAME,...": "benchmarks (gsm8k, math500, ...; gsm8k=FILE for a copy), sources, files",
        "k NUMBER": "samples per task; the setting eval.samples",
        "against OTHER": "compare with another evaluation, run or model, task by task",
        "without-tools": "play the tasks in the environment that offers no tool",
        "out FOLDER": "folder to write to (default: below the run, or below evaluations/)",
    },
)


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code: 2 for what the user has to fix."""
    try:
        words = _COMMAND.read(arguments)
        config, model, out = read_arguments(words)
    except ValueError as error:
        print(f"tir_alp.evaluate: {error}", file=sys.stderr)
        return 2
    # Imported here because it needs torch, and a mistake in the command line is answered at once.
    with torch_imports():
        from tir_alp.run.ahead import start_tools

        start_tools(config)
        from tir_alp.run.finish import finish

    def work() -> None:
        result = asyncio.run(evaluate(config, model, out))
        if other := words.options.get("against"):
            result |= {"against": asyncio.run(compare(result, other, words))}
        print(f"result: {write_result(out, result)}")
        show(result)

    return finish("evaluate", work, interrupted="interrupted; the same command goes on")


async def evaluate(config: Config, model: Model, out: Path) -> dict[str, Any]:
    """Play the tasks that have not been played, and return the result of all.

    Args:
        config: Settings of the evaluation.
        model: The weights.
        out: Folder of the evaluation.

    Raises:
        ValueError: For what a user can fix.
        Interrupted: The user asked for an end; what was played is kept.
    """
    from tir_alp.cluster import open_cluster
    from tir_alp.doctor.start import Doctor
    from tir_alp.run.open_evaluation import open_evaluation, prepare_evaluation
    from tir_alp.run.placement import open_placement
    from tir_alp.run.prepare import describe_left_out

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    log(f"reading the model {model.path!r} and the tasks")
    interrupt = Interrupt(log, "the tasks that were played are kept")
    with interrupt.listening():
        reading = asyncio.to_thread(prepare_evaluation, config, model, out)
        prepared = await interrupt.interruptible(reading)
        if prepared.left_out:
            log(describe_left_out(prepared.left_out))
        async with (
            open_placement(config, open_cluster, log) as placement,
            open_evaluation(prepared, placement, Doctor(), log) as evaluation,
        ):
            log(f"evaluation {out}: {len(prepared.done)} tasks have been played")
            played = await interrupt.interruptible(evaluation.play(_progress(log)))
    return {
        "model": model.path,
        "version": model.version,
        "env": config.env.id,
        "samples": config.eval.samples,
        "temperature": config.rollout.temperature,
        "seed": config.seed,
        "sets": {name or "held_out": result_of(tasks) for name, tasks in played.items()},
    }


def result_of(tasks: Sequence[PlayedTask]) -> dict[str, Any]:
    """Return the estimates of a set of tasks, and one row per task.

    Tasks all of whose samples failed for reasons of infrastructure are left out, and counted.
    """
    measured = [each for each in tasks if each.sampled]
    rows = [_row(each) for each in measured]
    found: dict[str, Any] = {
        "tasks": len(tasks),
        "failed_tasks": len(tasks) - len(measured),
        "failed_episodes": sum(each.num_failed for each in tasks),
    }
    if measured:
        found |= {name: asdict(each) for name, each in _estimates(measured, rows).items()}
    return {**found, "per_task": rows}


def _estimates(
    tasks: Sequence[PlayedTask], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Estimate]:
    num_samples = min(len(each.sampled) for each in tasks)
    verdicts = [[is_correct(each) for each in task.sampled] for task in tasks]
    found = {"avg@k": over_tasks([sum(each) / len(each) for each in verdicts])}
    for k in _powers(num_samples):
        values = [pass_at_k(len(each), sum(each), k) for each in verdicts]
        found[f"pass@{k}"] = over_tasks(values)
    answers = [[_answer(each) for each in task.sampled] for task in tasks]
    majority = [majority_is_correct(*pair) for pair in zip(answers, verdicts, strict=True)]
    found["maj@k"] = over_tasks(majority)
    greedy = [float(is_correct(each.greedy)) for each in tasks if each.greedy is not None]
    if greedy:
        found["greedy"] = over_tasks(greedy)
    for name in ("tool_calls", "turns", "tokens", "truncated", "tool_errors"):
        found[name] = over_tasks([float(row[name]) for row in rows])
    return found


def _row(task: PlayedTask) -> dict[str, Any]:
    """What one task came to; counts are means over its samples."""
    samples = task.sampled
    return {
        "task_id": task.task_id,
        "correct": [is_correct(each) for each in samples],
        "answers": [_answer(each) for each in samples],
        "greedy": None if task.greedy is None else is_correct(task.greedy),
        "tool_calls": _mean([tool_calls(each) for each in samples]),
        "turns": _mean([len(each.conversation_turns) for each in samples]),
        "tokens": _mean(
            [sum(len(turn.completion) for turn in each.conversation_turns) for each in samples]
        ),
        "truncated": _mean([each.is_overlong for each in samples]),
        "tool_errors": _mean(
            [sum(turn.outcome != "ok" for turn in each.conversation_turns) for each in samples]
        ),
        "failed": task.num_failed,
    }


async def compare(result: Mapping[str, Any], other: str, words: Words) -> dict[str, Any]:
    """Return the paired difference to another evaluation, per set: this one minus the other.

    Args:
        result: The result of this evaluation.
        other: Folder of an evaluation or a run, or a model; the latter two are evaluated first.
        words: The command line of this evaluation, whose settings hold for the other one too.

    Raises:
        ValueError: The two have no task in common.
    """
    if (Path(other) / RESULT).exists():
        theirs = read_result(Path(other))
    else:
        key = "run" if (Path(other) / "config.json").exists() and _is_run(Path(other)) else "model"
        kept = {
            name: value
            for name, value in words.options.items()
            if name not in ("run", "model", "checkpoint", "against", "out")
        }
        of_this_run = None  # a model has no settings of its own: it plays as this run does
        if key == "model" and "run" in words.options and "config" not in words.options:
            of_this_run = settings_of(Path(words.options["run"]))
        config, model, out = read_arguments(Words({**kept, key: other}, words.values), of_this_run)
        theirs = await evaluate(config, model, out)
        write_result(out, theirs)
    differences = {}
    for name, mine in result["sets"].items():
        yours = {row["task_id"]: row for row in theirs["sets"].get(name, {}).get("per_task", ())}
        pairs = [
            (_mean(row["correct"]), _mean(yours[row["task_id"]]["correct"]))
            for row in mine["per_task"]
            if row["task_id"] in yours
        ]
        if pairs:
            mine_only, others = zip(*pairs, strict=True)
            differences[name] = asdict(paired_difference(mine_only, others))
    if not differences:
        raise ValueError(f"{other} has no task in common with this evaluation")
    return {"other": other, "avg@k": differences}


def read_arguments(
    words: Words, settings: Mapping[str, Any] | None = None
) -> tuple[Config, Model, Path]:
    """Build the config of an evaluation, and find the weights and the folder.

    Args:
        words: The command line.
        settings: Those over which it is laid; None: those of the run or the model that it names.

    Raises:
        ValueError: With one line for each mistake.
    """
    options = words.options
    below, model = choose_model(options)
    below = below if settings is None else settings
    changes: dict[str, Any] = {"name": None}
    if "k" in options:
        changes["eval"] = {"samples": options["k"]}
    values = words.values
    if "data" in options:
        data = [each.strip() for each in options["data"].split(",") if each.strip()]
        of_files = {
            name: value for name, value in values.get("data", {}).items() if name in OF_FILES
        }
        sources = [source_of(each) for each in data]
        sources = [each | of_files if "path" in each else each for each in sources]
        changes = merge(changes, {"eval": {"data": sources}})
        own = {
            name: value for name, value in values.get("data", {}).items() if name not in OF_FILES
        }
        values = {**values, "data": own}
        env = environment_of(data)
        if env is not None and env != below.get("env", {}).get("id", env):
            changes["env"] = {"id": env}
    values = merge(changes, values)
    if "without-tools" in options:
        values = without_tools(values, below)
    values = merge(values, {"model": {"path": model.path}})
    config = overlay(values, below)
    label = "-".join(each.label for each in config.eval.data) or "held_out"
    label += f"-k{config.eval.samples}" + ("-no-tools" if "without-tools" in options else "")
    if "out" in options:
        return config, model, Path(options["out"])
    if "run" in options:
        out = Path(options["run"]) / "evaluations" / f"{label}-step{model.version}"
    else:
        out = Path("evaluations") / Path(options["model"]).name / label
    return config, model, out


def without_tools(values: Mapping[str, Any], below: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the environment by its counterpart without tools.

    Raises:
        ValueError: It has none.
    """
    default = Config.model_fields["env"].default.id
    env = merge(below.get("env", {}), values.get("env", {})).get("id", default)
    if env not in WITHOUT_TOOLS:
        raise ValueError(
            f"--without-tools: {env!r} has no counterpart without tools: name one with --env.id"
        )
    return {**values, "env": {"id": WITHOUT_TOOLS[env]}}


def show(result: Mapping[str, Any]) -> None:
    """Print the result as a table with one column per set: means with their 95 % intervals."""
    from rich.console import Console
    from rich.table import Table

    sets = result["sets"]
    names = dict.fromkeys(
        name for found in sets.values() for name, each in found.items() if isinstance(each, dict)
    )
    table = Table("", *(f"{label} ({found['tasks']})" for label, found in sets.items()), box=None)
    for name in names:
        table.add_row(name, *(_shown(found.get(name), name) for found in sets.values()))
    Console().print(table)
    for label, found in sets.items():
        if found["failed_episodes"]:
            print(f"{label}: {found['failed_episodes']} episodes failed and are left out")
    against = result.get("against", {"other": "", "avg@k": {}})
    for label, difference in against["avg@k"].items():
        print(
            f"{label}: avg@k minus that of {against['other']}: {_shown(difference, 'avg@k')} over "
            f"{difference['num_tasks']} tasks"
        )


def _shown(estimate: Mapping[str, float] | None, name: str) -> str:
    """An estimate with its interval; shares in percent."""
    if estimate is None:
        return "-"
    is_share = "@" in name or name in ("greedy", "truncated")
    factor, unit = (100, " %") if is_share else (1, "")
    mean, low, high = (factor * estimate[key] for key in ("mean", "low", "high"))
    return f"{mean:.1f}{unit} [{low:.1f}, {high:.1f}]"


def _is_run(path: Path) -> bool:
    return (path / "checkpoints").is_dir()


def _progress(log: Any) -> Any:
    def on_task(done: int, total: int) -> None:
        if done == total or done % max(1, total // 10) == 0:
            log(f"{done} of {total} tasks played")

    return on_task


def _powers(most: int) -> list[int]:
    """2, 4, 8, ... up to `most`, and `most` itself; pass@1 is avg@k."""
    return sorted({*(1 << n for n in range(1, most.bit_length())), *((most,) if most > 1 else ())})


def _answer(trajectory: Trajectory) -> str | None:
    return trajectory.turns[-1].info.get("answer") if trajectory.turns else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


if __name__ == "__main__":
    sys.exit(run_command(main, imports=True))
