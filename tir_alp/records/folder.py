"""The folder of a run: its config, metrics and trajectories, as other programs read them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tir_alp.algorithm.formula import formula
from tir_alp.config import Config
from tir_alp.records.trajectories import to_row
from tir_alp.types import Batch, Trajectory, TrajectoryGroup

STEP_FOLDERS = ("trajectories", "replaced", "ledger")
"""With one file a step."""


class RunFolder:
    """Writes what a run leaves behind; nothing before `create` or `reopen`.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._events = path / "events.jsonl"

    def check_is_new(self) -> None:
        """Refuse the name of a run that is there already. Raises ValueError."""
        if self.path.exists():
            raise self._exists()

    def _exists(self) -> ValueError:
        return ValueError(
            f"the run {self.path} exists: resume it with --resume {self.path}, or give "
            "another --name"
        )

    def create(self, config: Config) -> None:
        """Make the folder of a new run. Raises ValueError if there is one already."""
        try:
            self.path.mkdir(parents=True)
        except FileExistsError:
            raise self._exists() from None
        (self.path / "config.json").write_text(config.model_dump_json(indent=2) + "\n")
        (self.path / "objective.txt").write_text(formula(config.algorithm) + "\n")
        self._open()

    def reopen(self, step: int) -> None:
        """Open the folder of a run that goes on behind `step`; what came later is taken out."""
        for name in STEP_FOLDERS:
            for file in (self.path / name).glob("step_*.jsonl"):
                if file.name > step_file(step):
                    file.unlink()
        for file in filter(Path.exists, (self.path / "metrics.jsonl", self._events)):
            aside = file.with_name(f".{file.name}.part")
            # A run that begins again at 0 also evaluates again.
            kept = [row for row in read_rows(file)[0] if step > 0 and row["step"] <= step]
            aside.write_text("".join(f"{json.dumps(row)}\n" for row in kept))
            os.replace(aside, file)
        self._open()

    def _open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter  # only who writes a run needs it

        self._metrics = (self.path / "metrics.jsonl").open("a")
        self._tensorboard = SummaryWriter(str(self.path / "tensorboard"))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one row of metrics."""
        self._metrics.write(json.dumps({"step": step, **dict(sorted(metrics.items()))}) + "\n")
        self._metrics.flush()
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, value, step)

    def note_left_out(self, sentences: Sequence[str]) -> None:
        """Write down which rows of the data were left out, a line each, if any were."""
        if sentences:
            (self.path / "left_out.txt").write_text("".join(f"{each}\n" for each in sentences))

    def tell(self, step: int, kind: str, reason: str) -> None:
        """Write down something that happened to the run as a whole, such as a roll-back."""
        with self._events.open("a") as file:
            file.write(json.dumps({"step": step, "kind": kind, "reason": reason}) + "\n")

    def events(self, kind: str) -> list[dict[str, Any]]:
        """What has happened of this kind."""
        return [event for event in read_rows(self._events)[0] if event.get("kind") == kind]

    def note_environment(self, step: int, report: Mapping[str, Any]) -> None:
        """Write what the environment runs in from `step` on; a line for each start of the run."""
        with (self.path / "environment.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **report}) + "\n")

    def record(
        self,
        step: int,
        groups: Sequence[TrajectoryGroup],
        replaced: Sequence[TrajectoryGroup],
        ledger: Iterable[Mapping[str, Any]],
    ) -> None:
        """Write the trajectories of a step, and what the others say about them.

        Args:
            step: Steps behind it, this one included.
            groups: Those that it trained on.
            replaced: Groups without signal that others took the place of.
            ledger: Rows of the ledger.
        """
        self._write_rows("trajectories", step, map(to_row, _trajectories(groups)))
        if replaced:
            self._write_rows("replaced", step, map(to_row, _trajectories(replaced)))
        self._write_rows("ledger", step, ledger)

    def _write_rows(self, name: str, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write one file of a step: it is there whole, or not there."""
        folder = self.path / name
        folder.mkdir(exist_ok=True)
        aside = folder / ".part"
        with aside.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        os.replace(aside, folder / step_file(step))

    def dump_bad_update(self, update: int, batches: Sequence[Batch]) -> None:
        """Keep the micro-batches of an update that was skipped, for a post-mortem."""
        folder = self.path / "bad_updates"
        folder.mkdir(exist_ok=True)
        torch.save([asdict(batch) for batch in batches], folder / f"update_{update}.pt")

    def close(self) -> None:
        """Write out what is buffered."""
        self._metrics.close()
        self._tensorboard.close()


def step_file(step: int) -> str:
    """Name of a step's file in `trajectories`, `replaced` and `ledger`."""
    return f"step_{step:06d}.jsonl"


def _trajectories(groups: Iterable[TrajectoryGroup]) -> Iterator[Trajectory]:
    return (each for group in groups for each in group.trajectories)


def read_rows(file: Path) -> tuple[list[dict[str, Any]], int]:
    """Read a file of JSON objects, a line each, as a run leaves it behind; it may be missing.

    Returns:
        The rows that have an int `step`, and how many lines are none. A last line without its end
        is not counted: that is how a file looks while the run goes on, or after it was killed.
    """
    lines = file.read_text(errors="replace").split("\n") if file.is_file() else []
    rows = []
    num_unreadable = 0
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            num_unreadable += bool(line.strip()) and number < len(lines)
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
        else:
            num_unreadable += 1
    return rows, num_unreadable


def read_run_config(path: Path) -> dict[str, Any]:
    """Read the config that a run was started with. Raises ValueError if this is no run."""
    file = path / "config.json"
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no folder of a run: cannot read {file} ({error})") from None
