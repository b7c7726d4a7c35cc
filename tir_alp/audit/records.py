"""Reads the files of a run, a step at a time; what cannot be read is a drift with its line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tir_alp.audit.findings import Findings, Place
from tir_alp.records.folder import step_file
from tir_alp.records.ledger_rows import FORMAT, Attempt, Call, update_record
from tir_alp.records.trajectories import from_row
from tir_alp.training.step_report import UpdateRecord
from tir_alp.types import Trajectory

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Recorded:
    """A trajectory, and the line that it stands in."""

    trajectory: Trajectory
    place: Place


@dataclass(frozen=True, slots=True)
class GroupEntry:
    """What became of one group."""

    group_id: int
    task_id: str
    fate: str
    num_failed: int
    place: Place


@dataclass(frozen=True, slots=True)
class UpdateEntry:
    """The record of one optimizer update."""

    record: UpdateRecord
    place: Place


@dataclass(slots=True)
class StepLedger:
    """The ledger of one step."""

    place: Place
    groups: list[GroupEntry] = field(default_factory=list)
    attempts: dict[int, list[Attempt]] = field(default_factory=dict)
    """By uid, in order."""
    updates: list[UpdateEntry] = field(default_factory=list)


def rows_of(path: Path, name: str, findings: Findings) -> Iterator[tuple[Place, Row]]:
    """The objects of a file of JSON lines, one by one. What is none is a drift, and left out."""
    findings.count("files")
    try:
        with (path / name).open("rb") as file:
            for number, line in enumerate(file, start=1):
                place = Place(name, number)
                if not line.endswith(b"\n"):
                    findings.drift("files", place, "the line is torn: the file was cut short")
                    return
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    findings.drift("files", place, f"not JSON ({error})")
                    continue
                if isinstance(row, dict):
                    yield place, row
                else:
                    findings.drift("files", place, f"not an object: {row!r:.60}")
    except OSError as error:
        findings.drift("files", Place(name), f"cannot be read ({error.strerror})")


def read_trajectories(path: Path, folder: str, step: int, findings: Findings) -> list[Recorded]:
    """The trajectories of a step."""
    recorded = []
    for place, row in rows_of(path, f"{folder}/{step_file(step)}", findings):
        try:
            trajectory = from_row(row)
        except ValueError as error:
            findings.drift("files", place, f"not a trajectory: {error}")
            continue
        task = f"{trajectory.task_id} (sequence {trajectory.sequence_uid})"
        recorded.append(Recorded(trajectory, Place(place.file, place.line, task)))
    return recorded


def read_ledger(path: Path, step: int, findings: Findings) -> StepLedger:
    """The ledger of a step.

    Raises:
        ValueError: If it has another format.
    """
    name = f"ledger/{step_file(step)}"
    ledger = StepLedger(Place(name))
    num_rows = 0
    ended = False
    for place, row in rows_of(path, name, findings):
        try:
            match row["kind"]:
                case "ledger":
                    if row["format"] != FORMAT:
                        raise ValueError(
                            f"{place} has the format {row['format']!r}; this version of tir_alp "
                            f"reads {FORMAT!r}: audit the run with the version that made it"
                        )
                    continue
                case "end":
                    ended = row["rows"] == num_rows
                    continue
            num_rows += 1
            _take(ledger, place, row)
        except (KeyError, TypeError, _BadRow) as error:
            findings.drift("files", place, f"not a row of a ledger ({error!r})")
    if num_rows:
        findings.expect(
            ended, "files", ledger.place, "the file was cut short, or lines are missing"
        )
    return ledger


class _BadRow(Exception):
    pass


def _demand_numbers(*values: Any) -> None:
    if not all(type(value) is int and value >= 0 for value in values):
        raise _BadRow(f"{values} are numbers from 0")


def _take(ledger: StepLedger, place: Place, row: Row) -> None:
    match row["kind"]:
        case "group":
            _demand_numbers(row["group_id"], row["dropped"])
            entry = GroupEntry(row["group_id"], row["task_id"], row["fate"], row["dropped"], place)
            ledger.groups.append(entry)
        case "attempt":
            try:
                calls = [Call.from_row(call) for call in row["calls"]]
            except ValueError as error:
                raise _BadRow(str(error)) from None
            _demand_numbers(row["uid"])
            attempt = Attempt(row["uid"], row["prompt"], calls)
            ledger.attempts.setdefault(attempt.uid, []).append(attempt)
        case "update":
            record = update_record(row)
            _demand_numbers(record.update)
            for each in record.sequences:
                _demand_numbers(each.uid, each.num_tokens, each.num_loss_tokens)
            ledger.updates.append(UpdateEntry(record, place))
        case kind:
            raise _BadRow(f"of the kind {kind!r}")
