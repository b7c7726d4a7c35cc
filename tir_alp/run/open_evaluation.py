"""Opens an evaluation: an engine with the weights, the tasks, and a folder that can go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import gymnasium

from tir_alp.config import Config
from tir_alp.records.evaluation_folder import check_same, read_tasks, write_task
from tir_alp.records.folder import RunFolder, read_origin
from tir_alp.records.ledger import Ledger
from tir_alp.records.readable import reading
from tir_alp.roles import Placement
from tir_alp.rollouts.data import EvalSet, left_out, load_eval_sets
from tir_alp.rollouts.environment import make_environment
from tir_alp.rollouts.episode import EpisodeRunner
from tir_alp.rollouts.evaluation import UIDS_PER_TASK, PlayedTask, group_id_of, play_sets
from tir_alp.rollouts.renderer import Renderer, make_renderer
from tir_alp.run.episodes import open_episodes
from tir_alp.run.model_choice import Model
from tir_alp.run.open_run import EVALUATION_SEED
from tir_alp.training.model_folder import check_model_folder
from tir_alp.training.policy import load_tokenizer
from tir_alp.training.structure import local_path, new_origin
from tir_alp.types import Origin, TrajectoryGroup


@dataclass(frozen=True, slots=True)
class PreparedEvaluation:
    """An evaluation whose inputs are all there."""

    config: Config
    model: Model
    folder: RunFolder
    origin: Origin
    tokenizer: Any
    renderer: Renderer
    sets: Sequence[EvalSet]
    done: dict[int, PlayedTask]
    """Tasks that were played before, by their identity."""
    left_out: Sequence[str]
    """Sentences about the rows of the data that were left out."""


class EvaluationChecks(Protocol):
    """Examines an evaluation before it begins."""

    def before_evaluation(
        self, prepared: PreparedEvaluation, make_env: Callable[[], gymnasium.Env[str, str]]
    ) -> dict[str, Any]:
        """Check prompts, environment and template; returns the environment's report.

        Raises:
            ValueError: Something has to be fixed first.
        """
        ...


@dataclass(frozen=True, slots=True)
class Evaluation:
    """An evaluation, ready to go."""

    prepared: PreparedEvaluation
    runner: EpisodeRunner
    ledger: Ledger

    async def play(self, on_task: Callable[[int, int], None]) -> dict[str, list[PlayedTask]]:
        """Play what has not been played, and return all tasks by the name of their set.

        Args:
            on_task: Called after each task with the number of tasks played, and of all.
        """
        prepared, settings = self.prepared, self.prepared.config.eval
        numbers = {each: number for number, each in enumerate(group_ids(prepared.sets))}
        num_done = len(prepared.done)

        async def record(played: PlayedTask) -> None:
            nonlocal num_done
            everything = (*played.sampled, *((played.greedy,) if played.greedy else ()))
            group = TrajectoryGroup(
                played.task_id, played.group_id, everything, num_failed=played.num_failed
            )
            rows = self.ledger.take([group], (), ())
            write_task(prepared.folder, numbers[played.group_id], played, rows)
            num_done += 1
            on_task(num_done, len(numbers))

        return await play_sets(
            self.runner,
            prepared.sets,
            samples=settings.samples,
            greedy=settings.greedy,
            done=prepared.done,
            on_played=record,
        )


def group_ids(sets: Sequence[EvalSet]) -> list[int]:
    """Return the identity of each task of all sets, in order."""
    return [group_id_of(each.name, index) for each in sets for index in range(len(each.tasks))]


def prepare_evaluation(config: Config, model: Model, out: Path) -> PreparedEvaluation:
    """Read tokenizer, tasks and what was played before; it blocks, and takes seconds.

    Args:
        config: Settings of the evaluation: `eval`, `env`, `rollout`, `engine`, and `data` where
            tasks are held out from it.
        model: The weights.
        out: Folder to write to; one with the same settings is gone on with.

    Raises:
        ValueError: For what a user can fix.
    """
    config = config.model_copy(update={"trackers": ()})  # there is nothing to follow over time
    folder = RunFolder(out)
    check_model_folder(local_path(model.path))
    sets = load_eval_sets(config.data, config.eval)
    done: dict[int, PlayedTask] = {}
    if out.exists():
        check_same(out, config.model_dump(mode="json"))
        folder.check_is_free()
        origin = read_origin(out)
        done = read_tasks(out, group_ids(sets), config.eval.samples, config.eval.greedy)
    else:
        folder.check_is_new()
        origin = new_origin(model.path)
    tokenizer = load_tokenizer(model.path)
    with closing(make_environment(config)) as env:
        renderer = make_renderer(config, tokenizer, env, origin)
    sources = config.eval.data or config.data.sources
    return PreparedEvaluation(
        config, model, folder, origin, tokenizer, renderer, sets, done, left_out(sources)
    )


@asynccontextmanager
async def open_evaluation(
    prepared: PreparedEvaluation,
    placement: Placement,
    checks: EvaluationChecks,
    log: Callable[[str], None],
) -> AsyncIterator[Evaluation]:
    """Open an evaluation; see `prepare_evaluation`.

    Raises:
        ValueError: For what a user can fix; nothing has been written then.
    """
    config, folder = prepared.config, prepared.folder
    folder.reading = reading(prepared.tokenizer, config.records.max_text_chars)
    report = await asyncio.to_thread(checks.before_evaluation, prepared, placement.make_env)
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(
            placement.engine(prepared.model.path, prepared.model.version, prepared.renderer, None)
        )
        if folder.path.exists():
            folder.go_on()
        else:
            folder.create(config, prepared.origin, objective="", command="evaluate")
        stack.enter_context(closing(folder))
        folder.note_environment(0, report)
        folder.note_left_out(prepared.left_out)
        num_episodes = config.rollout.groups_per_step * config.rollout.group_size
        make_runner = open_episodes(
            stack, config, num_episodes, placement.make_env, prepared.renderer, log
        )
        ledger = Ledger(UIDS_PER_TASK)
        runner = make_runner(
            config.seed + EVALUATION_SEED, ledger.recording(engine.generate), ledger.record_env
        )
        yield Evaluation(prepared, runner, ledger)
