"""Trajectories of a run as text: before and after training, the best and the worst.

What is read is bounded: the first step, and the newest ones up to `MOST_BYTES` in all.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tir_alp.inspector.rows import row_of
from tir_alp.records.readable import redacted, secret_values, shortened
from tir_alp.records.trajectories import texts_of
from tir_alp.report.document import Episode, Said
from tir_alp.report.formats import counted, number

MOST_BYTES = 64 << 20
"""Bytes of records that are read, at most."""
MOST_OF_A_FILE = 16 << 20
"""Bytes that are read of one step, at most."""
MOST_SHOWN = 2
"""The best trajectories that are shown, and as many of the worst."""
MOST_CHARS = 1500
"""Characters of a prompt, a completion or an observation that are shown."""
MOST_TURNS = 8
"""Turns of a trajectory that are shown: its first and its last ones."""
_LONGEST_NAME = 200


@dataclass(frozen=True, slots=True)
class Example:
    """A trajectory: its record, and the row that describes it."""

    record: Mapping[str, Any]
    row: Mapping[str, Any]

    @property
    def reward(self) -> float:
        """The reward of the episode."""
        return self.row["reward"]


@dataclass(frozen=True, slots=True)
class Examples:
    """What a report shows of the trajectories of a run."""

    before: Example | None = None
    """From the first step."""
    after: Example | None = None
    """From the last step, of the same task if both steps have one in common."""
    best: tuple[Example, ...] = ()
    worst: tuple[Example, ...] = ()
    num_read: int = 0
    """Trajectories among which the best and the worst were searched."""
    steps: tuple[int, int] = (0, 0)
    """First and last step of these trajectories."""
    is_whole: bool = True
    """Whether they are all that the run recorded."""


@dataclass(slots=True)
class _Extremes:
    """The best and the worst of the trajectories seen so far, each of another task if possible."""

    best: list[Example] = field(default_factory=list)
    worst: list[Example] = field(default_factory=list)

    def see(self, example: Example) -> None:
        self.best = _kept([*self.best, example], -1)
        self.worst = _kept([*self.worst, example], 1)


def read_examples(path: Path) -> Examples:
    """Read what a report shows of a run's trajectories; nothing if it recorded none."""
    files = sorted((path / "trajectories").glob("step_*.jsonl"))
    if not files:
        return Examples()
    first, last = files[0], files[-1]
    left, is_whole, num_read = MOST_BYTES, True, 0
    steps, extremes, ends = [], _Extremes(), {}
    for file in dict.fromkeys((last, first, *reversed(files))):
        if left <= 0:
            is_whole = False
            break
        found, size, whole = _read(file, min(left, MOST_OF_A_FILE))
        left, is_whole, num_read = left - size, is_whole and whole, num_read + len(found)
        if file in (first, last):
            ends[file] = found
        for example in found:
            extremes.see(example)
            steps.append(example.row["step"])
    before, after = (
        _pair(ends.get(first, []), ends.get(last, [])) if first != last else (None, None)
    )
    best = tuple(extremes.best)
    shown = {_place(each) for each in best}
    worst = tuple(each for each in extremes.worst if _place(each) not in shown)
    span = (min(steps), max(steps)) if steps else (0, 0)
    return Examples(before, after, best, worst, num_read, span, is_whole)


def episode_of(example: Example, label: str) -> Episode:
    """Return a trajectory as text, of bounded length and without secrets.

    Args:
        example: The trajectory.
        label: What it is an example of.
    """
    row, secrets = example.row, secret_values(os.environ)
    # The reader of a record checks it in full; here its text is enough.
    texts = texts_of(example.record)
    num_turns = len(example.record["turns"])
    said = [_said("prompt", texts[0], secrets)]
    for turn in range(num_turns):
        skipped = num_turns - MOST_TURNS
        if skipped > 0 and turn == MOST_TURNS // 2:
            said.append(Said("note", f"{counted(skipped, 'turn is', 'turns are')} left out here."))
        if skipped > 0 and MOST_TURNS // 2 <= turn < MOST_TURNS // 2 + skipped:
            continue
        said.append(_said("model", texts[1 + 2 * turn], secrets))
        if texts[2 + 2 * turn] or turn < num_turns - 1:
            said.append(_said("environment", texts[2 + 2 * turn], secrets))
    task = redacted(str(row["task_id"]), secrets)[:_LONGEST_NAME]
    title = f"{label}: step {row['step']}, task {task}, reward {number(example.reward)}"
    facts = [
        counted(num_turns, "turn", "turns"),
        counted(row["tool_calls"], "tool call", "tool calls"),
        counted(row["tokens"], "token", "tokens"),
        f"outcome {row['outcome']}",
        str(row["ended"]),
    ]
    if row["branches"]:
        facts.append(f"the first of {row['branches'] + 1} sequences")
    if row["answer"] is not None:
        facts.append(f"answer {redacted(str(row['answer']), secrets)}")
    return Episode(title, "; ".join(facts), tuple(said))


def _said(author: Any, text: str | None, secrets: tuple[str, ...]) -> Said:
    if text is None:
        return Said("note", f"The {author}'s text is not in the records (records.max_text_chars).")
    return Said(author, shortened(redacted(text, secrets), MOST_CHARS))


def _read(file: Path, most: int) -> tuple[list[Example], int, bool]:
    """Return examples, the bytes that were read, and whether that is the whole file."""
    found, size = [], 0
    step = int(file.stem.removeprefix("step_"))
    try:
        with file.open("rb") as lines:
            for line, raw in enumerate(lines, start=1):
                size += len(raw)
                if size > most:
                    return found, size, False
                if (example := _example(raw, step, line)) is not None:
                    found.append(example)
    except OSError:
        return found, size, False
    return found, size, True


def _example(raw: bytes, step: int, line: int) -> Example | None:
    """Return the example of a line; None if it is no trajectory."""
    try:
        record = json.loads(raw)
        row = row_of(record, "trajectories", step, line)
        if not all(text is None or isinstance(text, str) for text in texts_of(record)):
            return None
        row["reward"] = float(row["reward"])
        return Example(_slim(record), row) if math.isfinite(row["reward"]) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return None


def _slim(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the text of a record alone, so that many can be held."""
    turns = [
        {name: {"text": turn[name].get("text")} for name in ("completion", "observation")}
        for turn in record["turns"]
    ]
    return {"prompt": {"text": record["prompt"].get("text")}, "turns": turns}


def _kept(examples: list[Example], sign: int) -> list[Example]:
    """Return the first by reward, of which a task has one as long as there are other tasks."""
    order = sorted(examples, key=lambda each: sign * each.reward)
    tasks: set[str] = set()
    first, again = [], []
    for each in order:
        (again if each.row["task_id"] in tasks else first).append(each)
        tasks.add(each.row["task_id"])
    return [*first, *again][:MOST_SHOWN]


def _pair(before: list[Example], after: list[Example]) -> tuple[Example | None, Example | None]:
    """Return the first trajectory of each step, of a task that both have if there is one."""
    later = {each.row["task_id"]: each for each in reversed(after)}
    for each in before:
        if each.row["task_id"] in later:
            return each, later[each.row["task_id"]]
    return (before[0] if before else None), (after[0] if after else None)


def _place(example: Example) -> tuple[int, int]:
    return example.row["step"], example.row["line"]
