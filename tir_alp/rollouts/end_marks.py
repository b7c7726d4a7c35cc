"""Tells marks, such as `<|im_end|>`, from ordinary text among the tokens of a tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_TAG = re.compile(r"</?([^<>/\s]+)/?>")
# Some tokenizers have tokens for these, so that a web page takes fewer tokens.
_HTML = re.compile(
    "a|abbr|b|blockquote|body|br|caption|code|col|dd|del|div|dl|dt|em|figure|footer|form|h[1-6r]|"
    "head|header|html|i|img|input|ins|kbd|label|li|main|mark|nav|ol|option|p|pre|q|samp|script|"
    "section|select|small|span|strong|style|sub|summary|sup|table|tbody|td|textarea|tfoot|th|thead|"
    "title|tr|tt|u|ul|var|video"
)


def structure_marks(tokenizer: Any) -> Mapping[int, str]:
    """Return the marks that text from outside must not become, with their text.

    These are the tokenizer's special tokens and, of the other tokens that were added to its
    vocabulary, those that the chat template names and those that look like a tag: Qwen's `<think>`
    and `<tool_call>`, say. Words, elements of HTML and runs of spaces may be added as text, which a
    model has read in text and goes on reading there.
    """
    template = str(tokenizer.chat_template or "")
    added = {each: token.content for each, token in tokenizer.added_tokens_decoder.items()}
    special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    named = {
        each: text
        for each, text in added.items()
        if text.strip() and (tokenizer.added_tokens_decoder[each].special or text in template)
    }
    tags = {each: text for each, text in added.items() if _is_tag(text)}
    found = special | named | tags
    found.pop(tokenizer.unk_token_id, None)  # any text may have characters that are unknown
    return found


def _is_tag(text: str) -> bool:
    tag = _TAG.fullmatch(text.strip())
    return tag is not None and not _HTML.fullmatch(tag.group(1).lower())


def is_mark(tokenizer: Any, token_id: int) -> bool:
    """Return whether a token is a mark of a conversation's form, and not text that a model writes.

    Marks are the tokenizer's special tokens and those that were added to its vocabulary. Some
    tokenizers also add runs of spaces or line ends; these are text.
    """
    added = tokenizer.added_tokens_decoder.get(token_id)
    if added is not None and not added.content.strip():
        return False
    return added is not None or token_id in tokenizer.all_special_ids


def end_mark(tokenizer: Any, frame: Sequence[int], section_end: Sequence[int] = ()) -> int | None:
    """Return the index of the mark that ends a turn, in what follows the turn's content.

    It is the first token that is not white space, if that is a mark; None if it is text.

    Args:
        tokenizer: The tokenizer.
        frame: The tokens after the content.
        section_end: Tokens of a mark that may stand before that of the turn.
    """
    size = len(section_end)
    skipped = 0
    if size and (where := _find(frame, section_end)) is not None:
        skipped = where + size
    for index, token_id in enumerate(frame[skipped:], start=skipped):
        if is_mark(tokenizer, token_id):
            return index
        if tokenizer.decode([token_id]).strip():
            return None
    return None


def _find(ids: Sequence[int], part: Sequence[int]) -> int | None:
    sizes = range(len(ids) - len(part) + 1)
    return next((i for i in sizes if tuple(ids[i : i + len(part)]) == tuple(part)), None)


def ordinary_tokens(tokenizer: Any, token_ids: Iterable[int]) -> dict[int, str]:
    """Return those of some tokens that are ordinary text, with that text."""
    return {
        each: tokenizer.decode([each]) for each in sorted(token_ids) if not is_mark(tokenizer, each)
    }
