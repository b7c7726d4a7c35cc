"""Tells marks, such as `<|im_end|>`, from ordinary text among the tokens of a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def is_mark(tokenizer: Any, token_id: int) -> bool:
    """Return whether a token is a mark of a conversation's form, and not text that a model writes.

    Marks are the tokenizer's special tokens and those that were added to its vocabulary. Some
    tokenizers also add runs of spaces or line ends; these are text.
    """
    added = tokenizer.added_tokens_decoder.get(token_id)
    if added is not None and not added.content.strip():
        return False
    return added is not None or token_id in tokenizer.all_special_ids


def end_mark(tokenizer: Any, frame: Sequence[int]) -> int | None:
    """Return the index of the mark that ends a turn, in what follows the turn's content.

    It is the first token that is not white space, if that is a mark; None if it is text.
    """
    for index, token_id in enumerate(frame):
        if is_mark(tokenizer, token_id):
            return index
        if tokenizer.decode([token_id]).strip():
            return None
    return None


def ordinary_tokens(tokenizer: Any, token_ids: Iterable[int]) -> dict[int, str]:
    """Return those of some tokens that are ordinary text, with that text."""
    return {
        each: tokenizer.decode([each]) for each in sorted(token_ids) if not is_mark(tokenizer, each)
    }
