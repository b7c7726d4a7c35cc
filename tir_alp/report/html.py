"""A document -> one HTML file that loads nothing: text, pictures, and curves where scripts run.

All text is data: it goes through `_text`, which makes visible what would be invisible or would
change the order of what is read, and escapes markup. The scripts and the style are those of the
package, and a policy allows these alone.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from tir_alp.inspector.assets import as_data, as_one, policy_of, static_text
from tir_alp.inspector.visible import visible
from tir_alp.report.document import (
    ABOUT,
    LEVELS,
    Block,
    Code,
    Document,
    Episode,
    Figure,
    Findings,
    Folded,
    Level,
    Section,
    Table,
    Words,
)

_MODULES = ("dom.js", "charts.js")
"""Modules of the inspector that the page's own one imports."""
_COLOUR = re.compile(r"#[0-9A-Fa-f]{6}")


def page_of(
    document: Document, pictures: Mapping[str, bytes], curves: Mapping[str, list[dict[str, Any]]]
) -> str:
    """Return the page.

    Args:
        document: What it says.
        pictures: PNG data by name of the figure.
        curves: Panels by name of the figure.
    """
    colours = _colours(document)
    style = f"{static_text('uplot.css')}{_own('report.css')}{_rules(colours)}"
    library, program = static_text("uplot.js"), _program()
    title = _text(document.title)
    chip = _chip(document.colour, colours) if document.colour else ""
    first = "" if document.first is None else _figure(document.first, pictures)
    body = "\n".join(_section(each, pictures, colours) for each in document.sections)
    nothing = "" if first else '<p class="warning">There are no metrics to draw yet.</p>'
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="'
        f'{escape(policy_of((library, program), style))}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="referrer" content="no-referrer">\n<title>{title}</title>\n'
        f'<link rel="icon" href="data:,">\n<style>{style}</style>\n</head>\n<body>\n<main>\n'
        f'<header><h1>{chip}{title}</h1>\n<p class="headline">{_text(document.headline)}</p>\n'
        f'<div class="first">{first}{nothing}{_findings(document.verdict)}</div></header>\n'
        f"{_contents(document)}\n<div>{body}</div>\n</main>\n"
        f'<script type="application/json" id="curves">{as_data(curves)}</script>\n'
        f'<script>{library}</script>\n<script type="module">{program}</script>\n</body>\n</html>\n'
    )


def _own(name: str) -> str:
    return (resources.files("tir_alp.report") / "static" / name).read_text("utf-8")


def _program() -> str:
    return as_one([*map(static_text, _MODULES), _own("report.js")])


def _contents(document: Document) -> str:
    items = "".join(
        f'<li><a href="#{_anchor(each.name)}">{_text(each.title)}</a></li>'
        for each in document.sections
    )
    return f'<nav aria-label="contents"><h2>Contents</h2><ul>{items}</ul></nav>'


def _section(section: Section, pictures: Mapping[str, bytes], colours: Mapping[str, str]) -> str:
    blocks = "\n".join(_block(each, pictures, colours) for each in section.blocks)
    name = _anchor(section.name)
    return f'<section id="{name}">\n<h2>{_text(section.title)}</h2>\n{blocks}\n</section>'


def _block(block: Block, pictures: Mapping[str, bytes], colours: Mapping[str, str]) -> str:
    match block:
        case Words():
            kind = "" if block.kind == "plain" else f' class="{block.kind}"'
            return f"<p{kind}>{_text(block.text)}</p>"
        case Findings():
            return _findings(block)
        case Table():
            return _table(block, colours)
        case Code():
            return _pre(block.text, "code")
        case Figure():
            return _figure(block, pictures)
        case Episode():
            return _episode(block)
        case Folded():
            inner = "\n".join(_block(each, pictures, colours) for each in block.blocks)
            return f"<details><summary>{_text(block.summary)}</summary>\n{inner}\n</details>"


def _findings(found: Findings) -> str:
    parts = []
    for about, title in ABOUT.items():
        items = "".join(
            f'<li class="{each.level}">{_mark(each.level)}{_text(each.text)}</li>'
            for each in found.findings
            if each.about == about
        )
        if items:
            parts.append(f"<h2>{title}</h2><ul>{items}</ul>")
    return f'<div class="verdict">{"".join(parts)}</div>'


def _mark(level: Level) -> str:
    return f"<b>{LEVELS[level]}:</b> " if LEVELS[level] else ""


def _figure(figure: Figure, pictures: Mapping[str, bytes]) -> str:
    name, title = _anchor(figure.name), _text(figure.title)
    data = base64.b64encode(pictures[figure.name]).decode()
    return (
        f'<figure data-picture="{name}"><div class="panels"></div>'
        f'<div class="picture" tabindex="0" role="group" aria-label="{title}, picture">'
        f'<img alt="{title}" src="data:image/png;base64,{data}"></div>'
        f"<figcaption>{_text(figure.caption)}</figcaption></figure>"
    )


def _episode(episode: Episode) -> str:
    parts = []
    for said in episode.said:
        if said.author == "note":
            parts.append(f'<p class="note">{_text(said.text)}</p>')
        else:
            parts.append(f"<h4>{said.author}</h4>{_pre(said.text, said.author)}")
    return (
        f'<article class="episode"><h3>{_text(episode.title)}</h3>'
        f'<p class="note">{_text(episode.facts)}</p>{"".join(parts)}</article>'
    )


def _pre(text: str, kind: str) -> str:
    """Return text with its line breaks; it can be scrolled, so it can be reached by keyboard."""
    return (
        f'<pre class="{kind}" tabindex="0" role="group" aria-label="{kind}" dir="ltr">'
        f"{_text(text)}</pre>"
    )


def _table(table: Table, colours: Mapping[str, str]) -> str:
    head = ""
    if table.heading:
        kinds = [' class="number"' if n in table.numbers else "" for n in range(len(table.heading))]
        cells = "".join(
            f'<th scope="col"{kind}>{_text(title)}</th>'
            for kind, title in zip(kinds, table.heading, strict=True)
        )
        head = f"<thead><tr>{cells}</tr></thead>"
    rows = []
    for number, row in enumerate(table.rows):
        chip = _chip(table.colours[number], colours) if table.colours else ""
        rows.append(f"<tr>{''.join(_cells(table, row, chip))}</tr>")
    kind = "data" if table.heading else "facts"
    return (
        '<div class="wide" tabindex="0" role="group" aria-label="table">'
        f'<table class="{kind}">{head}<tbody>{"".join(rows)}</tbody></table></div>'
    )


def _cells(table: Table, row: Sequence[str], chip: str) -> list[str]:
    found = []
    for index, value in enumerate(row):
        text = f"<code>{_text(value)}</code>" if index in table.code else _text(value)
        if not index:
            tag = "th scope=row" if not table.heading else "td"
            found.append(f"<{tag}>{chip}{text}</{tag.partition(' ')[0]}>")
        else:
            kind = " class=number" if index in table.numbers else ""
            found.append(f"<td{kind}>{text}</td>")
    return found


# --------------------------------------------------------------------------- text, colours, names


def _text(text: str) -> str:
    return escape(visible(text))


def _anchor(name: str) -> str:
    return re.sub(r"[^a-z0-9_-]", "-", name.lower())


def _colours(document: Document) -> dict[str, str]:
    """Return the class of each colour of the document: the policy allows no style of an element."""
    blocks = (block for section in document.sections for block in section.blocks)
    found = [document.colour] if document.colour else []
    found += [each for block in blocks if isinstance(block, Table) for each in block.colours]
    return {each: f"chip{number}" for number, each in enumerate(dict.fromkeys(found))}


def _rules(colours: Mapping[str, str]) -> str:
    pairs = ((name, each) for each, name in colours.items() if _COLOUR.fullmatch(each))
    return "".join(f".{name} {{ background: {colour}; }}\n" for name, colour in pairs)


def _chip(colour: str, colours: Mapping[str, str]) -> str:
    return f'<span class="chip {colours[colour]}"></span>'
