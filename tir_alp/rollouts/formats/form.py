"""What a form of calls is: its marks, and how the text between them is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tir_alp.tools.calls import BadCall, ToolCall

_CONSTANTS = {"True": True, "False": False, "None": None}


@dataclass(frozen=True, slots=True)
class ReadCall:
    """A call as it was read from a model's text."""

    call: ToolCall | BadCall
    name: str = ""
    """The name of the tool, as the model wrote it."""
    call_id: str = ""
    """The id of the call, as the model wrote it; empty if it wrote none."""


@dataclass(frozen=True, slots=True)
class ParameterTypes:
    """Which parameters of the tools are texts, for forms that do not tell texts from numbers."""

    texts: frozenset[tuple[str, str]] = frozenset()
    """Names of a tool and of a parameter that may be a text."""
    known: frozenset[tuple[str, str]] = frozenset()
    """Names of all tools and their parameters."""

    @classmethod
    def of(cls, tools: Sequence[Mapping[str, Any]]) -> ParameterTypes:
        """Read the JSON schemas of tools."""
        functions = [each.get("function", each) for each in tools]
        schemas = {
            (str(function.get("name")), str(name)): schema
            for function in functions
            for name, schema in ((function.get("parameters") or {}).get("properties") or {}).items()
        }
        texts = frozenset(each for each, schema in schemas.items() if _may_be_text(schema))
        return cls(texts, frozenset(schemas))

    def value(self, tool: str, parameter: str, text: str) -> Any:
        """Return the value that a text stands for: itself, if a text is wanted or it is no JSON."""
        if (tool, parameter) in self.texts or (tool, parameter) not in self.known:
            return text
        if text.strip() in _CONSTANTS:
            return _CONSTANTS[text.strip()]
        try:
            return json.loads(text, strict=False)
        except (ValueError, RecursionError):
            return text


Reader = Callable[[str, ParameterTypes], tuple[ReadCall, ...]]
"""Reads the text between the marks; returns no call if it turns out to be none. Never raises."""


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a family of models writes calls.

    Example, for Kimi K2, whose calls stand in a section of their own:

        CallForm("kimi", "<|tool_call_begin|>", "<|tool_call_end|>", read_kimi,
                 section_end="<|tool_calls_section_end|>")
    """

    name: str
    opening: str
    """The mark before a call; empty if a message with a call begins with the call."""
    closing: str
    """The mark after a call; empty if the call ends with its last bracket."""
    read: Reader
    body_mark: str = ""
    """The mark inside a call after which its brackets are counted; empty: from its beginning."""
    section_end: str = ""
    """The mark after the last call of a turn; empty if there is none."""
    section_start: str = ""
    """The mark before the first call of a turn; empty if there is none."""
    ends_turn: bool = False
    """Whether the closing mark is a token that ends the turn."""
    inner_marks: tuple[str, ...] = ()
    """Marks inside a call."""
    starts: str = ""
    """Characters with which a call begins if there is no opening mark."""
    is_in_history: bool = True
    """Whether the template writes calls of earlier turns."""
    one_per_turn: bool = False
    """Whether a turn can contain only one call."""

    @property
    def ends(self) -> Literal["mark", "brackets"]:
        """How the end of a call is found."""
        return "mark" if self.closing else "brackets"

    @property
    def all_marks(self) -> tuple[str, ...]:
        """All marks of the form, the longest first."""
        marks = {self.opening, self.closing, self.body_mark, self.section_start, self.section_end}
        return tuple(sorted((marks | {*self.inner_marks}) - {""}, key=len, reverse=True))


def bad(error: str, name: str = "") -> tuple[ReadCall, ...]:
    """Return a call that cannot be read."""
    return (ReadCall(BadCall(error), name),)


def _may_be_text(schema: Any) -> bool:
    if not isinstance(schema, Mapping):
        return True
    kinds = schema.get("type")
    if isinstance(kinds, str | list):
        return kinds == "string" or (isinstance(kinds, list) and "string" in kinds)
    if isinstance(values := schema.get("enum"), list):
        return any(isinstance(each, str) for each in values)
    named = (schema.get("anyOf"), schema.get("oneOf"))
    choices = [each for listed in named if isinstance(listed, list) for each in listed]
    return any(map(_may_be_text, choices)) if choices else True
