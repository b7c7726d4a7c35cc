"""What a report says, before it is written as HTML or as Markdown: both say the same. Pure data.

All text is plain: it may hold anything that a model wrote, and who writes a document escapes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["good", "bad", "neutral", "unknown"]
LEVELS: Mapping[Level, str] = {
    "good": "good",
    "bad": "look",
    "neutral": "",
    "unknown": "too little data",
}
"""What a reader sees before a finding."""
ABOUT = {"learning": "Learning", "stability": "Stability", "attention": "To look at"}
"""What findings are about -> title, in order."""


@dataclass(frozen=True, slots=True)
class Words:
    """A paragraph."""

    text: str
    kind: Literal["plain", "note", "warning"] = "plain"


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence of a verdict, made from numbers."""

    about: Literal["learning", "stability", "attention"]
    level: Level
    """`neutral` is a fact that is neither; `unknown` means that there is too little data."""
    text: str


@dataclass(frozen=True, slots=True)
class Findings:
    """A list of findings."""

    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """A table of text."""

    heading: tuple[str, ...]
    """Title of each column; empty if the first column says what a row is."""
    rows: tuple[tuple[str, ...], ...]
    code: frozenset[int] = frozenset()
    """Columns that are names in the program's sense."""
    numbers: frozenset[int] = frozenset()
    """Columns that are aligned to the right."""
    colours: tuple[str, ...] = ()
    """Colour of each row, of which a sample is shown; empty for none."""


@dataclass(frozen=True, slots=True)
class Code:
    """Text whose line breaks count."""

    text: str


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture, and the curves that are drawn in its place where scripts run."""

    name: str
    title: str
    caption: str


@dataclass(frozen=True, slots=True)
class Said:
    """What an author wrote in an episode."""

    author: Literal["prompt", "model", "environment", "note"]
    text: str


@dataclass(frozen=True, slots=True)
class Episode:
    """A trajectory as text."""

    title: str
    facts: str
    said: tuple[Said, ...]


@dataclass(frozen=True, slots=True)
class Folded:
    """Blocks that are shown on demand."""

    summary: str
    blocks: tuple[Block, ...]


Block = Words | Findings | Table | Code | Figure | Episode | Folded


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a document, with an entry in its table of contents."""

    name: str
    """Its anchor."""
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """A report."""

    title: str
    colour: str
    """Colour of the method; empty if there are several."""
    headline: str
    """The verdict in one line."""
    verdict: Findings
    first: Figure | None
    """The figure that is seen first."""
    sections: tuple[Section, ...]

    @property
    def figures(self) -> Sequence[Figure]:
        """All figures, in order."""
        found = [] if self.first is None else [self.first]
        blocks = (block for section in self.sections for block in section.blocks)
        return [*found, *(block for block in blocks if isinstance(block, Figure))]
