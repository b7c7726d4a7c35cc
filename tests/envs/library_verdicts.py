"""Verdicts of other libraries on pairs of an answer and a truth, and those of the grader here.

`library_pairs/math_verify.jsonl` has the pairs of math-verify's public tests, with what these
expect; `hendrycks.jsonl` and `minerva.jsonl` have a pair for each rule by which the graders of
MATH and Minerva rewrite an answer. docs/grading_tests.md lists where the verdicts differ.
`python -m tests.envs.library_verdicts` prints these lines, without reasons for new ones.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tir_alp.envs.grading import grade
from tir_alp.envs.parsing import boxed_answer

DOCS = Path(__file__).parents[2] / "docs" / "grading_tests.md"
LIBRARIES = ("math_verify", "hendrycks", "minerva")
_PAIRS = Path(__file__).with_name("library_pairs")
_MAX_CHARS = 48
_VERDICTS = {True: "right", False: "wrong", None: "no verdict"}
_LINE = re.compile(r"\| (?P<pair>[a-z_]+-\d+) \|(?P<what>.*)\| (?P<reason>[^|]+) \|")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a library and the grader here say about one pair."""

    pair: str
    answer: str
    truth: str
    theirs: bool
    ours: bool | None

    def line(self, reason: str) -> str:
        """Return the line of the table."""
        cells = _cell(self.answer), _cell(self.truth), _VERDICTS[self.theirs], _VERDICTS[self.ours]
        return f"| {self.pair} | {' | '.join(cells)} | {reason} |"


@functools.cache
def verdicts(library: str) -> tuple[Verdict, ...]:
    """Grade the pairs of a library: what is boxed, or all of a text that has no box."""
    return tuple(_grade_pairs(library))


def _grade_pairs(library: str) -> Iterator[Verdict]:
    for line in (_PAIRS / f"{library}.jsonl").read_text().splitlines():
        row = json.loads(line)
        answer, truth = (
            text if (boxed := boxed_answer(text, "none")) is None else boxed
            for text in (row["answer"], row["truth"])
        )
        ours = grade(answer, truth).correct
        yield Verdict(row["id"], row["answer"], row["truth"], row["equal"], ours)


def documented() -> dict[str, str]:
    """Return the lines of the tables in the docs, by pair."""
    lines = DOCS.read_text().splitlines()
    return {match["pair"]: line for line in lines if (match := _LINE.fullmatch(line))}


def reason_of(line: str) -> str:
    """Return the reason that a line of a table gives."""
    match = _LINE.fullmatch(line)
    return match["reason"] if match else ""


def _cell(text: str) -> str:
    text = " ".join(text.replace("`", "'").split())
    if len(text) > _MAX_CHARS:
        text = f"{text[: _MAX_CHARS // 2].rstrip()} ... {text[-_MAX_CHARS // 2 :].lstrip()}"
    return "`{}`".format(text.replace("|", r"\|"))


def main() -> None:
    """Print a line for each difference."""
    known = documented() if DOCS.exists() else {}
    for library in LIBRARIES:
        print(f"\n{library}")
        for verdict in verdicts(library):
            if verdict.ours is not verdict.theirs:
                print(verdict.line(reason_of(known.get(verdict.pair, "")) or "?"))


if __name__ == "__main__":
    main()
