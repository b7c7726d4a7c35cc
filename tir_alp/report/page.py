"""Figures and numbers -> one HTML file: pictures inside, no script, nothing fetched.

Names, configs and reasons are data: each goes through `html.escape` on its way into the page.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tir_alp.report.catalogue import meaning
from tir_alp.report.compare import COLUMNS, numbers, row
from tir_alp.report.figures import Drawn
from tir_alp.report.methods import Method, colour_of
from tir_alp.report.read import Record, changed_settings

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; margin: 0 auto;
  max-width: 1180px; padding: 1.5rem; }}
h1 {{ font-size: 1.6rem; margin: 0 0 .3rem; }}
h2 {{ font-size: 1.2rem; margin: 2.2rem 0 .4rem; border-bottom: 1px solid #ddd; }}
table {{ border-collapse: collapse; font-size: .9rem; }}
th, td {{ text-align: left; vertical-align: top; padding: .2rem .9rem .2rem 0;
  border-bottom: 1px solid #eee; }}
td {{ overflow-wrap: anywhere; }}
td.number {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
pre, code {{ font-family: ui-monospace, monospace; font-size: .85rem; }}
pre {{ background: #f6f6f6; padding: .8rem; overflow-x: auto; white-space: pre-wrap; }}
figure {{ margin: 0 0 1rem; }} img {{ max-width: 100%; height: auto; }}
figcaption, .note {{ color: #555; font-size: .9rem; max-width: 62rem; }}
.warning {{ background: #fff3e0; border-left: 4px solid #d55e00; padding: .4rem .8rem; }}
.chip {{ display: inline-block; width: .8rem; height: .8rem; margin-right: .4rem; }}
.wide {{ overflow-x: auto; }} summary {{ cursor: pointer; margin: .6rem 0; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def page_of_run(record: Record, drawn: Sequence[Drawn], pictures: Mapping[str, bytes]) -> str:
    """The page of one run.

    Args:
        record: The run.
        drawn: The pictures in their order.
        pictures: PNG of each, by name.
    """
    run = numbers(record)
    facts = [
        ("algorithm", record.algorithm),
        ("seed", str(record.seed)),
        ("steps", _steps(record)),
        ("held-out accuracy", f"{_share(run.before)} before, {_share(run.after)} after training"),
        ("widest P98 / P2 of the sequence ratios", _number(run.widest)),
        ("largest |KL| to the rollout policy", f"{_number(run.max_kl)} nats a token"),
        ("folder", str(record.path)),
    ]
    parts = [
        f"<h1>{_chip(colour_of(record.algorithm))}{escape(record.name)}</h1>",
        _rows([[escape(name), escape(value)] for name, value in facts]),
        *(_warning(text) for text in _warnings(record)),
        _events(record),
        _environment(record),
        _objective(record),
        _settings(record),
        *_figures(drawn, pictures),
        _metrics(record),
    ]
    return _PAGE.format(title=escape(record.name), body="\n".join(filter(None, parts)))


def page_of_methods(
    methods: Sequence[Method], drawn: Sequence[Drawn], pictures: Mapping[str, bytes]
) -> str:
    """The page that compares; arguments as for `page_of_run`."""
    records = [record for method in methods for record in method.records]
    title = f"{len(records)} runs, {len(methods)} methods"
    cells = []
    for method in methods:
        label, *rest = map(escape, row(method))
        cells.append([f"{_chip(method.colour)}{label}", *rest])
    runs = [
        [
            f"{_chip(method.colour)}{escape(method.label)}",
            escape(str(record.seed)),
            escape(record.name),
            escape(_steps(record)),
            escape("; ".join(f"step {event['step']}: {_event(event)}" for event in record.events)),
        ]
        for method in methods
        for record in method.records
    ]
    parts = [
        f"<h1>{title}</h1>",
        '<p class="note">Runs that differ in their seed alone are one method: thin lines are runs, '
        "thick ones the median. Means stand with their range over the seeds; tails and KL are "
        "those of the worst seed.</p>",
        f'<div class="wide">{_table(COLUMNS, cells)}</div>',
        *(_warning(f"{each.name}: {text}") for each in records for text in _warnings(each)),
        *_figures(drawn, pictures),
        "<h2>Runs</h2>",
        _table(("method", "seed", "run", "steps", "events"), runs),
    ]
    return _PAGE.format(title=escape(title), body="\n".join(parts))


# ------------------------------------------------------------------------------------ the parts


def _figures(drawn: Sequence[Drawn], pictures: Mapping[str, bytes]) -> list[str]:
    if not drawn:
        return ['<p class="warning">There are no metrics to draw yet.</p>']
    return [
        f'<h2 id="{each.name}">{escape(each.title)}</h2>\n<figure>'
        f'<img alt="{escape(each.title)}" src="data:image/png;base64,'
        f'{base64.b64encode(pictures[each.name]).decode()}">'
        f"<figcaption>{escape(each.caption)}</figcaption></figure>"
        for each in drawn
    ]


def _warnings(record: Record) -> list[str]:
    found = []
    if record.num_unreadable:
        found.append(
            f"{record.num_unreadable} lines of metrics.jsonl could not be read and are left out."
        )
    for start in record.environment:
        warnings = start.get("warnings")
        found += map(str, warnings if isinstance(warnings, list) else [])
    return [*dict.fromkeys(found)]


def _events(record: Record) -> str:
    if not record.events:
        return ""
    rows = [[str(event["step"]), escape(_event(event))] for event in record.events]
    return f"<h2>Events</h2>\n{_table(('step', 'what happened'), rows)}"


def _event(event: Mapping[str, Any]) -> str:
    return f"{event.get('kind', 'event')}: {event.get('reason', '')}"


def _environment(record: Record) -> str:
    """What programs ran in, a line for each start of the run that said something new."""
    lines = []
    for start in record.environment:
        said = {key: value for key, value in start.items() if key not in ("step", "warnings")}
        tools = said.get("tools")
        if isinstance(tools, Mapping) and len(said) == 1:
            said = dict(tools)
        text = "; ".join(f"{name}: {_inline(value)}" for name, value in said.items())
        if text:
            lines.append(text)
    items = "".join(f"<li>{escape(line)}</li>" for line in dict.fromkeys(lines))
    return f"<h2>Sandbox</h2>\n<ul>{items}</ul>" if items else ""


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        told = {key: each for key, each in value.items() if each != {}}
        return ", ".join(
            f"{key} ({_inline(each)})" if isinstance(each, Mapping) else f"{key} {_inline(each)}"
            for key, each in told.items()
        )
    return value if isinstance(value, str) else json.dumps(value)


def _objective(record: Record) -> str:
    if not record.objective:
        return ""
    return f"<h2>Objective</h2>\n<pre>{escape(record.objective)}</pre>"


def _settings(record: Record) -> str:
    """What differs from the defaults; the whole config folded away."""
    changed = [
        [f"<code>{escape(key)}</code>", escape(_json(value)), escape(_json(default))]
        for key, (value, default) in changed_settings(record).items()
        if key != "name"
    ]
    table = _table(("key", "value", "default"), changed) if changed else "<p>None.</p>"
    whole = escape(json.dumps(record.config, indent=2, ensure_ascii=False))
    return (
        f"<h2>Settings that differ from the defaults</h2>\n{table}\n"
        f"<details><summary>The whole config</summary><pre>{whole}</pre></details>"
    )


def _metrics(record: Record) -> str:
    """The last value of each metric; those without a known meaning are folded away."""
    known, other = [], []
    for name, series in record.series.items():
        what, unit = meaning(name)
        cells = [
            f"<code>{escape(name)}</code>",
            _Number(_number(series.values[-1])),
            escape(unit),
            str(series.steps[-1]),
            escape(what),
        ]
        (known if what else other).append(cells)
    heading = ("metric", "last value", "unit", "at step", "meaning")
    parts = []
    if known:
        parts.append(f"<h2>Metrics</h2>\n{_table(heading, known)}")
    if other:
        parts.append(
            f"<details><summary>{len(other)} more metrics</summary>"
            f"{_table(heading, other)}</details>"
        )
    return "\n".join(parts)


# -------------------------------------------------------------------------------------- pieces


class _Number(str):
    """A cell that is aligned to the right."""


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heading)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{_body(rows)}</tbody></table>"


def _rows(rows: Sequence[Sequence[str]]) -> str:
    return f"<table><tbody>{_body(rows)}</tbody></table>"


def _body(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"<tr>{''.join(map(_cell, cells))}</tr>" for cells in rows)


def _cell(content: str) -> str:
    kind = ' class="number"' if isinstance(content, _Number) else ""
    return f"<td{kind}>{content}</td>"


def _chip(colour: str) -> str:
    return f'<span class="chip" style="background:{colour}"></span>'


def _warning(text: str) -> str:
    return f'<p class="warning">{escape(text)}</p>'


def _steps(record: Record) -> str:
    wanted = record.settings.get("steps")
    if wanted is None or wanted == record.last_step:
        return str(record.last_step)
    return f"{record.last_step} of {wanted}"


def _json(value: Any) -> str:
    return "-" if value is None else json.dumps(value, ensure_ascii=False)


def _share(value: float) -> str:
    return f"{value:.1%}" if math.isfinite(value) else "unknown"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    return f"{value:.0f}" if value == round(value) and abs(value) < 1e9 else f"{value:.4g}"
