"""Run folders for the inspector: written by the folder itself, or by a real training run."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from tests.runs import train_with
from tir_alp.config import Config
from tir_alp.inspector.index import kept_fresh
from tir_alp.inspector.server import HOST, listening, make_app
from tir_alp.inspector.source import RunSource
from tir_alp.models.tiny import ABLE, TRAIN_CONFIG
from tir_alp.records.folder import RunFolder
from tir_alp.records.readable import reading
from tir_alp.run.command_line import load_config, read_toml
from tir_alp.tools.outcome import Outcome
from tir_alp.training.policy import load_tokenizer
from tir_alp.types import StopReason, TokenSpan, Trajectory, TrajectoryGroup, Turn

TOKENIZER = load_tokenizer(str(ABLE))
SMALL = (
    *("--model.path", "tiny-able", "--steps", "2", "--eval.num_tasks", "1"),
    *("--rollout.groups_per_step", "2", "--rollout.group_size", "2"),
)


def trained(folder: Path, name: str, *settings: str) -> Path:
    """Make a run by training for two steps, in a thread: a browser has the loop of this one."""
    words = ("--name", name, *SMALL, *settings)
    with ThreadPoolExecutor(1) as thread:
        config = load_config(words, read_toml(TRAIN_CONFIG))
        return thread.submit(train_with, folder, config).result()


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode(text, add_special_tokens=False))


def trajectory(uid: int, texts: tuple[str, ...], reward: float = 0.0, **info: Any) -> Trajectory:
    """Make a trajectory: prompt, completion, observation, completion, ... as texts."""
    rng = random.Random(uid)
    prompt, *rest = texts
    spans = [*rest, ""] if len(rest) % 2 else rest
    turns = []
    for index in range(0, len(spans), 2):
        words, shown = ids(spans[index]), spans[index + 1]
        is_last = index + 2 >= len(spans)
        turn = Turn(
            completion=TokenSpan(words, tuple(-rng.random() for _ in words)),
            observation=TokenSpan(ids(shown)),
            policy_version=0,
            stop_reason=StopReason.EOS if is_last else StopReason.STOP,
            outcome=Outcome.OK,
            reward=reward if is_last else 0.0,
            info={"observation": shown, "tool_calls": int(not is_last)} | info,
            timing={"queue": 0.05, "generate": 0.2, "tool": 0.0 if is_last else 0.1},
        )
        turns.append(turn)
    return Trajectory(
        f"task/{uid // 2}",
        uid // 2,
        TokenSpan(ids(prompt)),
        tuple(turns),
        terminated=True,
        truncated=False,
        sequence_uid=uid,
    )


def write_run(path: Path, steps: list[list[Trajectory]], **metrics: float) -> Path:
    """Write a run folder with these trajectories in each step."""
    folder = RunFolder(path)
    config = Config.model_validate({"name": path.name, "model": {"path": str(ABLE)}})
    folder.reading = reading(TOKENIZER, 1000)
    folder.create(config)
    for number, of_step in enumerate(steps, start=1):
        add_step(folder, number, of_step, **metrics)
    folder.close()
    return path


def add_step(
    folder: RunFolder, number: int, trajectories: list[Trajectory], **metrics: float
) -> None:
    groups = [TrajectoryGroup(each.task_id, each.group_id, (each,)) for each in trajectories]
    sequences = [[each.sequence_uid, 1, 1, each.reward - 0.5, "0"] for each in trajectories]
    rows = [{"kind": "update", "update": number - 1, "made": True, "sequences": sequences}]
    folder.record(number, groups, (), rows)
    rewards = [each.reward for each in trajectories]
    folder.log(number, {"rollout/reward": sum(rewards) / max(1, len(rewards)), **metrics})


def rewrite(file: Path, change: Any) -> None:
    """Change the records of a file of JSON lines."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for record in records:
        change(record)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


@contextmanager
def served(*paths: Path) -> Iterator[str]:
    """Serve runs as the command does; yields the address of the page."""
    sources = [RunSource(path) for path in paths]
    with listening(0) as listener, kept_fresh([each.index for each in sources], 0.1):
        app = make_app(sources, "secret")
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off")
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://{HOST}:{listener.getsockname()[1]}/secret/"
        finally:
            server.should_exit = True
            thread.join(timeout=30)
