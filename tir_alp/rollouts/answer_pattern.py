"""Cuts the answer out of a longer text by a regular expression that is fast on any text.

Every repetition is bounded and no group is repeated, so that the time of a search is linear in the
length of the text.
"""

from __future__ import annotations

import functools
import re

PRESETS = {"gsm8k": r"#### ?([^\n]+)"}
"""Patterns by name."""
_MOST = {0: 0, 1: 200, 2: 40}  # characters that a repetition takes, by their number
_MAX_CHARS = 100_000  # from the end of the text
_PIECE = re.compile(
    r"\\(?P<escaped>.)|(?P<set>\[\^?\]?(?:\\.|[^\]\\])*\])|(?P<group>\((?:\?[^)]?)?)|(?P<close>\))"
    r"|(?P<repeat>\*|\+|\{(?P<low>\d+)(?P<comma>,?)(?P<high>\d*)\})|(?P<other>.)",
    re.DOTALL,
)
_GSM8K_END = re.compile(r"\n#### ?(-?\$?[0-9][0-9,.]*)\s*\Z")


@functools.lru_cache(maxsize=32)
def compile_pattern(name: str) -> re.Pattern[str]:
    """Compile a preset's name or a regular expression with one group, which is the answer.

    Raises:
        ValueError: The expression is no expression, has no group or several, or could be slow.
    """
    pattern = PRESETS.get(name, name)
    try:
        bounded = re.compile(_bounded(pattern))
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"data.answer_pattern {name!r} is no regular expression: {error}"
        ) from None
    if bounded.groups != 1:
        raise ValueError(
            f"data.answer_pattern {name!r} has {bounded.groups} groups; it needs one, around the "
            f"answer, as in {PRESETS['gsm8k']!r}"
        )
    return bounded


def cut_answer(text: str, name: str) -> str | None:
    """Return the group of a pattern's last match in a text, stripped; None without a match."""
    matches = list(compile_pattern(name).finditer(text[-_MAX_CHARS:]))
    return (matches[-1][1] or "").strip() if matches else None


def gsm8k_answer(text: str) -> str | None:
    """Return the number on a last line `#### 72`, with which GSM8K's answers end, or None."""
    start = text.rfind("\n####")
    match = _GSM8K_END.match(text, start) if start >= 0 else None
    return match[1] if match else None


def _bounded(pattern: str) -> str:
    """Bound every repetition; raise `ValueError` for what could make a search slow."""
    pieces, before = [], ""
    found = list(_PIECE.finditer(pattern))
    repetitions = sum(1 for piece in found if piece["repeat"])
    if repetitions not in _MOST:
        raise ValueError(
            f"data.answer_pattern {pattern!r} has {repetitions} repetitions; at most "
            f"{max(_MOST)} keep it fast"
        )
    most = _MOST[repetitions]
    for piece in found:
        text = piece[0]
        if (piece["escaped"] or "").isdigit():
            raise ValueError(
                f"data.answer_pattern {pattern!r} refers to a group, which can be slow"
            )
        if piece["group"] not in (None, "(", "(?:"):
            raise ValueError(
                f"data.answer_pattern {pattern!r} has a group other than (...) and (?:...)"
            )
        if piece["repeat"]:
            if before == ")":
                raise ValueError(f"data.answer_pattern {pattern!r} repeats a group: it can be slow")
            low = int(piece["low"] or text == "+")
            high = int(piece["high"] or (low if piece["low"] and not piece["comma"] else most))
            text = f"{{{min(low, most)},{min(high, most)}}}"
        before = piece[0]
        pieces.append(text)
    return "".join(pieces)
