"""A run -> what its report says. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from tir_alp.records.meanings import meaning
from tir_alp.records.readable import shortened
from tir_alp.report.compare import summary_of
from tir_alp.report.document import (
    Block,
    Code,
    Document,
    Episode,
    Figure,
    Folded,
    Section,
    Table,
    Words,
)
from tir_alp.report.examples import Examples, episode_of
from tir_alp.report.facts import provenance_of
from tir_alp.report.formats import counted, number, share
from tir_alp.report.methods import colour_of
from tir_alp.report.read import RecordedRun
from tir_alp.report.verdict import headline_of, verdict_of
from tir_alp.run.describe import changed_settings, changed_sft_settings
from tir_alp.training.checkpoint_folder import read_best

_FIRST = ("reward", "entropy")
"""Pictures that are shown first, if the run has them: of rewards, of losses."""
_MOST_ROWS = 400
_MOST_CHARS = 64_000
_LONGEST_CELL = 2000


def document_of_run(
    run: RecordedRun,
    figures: Sequence[Figure],
    examples: Examples,
    price_per_hour: float | None = None,
) -> Document:
    """Return what the report of a run says.

    Args:
        run: The run.
        figures: Its figures, in order.
        examples: Some of its trajectories.
        price_per_hour: See `provenance_of`.
    """
    verdict, first = verdict_of(run), first_of(figures)
    sections = [
        Section("provenance", "Provenance", (_facts(run, price_per_hour), *_warnings(run))),
        *_examples(run, examples),
        *_values(run),
        *(Section(each.name, each.title, (each,)) for each in figures if each is not first),
        *_events(run),
        *_environment(run),
        *_objective(run),
        _settings(run),
    ]
    return Document(
        title=run.name,
        colour=colour_of(run.algorithm),
        headline=headline_of(verdict),
        verdict=verdict,
        first=first,
        sections=tuple(sections),
    )


def first_of(figures: Sequence[Figure]) -> Figure | None:
    """Return the figure that is shown first; None if there is none."""
    order = {figure.name: figure for figure in reversed(figures)}
    chosen = next((order[name] for name in _FIRST if name in order), None)
    return chosen or next(iter(figures), None)


def steps_of(run: RecordedRun) -> str:
    """Return the number of steps that a run has made, and of those it is to make."""
    wanted = run.settings.get("steps")
    if wanted is None or wanted == run.last_step:
        return str(run.last_step)
    return f"{run.last_step} of {wanted}"


def event_of(event: Mapping[str, Any]) -> str:
    """Return what an event was, in words."""
    return f"{event.get('kind', 'event')}: {event.get('reason', '')}"[:_LONGEST_CELL]


def warnings_of(run: RecordedRun) -> list[str]:
    """Return what a reader must know before trusting the numbers."""
    found = []
    if run.num_unreadable:
        lines = counted(run.num_unreadable, "line", "lines")
        found.append(f"{lines} of metrics.jsonl could not be read and are left out.")
    for start in run.environment:
        warnings = start.get("warnings")
        found += map(str, warnings if isinstance(warnings, list) else [])
    return [each[:_LONGEST_CELL] for each in dict.fromkeys(found)][:_MOST_ROWS]


# ------------------------------------------------------------------------------------- sections


def _facts(run: RecordedRun, price_per_hour: float | None) -> Table:
    rows = [
        ("algorithm", run.algorithm),
        ("seed", str(run.seed)),
        ("steps", steps_of(run)),
        *_measured(run),
        *_best(run),
        ("folder", str(run.path)),
        *provenance_of(run, price_per_hour),
    ]
    return Table((), tuple((name, shortened(value, _LONGEST_CELL)) for name, value in rows))


def _measured(run: RecordedRun) -> list[tuple[str, str]]:
    if run.command != "train":
        return []
    summary = summary_of(run)
    rows = []
    if isfinite(summary.before) or isfinite(summary.after):
        accuracy = f"{share(summary.before)} before, {share(summary.after)} after training"
        rows.append(("held-out accuracy", accuracy))
    if isfinite(summary.widest):
        rows.append(("widest clean P98 / P2 of sequences", number(summary.widest)))
    if isfinite(summary.max_kl):
        rows.append(("largest clean |KL|", f"{number(summary.max_kl)} nats per token"))
    return rows


def _best(run: RecordedRun) -> list[tuple[str, str]]:
    best = read_best(run.path / "checkpoints")
    if best is None:
        return []
    is_sft = run.command == "sft"
    score = f"held-out loss {number(-best.score)}" if is_sft else f"{share(best.score)} held out"
    return [("best checkpoint", f"step {best.step}, {score}; the last is step {run.last_step}")]


def _warnings(run: RecordedRun) -> list[Words]:
    return [Words(text, "warning") for text in warnings_of(run)]


def _examples(run: RecordedRun, examples: Examples) -> list[Section]:
    if run.command != "train" or not examples.num_read:
        return []
    blocks: list[Block] = []
    if examples.before is not None and examples.after is not None:
        same = examples.before.row["task_id"] == examples.after.row["task_id"]
        which = "of a task that both steps have" if same else "of two tasks: no task is in both"
        text = f"Before and after: one trajectory of the first step and one of the last, {which}."
        blocks += [Words(text, "note"), episode_of(examples.before, "Before")]
        blocks.append(episode_of(examples.after, "After"))
    else:
        text = "There is no before and after: only one step with trajectories was recorded."
        blocks.append(Words(text, "note"))
    return [Section("examples", "Examples", (*blocks, *_extremes(examples)))]


def _extremes(examples: Examples) -> list[Words | Episode]:
    first, last = examples.steps
    steps = f"step {first}" if first == last else f"steps {first} to {last}"
    among = f"{counted(examples.num_read, 'trajectory', 'trajectories')} of {steps}"
    if not examples.is_whole:
        among += ", which is as many as a report reads"
    rewards = {each.reward for each in (*examples.best, *examples.worst)}
    if len(rewards) == 1:
        text = f"All have the same reward: {among}. Examples:"
        shown = [("Example", each) for each in examples.best]
    else:
        text = f"The best and the worst by reward, among {among}:"
        shown = [*(("Best", each) for each in examples.best)]
        shown += [("Worst", each) for each in examples.worst]
    return [Words(text, "note"), *(episode_of(each, label) for label, each in shown)]


def _values(run: RecordedRun) -> list[Section]:
    """Return the last value of each metric; metrics without a known meaning are folded."""
    known, other = [], []
    for name, series in run.series.items():
        what, unit = meaning(name)
        first, last = series.values[0], series.values[-1]
        row = (name[:200], number(first), number(last), unit, str(series.steps[-1]), what)
        (known if what else other).append(row)
    heading = ("metric", "first", "last", "unit", "at step", "meaning")

    def table(rows: list[tuple[str, ...]]) -> Table:
        return Table(heading, tuple(rows[:_MOST_ROWS]), frozenset([0]), frozenset([1, 2, 4]))

    blocks: list[Block] = [table(known)] if known else []
    if other:
        more = counted(len(other), "more metric", "more metrics")
        blocks.append(Folded(more, (table(other),)))
    return [Section("values", "Final values", tuple(blocks))] if blocks else []


def _events(run: RecordedRun) -> list[Section]:
    rows = tuple((str(event["step"]), event_of(event)) for event in run.events[-_MOST_ROWS:])
    table = Table(("step", "what happened"), rows)
    return [Section("events", "Events", (table,))] if rows else []


def _environment(run: RecordedRun) -> list[Section]:
    """Say what programs ran in: one paragraph per distinct report of a start of the run."""
    lines = []
    for start in run.environment:
        report = {key: value for key, value in start.items() if key not in ("step", "warnings")}
        tools = report.get("tools")
        if isinstance(tools, Mapping) and len(report) == 1:
            report = dict(tools)
        lines.append("; ".join(f"{name}: {_inline(value)}" for name, value in report.items()))
    distinct = [shortened(line, _LONGEST_CELL) for line in dict.fromkeys(filter(None, lines))]
    blocks = tuple(Words(line) for line in distinct[:_MOST_ROWS])
    return [Section("sandbox", "Sandbox", blocks)] if blocks else []


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        shown = {key: each for key, each in value.items() if each != {}}
        return ", ".join(
            f"{key} ({_inline(each)})" if isinstance(each, Mapping) else f"{key} {_inline(each)}"
            for key, each in shown.items()
        )
    return value if isinstance(value, str) else json.dumps(value)


def _objective(run: RecordedRun) -> list[Section]:
    if not run.objective:
        return []
    return [Section("objective", "Objective", (Code(shortened(run.objective, _MOST_CHARS)),))]


def _settings(run: RecordedRun) -> Section:
    """Show the settings that differ from the defaults, and the whole config folded."""
    if run.command == "sft":
        changed = changed_sft_settings(run.settings)
    else:
        changed = changed_settings(run.settings, run.algorithm)
    rows = tuple(
        (
            key[:200],
            shortened(_json(value), _LONGEST_CELL),
            shortened(_json(default), _LONGEST_CELL),
        )
        for key, (value, default) in changed.items()
        if key != "name"
    )
    heading = ("key", "value", "default")
    table = Table(heading, rows[:_MOST_ROWS], frozenset([0])) if rows else Words("None.")
    whole = shortened(json.dumps(run.config, indent=2, ensure_ascii=False), _MOST_CHARS)
    folded = Folded("The whole config", (Code(whole),))
    return Section("settings", "Settings that differ from the defaults", (table, folded))


def _json(value: Any) -> str:
    return "-" if value is None else json.dumps(value, ensure_ascii=False)
