"""The folder of a run: its config, metrics and trajectories, as other programs read them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from tir_alp.config import Config
from tir_alp.objective import objective
from tir_alp.types import Batch, TrajectoryGroup


class RunFolder:
    """Writes what a run leaves behind; nothing before `create` or `reopen`.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._events = path / "events.jsonl"
        self._dropped = path / "dropped.jsonl"

    def create(self, config: Config) -> None:
        """Make the folder of a new run. Raises ValueError if there is one already."""
        try:
            self.path.mkdir(parents=True)
        except FileExistsError:
            raise ValueError(
                f"the run {self.path} exists: resume it with --resume {self.path}, or give "
                "another --name"
            ) from None
        (self.path / "config.json").write_text(config.model_dump_json(indent=2) + "\n")
        (self.path / "objective.txt").write_text(objective(config.algorithm) + "\n")
        self._open()

    def reopen(self, step: int) -> None:
        """Open the folder of a run that goes on behind `step`; later rows are taken out."""
        for file in (self.path / "trajectories").glob("step_*.jsonl"):
            if int(file.stem.removeprefix("step_")) > step:
                file.unlink()
        metrics = self.path / "metrics.jsonl"
        for file in filter(Path.exists, (metrics, self._events, self._dropped)):
            aside = file.with_name(f".{file.name}.part")
            # A run that begins again at 0 also evaluates again.
            behind = -1 if step == 0 and file == metrics else step
            kept = [row for row in _read_rows(file) if row["step"] <= behind]
            aside.write_text("".join(f"{json.dumps(row)}\n" for row in kept))
            os.replace(aside, file)
        self._open()

    def _open(self) -> None:
        self._metrics = (self.path / "metrics.jsonl").open("a")
        self._tensorboard = SummaryWriter(str(self.path / "tensorboard"))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one row of metrics."""
        self._metrics.write(json.dumps({"step": step, **dict(sorted(metrics.items()))}) + "\n")
        self._metrics.flush()
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, value, step)

    def tell(self, step: int, kind: str, reason: str) -> None:
        """Write down something that happened to the run as a whole, such as a roll-back."""
        with self._events.open("a") as file:
            file.write(json.dumps({"step": step, "kind": kind, "reason": reason}) + "\n")

    def events(self, kind: str) -> list[dict[str, Any]]:
        """What has happened of this kind."""
        return [event for event in _read_rows(self._events) if event["kind"] == kind]

    def note_environment(self, step: int, report: Mapping[str, Any]) -> None:
        """Write what the environment runs in from `step` on; a line for each start of the run."""
        with (self.path / "environment.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **report}) + "\n")

    def record(self, step: int, groups: Sequence[TrajectoryGroup]) -> None:
        """Write the trajectories that a step trained on, one a line."""
        folder = self.path / "trajectories"
        folder.mkdir(exist_ok=True)
        with (folder / f"step_{step:06d}.jsonl").open("w") as file:
            for trajectory in (each for group in groups for each in group.trajectories):
                file.write(json.dumps(asdict(trajectory)) + "\n")

    def note_dropped(
        self,
        step: int,
        without_signal: Sequence[TrajectoryGroup],
        lost: Sequence[TrajectoryGroup],
    ) -> None:
        """Write down the groups that no step trains on, and why. With `trajectories` and what a
        checkpoint says is pending, every group that was begun is accounted for.
        """
        groups = [("no signal", each) for each in without_signal]
        groups += [("no episode left", each) for each in lost]
        with self._dropped.open("a") as file:
            for reason, group in groups:
                names = {"group_id": group.group_id, "task_id": group.task_id, "reason": reason}
                file.write(json.dumps({"step": step, **names}) + "\n")

    def dump_bad_update(self, update: int, batches: Sequence[Batch]) -> None:
        """Keep the micro-batches of an update that was skipped, for a post-mortem."""
        folder = self.path / "bad_updates"
        folder.mkdir(exist_ok=True)
        torch.save([asdict(batch) for batch in batches], folder / f"update_{update}.pt")

    def close(self) -> None:
        """Write out what is buffered."""
        self._metrics.close()
        self._tensorboard.close()


def _read_rows(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON objects; a torn last one is left out."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def read_run_config(path: Path) -> dict[str, Any]:
    """Read the config that a run was started with. Raises ValueError if this is no run."""
    file = path / "config.json"
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no folder of a run: cannot read {file} ({error})") from None
