"""Audits an evaluation: each trajectory against the ledger, the renderer and the environment."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from tir_alp.audit.episode import episode_check
from tir_alp.audit.findings import Findings, Location
from tir_alp.audit.records import read_ledger, read_trajectories
from tir_alp.audit.texts import check_texts
from tir_alp.records.folder import read_origin, read_run_config, step_file
from tir_alp.records.readable import decoder
from tir_alp.rollouts.data import load_eval_sets
from tir_alp.rollouts.environment import make_environment
from tir_alp.rollouts.evaluation import UIDS_PER_TASK
from tir_alp.rollouts.renderer import make_renderer
from tir_alp.run.command_line import parse_config
from tir_alp.run.open_evaluation import group_ids
from tir_alp.training.policy import load_tokenizer


def audit_evaluation(path: Path, tokenizer: Any = None) -> Findings:
    """Audit the folder of an evaluation.

    Args:
        path: The folder.
        tokenizer: Tokenizer of the model; None: it is loaded.

    Raises:
        ValueError: If the folder cannot be audited: its tasks or its tokenizer are missing.
    """
    try:
        config = parse_config(read_run_config(path))
    except ValueError as error:
        raise ValueError(f"the evaluation {path} cannot be audited: {error}") from error
    tokenizer = load_tokenizer(config.model.path) if tokenizer is None else tokenizer
    findings = Findings()
    sets = load_eval_sets(config.data, config.eval)
    tasks = [task for each in sets for task in each.tasks]
    num_missing = 0
    with closing(make_environment(config)) as env:
        renderer = make_renderer(config, tokenizer, env, read_origin(path))
        check = episode_check(config, env, renderer, findings)
        decode = decoder(tokenizer)
        for number, (group_id, task) in enumerate(zip(group_ids(sets), tasks, strict=True), 1):
            if not (path / "trajectories" / step_file(number)).exists():
                num_missing += 1
                continue
            findings.count("groups")
            recorded = read_trajectories(path, "trajectories", number, findings)
            ledger = read_ledger(path, number, findings)
            uids = [each.trajectory.episode_uid for each in recorded]
            location = Location(f"trajectories/{step_file(number)}")
            findings.expect(
                len(set(uids)) == len(uids)
                and all(uid // UIDS_PER_TASK == group_id for uid in uids)
                and all(each.trajectory.task_id == task.task_id for each in recorded),
                "groups",
                location,
                f"the sequences {uids} are not, each once, those of the task {task.task_id}",
            )
            findings.expect(
                set(uids) <= ledger.attempts.keys(),
                "attempts",
                ledger.location,
                "there are trajectories of which the ledger knows nothing",
            )
            for each in recorded:
                check_texts(each, decode, findings)
                attempts = ledger.attempts.get(each.trajectory.episode_uid, ())
                findings.count("attempts", len(attempts))
                if attempts:
                    check(each, attempts[-1], task)
    if num_missing:
        findings.notes.append(f"{num_missing} of {len(tasks)} tasks have not been played")
    return findings
