"""Figures and numbers -> one HTML file with embedded pictures that runs and fetches nothing.

Names, configs and reasons are data: each is passed through `html.escape`.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tir_alp.report.compare import COLUMNS, row, summary_of
from tir_alp.report.figures import DrawnPicture
from tir_alp.report.meanings import meaning
from tir_alp.report.methods import Method, colour_of
from tir_alp.report.read import RecordedRun
from tir_alp.run.describe import changed_settings, changed_sft_settings
from tir_alp.training.checkpoint_folder import read_best

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


def page_of_run(
    run: RecordedRun, drawn: Sequence[DrawnPicture], pictures: Mapping[str, bytes]
) -> str:
    """Return the page of one run.

    Args:
        run: The run.
        drawn: The pictures in order.
        pictures: PNG data of each picture by name.
    """
    facts = [
        ("algorithm", run.algorithm),
        ("seed", str(run.seed)),
        ("steps", _steps(run)),
        *(_facts_of_sft(run) if run.command == "sft" else _facts_of_training(run)),
        *_best(run),
        ("folder", str(run.path)),
    ]
    sections = [
        f"<h1>{_chip(colour_of(run.algorithm))}{escape(run.name)}</h1>",
        _rows([[escape(name), escape(value)] for name, value in facts]),
        *(_warning(text) for text in _warnings(run)),
        _events(run),
        _environment(run),
        _objective(run),
        _settings(run),
        *_figures(drawn, pictures),
        _metrics(run),
    ]
    return _PAGE.format(title=escape(run.name), body="\n".join(filter(None, sections)))


def _facts_of_training(run: RecordedRun) -> list[tuple[str, str]]:
    summary = summary_of(run)
    return [
        (
            "held-out accuracy",
            f"{_share(summary.before)} before, {_share(summary.after)} after training",
        ),
        ("widest P98 / P2 of the sequence ratios, without noise", _number(summary.widest)),
        (
            "largest |KL| to the rollout policy, without noise",
            f"{_number(summary.max_kl)} nats per token",
        ),
    ]


def _facts_of_sft(run: RecordedRun) -> list[tuple[str, str]]:
    facts = []
    for title, name in (("loss", "loss/value"), ("loss on held-out conversations", "eval/loss")):
        values = run.series[name].finite if name in run.series else []
        if values:
            text = f"{_number(values[0])} at first, {_number(values[-1])} at last, nats per token"
            facts.append((title, text))
    return facts


def _best(run: RecordedRun) -> list[tuple[str, str]]:
    best = read_best(run.path / "checkpoints")
    if best is None:
        return []
    is_sft = run.command == "sft"
    score = f"held-out loss {_number(-best.score)}" if is_sft else f"{_share(best.score)} held out"
    return [("best checkpoint", f"step {best.step}, {score}; the last is step {run.last_step}")]


def page_of_methods(
    methods: Sequence[Method], drawn: Sequence[DrawnPicture], pictures: Mapping[str, bytes]
) -> str:
    """Return the page that compares methods; see `page_of_run`."""
    runs = [run for method in methods for run in method.runs]
    title = f"{len(runs)} runs, {len(methods)} methods"
    cells = []
    for method in methods:
        label, *rest = map(escape, row(method))
        cells.append([f"{_chip(method.colour)}{label}", *rest])
    rows = [
        [
            f"{_chip(method.colour)}{escape(method.label)}",
            escape(str(run.seed)),
            escape(run.name),
            escape(_steps(run)),
            escape("; ".join(f"step {event['step']}: {_event(event)}" for event in run.events)),
        ]
        for method in methods
        for run in method.runs
    ]
    sections = [
        f"<h1>{title}</h1>",
        '<p class="note">Runs that differ only in their seed are one method: thin lines are runs, '
        "thick lines their median. Means are followed by their range over the seeds; tails and KL "
        "are those of the worst seed. Ratios of ALP are those of the perturbed policy, so its "
        "tails and KL contain the noise.</p>",
        f'<div class="wide">{_table(COLUMNS, cells)}</div>',
        *(_warning(f"{each.name}: {text}") for each in runs for text in _warnings(each)),
        *_figures(drawn, pictures),
        "<h2>Runs</h2>",
        _table(("method", "seed", "run", "steps", "events"), rows),
    ]
    return _PAGE.format(title=escape(title), body="\n".join(sections))


# ------------------------------------------------------------------------------------- sections


def _figures(drawn: Sequence[DrawnPicture], pictures: Mapping[str, bytes]) -> list[str]:
    if not drawn:
        return ['<p class="warning">There are no metrics to draw yet.</p>']
    return [
        f'<h2 id="{each.name}">{escape(each.title)}</h2>\n<figure>'
        f'<img alt="{escape(each.title)}" src="data:image/png;base64,'
        f'{base64.b64encode(pictures[each.name]).decode()}">'
        f"<figcaption>{escape(each.caption)}</figcaption></figure>"
        for each in drawn
    ]


def _warnings(run: RecordedRun) -> list[str]:
    found = []
    if run.num_unreadable:
        found.append(
            f"{run.num_unreadable} lines of metrics.jsonl could not be read and are left out."
        )
    for start in run.environment:
        warnings = start.get("warnings")
        found += map(str, warnings if isinstance(warnings, list) else [])
    return [*dict.fromkeys(found)]


def _events(run: RecordedRun) -> str:
    if not run.events:
        return ""
    rows = [[str(event["step"]), escape(_event(event))] for event in run.events]
    return f"<h2>Events</h2>\n{_table(('step', 'what happened'), rows)}"


def _event(event: Mapping[str, Any]) -> str:
    return f"{event.get('kind', 'event')}: {event.get('reason', '')}"


def _environment(run: RecordedRun) -> str:
    """List what programs ran in: one item per distinct report of a start of the run."""
    lines = []
    for start in run.environment:
        report = {key: value for key, value in start.items() if key not in ("step", "warnings")}
        tools = report.get("tools")
        if isinstance(tools, Mapping) and len(report) == 1:
            report = dict(tools)
        text = "; ".join(f"{name}: {_inline(value)}" for name, value in report.items())
        if text:
            lines.append(text)
    items = "".join(f"<li>{escape(line)}</li>" for line in dict.fromkeys(lines))
    return f"<h2>Sandbox</h2>\n<ul>{items}</ul>" if items else ""


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        shown = {key: each for key, each in value.items() if each != {}}
        return ", ".join(
            f"{key} ({_inline(each)})" if isinstance(each, Mapping) else f"{key} {_inline(each)}"
            for key, each in shown.items()
        )
    return value if isinstance(value, str) else json.dumps(value)


def _objective(run: RecordedRun) -> str:
    if not run.objective:
        return ""
    return f"<h2>Objective</h2>\n<pre>{escape(run.objective)}</pre>"


def _changed(run: RecordedRun) -> dict[str, tuple[Any, Any]]:
    if run.command == "sft":
        return changed_sft_settings(run.settings)
    return changed_settings(run.settings, run.algorithm)


def _settings(run: RecordedRun) -> str:
    """Show the settings that differ from the defaults, and the whole config folded."""
    changed = [
        [f"<code>{escape(key)}</code>", escape(_json(value)), escape(_json(default))]
        for key, (value, default) in _changed(run).items()
        if key != "name"
    ]
    table = _table(("key", "value", "default"), changed) if changed else "<p>None.</p>"
    whole = escape(json.dumps(run.config, indent=2, ensure_ascii=False))
    return (
        f"<h2>Settings that differ from the defaults</h2>\n{table}\n"
        f"<details><summary>The whole config</summary><pre>{whole}</pre></details>"
    )


def _metrics(run: RecordedRun) -> str:
    """Show the last value of each metric; metrics without a known meaning are folded."""
    known, other = [], []
    for name, series in run.series.items():
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
    sections = []
    if known:
        sections.append(f"<h2>Metrics</h2>\n{_table(heading, known)}")
    if other:
        sections.append(
            f"<details><summary>{len(other)} more metrics</summary>"
            f"{_table(heading, other)}</details>"
        )
    return "\n".join(sections)


# ------------------------------------------------------------------------------- HTML elements


class _Number(str):
    """A table cell that is aligned to the right."""


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; the cells of its rows are HTML already."""
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


def _steps(run: RecordedRun) -> str:
    wanted = run.settings.get("steps")
    if wanted is None or wanted == run.last_step:
        return str(run.last_step)
    return f"{run.last_step} of {wanted}"


def _json(value: Any) -> str:
    return "-" if value is None else json.dumps(value, ensure_ascii=False)


def _share(value: float) -> str:
    return f"{value:.1%}" if math.isfinite(value) else "unknown"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    return f"{value:.0f}" if value == round(value) and abs(value) < 1e9 else f"{value:.4g}"
