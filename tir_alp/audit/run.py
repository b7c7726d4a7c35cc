"""Walks through a run, step by step; holds one step in memory."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import gymnasium

from tir_alp.audit import step as steps
from tir_alp.audit.findings import Findings, Place
from tir_alp.audit.records import Recorded, Row, read_ledger, read_trajectories, rows_of
from tir_alp.audit.replay import replay
from tir_alp.audit.step import StepFiles
from tir_alp.audit.trajectory import TrajectoryCheck
from tir_alp.config import Config
from tir_alp.models.tiny import SHIPPED
from tir_alp.records.folder import STEP_FOLDERS, read_run_config, step_file
from tir_alp.rollouts.data import load_order
from tir_alp.rollouts.environment import make_environment
from tir_alp.rollouts.renderer import make_renderer
from tir_alp.run.command_line import parse_config
from tir_alp.training import checkpoint
from tir_alp.training.policy import load_tokenizer

_METRICS = "metrics.jsonl"


def audit_run(path: Path, tokenizer: Any = None) -> Findings:
    """Audit the folder of a run.

    Args:
        path: The folder.
        tokenizer: Of the run; None: that of its newest checkpoint, or of its model.

    Raises:
        ValueError: If it cannot be audited: it is no run, one of another version, or its tasks or
            tokenizer are not there.
    """
    try:
        config = parse_config(read_run_config(path))
    except ValueError as error:
        raise ValueError(f"the run {path} cannot be audited: {error}") from error
    if not (path / "ledger").is_dir() and (path / "trajectories").is_dir():
        raise ValueError(
            f"{path} has no ledger: it was made by a version of tir_alp that kept none, so there "
            "is nothing to hold its trajectories against"
        )
    findings = Findings()
    rows, evaluated = _metric_rows(path, findings)
    last = _last_step(path, config, rows, evaluated, findings)
    starts = [row.get("step", 0) for _, row in rows_of(path, "environment.jsonl", findings)]
    with closing(make_environment(config)) as env:
        if tokenizer is None:
            tokenizer = load_tokenizer(_tokenizer_folder(path, config))
        audit = _RunAudit(path, config, env, tokenizer, findings)
        for number in range(1, last + 1):
            audit.step(number, rows.get(number, (Place(_METRICS), None)), starts)
    return findings


def _metric_rows(path: Path, findings: Findings) -> tuple[dict[int, tuple[Place, Row]], int]:
    """The row of each step, and the last step that was evaluated, which leaves nothing to audit."""
    rows: dict[int, tuple[Place, Row]] = {}
    latest = evaluated = 0
    for place, row in rows_of(path, _METRICS, findings):
        step = row.get("step")
        if not isinstance(step, int):
            findings.drift("steps", place, f"the step is {step!r}")
            continue
        findings.expect(step >= latest, "steps", place, f"step {step} behind step {latest}")
        latest = max(latest, step)
        if not steps.training_row(row):
            evaluated = step
            continue
        findings.expect(step not in rows, "steps", place, f"step {step} is there twice")
        rows[step] = place, row
    return rows, evaluated


def _last_step(
    path: Path, config: Config, rows: Mapping[int, object], evaluated: int, findings: Findings
) -> int:
    """The last step of which anything is known; notes which of its parts are missing."""
    recorded: dict[str, set[int]] = {"a row of metrics": {*rows}}
    for name in STEP_FOLDERS:
        files = (path / name).glob("step_*.jsonl")
        numbers = {int(file.stem.removeprefix("step_")) for file in files}
        if name != "replaced":
            recorded[f"a file in {name}"] = numbers
    saved = _last_saved(path)
    last = max(0, evaluated, saved, *(max(numbers, default=0) for numbers in recorded.values()))
    is_unfinished = last not in rows and last > max(evaluated, saved, *rows, 0)
    for number in range(1, last + 1):
        findings.count("steps")
        missing = [what for what, numbers in recorded.items() if number not in numbers]
        if number == last and is_unfinished and missing == ["a row of metrics"]:
            findings.notes.append(f"the run ended in the middle of step {last}")
            continue
        place = Place(f"step {number}")
        findings.expect(not missing, "steps", place, f"there is no {' and no '.join(missing)}")
    if last < config.steps:
        findings.notes.append(f"the run has made {last} of its {config.steps} steps")
    return last


def _last_saved(path: Path) -> int:
    try:
        return checkpoint.newest(path / "checkpoints")[1].step
    except checkpoint.CheckpointError:
        return 0


def _tokenizer_folder(path: Path, config: Config) -> str:
    """The tokenizer is in every checkpoint; before the first, that of the model is the same."""
    try:
        return str(checkpoint.newest(path / "checkpoints")[0])
    except checkpoint.CheckpointError:
        return str(SHIPPED.get(config.model.path, config.model.path))


class _RunAudit:
    """What all steps of a run share."""

    def __init__(
        self,
        path: Path,
        config: Config,
        env: gymnasium.Env[str, str],
        tokenizer: Any,
        findings: Findings,
    ) -> None:
        self._path, self._config, self._env, self._findings = path, config, env, findings
        self._tasks = load_order(config.data, config.seed)
        self._renderer = make_renderer(config, tokenizer, env)
        self._check = TrajectoryCheck(self._renderer, config.rollout, findings)
        self._next_group = 0

    def step(self, number: int, row: tuple[Place, Row | None], starts: list[int]) -> None:
        """Audit one step."""
        path, config, findings = self._path, self._config, self._findings
        has_replaced = (path / "replaced" / step_file(number)).exists()
        files = StepFiles(
            step=number,
            trained=read_trajectories(path, "trajectories", number, findings),
            replaced=read_trajectories(path, "replaced", number, findings) if has_replaced else [],
            ledger=read_ledger(path, number, findings),
            metrics=row[1],
            metrics_place=row[0],
        )
        steps.check_groups(files, self._next_group, config, findings)
        self._next_group = max(
            (group.group_id + 1 for group in files.ledger.groups), default=self._next_group
        )
        for group in files.ledger.groups:
            findings.expect(
                self._tasks[group.group_id].task_id == group.task_id,
                "groups",
                group.place,
                f"group {group.group_id} is of {group.task_id}; the data set has "
                f"{self._tasks[group.group_id].task_id} there",
            )
        known = {group.group_id for group in files.ledger.groups}
        for recorded in (*files.trained, *files.replaced):
            self._trajectory(recorded, files, known)
        steps.check_attempts(files, config.rollout.group_size, findings)
        steps.check_versions(files, config, starts, findings)
        groups = steps.groups_of(files.trained, files.ledger.groups)
        replaced = steps.groups_of(files.replaced, files.ledger.groups)
        steps.check_refills(replaced, config, files.ledger.place, findings)
        num_loss_tokens = steps.check_loss(files, groups, config, findings)
        steps.check_metrics(files, groups, replaced, num_loss_tokens, findings)

    def _trajectory(self, recorded: Recorded, files: StepFiles, known: set[int]) -> None:
        trajectory = recorded.trajectory
        attempts = files.ledger.attempts.get(trajectory.sequence_uid)
        if attempts is None or trajectory.group_id not in known:
            return  # which is told where groups and attempts are looked at
        task = self._tasks[trajectory.group_id]
        self._check(recorded, attempts[-1], replay(self._env, task, trajectory, self._renderer))
