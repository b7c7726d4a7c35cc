"""Audits a run step by step, with one step in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import gymnasium

from tir_alp.audit import step as steps
from tir_alp.audit.episode import episode_check
from tir_alp.audit.findings import Findings, Location
from tir_alp.audit.records import (
    RecordedTrajectory,
    read_ledger,
    read_trajectories,
    records_of,
)
from tir_alp.audit.step import StepFiles
from tir_alp.audit.texts import check_texts
from tir_alp.config import Config
from tir_alp.records.folder import STEP_FOLDERS, read_origin, read_run_config, step_file
from tir_alp.records.ledger_rows import Record
from tir_alp.records.readable import decoder
from tir_alp.rollouts.data import load_order
from tir_alp.rollouts.environment import make_environment
from tir_alp.rollouts.renderer import make_renderer
from tir_alp.run.command_line import parse_config
from tir_alp.run.demonstrations import model_of
from tir_alp.training import checkpoint_folder
from tir_alp.training.policy import load_tokenizer

_METRICS = "metrics.jsonl"
_METRICS_RECORD = f"no record in {_METRICS}"


def audit_run(path: Path, tokenizer: Any = None) -> Findings:
    """Audit a run folder.

    Args:
        path: The run folder.
        tokenizer: Tokenizer of the run. If None, it is loaded from the newest checkpoint, or from
            the run's model if there is no checkpoint.

    Raises:
        ValueError: If the folder cannot be audited: it is not a run folder, was written by another
            version, or its tasks or tokenizer are missing.
    """
    try:
        config = parse_config(read_run_config(path))
    except ValueError as error:
        raise ValueError(f"the run {path} cannot be audited: {error}") from error
    if not (path / "ledger").is_dir() and (path / "trajectories").is_dir():
        raise ValueError(
            f"{path} has no ledger: it was made by a version of tir_alp that kept none, so there "
            "is nothing to compare its trajectories with"
        )
    findings = Findings()
    metrics, evaluated = _metrics_by_step(path, findings)
    last = _last_step(path, config, metrics, evaluated, findings)
    reports = records_of(path, "environment.jsonl", findings)
    starts = [report.get("step", 0) for _, report in reports]
    with closing(make_environment(config)) as env:
        if tokenizer is None:
            tokenizer = load_tokenizer(model_of(path))
        audit = _RunAudit(path, config, env, tokenizer, findings)
        for number in range(1, last + 1):
            audit.step(number, metrics.get(number, (Location(_METRICS), None)), starts)
    return findings


def _metrics_by_step(
    path: Path, findings: Findings
) -> tuple[dict[int, tuple[Location, Record]], int]:
    """Read the metrics record of each training step, and the last step that was evaluated.

    Evaluations leave no trajectories, so there is nothing to audit in their records.
    """
    by_step: dict[int, tuple[Location, Record]] = {}
    latest = evaluated = 0
    for location, record in records_of(path, _METRICS, findings):
        step = record.get("step")
        if not isinstance(step, int):
            findings.drift("steps", location, f"the step is {step!r}")
            continue
        findings.expect(step >= latest, "steps", location, f"step {step} follows step {latest}")
        latest = max(latest, step)
        if not steps.is_training_record(record):
            evaluated = step
            continue
        findings.expect(step not in by_step, "steps", location, f"step {step} is recorded twice")
        by_step[step] = location, record
    return by_step, evaluated


def _last_step(
    path: Path, config: Config, metrics: Mapping[int, object], evaluated: int, findings: Findings
) -> int:
    """Return the last step of which there is any record, and report what steps lack.

    Args:
        path: The run folder.
        config: Config of the run.
        metrics: Has a key for each training step with a metrics record.
        evaluated: The last step that was evaluated; 0 if none was.
        findings: Where drifts are added.
    """
    recorded: dict[str, set[int]] = {_METRICS_RECORD: {*metrics}}
    for name in STEP_FOLDERS:
        files = (path / name).glob("step_*.jsonl")
        numbers = {int(file.stem.removeprefix("step_")) for file in files}
        if name != "replaced":
            recorded[f"no file in {name}/"] = numbers
    saved = _last_saved(path)
    last = max(0, evaluated, saved, *(max(numbers, default=0) for numbers in recorded.values()))
    is_unfinished = last not in metrics and last > max(evaluated, saved, *metrics, 0)
    for number in range(1, last + 1):
        findings.count("steps")
        missing = [what for what, numbers in recorded.items() if number not in numbers]
        if number == last and is_unfinished and missing == [_METRICS_RECORD]:
            findings.notes.append(f"the run ended in the middle of step {last}")
            continue
        location = Location(f"step {number}")
        findings.expect(not missing, "steps", location, f"the step has {', '.join(missing)}")
    if last < config.steps:
        findings.notes.append(f"the run has made {last} of its {config.steps} steps")
    return last


def _last_saved(path: Path) -> int:
    try:
        return checkpoint_folder.newest(path / "checkpoints")[1].step
    except checkpoint_folder.CheckpointError:
        return 0


class _RunAudit:
    """Audits the steps of one run in order."""

    def __init__(
        self,
        path: Path,
        config: Config,
        env: gymnasium.Env[str, str],
        tokenizer: Any,
        findings: Findings,
    ) -> None:
        self._path, self._config, self._findings = path, config, findings
        self._tasks = load_order(config.data, config.seed, whole=bool(config.eval.data))
        renderer = make_renderer(config, tokenizer, env, read_origin(path))
        self._check = episode_check(config, env, renderer, findings)
        self._decode = decoder(tokenizer)
        self._next_group = 0

    def step(self, number: int, metrics: tuple[Location, Record | None], starts: list[int]) -> None:
        """Audit one step.

        Args:
            number: Number of the step, from 1.
            metrics: The step's metrics record and its location; None if there is none.
            starts: Number of steps made at each start of the run.
        """
        path, config, findings = self._path, self._config, self._findings
        has_replaced = (path / "replaced" / step_file(number)).exists()
        files = StepFiles(
            step=number,
            trained=read_trajectories(path, "trajectories", number, findings),
            replaced=read_trajectories(path, "replaced", number, findings) if has_replaced else [],
            ledger=read_ledger(path, number, findings),
            metrics=metrics[1],
            metrics_location=metrics[0],
        )
        steps.check_groups(files, self._next_group, config, findings)
        self._next_group = max(
            (group.group_id + 1 for group in files.ledger.groups), default=self._next_group
        )
        for group in files.ledger.groups:
            findings.expect(
                self._tasks[group.group_id].task_id == group.task_id,
                "groups",
                group.location,
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
        steps.check_refills(replaced, config, files.ledger.location, findings)
        num_loss_tokens = steps.check_loss(files, groups, config, findings)
        steps.check_metrics(files, groups, replaced, num_loss_tokens, findings)

    def _trajectory(self, recorded: RecordedTrajectory, files: StepFiles, known: set[int]) -> None:
        trajectory = recorded.trajectory
        check_texts(recorded, self._decode, self._findings)
        attempts = files.ledger.attempts.get(trajectory.episode_uid)
        if attempts is None or trajectory.group_id not in known:
            return  # reported by the checks of groups and attempts
        task = self._tasks[trajectory.group_id]
        self._check(recorded, attempts[-1], task)
