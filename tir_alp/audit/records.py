"""Reads a run's records, one step at a time. A line that cannot be read is a drift."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tir_alp.audit.findings import Findings, Location
from tir_alp.records.folder import step_file
from tir_alp.records.ledger_rows import FORMAT, Attempt, Record, update_record
from tir_alp.records.trajectories import from_record, texts_of
from tir_alp.training.step_report import UpdateRecord
from tir_alp.types import Trajectory


@dataclass(frozen=True, slots=True)
class RecordedTrajectory:
    """A trajectory, and the line that holds it."""

    trajectory: Trajectory
    location: Location
    texts: tuple[tuple[str | None, ...], ...] = ()
    """Of each of its sequences, the recorded text of each span; None where there is none."""


@dataclass(frozen=True, slots=True)
class GroupEntry:
    """What became of one group, according to the ledger."""

    group_id: int
    task_id: str
    fate: str
    num_failed: int
    location: Location


@dataclass(frozen=True, slots=True)
class UpdateEntry:
    """The record of one optimizer update."""

    record: UpdateRecord
    location: Location


@dataclass(slots=True)
class StepLedger:
    """The ledger of one step."""

    location: Location
    groups: list[GroupEntry] = field(default_factory=list)
    attempts: dict[int, list[Attempt]] = field(default_factory=dict)
    """Attempts by sequence uid, in the order in which they were made."""
    updates: list[UpdateEntry] = field(default_factory=list)


def records_of(path: Path, name: str, findings: Findings) -> Iterator[tuple[Location, Record]]:
    """Yield the objects of a file of JSON lines. Any other line is a drift and is skipped.

    Args:
        path: The run folder.
        name: Path of the file relative to it.
        findings: Where drifts are added.
    """
    findings.count("files")
    try:
        with (path / name).open("rb") as file:
            for number, line in enumerate(file, start=1):
                location = Location(name, number)
                if not line.endswith(b"\n"):
                    findings.drift("files", location, "incomplete line: the file was cut short")
                    return
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    findings.drift("files", location, f"not JSON ({error})")
                    continue
                if isinstance(record, dict):
                    yield location, record
                else:
                    findings.drift("files", location, f"not an object: {record!r:.60}")
    except OSError as error:
        findings.drift("files", Location(name), f"cannot be read ({error.strerror})")


def read_trajectories(
    path: Path, folder: str, step: int, findings: Findings
) -> list[RecordedTrajectory]:
    """Read the trajectories of a step.

    Args:
        path: The run folder.
        folder: `trajectories` or `replaced`.
        step: Number of the step, from 1.
        findings: Where drifts are added.
    """
    recorded = []
    for location, record in records_of(path, f"{folder}/{step_file(step)}", findings):
        try:
            trajectory = from_record(record)
        except ValueError as error:
            findings.drift("files", location, f"not a trajectory: {error}")
            continue
        task = f"{trajectory.task_id} (sequence {trajectory.sequence_uid})"
        of_task = Location(location.file, location.line, task)
        texts = tuple(tuple(texts_of(each)) for each in (record, *record.get("branches", ())))
        recorded.append(RecordedTrajectory(trajectory, of_task, texts))
    return recorded


def read_ledger(path: Path, step: int, findings: Findings) -> StepLedger:
    """Read the ledger of a step.

    Raises:
        ValueError: If it was written in another format.
    """
    name = f"ledger/{step_file(step)}"
    ledger = StepLedger(Location(name))
    num_records = 0
    is_complete = False
    for location, record in records_of(path, name, findings):
        try:
            match record["kind"]:
                case "ledger":
                    if record["format"] != FORMAT:
                        raise ValueError(
                            f"{location} has the format {record['format']!r}; this version of "
                            f"tir_alp reads {FORMAT!r}: audit the run with the version that made it"
                        )
                    continue
                case "end":
                    is_complete = record["rows"] == num_records
                    continue
            num_records += 1
            _add(ledger, location, record)
        except (KeyError, TypeError, _BadRecord) as error:
            findings.drift("files", location, f"not a record of a ledger ({error!r})")
    if num_records:
        findings.expect(
            is_complete, "files", ledger.location, "the file was cut short, or lines are missing"
        )
    return ledger


class _BadRecord(Exception):
    pass


def _demand_counts(*values: Any) -> None:
    if not all(type(value) is int and value >= 0 for value in values):
        raise _BadRecord(f"{values} must be integers of at least 0")


def _add(ledger: StepLedger, location: Location, record: Record) -> None:
    match record["kind"]:
        case "group":
            _demand_counts(record["group_id"], record["dropped"])
            ledger.groups.append(
                GroupEntry(
                    group_id=record["group_id"],
                    task_id=record["task_id"],
                    fate=record["fate"],
                    num_failed=record["dropped"],
                    location=location,
                )
            )
        case "attempt":
            try:
                attempt = Attempt.from_record(record)
            except ValueError as error:
                raise _BadRecord(str(error)) from None
            _demand_counts(attempt.uid)
            ledger.attempts.setdefault(attempt.uid, []).append(attempt)
        case "update":
            update = update_record(record)
            _demand_counts(update.update)
            for each in update.sequences:
                _demand_counts(each.uid, each.num_tokens, each.num_loss_tokens)
            ledger.updates.append(UpdateEntry(update, location))
        case kind:
            raise _BadRecord(f"unknown kind {kind!r}")
