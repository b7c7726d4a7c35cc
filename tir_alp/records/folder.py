"""The folder of a run: config, metrics and trajectories, in files that other programs can read."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from tir_alp.algorithm.formula import formula
from tir_alp.config import Config, SFTConfig
from tir_alp.records.provenance import note_end, note_start
from tir_alp.records.readable import Reading, redacted
from tir_alp.records.run_lock import RunLock
from tir_alp.records.token_values import TOKEN_VALUES, write_values
from tir_alp.records.trackers import Say, TrackedRun, Trackers
from tir_alp.records.trajectories import to_record
from tir_alp.training.token_values import TokenValues
from tir_alp.types import Batch, Origin, Trajectory, TrajectoryGroup

STEP_FOLDERS = ("trajectories", "replaced", "ledger")
"""Subfolders that hold one file per step."""

ADVICE = "advice.jsonl"
"""File with sentences about why a run learns nothing."""
_ORIGIN = "origin.json"
_WHERE = (
    "Runs and evaluations are written below the folder in which the command is started: start it "
    "in another one"
)

Command = Literal["train", "sft", "evaluate"]
"""Commands that write run folders."""


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class RunFolder:
    """Writes the files of a run. Nothing is written before `create` or `reopen` is called.

    Args:
        path: Path of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._lock = RunLock(path)
        self._events = path / "events.jsonl"
        self.reading: Reading | None = None
        """How trajectories show text; None: they hold none."""

    def check_is_new(self) -> None:
        """Refuse the name of a run that is there already, or a place that cannot be written.

        Raises:
            ValueError: Of both.
        """
        if self.path.exists():
            raise self._exists()
        above = next(each for each in self.path.absolute().parents if each.exists())
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            reason = "is not a folder" if not above.is_dir() else "cannot be written"
            raise ValueError(f"cannot make the folder {self.path}: {above} {reason}. {_WHERE}")

    def check_is_free(self) -> None:
        """Refuse a run that another process is writing. Raises ValueError."""
        self._lock.check_is_free()

    def _exists(self) -> ValueError:
        return ValueError(
            f"the run {self.path} exists: resume it with --resume {self.path}, or give "
            "another --name"
        )

    def create(
        self,
        config: Config | SFTConfig,
        origin: Origin | None = None,
        say: Say = _say,
        *,
        objective: str | None = None,
        command: Command = "train",
    ) -> None:
        """Make the folder of a new run. Raises ValueError if it exists already.

        Args:
            config: Config of the run.
            origin: What resuming and auditing the run depend on; None: created now.
            say: Called with a line for people by a tracker, from any thread.
            objective: What is minimised, as text, or "" for nothing; None: the formula of the
                config's algorithm.
            command: The command that writes the run.
        """
        try:
            self.path.mkdir(parents=True)
        except FileExistsError:
            raise self._exists() from None
        except OSError as error:
            raise ValueError(
                f"cannot make the folder {self.path}: {error.strerror}. {_WHERE}"
            ) from None
        self._lock.acquire()
        (self.path / "config.json").write_text(config.model_dump_json(indent=2) + "\n")
        origin = origin or Origin(datetime.now())
        record = {
            "command": command,
            "created": origin.created.isoformat(),
            "end_token_ids": origin.end_token_ids,
        }
        (self.path / _ORIGIN).write_text(json.dumps(record) + "\n")
        if objective is None:
            assert isinstance(config, Config)
            objective = formula(config.algorithm)
        if objective:
            (self.path / "objective.txt").write_text(objective + "\n")
        note_start(self.path)
        self._open(None, config.trackers, say)

    def discard(self) -> None:
        """Delete the folder of a new run that cannot begin; its name is free again."""
        self._lock.release()
        shutil.rmtree(self.path, ignore_errors=True)

    def reopen(self, step: int, trackers: Sequence[str] | None = None, say: Say = _say) -> None:
        """Open the folder of a run that continues after `step`, and delete what was written later.

        Args:
            step: Number of training steps that the run's newest checkpoint contains.
            trackers: Where metrics go; None: as the run's config says.
            say: As of `create`.

        Raises:
            ValueError: Another process is writing the run.
        """
        self._lock.acquire()
        last = Path(step_file(step)).stem
        for name in (*STEP_FOLDERS, TOKEN_VALUES):
            for file in (self.path / name).glob("step_*.*"):
                if file.stem > last:
                    file.unlink()
        streams = (self.path / "metrics.jsonl", self._events, self.path / ADVICE)
        for file in filter(Path.exists, streams):
            temporary = file.with_name(f".{file.name}.part")
            # A run that starts again at 0 also evaluates again.
            kept = [each for each in read_records(file)[0] if step > 0 and each["step"] <= step]
            temporary.write_text("".join(f"{json.dumps(record)}\n" for record in kept))
            os.replace(temporary, file)
        note_start(self.path)
        own: Sequence[str] = read_run_config(self.path).get("trackers", ["tensorboard"])
        self._open(step, own if trackers is None else trackers, say)

    def go_on(self) -> None:
        """Open the folder of an evaluation again; what was played stays.

        Raises:
            ValueError: Another process is writing it.
        """
        self._lock.acquire()
        note_start(self.path)
        self._open(None, (), _say)

    def _open(self, step: int | None, trackers: Sequence[str], say: Say) -> None:
        self._metrics = (self.path / "metrics.jsonl").open("a")
        run = TrackedRun(self.path, read_run_config(self.path), step)
        self._trackers = Trackers(trackers, run, say)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one record of metrics."""
        self._metrics.write(json.dumps({"step": step, **dict(sorted(metrics.items()))}) + "\n")
        self._metrics.flush()
        self._trackers.log(step, metrics)

    def note_left_out(self, sentences: Sequence[str]) -> None:
        """Write which data rows were left out, one sentence per line; no file if none were."""
        if sentences:
            (self.path / "left_out.txt").write_text("".join(f"{each}\n" for each in sentences))

    def log_event(self, step: int, kind: str, reason: str, **details: int) -> None:
        """Write an event of the run as a whole.

        Args:
            step: Number of steps made when it happened.
            kind: "roll_back" or "stop".
            reason: What happened, in words.
            details: More fields of the record.
        """
        with self._events.open("a") as file:
            event = {"step": step, "kind": kind, "reason": reason, **details}
            file.write(json.dumps(event) + "\n")

    def note_advice(self, step: int, sentence: str) -> None:
        """Write down a sentence about why a run learns nothing, without secrets.

        Args:
            step: Number of steps made when it was said.
            sentence: The sentence; it may quote the model.
        """
        secrets = () if self.reading is None else self.reading.secrets
        with (self.path / ADVICE).open("a") as file:
            file.write(json.dumps({"step": step, "advice": redacted(sentence, secrets)}) + "\n")

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Return the events of one kind that have been written."""
        return [event for event in read_records(self._events)[0] if event.get("kind") == kind]

    def note_environment(self, step: int, report: Mapping[str, Any]) -> None:
        """Write the environment's report; one line per start of the run.

        Args:
            step: Number of training steps that the run had made when it started.
            report: What the environment's tools run in, e.g. the sandbox's backend.
        """
        with (self.path / "environment.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **report}) + "\n")

    def record(
        self,
        step: int,
        groups: Sequence[TrajectoryGroup],
        replaced: Sequence[TrajectoryGroup],
        ledger: Iterable[Mapping[str, Any]],
    ) -> None:
        """Write the trajectories of a step, and the ledger's independent account of them.

        Args:
            step: Number of training steps made, this one included.
            groups: Groups that the step trained on.
            replaced: Groups without signal, in whose stead the step trained on others.
            ledger: The ledger's records of the step.
        """
        self.write_step("trajectories", step, self.trajectories(_trajectories(groups)))
        if replaced:
            self.write_step("replaced", step, self.trajectories(_trajectories(replaced)))
        self.write_step("ledger", step, ledger)

    def record_values(self, step: int, values: Sequence[TokenValues]) -> None:
        """Write what the loss of a step saw of each token.

        Args:
            step: Number of training steps made, this one included.
            values: Of each sequence.
        """
        write_values(self.path, step, values)

    def trajectories(self, trajectories: Iterable[Trajectory]) -> Iterator[dict[str, Any]]:
        """Return the records of trajectories, with their text."""
        return (to_record(each, self.reading) for each in trajectories)

    def write_step(self, name: str, step: int, records: Iterable[Mapping[str, Any]]) -> None:
        """Write one file of a step atomically: it is complete, or it does not exist."""
        folder = self.path / name
        folder.mkdir(exist_ok=True)
        temporary = folder / ".part"
        with temporary.open("w") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        os.replace(temporary, folder / step_file(step))

    def dump_bad_update(self, update: int, batches: Sequence[Batch]) -> None:
        """Save the micro-batches of an update that was skipped, for a post-mortem."""
        folder = self.path / "bad_updates"
        folder.mkdir(exist_ok=True)
        import torch  # needed only here, and slow to import

        written = io.BytesIO()  # torch hides why it cannot write a file
        torch.save([asdict(batch) for batch in batches], written)
        (folder / f"update_{update}.pt").write_bytes(written.getvalue())

    def close(self) -> None:
        """Flush and close the files, and free the run's lock."""
        self._trackers.close()
        with contextlib.suppress(OSError):  # of a full disk, which `log` has raised already
            self._metrics.close()
        note_end(self.path)
        self._lock.release()


def step_file(step: int) -> str:
    """Return the name of a step's file in `trajectories`, `replaced` and `ledger`."""
    return f"step_{step:06d}.jsonl"


def _trajectories(groups: Iterable[TrajectoryGroup]) -> Iterator[Trajectory]:
    return (each for group in groups for each in group.trajectories)


def read_records(file: Path) -> tuple[list[dict[str, Any]], int]:
    """Read a file of JSON objects, one per line, in the state in which a run left it.

    The file may be missing. A last line without a line break is not counted as unreadable: the file
    looks like that while the run is writing, or after it was killed.

    Returns:
        The records, which are the objects with an int `step`, and the number of other lines.
    """
    lines = file.read_text(errors="replace").split("\n") if file.is_file() else []
    records = []
    num_unreadable = 0
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            num_unreadable += bool(line.strip()) and number < len(lines)
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append(record)
        else:
            num_unreadable += 1
    return records, num_unreadable


def read_run_config(path: Path) -> dict[str, Any]:
    """Read the config that a run was started with. Raises ValueError if there is none."""
    file = path / "config.json"
    try:
        return json.loads(file.read_text())
    except OSError as error:
        reason = str(error.strerror)
    except ValueError as error:
        reason = f"it is not JSON ({error})"
    raise ValueError(f"{path} is not a run folder: cannot read {file}: {reason}")


def read_command(path: Path) -> str:
    """Return the command that wrote a run; "train" if the folder does not say."""
    try:
        return str(json.loads((path / _ORIGIN).read_text()).get("command", "train"))
    except (OSError, ValueError, AttributeError):
        return "train"


def read_origin(path: Path) -> Origin:
    """Read the origin of a run. Raises ValueError if the file is unreadable.

    A folder of an older version has none: the run was created when its config was written.
    """
    file = path / _ORIGIN
    if not file.exists():
        return Origin(datetime.fromtimestamp((path / "config.json").stat().st_mtime))
    try:
        record = json.loads(file.read_text())
        created = datetime.fromisoformat(record["created"])
        return Origin(created, tuple(int(each) for each in record["end_token_ids"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cannot read {file}: {error!r}") from None
