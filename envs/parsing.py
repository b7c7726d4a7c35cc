r"""What a model's turn holds: a tool call, an answer, or neither. Pure, and linear in the text.

One rule keeps scores honest: *an answer is `\boxed{...}` in the model's own prose*. A box inside a
code block or a tool call, complete or not, is program text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tir_alp.tools.boxed import extract_boxed
from tir_alp.tools.calls import BadCall, CallFormat, ToolCall, find_call, prose


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, as the model wrote it."""

    text: str


def boxed_answer(text: str, call_format: CallFormat = "fenced") -> str | None:
    """Return the content of the last box in the prose of a text, or None."""
    boxed = [box for box in map(extract_boxed, prose(text, call_format)) if box is not None]
    return boxed[-1] if boxed else None


def parse_action(
    text: str,
    call_format: CallFormat = "fenced",
    answer_in: Callable[[str], str | None] | None = None,
) -> ToolCall | BadCall | Answer | None:
    """Read one turn of a model: its first call, else its answer, else None (a void turn).

    A call takes precedence over every answer, even one that follows it: in training a completion
    stops where the call ends, so whatever follows was written without seeing the tool's output.

    Args:
        text: What the model wrote.
        call_format: How calls are written.
        answer_in: Finds the answer in a text without a call; None: the last box in its prose.
    """
    call = find_call(text, call_format)
    if call is not None:
        return call
    answer = boxed_answer(text, call_format) if answer_in is None else answer_in(text)
    return None if answer is None else Answer(answer)
