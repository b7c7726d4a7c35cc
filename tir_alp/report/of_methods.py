"""Runs of several methods -> what their comparison says. Pure.

Methods are compared by measures of the policy without noise, with intervals over seeds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from math import isfinite

from tir_alp.report.compare import COLUMNS, RunSummary, row, summary_of
from tir_alp.report.document import (
    Document,
    Figure,
    Finding,
    Findings,
    Level,
    Section,
    Table,
    Words,
)
from tir_alp.report.facts import provenance_of
from tir_alp.report.formats import counted, with_interval
from tir_alp.report.intervals import Interval, difference_of, mean_of
from tir_alp.report.methods import Method
from tir_alp.report.of_run import event_of, first_of, steps_of, warnings_of

_MEASURES = (
    ("held-out accuracy after training", "after", ".1%", 1, "learning"),
    ("reward of the last steps", "reward", ".3f", 1, "learning"),
    ("widest clean P98 / P2", "widest", ".3g", -1, "stability"),
    ("largest clean |KL|", "max_kl", ".2e", -1, "stability"),
    ("clean clip fraction", "clip_fraction", ".2%", -1, "stability"),
)
"""Name, field of `RunSummary`, format, sign of an improvement, and what it is about."""
_MOST_METHODS = 12
_MOST_RUNS = 400
_SHORT = re.compile(r"\b([0-9a-f]{10})[0-9a-f]{30}\b")  # a commit
_NOTE = (
    "Runs that differ only in their seed are one method. In brackets: 95 % intervals of the mean "
    "over seeds (Student's t), and of differences (Welch); of twenty such comparisons, one is "
    "expected to mislead. Tails and KL in the table are those of the worst seed. Ratios of ALP are "
    "those of the perturbed policy, so its tails and KL contain the noise; clean measures do not."
)


def document_of_methods(methods: Sequence[Method], figures: Sequence[Figure]) -> Document:
    """Return what the comparison of methods says.

    Args:
        methods: The methods; the others are compared with the first.
        figures: The figures, in order.
    """
    runs = [run for method in methods for run in method.runs]
    first = first_of(figures)
    colours = tuple(method.colour for method in methods)
    table = Table(COLUMNS, tuple(tuple(row(method)) for method in methods), colours=colours)
    warnings = [f"{run.name}: {text}" for run in runs for text in warnings_of(run)]
    sections = [
        Section("methods", "Methods", (Words(_NOTE, "note"), table)),
        *(Section(each.name, each.title, (each,)) for each in figures if each is not first),
        Section(
            "runs",
            "Runs",
            (_runs(methods), *(Words(text, "warning") for text in warnings[:_MOST_RUNS])),
        ),
    ]
    count = counted(len(methods), "method", "methods")
    return Document(
        title=f"{counted(len(runs), 'run', 'runs')}, {count}",
        colour="",
        headline=_headline(methods),
        verdict=Findings(tuple(_findings(methods))),
        first=first,
        sections=tuple(sections),
    )


def _runs(methods: Sequence[Method]) -> Table:
    rows, colours = [], []
    for method in methods:
        for run in method.runs:
            known = dict(provenance_of(run))
            events = "; ".join(f"step {event['step']}: {event_of(event)}" for event in run.events)
            facts = (
                known.get("began", ""),
                known.get("duration", ""),
                _SHORT.sub(r"\1", known.get("commit", "")),
            )
            cells = (method.label, str(run.seed), run.name, steps_of(run), *facts, events[:2000])
            rows.append(tuple(cells))
            colours.append(method.colour)
    heading = ("method", "seed", "run", "steps", "began", "duration", "commit", "events")
    return Table(heading, tuple(rows[:_MOST_RUNS]), colours=tuple(colours[:_MOST_RUNS]))


# ------------------------------------------------------------------------------------- verdict


def _values(method: Method, field: str) -> list[float]:
    summaries: list[RunSummary] = [summary_of(run) for run in method.runs]
    return [value for each in summaries if isfinite(value := getattr(each, field))]


def _findings(methods: Sequence[Method]) -> Iterator[Finding]:
    base, *others = methods
    for name, field, form, better, about in _MEASURES:
        theirs = _values(base, field)
        for method in others[:_MOST_METHODS]:
            own = _values(method, field)
            if not own or not theirs:
                continue
            level, words = _judged(difference_of(own, theirs), better, form)
            yield Finding(
                "learning" if about == "learning" else "stability",
                level,
                f"{_capital(name)}: {method.label} {with_interval(mean_of(own), form)}, "
                f"{base.label} {with_interval(mean_of(theirs), form)}; {words}.",
            )
        if not others and theirs:
            mean = with_interval(mean_of(theirs), form)
            runs = counted(len(theirs), "run", "runs")
            level = "neutral" if len(theirs) > 1 else "unknown"
            kind = "learning" if about == "learning" else "stability"
            yield Finding(kind, level, f"{_capital(name)}: {mean} over {runs}.")
    if len(others) > _MOST_METHODS:
        hidden = len(others) - _MOST_METHODS
        text = f"{counted(hidden, 'method is', 'methods are')} in the table alone."
        yield Finding("attention", "neutral", text)
    for method in methods[:_MOST_METHODS]:
        events = sum(len(run.events) for run in method.runs)
        if events:
            text = f"{method.label}: {counted(events, 'event', 'events')} in its runs, see Runs."
            yield Finding("attention", "neutral", text)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _judged(difference: Interval, better: int, form: str) -> tuple[Level, str]:
    if not difference.is_known:
        return "unknown", "one seed cannot tell the difference from chance"
    if difference.low == difference.high == 0:
        return "neutral", "they are equal"
    shown = f"the difference is {with_interval(difference, form)}"
    if difference.sign == 0:
        return "neutral", f"{shown}, which seeds alone can explain"
    return ("good" if difference.sign == better else "bad"), f"{shown}, more than seeds explain"


def _headline(methods: Sequence[Method]) -> str:
    """Say which method is best by the first measure that the runs have, and how surely."""
    for name, field, form, better, _ in _MEASURES[:2]:
        found = [(method, values) for method in methods if (values := _values(method, field))]
        if not found:
            continue
        best, own = max(found, key=lambda each: better * mean_of(each[1]).mean)
        shown = f"{name}: {best.label}, {with_interval(mean_of(own), form)}"
        others = [(method, values) for method, values in found if method is not best]
        if not others:
            return f"{_capital(shown)}."
        equal = [m.label for m, values in others if difference_of(own, values).sign != better]
        sure = "above all others by more than seeds explain"
        if equal:
            names = ", ".join(equal[:3]) + (f" and {len(equal) - 3} more" if equal[3:] else "")
            sure = f"but not told apart from {names}"
        return f"Highest {shown}, {sure}."
    return "Too little data to compare: no run has an accuracy or a reward."
