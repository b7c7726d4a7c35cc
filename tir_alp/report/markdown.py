"""A document -> Markdown that says the same as the page.

Text of models is in fenced blocks that it cannot end, and elsewhere what Markdown would read as
markup is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

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
    Table,
    Words,
)

_MARKUP = re.compile(r"([\\`*\[\]<>|~$&]|(?<!\w)_|_(?!\w))")  # not within a word
_LISTED = re.compile(r"^(\d+(?=\.(?:\s|$))|(?=[-+=#]))")  # lists and headings


def text_of(document: Document) -> str:
    """Return the document as Markdown; pictures are those in `figures/`."""
    lines = [f"# {inline(document.title)}", "", inline(document.headline), ""]
    if document.first is not None:
        lines += _figure(document.first)
    lines += _findings(document.verdict)
    for section in document.sections:
        lines += [f"## {inline(section.title)}", ""]
        for block in section.blocks:
            lines += _block(block)
    return "\n".join(lines)


def table_text(table: Table) -> str:
    """Return a table as Markdown, one row per line."""
    heading = table.heading or ("", "")
    rows = [heading, *table.rows]
    lines = [" | ".join(map(inline, row)) for row in rows]
    lines.insert(1, " | ".join(["---"] * len(heading)))
    return "".join(f"| {line} |\n" for line in lines)


def inline(text: str) -> str:
    """Return text on one line, with an escape before whatever could be markup."""
    shown = _MARKUP.sub(r"\\\1", " ".join(visible(text).split()))
    return _LISTED.sub(r"\1\\", shown)


def _block(block: Block) -> Iterator[str]:
    match block:
        case Words():
            yield from (inline(block.text), "")
        case Findings():
            yield from _findings(block)
        case Table():
            yield table_text(block)
        case Code():
            yield from _fenced(block.text)
        case Figure():
            yield from _figure(block)
        case Episode():
            yield from _episode(block)
        case Folded():
            yield from (f"**{inline(block.summary)}**", "")
            for each in block.blocks:
                yield from _block(each)


def _findings(found: Findings) -> Iterator[str]:
    for about, title in ABOUT.items():
        items = [each for each in found.findings if each.about == about]
        if items:
            yield from (f"**{title}**", "")
            for each in items:
                level = f"{LEVELS[each.level]}: " if LEVELS[each.level] else ""
                yield f"- {level}{inline(each.text)}"
            yield ""


def _figure(figure: Figure) -> Iterator[str]:
    yield f"![{inline(figure.title)}](figures/{figure.name}.png)"
    yield from ("", inline(figure.caption), "")


def _episode(episode: Episode) -> Iterator[str]:
    yield from (f"### {inline(episode.title)}", "", inline(episode.facts), "")
    for said in episode.said:
        if said.author == "note":
            yield from (inline(said.text), "")
        else:
            yield from (f"{said.author}:", "", *_fenced(said.text))


def _fenced(text: str) -> Iterator[str]:
    shown = visible(text)
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence = "`" * max(3, longest + 1)
    yield from (f"{fence}text", *shown.split("\n"), fence, "")
