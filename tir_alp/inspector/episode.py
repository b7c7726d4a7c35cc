"""One trajectory with all that is known of its tokens, as the page gets it. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tir_alp.inspector.highlight import code_ranges
from tir_alp.records.readable import redacted_values
from tir_alp.records.trajectories import from_record, texts_of
from tir_alp.training.token_values import CLIPPED, TokenValues
from tir_alp.types import Trajectory

Read = Callable[[Sequence[int]], list[str]]
"""Returns the text of each token of a span."""


def episode_of(
    record: Mapping[str, Any],
    row: Mapping[str, Any],
    chosen: int,
    read: Read | None,
    values_of: Callable[[int], TokenValues | None],
    secrets: Sequence[str] = (),
) -> dict[str, Any]:
    """Return what the page shows of a trajectory.

    Every column has one entry per token. Numbers are those of the records: float32 from the loss,
    which a float64 holds exactly; None where there is none.

    Args:
        record: The record of the trajectory.
        row: Its row in the index.
        chosen: Which of its sequences is shown, from 0; the others are listed.
        read: Returns the text of each token; None: there is no tokenizer, and the text of spans is
            that of the record.
        values_of: Returns what the loss saw of a sequence, given its uid; None if unknown.
        secrets: Values that are not shown.

    Raises:
        ValueError: If the record is not a trajectory, or has no such sequence.
    """
    whole = from_record(record)
    if not 0 <= chosen < len(whole.sequences):
        raise ValueError(f"the trajectory has {len(whole.sequences)} sequences, not {chosen + 1}")
    sequence = whole.sequences[chosen]
    texts = texts_of((record, *record.get("branches", ()))[chosen])
    values = values_of(sequence.sequence_uid)
    spans = _spans(sequence, texts, read)
    return {
        "row": dict(row),
        "task_id": whole.task_id,
        "uid": sequence.sequence_uid,
        "chosen": chosen,
        "sequences": tree_of(whole),
        "spans": spans,
        "turns": [
            {
                "stop": turn.stop_reason.value,
                "outcome": turn.outcome.value,
                "reward": turn.reward,
                "version": turn.policy_version,
                "timing": dict(turn.timing),
                "info": redacted_values(dict(turn.info), secrets),
            }
            for turn in sequence.turns
        ],
        "ids": list(sequence.token_ids),
        "pieces": [piece for span in spans for piece in span.pop("pieces")] if read else None,
        "columns": columns_of(sequence, values),
        "clip_sides": [] if values is None else list(values.clip_sides),
        "update": None if values is None else values.update,
    }


def columns_of(sequence: Trajectory, values: TokenValues | None) -> dict[str, list[Any]]:
    """Return the columns of numbers: rollout logprobs, versions, and what the loss saw.

    Args:
        sequence: The sequence.
        values: Of its loss tokens; None: not recorded, or not of this sequence.
    """
    sampled = [span.is_sampled for span in sequence.spans() for _ in range(len(span))]
    logprobs = sequence.rollout_logprobs
    versions: list[int | None] = [None] * len(sequence.prompt)
    for turn in sequence.turns:
        for span in turn.versions:
            versions += [span.version] * (span.stop - span.start)
        versions += [None] * len(turn.observation)
    columns: dict[str, list[Any]] = {
        "rollout": [
            value if is_own else None for value, is_own in zip(logprobs, sampled, strict=True)
        ],
        "version": versions,
        "mask": [int(bit) for bit in sequence.loss_mask],
    }
    positions = np.flatnonzero(np.array(sequence.loss_mask, bool))
    if values is None or len(values) != len(positions):
        return columns
    for name, column in values.columns.items():
        wide: list[Any] = [None] * len(sampled)
        for position, value in zip(positions.tolist(), column.tolist(), strict=True):
            wide[position] = value if name == CLIPPED or math.isfinite(value) else None
        columns[name] = wide
    return columns


def tree_of(trajectory: Trajectory) -> list[dict[str, Any]]:
    """Return the sequences of an episode as a tree: what each branches off from, and where.

    A sequence branches off from the earlier one with which it has the longest beginning in common.
    """
    found = []
    for index, each in enumerate(trajectory.sequences):
        ids, parent, shared = each.token_ids, None, 0
        for earlier in range(index):
            num = _num_common(ids, trajectory.sequences[earlier].token_ids)
            if num > shared:
                parent, shared = earlier, num
        found.append(
            {
                "uid": each.sequence_uid,
                "parent": parent,
                "shared": shared,
                "tokens": len(ids),
                "turns": len(each.turns),
                "loss_tokens": sum(each.loss_mask),
            }
        )
    return found


def _num_common(left: Sequence[int], right: Sequence[int]) -> int:
    num = min(len(left), len(right))
    different = np.flatnonzero(np.array(left[:num]) != np.array(right[:num]))
    return int(different[0]) if len(different) else num


def _spans(
    sequence: Trajectory, texts: Sequence[str | None], read: Read | None
) -> list[dict[str, Any]]:
    """Return the spans that have tokens, with their author, turn, place and text."""
    found, start = [], 0
    for index, (span, text) in enumerate(zip(sequence.spans(), texts, strict=True)):
        pieces = [] if read is None else read(span.token_ids)
        author = "prompt" if index == 0 else "policy" if index % 2 else "environment"
        shown = "".join(pieces) if read else (text or "")
        if len(span):
            found.append(
                {
                    "author": author,
                    "turn": None if index == 0 else (index - 1) // 2,
                    "start": start,
                    "stop": start + len(span),
                    "in_loss": span.is_sampled and span.trainable,
                    "code": code_ranges(shown) if author == "policy" else [],
                    "text": None if read else shown,
                    "pieces": pieces,
                }
            )
        start += len(span)
    return found
