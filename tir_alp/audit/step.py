"""Checks of one step: groups, attempts, versions, what entered the loss, and metrics. Pure.

Single trajectories are checked in `trajectory.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tir_alp.algorithm.advantage import (
    group_advantages,
    has_signal,
    step_advantages,
    turn_advantages,
)
from tir_alp.algorithm.metrics import rollout_metrics
from tir_alp.audit.findings import Findings, Location
from tir_alp.audit.records import GroupEntry, RecordedTrajectory, StepLedger, UpdateEntry
from tir_alp.config import Config
from tir_alp.records.ledger_rows import Attempt, Record
from tir_alp.rollouts.call_metrics import call_metrics
from tir_alp.rollouts.episode import MAX_ATTEMPTS
from tir_alp.tools.outcome import Outcome
from tir_alp.training.packed_sequence import PackedSequence, packed_sequence
from tir_alp.training.samples import samples_of
from tir_alp.types import Sample, TrajectoryGroup

_CLOSE = 1e-9  # relative; sums of floats in another order differ by less
_FATES = ("trained", "replaced", "lost")


@dataclass(frozen=True, slots=True)
class StepFiles:
    """The records of one step."""

    step: int
    trained: Sequence[RecordedTrajectory]
    replaced: Sequence[RecordedTrajectory]
    ledger: StepLedger
    metrics: Mapping[str, float] | None
    """The step's metrics record; None if the run ended in the middle of the step."""
    metrics_location: Location


def check_groups(files: StepFiles, first_group: int, config: Config, findings: Findings) -> None:
    """Check that group ids continue those of the last step, and that no member is missing.

    Args:
        files: Records of the step.
        first_group: Expected id of the step's first group.
        config: Config of the run.
        findings: Where drifts are added.
    """
    rollout, ledger = config.rollout, files.ledger
    findings.count("groups", len(ledger.groups))
    ids = [group.group_id for group in ledger.groups]
    findings.expect(
        ids == list(range(first_group, first_group + len(ids))),
        "groups",
        ledger.location,
        f"groups {ids}: expected consecutive ids from {first_group}, each once",
    )
    num = {fate: sum(group.fate == fate for group in ledger.groups) for fate in _FATES}
    findings.expect(
        num["trained"] == rollout.groups_per_step and sum(num.values()) == len(ids),
        "groups",
        ledger.location,
        f"{num['trained']} groups were trained on; rollout.groups_per_step is "
        f"{rollout.groups_per_step}",
    )
    findings.expect(
        num["replaced"] <= rollout.max_refills,
        "groups",
        ledger.location,
        f"{num['replaced']} groups were replaced; rollout.max_refills is {rollout.max_refills}",
    )
    for fate, members in (("trained", files.trained), ("replaced", files.replaced)):
        groups = {group.group_id: group for group in ledger.groups if group.fate == fate}
        _check_members(members, groups, rollout.group_size, findings)


def _check_members(
    members: Sequence[RecordedTrajectory],
    groups: Mapping[int, GroupEntry],
    group_size: int,
    findings: Findings,
) -> None:
    latest = -1
    present = dict.fromkeys(groups, 0)
    for member in members:
        trajectory, location = member.trajectory, member.location
        uid, group_id = trajectory.episode_uid, trajectory.group_id
        findings.expect(
            uid > latest,
            "groups",
            location,
            f"sequence {uid} follows {latest}: doubled or misplaced",
        )
        latest = max(latest, uid)
        group = groups.get(group_id)
        if group is None:
            findings.drift("groups", location, f"the ledger has no group {group_id} of this fate")
            continue
        present[group_id] += 1
        findings.expect(
            uid // group_size == group_id and trajectory.task_id == group.task_id,
            "groups",
            location,
            f"sequence {uid} with task {trajectory.task_id} does not belong to group {group_id}, "
            f"whose task is {group.task_id}",
        )
    for group_id, group in groups.items():
        findings.expect(
            present[group_id] + group.num_failed == group_size and present[group_id] > 0,
            "groups",
            group.location,
            f"group {group_id} has {present[group_id]} trajectories and {group.num_failed} "
            f"dropped; rollout.group_size is {group_size}",
        )


def check_attempts(files: StepFiles, group_size: int, findings: Findings) -> None:
    """Check that every attempt became a trajectory, or failed and was counted as dropped."""
    ledger = files.ledger
    kept = {each.trajectory.episode_uid for each in (*files.trained, *files.replaced)}
    lost = {group.group_id for group in ledger.groups if group.fate == "lost"}
    known = {group.group_id for group in ledger.groups}
    for uid, attempts in ledger.attempts.items():
        findings.count("attempts", len(attempts))
        group_id = uid // group_size
        findings.expect(
            group_id in known and len(attempts) <= MAX_ATTEMPTS,
            "attempts",
            ledger.location,
            f"{len(attempts)} attempts at sequence {uid} of group {group_id}: at most "
            f"{MAX_ATTEMPTS} are allowed, and only for a group of the step",
        )
        failed = attempts[:-1] if uid in kept else attempts
        if group_id in lost:  # a lone survivor is dropped with its group
            continue
        findings.expect(
            not any(map(_is_complete, failed)),
            "attempts",
            ledger.location,
            f"an attempt at sequence {uid} completed, but no trajectory was made of it",
        )
    for recorded in (*files.trained, *files.replaced):
        if recorded.trajectory.episode_uid not in ledger.attempts:
            findings.drift(
                "attempts", recorded.location, "the ledger has no attempt at this sequence"
            )


def _is_complete(attempt: Attempt) -> bool:
    last = attempt.calls[-1] if attempt.calls else None
    return last is not None and last.ended and not Outcome(last.outcome or "ok").is_infrastructure


def check_versions(
    files: StepFiles, config: Config, starts: Sequence[int], findings: Findings
) -> None:
    """Check that no token is older than allowed, or with `rollout.hold` that all have that age.

    Args:
        files: Records of the step.
        config: Config of the run.
        starts: Number of steps made at each start of the run.
        findings: Where drifts are added.
    """
    rollout, step = config.rollout, files.step - 1
    oldest = max(0, step - rollout.max_staleness)
    newest = step
    if rollout.hold:  # a resumed run plays anew what had not ended, with the weights it loads
        started = max((start for start in starts if start <= step), default=0)
        newest = max(started, oldest)
    for recorded in files.trained:
        turns = [turn for each in recorded.trajectory.sequences for turn in each.turns]
        for index, turn in enumerate(turns):
            for span in turn.versions:
                findings.expect(
                    oldest <= span.version <= newest,
                    "versions",
                    recorded.location.at(turn=index, token=span.start),
                    f"version {span.version} in step {files.step}; it must be from {oldest} to "
                    f"{newest} with rollout.max_staleness = {rollout.max_staleness}",
                )


def groups_of(
    recorded: Sequence[RecordedTrajectory], entries: Sequence[GroupEntry]
) -> list[TrajectoryGroup]:
    """Return the groups that trajectories belong to, in order."""
    members: dict[int, list[RecordedTrajectory]] = {}
    for each in recorded:
        members.setdefault(each.trajectory.group_id, []).append(each)
    dropped = {entry.group_id: entry.num_failed for entry in entries}
    return [
        TrajectoryGroup(
            task_id=group[0].trajectory.task_id,
            group_id=group_id,
            trajectories=tuple(each.trajectory for each in group),
            num_failed=dropped.get(group_id, 0),
        )
        for group_id, group in members.items()
    ]


def check_loss(
    files: StepFiles, groups: Sequence[TrajectoryGroup], config: Config, findings: Findings
) -> int:
    """Check what the trainer packed against the trajectories; return the number of loss tokens."""
    num_updates = config.trainer.updates_per_step
    first = (files.step - 1) * num_updates
    updates = [entry.record.update for entry in files.ledger.updates]
    findings.expect(
        updates == list(range(first, first + num_updates)),
        "sequences in the loss",
        files.ledger.location,
        f"updates {updates}; step {files.step} makes {num_updates}, starting with {first}",
    )
    locations = {
        sequence.sequence_uid: each.location
        for each in files.trained
        for sequence in each.trajectory.sequences
    }
    per_update = max(1, len(groups) // num_updates)
    advantages = step_advantages(groups, config.algorithm, config.rollout)
    num_tokens = 0
    for index, entry in enumerate(files.ledger.updates):
        part = slice(index * per_update, (index + 1) * per_update)
        expected = [
            packed_sequence(sample)
            for group, of_group in zip(groups[part], advantages[part], strict=True)
            for sample in _samples(group, of_group, config)
            if any(sample.trajectory.loss_mask)
        ]
        num_tokens += sum(each.num_loss_tokens for each in expected)
        by_uid = {each.uid: each for each in expected}
        check_packed(entry, by_uid, locations, findings)
    return num_tokens


def _samples(
    group: TrajectoryGroup, advantages: Sequence[float], config: Config
) -> Iterator[Sample]:
    """Yield what the trainer must have been given of a group."""
    by_turn = turn_advantages(group, config.algorithm) or [None] * len(advantages)
    for trajectory, advantage, of_turns in zip(
        group.trajectories, advantages, by_turn, strict=True
    ):
        yield from samples_of(trajectory, advantage, of_turns, config.rollout.trace_credit)


def check_packed(
    entry: UpdateEntry,
    expected: Mapping[int, PackedSequence],
    locations: Mapping[int, Location],
    findings: Findings,
) -> None:
    """Compare what an update packed with what its trajectories give.

    Args:
        entry: The update.
        expected: What should have been packed, by uid.
        locations: Where the trajectories are recorded, by uid.
        findings: Where drifts are added.
    """
    check = "sequences in the loss"
    update = entry.record
    uids = [each.uid for each in update.sequences]
    for uid in sorted({*expected, *uids}):
        findings.count(check)
        location = locations.get(uid, entry.location)
        if uids.count(uid) != (uid in expected):
            findings.drift(
                check,
                location,
                f"sequence {uid} was packed {uids.count(uid)} times in update {update.update}; "
                f"expected {int(uid in expected)} times",
            )
            continue
        packed, due = update.sequences[uids.index(uid)], expected[uid]
        findings.count("tokens in the loss", packed.num_loss_tokens)
        findings.expect(
            (packed.num_tokens, packed.num_loss_tokens) == (due.num_tokens, due.num_loss_tokens),
            "tokens in the loss",
            location,
            f"{packed.num_loss_tokens} of {packed.num_tokens} tokens entered the loss; "
            f"{due.num_loss_tokens} of {due.num_tokens} are trainable",
        )
        findings.expect(
            packed.advantage == due.advantage,
            check,
            location,
            f"it was trained with the advantage {packed.advantage}; its group's rewards give "
            f"{due.advantage}",
        )
        findings.expect(
            packed.turn_advantages == due.turn_advantages,
            check,
            location,
            f"its turns were trained with the advantages {_listed(packed.turn_advantages)}; the "
            f"rewards of its turns give {_listed(due.turn_advantages)}",
        )
        findings.expect(
            packed.digest == due.digest,
            check,
            location,
            "the packed ids, mask, logprobs or turns differ from those of the trajectory",
        )


def _listed(advantages: Sequence[float]) -> str:
    """Write out the advantages of turns."""
    return ", ".join(f"{each:g}" for each in advantages) or "of the whole sequence"


def check_refills(
    groups: Sequence[TrajectoryGroup], config: Config, location: Location, findings: Findings
) -> None:
    """Check that only groups without signal were replaced."""
    for group in groups:
        findings.expect(
            not has_signal(group, group_advantages(group, config.algorithm, config.rollout)),
            "groups",
            location,
            f"group {group.group_id} was replaced although it has signal",
        )


def check_metrics(
    files: StepFiles,
    groups: Sequence[TrajectoryGroup],
    replaced: Sequence[TrajectoryGroup],
    num_loss_tokens: int,
    findings: Findings,
) -> None:
    """Check that the step's metrics follow from its trajectories."""
    metrics, location = files.metrics, files.metrics_location
    if metrics is None or not groups:
        return
    expected = rollout_metrics(groups, files.step - 1, replaced) | call_metrics(groups, replaced)
    expected["tokens/loss"] = num_loss_tokens
    expected["train/skipped_updates"] = sum(not entry.record.made for entry in files.ledger.updates)
    for name, value in expected.items():
        findings.count("metrics")
        logged = metrics.get(name)
        is_close = isinstance(logged, int | float) and math.isclose(
            logged, value, rel_tol=_CLOSE, abs_tol=_CLOSE
        )
        findings.expect(
            is_close, "metrics", location, f"{name} is {logged}; the trajectories give {value}"
        )
    of_rollouts = ("rollout/", "outcome/", "staleness/")
    unknown = sorted(n for n in metrics if n.startswith(of_rollouts) and n not in expected)
    findings.expect(
        not unknown, "metrics", location, f"{unknown} do not follow from the trajectories"
    )


def is_training_record(record: Record) -> bool:
    """Whether a metrics record is that of a training step, and not of an evaluation."""
    return "tokens/loss" in record or "loss/value" in record
