"""Where code is in a text, and of which kind its words are; for colours."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pygments.lexer import Lexer
from pygments.lexers.data import JsonLexer
from pygments.lexers.python import PythonLexer
from pygments.token import Comment, Keyword, Name, Number, Operator, String, _TokenType

_BLOCK = re.compile(r"```(?:python|py|tool)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_CLASSES: tuple[tuple[_TokenType, str], ...] = (
    (Comment, "comment"),
    (String, "string"),
    (Number, "number"),
    (Keyword, "keyword"),
    (Name.Builtin, "builtin"),
    (Name.Function, "function"),
    (Operator.Word, "keyword"),
)
MOST_CHARS = 100_000
"""Longer code is not coloured."""


def code_ranges(text: str) -> list[tuple[int, int, str]]:
    """Return the coloured words of the code in a text: start, stop and kind, in order.

    Code is what stands in fences, and calls in JSON between `<tool_call>` marks. A kind is
    `comment`, `string`, `number`, `keyword`, `builtin` or `function`; `code` covers a whole block.

    Args:
        text: What the policy wrote.
    """
    found: list[tuple[int, int, str]] = []
    for form, lexer in ((_BLOCK, PythonLexer()), (_CALL, JsonLexer())):
        for block in form.finditer(text):
            start, stop = block.span(1)
            if stop - start <= MOST_CHARS:
                found += _words(text[start:stop], start, lexer)
    return sorted(found)


def _words(code: str, start: int, lexer: Lexer) -> Iterator[tuple[int, int, str]]:
    for at, kind, value in lexer.get_tokens_unprocessed(code):
        name = next((name for above, name in _CLASSES if kind in above), "")
        if name and value.strip():
            yield start + at, start + at + len(value), name
