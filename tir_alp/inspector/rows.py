"""The row of a list for one trajectory, from its record. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLUMNS: Mapping[str, str] = {
    "kind": "TEXT",
    "step": "INTEGER",
    "line": "INTEGER",
    "start": "INTEGER",
    "size": "INTEGER",
    "uid": "INTEGER",
    "group_id": "INTEGER",
    "task_id": "TEXT",
    "reward": "REAL",
    "advantage": "REAL",
    "outcome": "TEXT",
    "ended": "TEXT",
    "stop": "TEXT",
    "turns": "INTEGER",
    "tokens": "INTEGER",
    "sampled": "INTEGER",
    "loss_tokens": "INTEGER",
    "tool_calls": "INTEGER",
    "void_turns": "INTEGER",
    "version": "INTEGER",
    "staleness": "INTEGER",
    "branches": "INTEGER",
    "seconds": "REAL",
    "answer": "TEXT",
    "preview": "TEXT",
}
"""Columns of the index, and their types in SQLite. `start` and `size` are where the record is in
its file, in bytes; `sampled` counts tokens of the policy, and `loss_tokens` those that may be
trained on; `staleness` is in steps."""

_PREVIEW_CHARS = 160
_ANSWER_CHARS = 60


def row_of(record: Mapping[str, Any], kind: str, step: int, line: int) -> dict[str, Any]:
    """Return the row of a trajectory, without `start`, `size` and `advantage`.

    Args:
        record: A record of `trajectories/` or `replaced/`.
        kind: The folder it is in.
        step: Number of the step.
        line: Number of the line, from 1.

    Raises:
        KeyError, TypeError, AttributeError: If it is no such record.
    """
    turns = record["turns"]
    spans = [turn["completion"] for turn in turns]
    outcomes = [turn["outcome"] for turn in turns]
    versions = [turn["policy_version"] for turn in turns]
    last = turns[-1] if turns else {}
    timings = [turn.get("timing", {}) for turn in turns]
    num_shown = sum(len(turn["observation"]["token_ids"]) for turn in turns)
    num_sampled = sum(len(span["token_ids"]) for span in spans)
    answer = last.get("info", {}).get("answer")
    return {
        "kind": kind,
        "step": step,
        "line": line,
        "uid": record["sequence_uid"],
        "group_id": record["group_id"],
        "task_id": str(record["task_id"]),
        "reward": sum(turn["reward"] for turn in turns),
        "outcome": next((each for each in reversed(outcomes) if each != "ok"), "ok"),
        "ended": _ended(record),
        "stop": last.get("stop_reason", ""),
        "turns": len(turns),
        "tokens": len(record["prompt"]["token_ids"]) + num_sampled + num_shown,
        "sampled": num_sampled,
        "loss_tokens": sum(len(span["token_ids"]) for span in spans if span["trainable"]),
        "tool_calls": sum(int(turn["info"].get("tool_calls", 0)) for turn in turns),
        "void_turns": sum(bool(turn["info"].get("void")) for turn in turns),
        "version": min(versions, default=0),
        "staleness": max(0, step - 1 - min(versions, default=step - 1)),
        "branches": len(record.get("branches", ())),
        "seconds": sum(float(t.get("generate", 0)) + float(t.get("tool", 0)) for t in timings),
        "answer": None if answer is None else str(answer)[:_ANSWER_CHARS],
        "preview": "".join(str(span.get("text", "")) for span in spans)[:_PREVIEW_CHARS],
    }


def _ended(record: Mapping[str, Any]) -> str:
    if record["terminated"]:
        return "terminated"
    return "truncated" if record["truncated"] else "open"
