"""What engine, environments and trainer did, by their own account: the auditor's second source.

Trajectories are made by the rollouts. The ledger is written by separate code, at the interfaces:
what the engine returned before anything was cut, what each environment answered, and what the
trainer had packed when it computed the loss. `tir_alp.audit` proves that the two accounts agree.

Only training episodes are recorded. There is one file per step; `docs/audit.md` has its format.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import gymnasium

from tir_alp.engines.base import Completion, Generate, Sampling
from tir_alp.records.ledger_rows import (
    FORMAT,
    Attempt,
    Call,
    Record,
    answer_digest,
    digest,
    ids_digest,
    update_row,
)
from tir_alp.training.step_report import UpdateRecord
from tir_alp.types import TrajectoryGroup, split_uid


class Ledger:
    """Collects records until a step takes them.

    Args:
        group_size: Sequences per group; the uids of a group's sequences follow from it.
    """

    def __init__(self, group_size: int) -> None:
        self._group_size = group_size
        self._attempts: defaultdict[int, list[_OpenAttempt]] = defaultdict(list)
        self._updates: list[Record] = []

    def recording(self, generate: Generate) -> Generate:
        """Wrap the engine's `generate` so that each call is recorded with its sequence."""

        async def recorded(token_ids: tuple[int, ...], sampling: Sampling) -> Completion:
            completion = await generate(token_ids, sampling)
            uid, trace = split_uid(sampling.sequence_uid)
            call = Call(len(token_ids), ids_digest(token_ids), completion, trace=trace)
            self._attempts[uid][-1].calls.append(call)
            return completion

        return recorded

    def record_env(self, env: gymnasium.Env[str, str], uid: int) -> gymnasium.Env[str, str]:
        """Wrap the environment of one attempt at the episode of a sequence."""
        attempt = _OpenAttempt(uid)
        self._attempts[uid].append(attempt)
        return _RecordedEnv(env, attempt)

    def updated(self, records: Iterable[UpdateRecord]) -> None:
        """Write down which sequences the loss of each update got."""
        self._updates.extend(update_row(each) for each in records)

    def snapshot(self, group_ids: Iterable[int]) -> list[Record]:
        """Return the attempts at groups that are finished and not yet taken, for a checkpoint."""
        uids = [uid for group_id in group_ids for uid in self._uids(group_id)]
        return [each.to_record() for uid in uids for each in self._attempts.get(uid, ())]

    def restore(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add the attempts of a `snapshot`."""
        for record in records:
            attempt = Attempt.from_record(record)
            opened = _OpenAttempt(attempt.uid, attempt.prompt, [*attempt.calls])
            self._attempts[attempt.uid].append(opened)

    def take(
        self,
        trained: Iterable[TrajectoryGroup],
        replaced: Iterable[TrajectoryGroup],
        lost: Iterable[TrajectoryGroup],
    ) -> list[Record]:
        """Return the records of one step, and forget them.

        Args:
            trained: Groups that the step trained on.
            replaced: Groups without signal, in whose stead the step trained on others.
            lost: Groups all of whose episodes failed.
        """
        fates = {"trained": trained, "replaced": replaced, "lost": lost}
        groups = [
            {
                "kind": "group",
                "group_id": group.group_id,
                "task_id": group.task_id,
                "fate": fate,
                "dropped": group.num_failed,
            }
            for fate, each in fates.items()
            for group in each
        ]
        groups.sort(key=lambda group: group["group_id"])
        uids = [uid for group in groups for uid in self._uids(group["group_id"])]
        attempts = [each for uid in uids for each in self._attempts.pop(uid, ())]
        updates, self._updates = self._updates, []
        rows = [*groups, *(attempt.to_record() for attempt in attempts), *updates]
        return [{"kind": "ledger", "format": FORMAT}, *rows, {"kind": "end", "rows": len(rows)}]

    def _uids(self, group_id: int) -> range:
        return range(group_id * self._group_size, (group_id + 1) * self._group_size)


@dataclass(slots=True)
class _OpenAttempt:
    """Grows during an attempt: by a call per completion, which the environment then answers."""

    uid: int
    prompt: str | None = None
    calls: list[Call] = field(default_factory=list)

    def to_record(self) -> Record:
        return Attempt(self.uid, self.prompt, tuple(self.calls)).to_record()


class _RecordedEnv(gymnasium.Wrapper[str, str, str, str]):
    """Records what an environment answers, in the thread in which it answers."""

    def __init__(self, env: gymnasium.Env[str, str], attempt: _OpenAttempt) -> None:
        super().__init__(env)
        self._attempt = attempt

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        text, info = self.env.reset(seed=seed, options=options)
        self._attempt.prompt = digest(text)
        return text, info

    def step(self, action: str) -> tuple[str, Any, bool, bool, dict[str, Any]]:
        answer = self.env.step(action)
        _, _, terminated, truncated, info = answer
        self._attempt.calls[-1] = replace(
            self._attempt.calls[-1],
            answer=answer_digest(action, *answer),
            outcome=str(info.get("outcome", "ok")),
            ended=bool(terminated or truncated),
        )
        return answer
