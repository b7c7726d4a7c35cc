"""The folder of an evaluation: one file of trajectories and one of the ledger per task.

A task's files are written when all of its samples have been played. An evaluation that was killed
goes on with the tasks that have none, so that no task is lost and none is played twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tir_alp.records.folder import RunFolder, read_run_config, step_file
from tir_alp.records.trajectories import from_record
from tir_alp.rollouts.evaluation import UIDS_PER_TASK, PlayedTask

RESULT = "evaluation.json"
"""The file with the result."""


def write_task(
    folder: RunFolder, number: int, played: PlayedTask, ledger: Iterable[Mapping[str, Any]]
) -> None:
    """Write the files of a task; the ledger's first, so that a trajectory never lacks it.

    Args:
        folder: Folder of the evaluation.
        number: Number of the task over all sets, from 0.
        played: What became of it.
        ledger: The ledger's records of it.
    """
    greedy = () if played.greedy is None else (played.greedy,)
    records = folder.trajectories((*played.sampled, *greedy))
    folder.write_step("ledger", number + 1, ledger)
    folder.write_step("trajectories", number + 1, records)


def read_tasks(
    path: Path, group_ids: Sequence[int], samples: int, greedy: bool
) -> dict[int, PlayedTask]:
    """Read the tasks that have been played, by their identity.

    Tasks of which an episode failed are left out: they are played again.

    Args:
        path: Folder of the evaluation.
        group_ids: Identity of each task over all sets, in order.
        samples: Sampled trajectories per task.
        greedy: Whether each task has a greedy one as well.

    Raises:
        ValueError: A file is not what this module writes.
    """
    found = {}
    for number, group_id in enumerate(group_ids):
        file = path / "trajectories" / step_file(number + 1)
        if not file.exists():
            continue
        try:
            played = [from_record(json.loads(line)) for line in file.read_text().splitlines()]
        except ValueError as error:
            raise ValueError(f"{file} cannot be read ({error}): delete it, and go on") from None
        if len(played) < samples + greedy or any(each.group_id != group_id for each in played):
            continue
        last = UIDS_PER_TASK - 1
        sampled = tuple(each for each in played if each.sequence_uid % UIDS_PER_TASK != last)
        best = next((each for each in played if each.sequence_uid % UIDS_PER_TASK == last), None)
        found[group_id] = PlayedTask(group_id, played[0].task_id, sampled, best)
    return found


def check_same(path: Path, config: Mapping[str, Any]) -> None:
    """See that the evaluation in a folder has the same settings.

    Raises:
        ValueError: It has others; names the first.
    """
    saved = read_run_config(path)
    for key in sorted(saved.keys() | config.keys()):
        if saved.get(key) != config.get(key):
            raise ValueError(
                f"{path} holds an evaluation with another {key!r}: give another --out, or delete it"
            )


def write_result(path: Path, result: Mapping[str, Any]) -> Path:
    """Write the result of an evaluation; returns the file."""
    aside = path / f".{RESULT}.part"
    aside.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(aside, path / RESULT)
    return path / RESULT


def read_result(path: Path) -> dict[str, Any]:
    """Read the result of an evaluation. Raises ValueError if there is none."""
    try:
        return json.loads((path / RESULT).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} has no result of an evaluation ({error})") from None
