"""Tables from rows: every number with its interval. Pure.

Seeds are the independent units, so intervals come from resampling seeds, and methods are compared
seed by seed. With fewer than about eight seeds such intervals are too narrow.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence

from tir_alp.algorithm.estimates import Estimate, over_tasks, paired_difference
from tir_alp.studies.study.definition import StudyConfig
from tir_alp.studies.study.rows import Row

COLUMNS = (
    "method",
    "seeds",
    "took off",
    "in step",
    "collapsed",
    "level",
    "level, less the baseline's",
    "accuracy",
    "accuracy, less the baseline's",
    "widest P98 / P2, clean",
    "max |KL|, clean",
    "clip fraction, clean",
)

LANDSCAPE = ("sharpness", "moved by int8 weights, nats")
"""Further columns of a study that measures the landscape."""


def rows_of(rows: Iterable[Row], setting: str, method: str) -> list[Row]:
    """Return the rows of a method in a setting, by seed."""
    found = [row for row in rows if (row["setting"], row["method"]) == (setting, method)]
    return sorted(found, key=lambda row: row["seed"])


def estimate(rows: Sequence[Row], column: str) -> Estimate | None:
    """Return the mean of a column over the rows that have it, with its interval."""
    values = [row[column] for row in rows if row[column] is not None]
    return over_tasks(values) if values else None


def difference(rows: Sequence[Row], others: Sequence[Row], column: str) -> Estimate | None:
    """Return the mean difference to other rows of the same seeds, with its interval."""
    theirs = {row["seed"]: row[column] for row in others if row[column] is not None}
    pairs = [
        (row[column], theirs[row["seed"]])
        for row in rows
        if row[column] is not None and row["seed"] in theirs
    ]
    if not pairs:
        return None
    return paired_difference([own for own, _ in pairs], [other for _, other in pairs])


def markdown(config: StudyConfig, rows: Sequence[Row]) -> str:
    """Return the study as text: what was asked, and one table per setting."""
    texts = [f"**Question.** {config.question}"]
    texts += [f"**Hypothesis {n}.** {each}" for n, each in enumerate(config.hypotheses, 1)]
    texts += [f"**Analysis.** {config.analysis}", _how(config)]
    lines = [line for each in texts for line in (*textwrap.wrap(each, 100), "")]
    for setting in config.settings:
        lines += [f"### {setting}", "", *_table(config, rows, setting), ""]
    return "\n".join(lines)


def _how(config: StudyConfig) -> str:
    measures = config.measures
    return (
        f"A run takes off when the mean of `{measures.metric}` over {measures.window} steps "
        f"reaches {measures.take_off:g}, and collapses when it then falls below "
        f"{measures.collapse:.0%} of its largest value. Its level is the mean after step "
        f"{measures.level_from}. In brackets: 95 % intervals over seeds (bootstrap). The baseline "
        f"is {config.baseline}; differences are by seed."
    )


def _table(config: StudyConfig, rows: Sequence[Row], setting: str) -> list[str]:
    baseline = rows_of(rows, setting, config.baseline)
    titles = [*COLUMNS, *(LANDSCAPE if config.measures.landscape else ())]
    lines = [titles, ["---"] * len(titles)]
    for method in config.methods:
        if own := rows_of(rows, setting, method):
            cells = _cells(method, own, baseline if method != config.baseline else [])
            if config.measures.landscape:
                cells += [
                    _text(lambda v: f"{v:.3g}", estimate(own, "sharpness")),
                    _text(lambda v: f"{v:.2e}", estimate(own, "rounding_int8")),
                ]
            lines.append(cells)
    return [
        f"| {' | '.join(each.replace('|', chr(92) + '|') for each in line)} |" for line in lines
    ]


def _text(form: Callable[[float], str], found: Estimate | None) -> str:
    if found is None or not math.isfinite(found.mean):
        return "-"
    return f"{form(found.mean)} [{form(found.low)}, {form(found.high)}]"


def _cells(method: str, own: Sequence[Row], baseline: Sequence[Row]) -> list[str]:
    off = [row for row in own if row["took_off"] is not None]
    collapsed = sum(row["collapsed"] is not None for row in off)

    return [
        method,
        str(len(own)),
        f"{len(off)} of {len(own)}",
        _text(lambda v: f"{v:.0f}", estimate(off, "took_off")),
        f"{collapsed} of {len(off)}",
        _text(lambda v: f"{v:.3f}", estimate(own, "level")),
        _text(lambda v: f"{v:+.3f}", difference(own, baseline, "level")),
        _text(lambda v: f"{v:.1%}", estimate(own, "accuracy")),
        _text(lambda v: f"{v:+.1%}", difference(own, baseline, "accuracy")),
        _text(lambda v: f"{v:.3g}", estimate(own, "widest_clean")),
        _text(lambda v: f"{v:.2e}", estimate(own, "max_kl_clean")),
        _text(lambda v: f"{v:.2%}", estimate(own, "clip_clean")),
    ]
